"""The operations of RandAugment and AutoAugment on one uint8 image, each with a given value.

Pixel operations equal Pillow's to the last bit; geometric operations use a cubic kernel with a = -0.75.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from albumentations.augmentations.blur import functional as fblur
from albumentations.augmentations.pixel import functional as fpixel


class Operation(NamedTuple):
    """One operation under timm's name, with its value in the unit of that operation.

    The unit is degrees (Rotate), pixels along one axis per pixel along the other (Shear), fraction of the side
    (Translate), bits kept (Posterize), threshold (Solarize), added value (SolarizeAdd), blending factor with 1 =
    unchanged (Color, Contrast, Brightness, Sharpness), fraction removed (Desaturate) or standard deviation in pixels
    (GaussianBlur). The value is None if the operation has no parameter.
    """

    name: str
    value: float | int | None = None


_LEVELS = np.arange(256)


def _autocontrast(image: np.ndarray, value: None) -> np.ndarray:
    low, high = np.array([cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]).T
    scale = np.where(high > low, 255.0 / np.maximum(high - low, 1), 1.0)
    tables = _LEVELS[:, None] * scale - np.where(high > low, low, 0) * scale
    return cv2.LUT(image, np.clip(tables, 0, 255).astype(np.uint8)[None])


def _equalize(image: np.ndarray, value: None) -> np.ndarray:
    counts = np.column_stack([cv2.calcHist([image], [c], None, [256], [0, 256]) for c in range(3)]).astype(np.int64)
    below = np.cumsum(counts, axis=0) - counts
    brightest = 255 - np.argmax(counts[::-1] > 0, axis=0)
    step = below[brightest, range(3)] // 255
    tables = np.where(step > 0, (step // 2 + below) // np.maximum(step, 1), _LEVELS[:, None])
    return cv2.LUT(image, np.clip(tables, 0, 255).astype(np.uint8)[None])


def _invert(image: np.ndarray, value: None) -> np.ndarray:
    return fpixel.invert(image)


def _posterize(image: np.ndarray, bits: int) -> np.ndarray:
    if bits >= 8:
        return image
    if bits <= 0:  # no bit kept: black. Pillow 13 and albumentations accept 1 to 8 only.
        return np.zeros_like(image)
    return fpixel.posterize(image, bits)


def _solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    # albumentations takes a fraction and multiplies it by 255; half a level keeps that product away from integers
    return fpixel.solarize(image, (threshold - 0.5) / 255)


def _solarize_add(image: np.ndarray, value: int) -> np.ndarray:
    return cv2.LUT(image, np.where(_LEVELS < 128, np.minimum(_LEVELS + value, 255), _LEVELS).astype(np.uint8))


def _blend_with_level(image: np.ndarray, level: int, factor: float) -> np.ndarray:
    """Compute (1 - factor) * level + factor * image, truncated and in single precision like Pillow's blend."""
    blended = np.float32(level) + np.float32(factor) * (_LEVELS.astype(np.float32) - np.float32(level))
    return cv2.LUT(image, np.clip(blended, 0, 255).astype(np.uint8))


# Pillow's blend truncates and cv2's rounds: subtract just under half a level, so that exact integers stay.
_TRUNCATE = -0.498


def _brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with_level(image, 0, factor)


def _contrast(image: np.ndarray, factor: float) -> np.ndarray:
    return _blend_with_level(image, int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5), factor)


def _color(image: np.ndarray, factor: float) -> np.ndarray:
    return fpixel.adjust_saturation_torchvision(image, factor, gamma=_TRUNCATE)


def _desaturate(image: np.ndarray, fraction: float) -> np.ndarray:
    return _color(image, min(1.0, max(0.0, 1.0 - fraction)))


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13


def _sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    smooth = fpixel.convolve(image, _SMOOTH)
    # Pillow leaves the outermost pixels as they are
    smooth[0], smooth[-1], smooth[:, 0], smooth[:, -1] = image[0], image[-1], image[:, 0], image[:, -1]
    return cv2.addWeighted(image, factor, smooth, 1 - factor, _TRUNCATE)


def _gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return fpixel.separable_convolve(image, fblur.create_gaussian_kernel_1d(sigma))


