"""decoding.py: every kind of file becomes the RGB picture it shows."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from hf_deit.data import decoding as decoding_module
from hf_deit.data.decoding import DamagedImage, Part, decode_image


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
