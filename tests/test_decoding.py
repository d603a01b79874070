"""decoding.py: every kind of file becomes the RGB picture it shows."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from hf_deit.decoding import decode_image


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


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
