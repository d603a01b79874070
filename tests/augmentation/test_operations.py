"""operations.py: each operation beside Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.augmentation import FILL
from timm.data import auto_augment as timm_auto_augment

from hf_deit.augmentation.operations import Operation, apply_operations


# Largest difference from Pillow in levels of 255. 0: the same bytes.
PIXEL_CASES = (
    [("AutoContrast", None, 0), ("Equalize", None, 0), ("Invert", None, 0)]
    + [("Posterize", bits, 0) for bits in range(1, 9)]
    + [("Solarize", threshold, 0) for threshold in (0, 1, 26, 128, 255, 256)]
    + [("SolarizeAdd", added, 0) for added in (0, 55, 99, 110)]
    + [(name, factor, 1) for name in ("Color", "Sharpness") for factor in (0.1, 0.55, 1.0, 1.37, 1.9)]
    + [("Contrast", factor, 1) for factor in (0.1, 0.55, 1.0, 1.37, 1.9)]
    + [("Brightness", factor, 0) for factor in (0.1, 0.55, 1.0, 1.37, 1.9)]
    + [("Desaturate", fraction, 1) for fraction in (0.5, 0.8, 1.0)]
)


MAP_CASES = (
    [("Rotate", degrees) for degrees in (-30.0, 3.3, 27.0)]
    + [(name, shear) for name in ("ShearX", "ShearY") for shear in (-0.1, 0.27)]
    + [(name, fraction) for name in ("TranslateXRel", "TranslateYRel") for fraction in (-0.1, 0.403)]
)


def with_timm(image: np.ndarray, name: str, value: float | None) -> np.ndarray:
    arguments = () if value is None else (value,)
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    return np.asarray(timm_auto_augment.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options)).astype(int)


@pytest.mark.parametrize(("name", "value", "bound"), PIXEL_CASES)
def test_pixel_operation_equals_pillows(squares, name, value, bound):
    for image in squares:
        ours = apply_operations(image, [Operation(name, value)], FILL)
        difference = np.abs(ours - with_timm(image, name, value))
        assert ours.dtype == np.uint8 and difference.max() <= bound
        assert difference.mean() < 0.01


@pytest.mark.parametrize("image", [np.full((9, 9, 3), 77, np.uint8), np.zeros((1, 1, 3), np.uint8)])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Sharpness"])
def test_flat_and_tiny_images_are_treated_as_by_pillow(image, name):
    value = 1.9 if name == "Sharpness" else None
    assert np.array_equal(apply_operations(image, [Operation(name, value)], FILL), with_timm(image, name, value))


@pytest.mark.parametrize("pixels", [1, 200, 254, 255, 256, 257, 1000])
def test_equalization_of_few_pixels_equals_pillows(pixels):
    image = np.random.default_rng(pixels).integers(0, 256, (1, pixels, 3), dtype=np.uint8)
    assert np.array_equal(apply_operations(image, [Operation("Equalize")], FILL), with_timm(image, "Equalize", None))


@pytest.mark.parametrize(("name", "value"), MAP_CASES)
def test_geometric_operation_is_within_two_levels_of_pillows(squares, name, value):
    """Mean distance: cv2's cubic filter has another free parameter and blends with the fill colour at the edge."""
    mean = []
    for image in squares:
        ours = apply_operations(image, [Operation(name, value)], FILL).astype(int)
        mean.append(np.abs(ours - with_timm(image, name, value)).mean())
    assert np.mean(mean) < 2


@pytest.mark.parametrize(("name", "value"), MAP_CASES)
def test_geometric_operation_moves_a_smooth_picture_exactly_as_pillow(name, value):
    """No filter matters on a ramp, so any error left would be one of direction, centre or half a pixel."""
    y, x = np.mgrid[0:150, 0:200]
    image = np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)
    ours = apply_operations(image, [Operation(name, value)], FILL).astype(int)
    theirs = with_timm(image, name, value)
    difference = np.abs(ours - theirs)
    far = np.ones(image.shape[:2], bool)  # further than two pixels from the edge of the moved picture
    filled = (np.abs(theirs - FILL) <= 2).all(-1)
    far[[0, 1, 2, -1, -2, -3]] = far[:, [0, 1, 2, -1, -2, -3]] = False
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            far &= np.roll(filled, (dy, dx), (0, 1)) == filled
    assert far.mean() > 0.5
    assert difference[far].max() <= 2 and difference[far].mean() < 0.7


def test_posterizing_to_no_bits_is_black(squares):
    image = squares[0]
    assert not apply_operations(image, [Operation("PosterizeIncreasing", 0)], FILL).any()


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0])
def test_gaussian_blur_is_near_pillows_box_approximation(squares, sigma):
    for image in squares:
        ours = apply_operations(image, [Operation("GaussianBlur", sigma)], FILL)
        assert np.abs(ours - with_timm(image, "GaussianBlur", sigma)).mean() < 1.5


def test_operations_on_a_part_of_an_image_equal_those_on_its_copy(squares):
    part = squares[0][10:90, 30:100]
    for name, value in [case[:2] for case in PIXEL_CASES] + MAP_CASES:
        ours = apply_operations(part, [Operation(name, value)], FILL)
        assert ours.flags.c_contiguous
        assert np.array_equal(ours, apply_operations(part.copy(), [Operation(name, value)], FILL)), name


def test_no_operation_writes_to_its_input(squares):
    image = squares[0].copy()
    image.flags.writeable = False
    before = image.copy()
    for name, value, _ in PIXEL_CASES:
        apply_operations(image, [Operation(name, value)], FILL)
    for name, value in MAP_CASES:
        apply_operations(image, [Operation(name, value)], FILL)
    assert np.array_equal(image, before)
