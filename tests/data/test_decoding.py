"""decoding.py: every kind of file becomes the RGB picture it shows, and what is damaged is listed once."""

import io
import logging
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from hf_deit.data import decoding as decoding_module
from hf_deit.data.decoding import BadImages, DamagedImage, Part, decode_image, storable_path


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pillow(encoded):
    """The reference: what Pillow makes of the bytes."""
    with Image.open(io.BytesIO(encoded["bytes"])) as image:
        return np.asarray(image.convert("RGB"))


def photograph(height=53, width=78, seed=0):
    """Soft shapes with some noise: every coefficient of a JPEG is in use."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def claiming(height, width, jpeg):
    """The JPEG with another size in its frame header."""
    start = jpeg.index(b"\xff\xc0")
    return jpeg[: start + 5] + struct.pack(">HH", height, width) + jpeg[start + 9 :]


def png_claiming(height, width):
    """A PNG whose header is all there is."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 999))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def gradient():
    """A colour picture that no mode can confuse with another."""
    y, x = np.mgrid[:24, :32]
    return np.stack([x * 8, y * 10, 255 - x * 4 - y * 4], axis=-1).astype(np.uint8)


def test_rgb_is_exact(gradient):
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(gradient))), gradient)


def test_grey_becomes_three_equal_channels(gradient):
    decoded = decode_image(encoded(Image.fromarray(gradient[..., 0])))
    np.testing.assert_array_equal(decoded, np.repeat(gradient[..., :1], 3, axis=2))


def test_alpha_is_dropped(gradient):
    alpha = np.full_like(gradient[..., :1], 77)
    decoded = decode_image(encoded(Image.fromarray(np.concatenate([gradient, alpha], axis=2))))
    np.testing.assert_array_equal(decoded, gradient)


def test_grey_with_alpha_is_grey(gradient):
    image = Image.fromarray(gradient[..., 0]).convert("LA")
    np.testing.assert_array_equal(decode_image(encoded(image)), np.repeat(gradient[..., :1], 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 3])
def test_palette_colours_are_looked_up(gradient, transparency):
    image = Image.fromarray(gradient).quantize(64)
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(encoded(image, **options))
    np.testing.assert_array_equal(
        decoded, np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)[np.asarray(image)]
    )


def test_cmyk_jpeg_has_its_colours(gradient):
    decoded = decode_image(encoded(Image.fromarray(gradient).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - gradient).mean() < 6  # an inverted reading is off by 100


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(decoded[..., 0], values // 256)
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_one_bit_images_are_black_and_white(gradient):
    decoded = decode_image(encoded(Image.fromarray(gradient[..., 0] > 100)))
    assert set(np.unique(decoded)) == {0, 255}


def test_images_stand_upright(gradient):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    decoded = decode_image(encoded(Image.fromarray(gradient), "PNG", exif=exif))
    np.testing.assert_array_equal(decoded, np.rot90(gradient, -1))


def test_broken_exif_does_not_matter(gradient):
    decoded = decode_image(encoded(Image.fromarray(gradient), "PNG", exif=b"Exif\0\0 this is no TIFF header"))
    np.testing.assert_array_equal(decoded, gradient)


# JPEG: the fast path

JPEG_KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "coarse": {"quality": 5},
    "with restart markers": {"restart_marker_blocks": 2},
    "optimised tables": {"optimize": True},
    "RGB, not YCbCr": {"keep_rgb": True},
    "ICC profile and comment": {"icc_profile": b"p" * 70_000, "comment": b"\xff\xd9 \xff\xc0"},
}


@pytest.fixture
def without_pillow(monkeypatch):
    """So that what decodes has taken the fast path."""
    monkeypatch.delattr(decoding_module, "_decode_with_pillow")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (53, 78)])