_PIXEL_OPERATIONS: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize,
    "PosterizeOriginal": _posterize,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "ColorIncreasing": _color,
    "Contrast": _contrast,
    "ContrastIncreasing": _contrast,
    "Brightness": _brightness,
    "BrightnessIncreasing": _brightness,
    "Sharpness": _sharpness,
    "SharpnessIncreasing": _sharpness,
    "Desaturate": _desaturate,
    "GaussianBlur": _gaussian_blur,
    "GaussianBlurRand": _gaussian_blur,
}


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Return the affine rows of a counter-clockwise rotation about the centre."""
    angle, x, y = math.radians(degrees), width / 2, height / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# (value, height, width) to the rows (a, b, c), (d, e, f): output (x, y) shows input (ax + by + c, dx + ey + f), where
# pixel centres lie at half-integers, as in Pillow.
_AFFINE_OPERATIONS: dict[str, Callable[[Any, int, int], tuple[float, ...]]] = {
    "Rotate": _rotation,
    "ShearX": lambda shear, height, width: (1, shear, 0, 0, 1, 0),
    "ShearY": lambda shear, height, width: (1, 0, 0, shear, 1, 0),
}
_SHIFTED_AXIS = {"TranslateXRel": 1, "TranslateYRel": 0}


def _warp(image: np.ndarray, affine: tuple[float, ...], fill: tuple[int, int, int]) -> np.ndarray:
    """Warp with cubic interpolation in two cheap steps: double the interpolated axes, then warp linearly.

    A fourth channel is added for the time of the warp, because cv2 is a third faster with four.
    """
    (a, b, c, d, e, f), (height, width) = affine, image.shape[:2]
    x, y = 1 if (a, b) == (1, 0) else 2, 1 if (d, e) == (0, 1) else 2  # times the pixels
    finer = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA), (width * x, height * y), interpolation=cv2.INTER_CUBIC)
    warped = cv2.warpAffine(
        finer,
        # cv2 puts pixel centres at integers
        np.array([[x * a, x * b, x * (c + (a + b) / 2) - 0.5], [y * d, y * e, y * (f + (d + e) / 2) - 0.5]]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(*fill, 0),
    )
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def _cubic_taps(offset: float) -> np.ndarray:
    """Return cv2's cubic weights of the four pixels around a point, `offset` in [0, 1) to the right of the second."""
    a = -0.75
    near, far = np.array([offset, 1 - offset]), np.array([1 + offset, 2 - offset])
    (left, right) = ((a + 2) * near - (a + 3)) * near**2 + 1
    (outer_left, outer_right) = ((far - 5) * far + 8) * far * a - 4 * a
    return np.array([outer_left, left, right, outer_right], np.float32)


def _shift(image: np.ndarray, distance: float, axis: int, fill: tuple[int, int, int]) -> np.ndarray:
    """Shift along `axis`, so that pixel p shows pixel p + `distance`: filter once, then move by whole pixels."""
    whole = math.floor(distance)
    taps = _cubic_taps(distance - whole)
    taps, anchor = (taps[None], (1, 0)) if axis == 1 else (taps[:, None], (0, 1))
    image = cv2.filter2D(image, -1, taps, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    size = image.shape[axis]
    before, after = min(max(-whole, 0), size), min(max(whole, 0), size)
    kept = image[:, after : size - before] if axis == 1 else image[after : size - before]
    border = (0, 0, before, after) if axis == 1 else (before, after, 0, 0)
    return cv2.copyMakeBorder(kept, *border, cv2.BORDER_CONSTANT, value=fill)


def apply_operations(
    image: np.ndarray, operations: tuple[Operation, ...] | list[Operation], fill: tuple[int, int, int]
) -> np.ndarray:
    """Apply `operations` in order to a (height, width, 3) uint8 image; uncovered pixels take the colour `fill`.

    The input is never modified. The result is contiguous; without operations it may be the input itself.
    """
    image = np.ascontiguousarray(image)
    for name, value in operations:
        if name in _AFFINE_OPERATIONS:
            image = _warp(image, _AFFINE_OPERATIONS[name](value, *image.shape[:2]), fill)
        elif name in _SHIFTED_AXIS:
            axis = _SHIFTED_AXIS[name]
            image = _shift(image, value * image.shape[axis], axis, fill)
        else:
            image = _PIXEL_OPERATIONS[name](image, value)
    return image