@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS)
def test_a_jpeg_has_exactly_pillows_pixels(mode, size, options, without_pillow):
    jpeg = encoded(photograph(*size).convert(mode), "JPEG", **options)
    sizes = []
    pixels = decode_image(jpeg, lambda height, width: sizes.append((height, width)) or Part())
    np.testing.assert_array_equal(pixels, pillow(jpeg))
    assert sizes == [size] and pixels.flags.writeable


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 96), (53, 78), (9, 8), (3, 1)])
def test_a_reduced_jpeg_has_libjpegs_pixels(reduction, size, without_pillow):
    jpeg = encoded(photograph(*size), "JPEG")
    pixels = decode_image(jpeg, lambda height, width: Part(reduction))
    height, width = (-(-side // reduction) for side in size)
    assert pixels.shape == (height, width, 3)
    with Image.open(io.BytesIO(jpeg["bytes"])) as image:
        image.draft("RGB", (max(1, size[1] // reduction), max(1, size[0] // reduction)))
        if image.size == (width, height):  # Pillow chooses a scale by itself
            np.testing.assert_array_equal(pixels, np.asarray(image))
        else:
            assert size == (3, 1)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "CMYK"])
def test_what_no_decoder_reduces_is_reduced_afterwards(format):
    image = photograph().convert("CMYK") if format == "CMYK" else photograph()
    file = encoded(image, "JPEG" if format == "CMYK" else format)
    expected = np.asarray(Image.fromarray(pillow(file)).reduce(4))
    np.testing.assert_array_equal(decode_image(file, lambda height, width: Part(4)), expected)


def test_bytes_after_the_end_do_not_matter(without_pillow):
    padded = {"bytes": encoded(photograph(), "JPEG")["bytes"] + bytes(1000), "path": None}
    assert decode_image(padded, lambda height, width: Part(4)).shape == (14, 20, 3)


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS)
def test_the_upper_rows_are_those_of_the_whole_image(options, reduction, without_pillow):
    file = encoded(photograph(200, 90), "JPEG", **options)
    whole = decode_image(file, lambda height, width: Part(reduction))
    for rows in (1, 15, 16, 17, 33, 80, 100):
        upper = decode_image(file, lambda height, width, rows=rows: Part(reduction, rows))
        assert len(upper) < len(whole) or len(whole) - rows < 48 or options.get("progressive")
        np.testing.assert_array_equal(upper[:rows], whole[:rows])


def test_the_upper_rows_of_photographs_are_exact(shared_data):
    table = pytest.importorskip("pyarrow.parquet").read_table(shared_data / "imagenet_sample" / "validation.parquet")
    rng = random.Random(0)
    for image in table["image"].to_pylist():
        whole = decode_image(image)
        rows = rng.randint(1, len(whole))
        np.testing.assert_array_equal(decode_image(image, lambda *_, rows=rows: Part(1, rows))[:rows], whole[:rows])


def test_damage_below_the_rows_that_are_needed_is_damage():
    """Whether an image is damaged does not depend on what is shown of it."""
    jpeg = encoded(photograph(200, 90), "JPEG")["bytes"]
    marked = bytearray(jpeg)
    marked[-300:-298] = b"\xff\x05"
    for data in (jpeg[:-500], jpeg[:-500] + bytes(500), bytes(marked)):
        with pytest.raises(DamagedImage):
            decode_image({"bytes": data, "path": None}, lambda height, width: Part(1, 10))


def test_a_path_is_read(tmp_path):
    photograph().save(tmp_path / "a.jpg")
    by_path = {"bytes": None, "path": str(tmp_path / "a.jpg")}
    np.testing.assert_array_equal(decode_image(by_path), pillow({"bytes": (tmp_path / "a.jpg").read_bytes()}))


def test_photographs_are_exact(shared_data):
    table = pytest.importorskip("pyarrow.parquet").read_table(shared_data / "imagenet_sample" / "validation.parquet")
    for image in table["image"].to_pylist()[:60]:
        np.testing.assert_array_equal(decode_image(image), pillow(image))


# Orientation


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encoded(photograph(), format, exif=exif)
    with Image.open(io.BytesIO(turned["bytes"])) as reference:
        expected = np.asarray(ImageOps.exif_transpose(reference))
    np.testing.assert_array_equal(decode_image(turned), expected)
    if format == "JPEG":
        height, width = expected.shape[:2]
        half = decode_image(turned, lambda *size: Part(2))
        assert half.shape == (-(-height // 2), -(-width // 2), 3)
        # the same corner up, whatever the scale
        coarse = Image.fromarray(expected).resize(half.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(half.astype(int) - np.asarray(coarse)).mean() < 10


@pytest.mark.parametrize("exif", [b"Exif\0\0 this is no TIFF header", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_in_a_jpeg_does_not_matter(exif):
    jpeg = encoded(photograph(), "JPEG", exif=exif)
    decoded = decode_image(jpeg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(decoded, pillow(jpeg))


def with_thumbnail(jpeg, thumbnail):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:]


def test_a_thumbnail_is_not_the_image():
    jpeg, thumbnail = (encoded(photograph(*size), "JPEG")["bytes"] for size in ((53, 78), (16, 16)))
    whole = with_thumbnail(jpeg, thumbnail)
    assert decode_image({"bytes": whole, "path": None}).shape == (53, 78, 3)
    with pytest.raises(DamagedImage, match="truncated"):  # the thumbnail's end is not the image's
        decode_image({"bytes": whole[:-400], "path": None})


# Damage


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_jpeg_cut_anywhere_is_damaged(options):
    jpeg = encoded(photograph(), "JPEG", **options)["bytes"]
    for length in range(1, len(jpeg) - 1, 37):
        with pytest.raises(DamagedImage):
            decode_image({"bytes": jpeg[:length], "path": None})
        with pytest.raises(DamagedImage):  # a disk that was full: zeros up to the right size
            decode_image({"bytes": jpeg[:length] + bytes(len(jpeg) - length), "path": None})


def test_a_wrong_marker_among_the_pixels_is_damage():
    """Some decoders fill the rest with grey and say nothing."""
    jpeg = bytearray(encoded(photograph(), "JPEG")["bytes"])
    jpeg[-300:-298] = b"\xff\x05"
    with pytest.raises(OSError, match="broken data stream"):
        pillow({"bytes": bytes(jpeg)})
    with pytest.raises(DamagedImage, match="broken data stream"):
        decode_image({"bytes": bytes(jpeg), "path": None})


@pytest.mark.parametrize("format", ["JPEG", "progressive JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_what_pillow_refuses_is_damaged_and_nothing_else_is_raised(format):
    original = encoded(photograph(), format.split()[-1], progressive="progressive" in format)["bytes"]
    rng = random.Random(format)
    refused = 0
    for _ in range(150):
        data = bytearray(original)
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.choice((0, 0xFF, rng.randrange(256)))
        file = {"bytes": bytes(data), "path": None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = pillow(file)
            except Exception:
                expected = None
                refused += 1
        try:
            pixels = decode_image(file)
        except DamagedImage as damage:
            assert expected is None, f"Pillow reads it, we say: {damage}"
        else:
            assert expected is not None, "Pillow refuses it"
            np.testing.assert_array_equal(pixels, expected)
            np.testing.assert_array_equal(decode_image(file, lambda *_: Part(1, 20))[:20], expected[:20])
    assert refused or format == "BMP"  # which has nothing that could be wrong


BOMBS = {
    "PNG": lambda: png_claiming(30_000, 30_000),
    "JPEG": lambda: claiming(30_000, 30_000, encoded(photograph(), "JPEG")["bytes"]),
}
DAMAGED = {
    "empty": ({"bytes": b"", "path": None}, "empty: 0 bytes"),
    "text": ({"bytes": b"<html>404</html>", "path": None}, "holds no image that Pillow can identify"),
    "no file": ({"bytes": None, "path": "/nowhere/a.jpg"}, "cannot be read: No such file"),
    "a directory": ({"bytes": None, "path": "/"}, "cannot be read: Is a directory"),
    "no bytes and no path": ({"bytes": None, "path": None}, "neither bytes nor a path"),
    "no value": (None, "neither bytes nor a path"),
    "12 bits": (lambda: encoded(photograph(), "JPEG")["bytes"].replace(b"\x11\x08\0\x35", b"\x11\x0c\0\x35"), ".+"),
    "no height": (lambda: claiming(0, 78, encoded(photograph(), "JPEG")["bytes"]), ".+"),
    **{f"{kind} bomb": (bomb, "exceeds limit") for kind, bomb in BOMBS.items()},
}


@pytest.mark.parametrize("file, reason", DAMAGED.values(), ids=DAMAGED)
def test_damage_has_a_short_reason(file, reason):
    with pytest.raises(DamagedImage, match=reason) as damage:
        decode_image({"bytes": file(), "path": None} if callable(file) else file)
    assert len(str(damage.value)) < 150


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pillows_limit_is_ours(format, monkeypatch):
    """Up to twice the limit Pillow merely warns; we do not, once per image."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode_image(encoded(photograph(14, 14), format)).shape == (14, 14, 3)
    assert not caught
    with pytest.raises(DamagedImage, match="exceeds limit"):
        decode_image(encoded(photograph(15, 15), format))


def test_a_lack_of_memory_is_not_damage(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode_image(encoded(photograph(), "PNG"))


# Modes


def tiff(pixels, photometric, bits, samples=1, sample_format=1, order="<", extra=()):
    """A TIFF of 24 x 32 pixels written by hand: one strip of `pixels`, which are bytes."""
    tags = {256: [32], 257: [24], 258: [bits] * samples, 259: [1], 262: [photometric], 273: [0], 277: [samples]}
    tags |= {278: [24], 279: [len(pixels)], 339: [sample_format] * samples}
    if extra:
        tags[338] = list(extra)
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [start + sum(2 * len(values) for values in tags.values() if len(values) > 2)]
    longer, entries = b"", b""
    for tag, values in sorted(tags.items()):
        if len(values) > 2:
            entries += struct.pack(f"{order}HHII", tag, 3, len(values), start + len(longer))
            longer += struct.pack(f"{order}{len(values)}H", *values)
        elif tag in (273, 279):
            entries += struct.pack(f"{order}HHII", tag, 4, 1, values[0])
        else:
            entries += struct.pack(f"{order}HHI2H", tag, 3, len(values), *[*values, 0][:2])
    kind = {"<": b"II", ">": b"MM"}[order]
    head = kind + struct.pack(f"{order}HI", 42, 8) + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return {"bytes": head + longer + pixels, "path": None}


RAMP = (np.arange(24 * 32, dtype=np.uint32) * 85).reshape(24, 32).astype(np.uint16)  # 0 ... 65195


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bits_of_either_byte_order_keep_the_upper_eight(order):
    decoded = decode_image(tiff(RAMP.astype(f"{order}u2").tobytes(), 1, 16, order=order))
    np.testing.assert_array_equal(decoded, np.repeat((RAMP // 256)[..., None], 3, axis=2))


def test_sixteen_bits_whose_zero_is_white_are_inverted():
    decoded = decode_image(tiff(RAMP.astype("<u2").tobytes(), 0, 16))
    np.testing.assert_array_equal(decoded[..., 1], (65535 - RAMP.astype(int)) // 256)


def test_twelve_bits_fill_the_range():
    values = (RAMP // 16).reshape(-1, 2).astype(np.uint32)  # 0 ... 4074, two in three bytes
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], axis=1)
    decoded = decode_image(tiff(packed.astype(np.uint8).tobytes(), 1, 12))
    np.testing.assert_array_equal(decoded[..., 2], RAMP // 256)


def test_a_pgm_of_sixteen_bits_is_scaled():
    data = b"P5 32 24 65535\n" + RAMP.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image({"bytes": data, "path": None})[..., 0], RAMP // 256)


@pytest.mark.parametrize(
    "type, bits, format, mode, order",
    [
        *(("f4", 32, 3, "F", order) for order in "<>"),
        *(("i4", 32, 2, "I", order) for order in "<>"),
        *(("i2", 16, 2, "I", order) for order in "<>"),
        ("u4", 32, 1, "I", "<"),
    ],
)
def test_a_mode_without_a_known_range_is_damage_and_named(type, bits, format, mode, order):
    file = tiff(RAMP.astype(order + type).tobytes(), 1, bits, sample_format=format, order=order)
    with pytest.raises(DamagedImage, match=f"^mode {mode} has no known range; convert to 8 or 16 bit$"):
        decode_image(file)


def test_a_float_map_has_no_known_range():
    data = b"Pf\n32 24\n-1.0\n" + (RAMP / 65535).astype("<f4").tobytes()
    with pytest.raises(DamagedImage, match="mode F has no known range"):
        decode_image({"bytes": data, "path": None})


def test_ycbcr_has_its_colours(gradient):
    """Against the equations of JFIF."""
    y, cb, cr = np.moveaxis(gradient.astype(float), -1, 0)
    expected = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], axis=-1
    ).clip(0, 255)
    decoded = decode_image(tiff(gradient.tobytes(), 6, 8, samples=3))
    assert np.abs(decoded - expected).max() <= 2


def test_lab_has_its_colours():
    """Against the equations of CIE L*a*b* at D50, to sRGB."""
    y, x = np.mgrid[:24, :32]
    stored = np.stack([np.rint((40 + 2 * y) * 2.55), x - 16, y - 12], axis=-1).astype(int)  # soft colours
    fy = (stored[..., 0] / 2.55 + 16) / 116
    f = np.stack([fy + stored[..., 1] / 500, fy, fy - stored[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    # sRGB's primaries, adapted to D50
    to_xyz = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    linear = (xyz @ np.linalg.inv(to_xyz).T).clip(0, 1)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    decoded = decode_image(tiff((stored & 255).astype(np.uint8).tobytes(), 8, 8, samples=3))
    assert np.abs(decoded - expected).max() <= 3


def test_cmyk_and_alpha_of_a_tiff(gradient):
    inks = np.concatenate([gradient, gradient[..., :1] // 2], axis=-1)
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    assert np.abs(decode_image(tiff(inks.tobytes(), 5, 8, samples=4)) - expected).max() <= 1
    np.testing.assert_array_equal(decode_image(tiff(inks.tobytes(), 2, 8, samples=4, extra=[2])), gradient)
    grey = np.ascontiguousarray(inks[..., [0, 3]])
    decoded = decode_image(tiff(grey.tobytes(), 1, 8, samples=2, extra=[2]))
    np.testing.assert_array_equal(decoded, np.repeat(gradient[..., :1], 3, axis=2))


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    for path in (str(tmp_path / "a.jpg"), "/dev/zero"):
        with pytest.raises(DamagedImage, match="is no regular file"):
            decode_image({"bytes": None, "path": path})
    with pytest.raises(DamagedImage, match="cannot be read"):
        decode_image({"bytes": None, "path": "a\0b"})


def test_a_path_that_is_not_utf8_is_stored_and_read(tmp_path):
    for name in (b"caf\xe9 100%41.png", b"\xff#?[*].png"):
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        photograph().save(path)
        stored = storable_path(path)
        assert stored.encode() and stored != path
        np.testing.assert_array_equal(decode_image({"bytes": None, "path": stored}), np.asarray(photograph()))
    assert storable_path("/a/café%20.png") == "/a/café%20.png"


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded():
    photo = encoded(Image.new("RGB", (6000, 4000)), "JPEG", progressive=True)["bytes"]
    assert decode_image({"bytes": photo, "path": None}).shape == (4000, 6000, 3)
    scan = photo.rindex(b"\xff\xda")
    with pytest.raises(DamagedImage, match="a JPEG of 24,000,000 pixels in .* scans, which would take minutes"):
        decode_image({"bytes": photo[:scan] + photo[scan:-2] * 400 + photo[-2:], "path": None})


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "I;16"])
def test_an_image_that_is_converted_in_strips_is_the_whole_image(mode, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode == "P":
        image = image.quantize(16)
        image.info["transparency"] = bytes(range(16))
    else:
        image = image.convert(mode)
    file = encoded(image, "PNG" if mode != "CMYK" else "TIFF")
    whole = decode_image(file)
    monkeypatch.setattr("hf_deit.data.decoding._STRIP", 7 * 30)
    np.testing.assert_array_equal(decode_image(file), whole)
    assert len(np.unique(whole)) > 4


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
def test_a_heic_photo_names_the_library_that_reads_it(brand, monkeypatch):
    monkeypatch.setattr("hf_deit.data.decoding.FORMATS", ("JPEG", "PNG"))
    with pytest.raises(
        DamagedImage, match=r"is a HEIC or HEIF image; install pillow-heif .pip install hf_deit.heif.."
    ):
        decode_image({"bytes": b"\0\0\0\x1cftyp" + brand + bytes(40), "path": None})


def test_a_heic_photo_is_read_with_pillow_heif():
    pytest.importorskip("pillow_heif")
    decoded = decode_image(encoded(Image.new("RGB", (32, 24), (200, 40, 10)), "HEIF"))
    assert decoded.shape == (24, 32, 3) and np.abs(decoded.astype(int) - (200, 40, 10)).max() <= 3


def test_a_file_of_too_many_bytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_deit.data.decoding.MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(bytes(101))
    for image in ({"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": bytes(101), "path": None}):
        with pytest.raises(DamagedImage, match=r"is larger than 100 bytes \(101\)"):
            decode_image(image)


# --- the list of damaged images ------------------------------------------------------------------------------------


def lines(directory):
    return (directory / "_bad_images.txt").read_text().splitlines()


def test_each_image_is_listed_once(tmp_path):
    ledger = BadImages(tmp_path / "new", 1000, 0.01)
    assert len(ledger) == 0 and not (tmp_path / "new").exists()
    ledger.record([(7, "a/7.jpg", "empty: 0 bytes"), (9, None, "no image"), (7, "a/7.jpg", "empty: 0 bytes")])
    ledger.record([(9, None, "no image")])
    assert lines(tmp_path / "new") == ["index\tpath\treason", "7\ta/7.jpg\tempty: 0 bytes", "9\t\tno image"]
    assert len(ledger) == 2


def test_ranks_and_resumed_runs_share_the_list(tmp_path):
    first, second = (BadImages(tmp_path, 1000, 0.01) for _ in range(2))
    first.record([(1, None, "x")])
    second.record([(2, None, "x")])
    first.record([(2, None, "x"), (3, None, "x")])
    BadImages(tmp_path, 1000, 0.01).record([(3, None, "x"), (4, None, "x")])
    assert [line.split("\t")[0] for line in lines(tmp_path)] == ["index", "1", "2", "3", "4"]
    assert len(first) == len(second) == 4


def test_a_line_is_a_line(tmp_path):
    ledger = BadImages(tmp_path, 10, 1)
    ledger.record([(1, "a\tb\nc\x85d\udcff", "two\r\nlines"), (2, None, "x")])
    assert len(BadImages(tmp_path, 10, 1)) == 2
    assert (tmp_path / "_bad_images.txt").read_text("utf-8").split("\n")[1].split("\t") == [
        "1",
        "a b c\\x85d\\udcff",
        "two lines",
    ]


def test_only_the_first_is_a_warning(tmp_path, caplog):
    ledger = BadImages(tmp_path, 10, 1)
    with caplog.at_level(logging.WARNING, "hf_deit.data.decoding"):
        ledger.record([(1, "a.jpg", "empty: 0 bytes"), (2, "b.jpg", "x")])
        ledger.record([(3, "c.jpg", "x")])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "number 1 (path a.jpg) is damaged: empty: 0 bytes" in warning and "bad_images.txt" in warning


@pytest.mark.parametrize("share, allowed", [(0.002, 2), (0, 0)])
def test_more_than_the_share_stops_the_run(tmp_path, share, allowed):
    ledger = BadImages(tmp_path, 1000, share)
    for index in range(allowed):
        ledger.record([(index, None, "x")])
    message = f"{allowed + 1} of 1000 training images .* max_bad_images = {share}.*bad_images.txt"
    with pytest.raises(ValueError, match=message):
        ledger.record([(allowed, None, "x")])
    with pytest.raises(ValueError, match=message):  # resumed with the same limit
        BadImages(tmp_path, 1000, share).record([(allowed, None, "x")])
    BadImages(tmp_path, 1000, 1).record([(allowed, None, "x")])


def test_a_new_run_forgets(tmp_path):
    ledger = BadImages(tmp_path, 10, 1)
    ledger.record([(1, None, "x")])
    ledger.forget()
    ledger.forget()
    assert len(ledger) == 0
    ledger.record([(1, None, "y")])
    assert lines(tmp_path)[1:] == ["1\t\ty"]
