"""Per-image augmentation (paper, Table 9): one uint8 image and one random generator in, one uint8 view out.

Every random choice of a view is drawn first (`TrainTransform.sample`) and carried out afterwards
(`TrainTransform.apply`), so choices can be inspected, measured, replayed, or handed to a decoder that needs the crop
box before there are any pixels. Nothing here keeps state or touches a global generator.

Not here: decoding (decoding.py); normalisation, random erasing, Mixup and CutMix, which happen per batch on the device
(mixing.py).

Sources of the conventions: operations, magnitude ranges and policies follow timm/data/auto_augment.py, which the
authors train with; the crop follows torchvision's RandomResizedCrop; the 32-pixel rule and the evaluation size follow
the authors' main.py and datasets.py. Pixel operations mean what Pillow's mean: albumentations' functions do the work
where they agree with Pillow, look-up tables where they do not (its "pil" equalisation is one bin off, its automatic
contrast ignores pixels of value 255, its brightness and contrast round where Pillow truncates). Geometric operations
are cubic as the authors', and ours, because cv2's cubic warp took four fifths of RandAugment's time.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from PIL import Image


os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would otherwise ask the network for a newer one

from albumentations.augmentations.blur import functional as fblur  # noqa: E402
from albumentations.augmentations.pixel import functional as fpixel  # noqa: E402


cv2.setNumThreads(0)  # loader workers share the cores already, and cv2's threads do not survive a fork

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SMALL_IMAGE_SIZE = 32  # up to here the authors crop from a padded border instead of zooming
LARGE_IMAGE_SIZE = 384  # from here on evaluation shows the whole shorter side
CROP_PADDING = 4

# --------------------------------------------------------------------------------------------------------------------
# Choices: what a view consists of.


class Generator(Protocol):
    """What choices are drawn from: a `random.Random` (quick to seed), a NumPy generator, or anything like them."""

    def random(self) -> float:
        """Uniform in [0, 1)."""


def _uniform(low: float, high: float, rng: Generator) -> float:
    return low + (high - low) * rng.random()


def _index(count: int, rng: Generator) -> int:
    return int(count * rng.random())


def _normal(mean: float, std: float, rng: Generator) -> float:
    return mean + std * math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())  # Box-Muller


class Box(NamedTuple):
    """A rectangle in pixels. `top` and `left` may lie outside the image when the crop is padded."""

    top: int
    left: int
    height: int
    width: int


class Operation(NamedTuple):
    """One operation as timm names it, with its argument in the unit of that operation.

    Degrees (Rotate), pixels along one axis per pixel along the other (Shear), fraction of the side (Translate), bits
    kept (Posterize), threshold (Solarize), added value (SolarizeAdd), blending factor with 1 = unchanged (Color,
    Contrast, Brightness, Sharpness), fraction removed (Desaturate), standard deviation in pixels (GaussianBlur), None
    where there is nothing to choose.
    """

    name: str
    value: float | int | None = None


class ViewParameters(NamedTuple):
    """All random choices of one training view, in the order they are carried out."""

    box: Box
    flip: bool
    operations: tuple[Operation, ...]


def sample_crop_box(
    height: int,
    width: int,
    rng: Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw the box of a random resized crop inside a `height` x `width` image.

    Area is uniform in `scale` (fractions of the image), width/height log-uniform in `ratio`, position uniform. After
    ten boxes that do not fit, the largest central box whose ratio is in range.

    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    largest, smallest = height * width * scale[1], height * width * scale[0]
    for _ in range(10):
        area = _uniform(smallest, largest, rng)
        aspect = math.exp(_uniform(low, high, rng))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = _index(height - box_height + 1, rng), _index(width - box_width + 1, rng)
            return Box(top, left, box_height, box_width)
    if width / height < ratio[0]:
        box_width, box_height = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width, box_height = round(height * ratio[1]), height
    else:
        box_width, box_height = width, height
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


# --------------------------------------------------------------------------------------------------------------------
# From a magnitude to the argument of an operation. `level` is the magnitude over 10: 0 to 1 unless mmax allows more.


def _signed(value: float, rng: Generator) -> float:
    return -value if rng.random() > 0.5 else value


def _enhance(level: float, rng: Generator) -> float:
    return 0.1 + 1.8 * level


def _enhance_increasing(level: float, rng: Generator) -> float:
    return max(0.1, 1 + _signed(0.9 * level, rng))


def _shear(level: float, rng: Generator) -> float:
    return _signed(0.3 * level, rng)


def _translate(level: float, rng: Generator) -> float:
    return _signed(0.45 * level, rng)


def _within(low: float, high: float, level: float) -> float:
    return min(high, low + (high - low) * level)


Argument = Callable[[float, Generator], float | int]

# timm's names. A plain name weakens or strengthens with the magnitude as the first published code did; "Increasing"
# always strengthens (the `inc1` of the paper's policy); "Original" keeps the range of the AutoAugment paper.
_ARGUMENTS: dict[str, Argument | None] = {
    "AutoContrast": None,
    "Equalize": None,
    "Invert": None,
    "Rotate": lambda level, rng: _signed(30 * level, rng),
    "Posterize": lambda level, rng: int(4 * level),
    "PosterizeIncreasing": lambda level, rng: 4 - int(4 * level),
    "PosterizeOriginal": lambda level, rng: 4 + int(4 * level),
    "Solarize": lambda level, rng: min(256, int(256 * level)),
    "SolarizeIncreasing": lambda level, rng: 256 - min(256, int(256 * level)),
    "SolarizeAdd": lambda level, rng: min(128, int(110 * level)),
    "Color": _enhance,
    "ColorIncreasing": _enhance_increasing,
    "Contrast": _enhance,
    "ContrastIncreasing": _enhance_increasing,
    "Brightness": _enhance,
    "BrightnessIncreasing": _enhance_increasing,
    "Sharpness": _enhance,
    "SharpnessIncreasing": _enhance_increasing,
    "ShearX": _shear,
    "ShearY": _shear,
    "TranslateXRel": _translate,
    "TranslateYRel": _translate,
    "Desaturate": lambda level, rng: _within(0.5, 1.0, level),
    "GaussianBlur": lambda level, rng: _within(0.1, 2.0, level),
    "GaussianBlurRand": lambda level, rng: _uniform(0.1, 2 * _within(0.0, 1.0, level), rng),
}

# --------------------------------------------------------------------------------------------------------------------
# Operations on pixels, (height, width, 3) uint8 to the same.


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
    """(1 - factor) * level + factor * image, truncated and in single precision as Pillow's blend."""
    blended = np.float32(level) + np.float32(factor) * (_LEVELS.astype(np.float32) - np.float32(level))
    return cv2.LUT(image, np.clip(blended, 0, 255).astype(np.uint8))


# Pillow's blend truncates, cv2's rounds: just under half a level less, so that exact integers survive either way.
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


_PIXEL_OPERATIONS: dict[str, Callable[[np.ndarray, float | int | None], np.ndarray]] = {
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
    """Counter-clockwise about the centre."""
    angle, x, y = math.radians(degrees), width / 2, height / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# (value, height, width) to the rows (a, b, c), (d, e, f): output (x, y) shows input (ax + by + c, dx + ey + f), where
# pixel centres lie at half-integers, as in Pillow.
_AFFINE_OPERATIONS: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "Rotate": _rotation,
    "ShearX": lambda shear, height, width: (1, shear, 0, 0, 1, 0),
    "ShearY": lambda shear, height, width: (1, 0, 0, shear, 1, 0),
}

_SHIFTED_AXIS = {"TranslateXRel": 1, "TranslateYRel": 0}


def _warp(image: np.ndarray, affine: tuple[float, ...], fill: tuple[int, int, int]) -> np.ndarray:
    """Cubic interpolation in two cheap steps: twice the pixels along the axes that need new ones, then a linear warp.

    On the way there is a fourth channel, in which cv2 is a third faster.
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
    """Weights of the four pixels around a point `offset` in [0, 1) to the right of the second: cv2's cubic filter."""
    a = -0.75
    near, far = np.array([offset, 1 - offset]), np.array([1 + offset, 2 - offset])
    (left, right) = ((a + 2) * near - (a + 3)) * near**2 + 1
    (outer_left, outer_right) = ((far - 5) * far + 8) * far * a - 4 * a
    return np.array([outer_left, left, right, outer_right], np.float32)


def _shift(image: np.ndarray, distance: float, axis: int, fill: tuple[int, int, int]) -> np.ndarray:
    """Output pixel p shows input pixel p + `distance` along `axis`: one filter for all, then whole pixels."""
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
    """Carry out `operations` in order on a (height, width, 3) uint8 image; uncovered pixels take the colour `fill`.

    The input is never written to; the result is contiguous, and without operations may be the input itself.
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


# --------------------------------------------------------------------------------------------------------------------
# Policies: which operations, how often, how strong.

_WEIGHTED = {
    "Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1, "ColorIncreasing": 0.25,
    "SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05,
    "ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05,
    "Invert": 0.05,
}  # fmt: skip

_WEIGHTED_3A = {
    "SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2, "ShearY": 2,
    "PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1, "SharpnessIncreasing": 1,
    "ContrastIncreasing": 1, "BrightnessIncreasing": 1, "Equalize": 1, "Invert": 1,
}  # fmt: skip

_PLAIN = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip

_INCREASING = tuple(f"{name}Increasing" if f"{name}Increasing" in _ARGUMENTS else name for name in _PLAIN)

# One sub-policy a line: operation, probability, magnitude, twice.
_ORIGINAL = """
    PosterizeOriginal .4 8   Rotate .6 9
    Solarize .6 5            AutoContrast .6 5
    Equalize .8 8            Equalize .6 3
    PosterizeOriginal .6 7   PosterizeOriginal .6 6
    Equalize .4 7            Solarize .2 4
    Equalize .4 4            Rotate .8 8
    Solarize .6 3            Equalize .6 7
    PosterizeOriginal .8 5   Equalize 1 2
    Rotate .2 3              Solarize .6 8
    Equalize .6 8            PosterizeOriginal .4 6
    Rotate .8 8              Color .4 0
    Rotate .4 9              Equalize .6 2
    Equalize 0 7             Equalize .8 8
    Invert .6 4              Equalize 1 8
    Color .6 4               Contrast 1 8
    Rotate .8 8              Color 1 2
    Color .8 8               Solarize .8 7
    Sharpness .4 7           Invert .6 8
    ShearX .6 5              Equalize 1 9
    Color .4 0               Equalize .6 3
    Equalize .4 7            Solarize .2 4
    Solarize .6 5            AutoContrast .6 5
    Invert .6 4              Equalize 1 8
    Color .6 4               Contrast 1 8
    Equalize .8 8            Equalize .6 3
"""

_V0 = """
    Equalize .8 1            ShearY .8 4
    Color .4 9               Equalize .6 3
    Color .4 1               Rotate .6 8
    Solarize .8 3            Equalize .4 7
    Solarize .4 2            Solarize .6 2
    Color .2 0               Equalize .8 8
    Equalize .4 8            SolarizeAdd .8 3
    ShearX .2 9              Rotate .6 8
    Color .6 1               Equalize 1 2
    Invert .4 9              Rotate .6 0
    Equalize 1 9             ShearY .6 3
    Color .4 7               Equalize .6 0
    Posterize .4 6           AutoContrast .4 7
    Solarize .6 8            Color .6 9
    Solarize .2 4            Rotate .8 9
    Rotate 1 7               TranslateYRel .8 9
    ShearX 0 0               Solarize .8 4
    ShearY .8 0              Color .6 4
    Color 1 0                Rotate .6 2
    Equalize .8 4            Equalize 0 8
    Equalize 1 4             AutoContrast .6 2
    ShearY .4 7              SolarizeAdd .6 7
    Posterize .8 2           Solarize .6 10
    Solarize .6 8            Equalize .6 1
    Color .8 6               Rotate .4 5
"""

_POLICIES = {
    "original": _ORIGINAL,
    "originalr": _ORIGINAL.replace("PosterizeOriginal", "PosterizeIncreasing"),
    "v0": _V0,
    "v0r": _V0.replace("Posterize", "PosterizeIncreasing"),
    "3a": "Solarize 1 5\nDesaturate 1 10\nGaussianBlurRand 1 10",
}


class _Step(NamedTuple):
    """One operation of a policy, before anything is drawn."""

    name: str
    probability: float
    magnitude: float


@dataclass(frozen=True)
class _Magnitudes:
    """How far a drawn magnitude strays from the one a policy names.

    `std` is that of a normal distribution; infinity means uniform between 0 and the named magnitude. The result is
    clipped to [0, `maximum`].
    """

    std: float = 0.0
    maximum: float = 10.0

    def draw(self, step: _Step, rng: Generator) -> Operation | None:
        """The operation with its argument, or None when its probability lets it pass."""
        if rng.random() >= step.probability:
            return None
        argument = _ARGUMENTS[step.name]
        if argument is None:
            return Operation(step.name)
        magnitude = step.magnitude
        if self.std == math.inf:
            magnitude = _uniform(0, magnitude, rng)
        elif self.std > 0:
            magnitude = _normal(magnitude, self.std, rng)
        return Operation(step.name, argument(max(0.0, min(magnitude, self.maximum)) / 10, rng))


@dataclass(frozen=True)
class RandAugment:
    """`num_layers` operations from `steps`, drawn with replacement, or with `weights` and then without.

    Source: Cubuk et al., 2019 (arXiv:1909.13719), as timm varies it.
    """

    steps: tuple[_Step, ...]
    weights: tuple[float, ...] | None
    num_layers: int
    magnitudes: _Magnitudes

    def sample(self, rng: Generator) -> list[Operation]:
        """The operations that happen, in order: at most `num_layers` of them."""
        if self.weights is None:
            chosen = [_index(len(self.steps), rng) for _ in range(self.num_layers)]
        else:
            bounds, chosen = list(accumulate(self.weights)), []
            while len(chosen) < self.num_layers:
                index = bisect(bounds, rng.random() * bounds[-1])
                if index not in chosen:
                    chosen.append(index)
        drawn = [self.magnitudes.draw(self.steps[index], rng) for index in chosen]
        return [operation for operation in drawn if operation is not None]


@dataclass(frozen=True)
class AutoAugment:
    """One sub-policy, uniformly chosen; its operations in order, each with its own probability.

    Source: Cubuk et al., 2018 (arXiv:1805.09501).
    """

    policy: tuple[tuple[_Step, ...], ...]
    magnitudes: _Magnitudes

    def sample(self, rng: Generator) -> list[Operation]:
        """The operations that happen, in order: at most as many as the sub-policy has."""
        drawn = [self.magnitudes.draw(step, rng) for step in self.policy[_index(len(self.policy), rng)]]
        return [operation for operation in drawn if operation is not None]


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation in random order, each by a factor uniform in 1 ± `strength`."""

    strength: float

    def sample(self, rng: Generator) -> list[Operation]:
        names = sorted(("Brightness", "Contrast", "Color"), key=lambda name: rng.random())
        return [Operation(name, _uniform(max(0.0, 1 - self.strength), 1 + self.strength, rng)) for name in names]


_RAND_KEYS = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int}


def parse_auto_augment(config: str) -> RandAugment | AutoAugment:
    """Read timm's policy string, sections joined by dashes.

    `rand`, then any of `m9` (magnitude), `n2` (operations per image), `p0.5` (probability of each), `mstd0.5` (noise
    on the magnitude; above 100: uniform), `mmax10` (its upper bound), `inc1` (operations that strengthen with the
    magnitude), `tweights`, `t3a`, `t3aw` (other sets of operations). Or `original`, `originalr`, `v0`, `v0r`, `3a`,
    then optionally `mstd0.5`.

    Raises:
        ValueError: for anything else. timm skips what it does not understand; a misspelt policy would train silently.
    """
    if not isinstance(config, str):
        raise ValueError(f"auto_augment must be a string such as 'rand-m9-mstd0.5-inc1' or None, got {config!r}.")
    kind, *sections = config.split("-")
    if kind != "rand" and kind not in _POLICIES:
        raise ValueError(f"auto_augment={config!r} starts with {kind!r}; expected 'rand' or one of {[*_POLICIES]}.")
    types = _RAND_KEYS if kind == "rand" else {"mstd": float}
    values: dict[str, float | int] = {}
    names: str | None = None
    for section in sections:
        if kind == "rand" and section in ("tweights", "t3a", "t3aw"):
            names = section[1:]
            continue
        match = re.fullmatch(r"([a-z]+)(\d+|\d*\.\d+)", section)
        key = match[1] if match else ""
        if key not in types or key in values or (types[key] is int and "." in match[2]):
            known = ", ".join(f"{known}<{kind.__name__}>" for known, kind in types.items())
            raise ValueError(
                f"auto_augment={config!r} has the section {section!r}; expected each of {known} at most once"
                + (", or tweights, t3a, t3aw." if kind == "rand" else ".")
            )
        values[key] = types[key](match[2])
    std = values.get("mstd", 0.0)
    magnitudes = _Magnitudes(std=math.inf if std > 100 else std, maximum=values.get("mmax", 0) or 10)
    if kind != "rand":
        return AutoAugment(_read_policy(_POLICIES[kind]), magnitudes)

    layers, probability, magnitude = values.get("n", 2), values.get("p", 0.5), values.get("m", 10)
    if probability > 1:
        raise ValueError(f"auto_augment={config!r} has p={probability:g}; a probability is at most 1.")
    if values.get("inc", 0) > 1:
        raise ValueError(f"auto_augment={config!r} has inc={values['inc']}; expected inc0 or inc1.")
    chosen: tuple[str, ...] | dict[str, float]
    if names is None:
        chosen = _INCREASING if values.get("inc", 0) else _PLAIN
    else:
        chosen = {
            "weights": _WEIGHTED, "3aw": _WEIGHTED_3A, "3a": ("SolarizeIncreasing", "Desaturate", "GaussianBlur")
        }[names]  # fmt: skip
    weights = None
    if isinstance(chosen, dict):
        weights = tuple(weight / sum(chosen.values()) for weight in chosen.values())
        if layers > len(chosen):
            raise ValueError(
                f"auto_augment={config!r} asks for {layers} different operations; its set has {len(chosen)}."
            )
    return RandAugment(tuple(_Step(name, probability, magnitude) for name in chosen), weights, layers, magnitudes)


def _read_policy(table: str) -> tuple[tuple[_Step, ...], ...]:
    rows = [line.split() for line in table.strip().splitlines()]
    return tuple(
        tuple(_Step(row[i], float(row[i + 1]), float(row[i + 2])) for i in range(0, len(row), 3)) for row in rows
    )


# --------------------------------------------------------------------------------------------------------------------
# The two transforms.


def _check_image(image: np.ndarray) -> None:
    if not (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size > 0
    ):
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"expected a non-empty uint8 RGB array of shape (height, width, 3), got {got}.")


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bicubic, antialiased resize of a (height, width, 3) uint8 image to (size, size, 3).

    PyTorch's uint8 kernel: the filter of Pillow and faster, rows before columns. It is within a level or two of Pillow
    working in that order. Pillow 13 takes columns first for some portrait images, and as uint8 saturates between the
    passes, isolated pixels along harsh edges then differ by more.
    """
    if image.shape[:2] == (size, size):
        return image
    if not (image.flags.c_contiguous and image.flags.writeable):  # torch warns of what is read-only
        image = image.copy()
    # (1, 3, height, width) with channels last in memory, the layout the kernel is fast in and keeps
    pixels = torch.from_numpy(image.reshape(1, *image.shape).transpose(0, 3, 1, 2))
    resized = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return resized.numpy()[0].transpose(1, 2, 0)


@dataclass(frozen=True)
class TrainTransform:
    """One training view: crop, flip, then `policies`. Build it with `build_train_transform`.

    Immutable and picklable: what a view looks like depends on the image and the generator alone.
    """

    image_size: int
    crop: Literal["random_resized", "padded"]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    horizontal_flip: float
    policies: tuple[RandAugment | AutoAugment | ColorJitter, ...]
    fill: tuple[int, int, int]

    def __call__(self, image: np.ndarray, rng: Generator) -> np.ndarray:
        """A view of a (height, width, 3) uint8 RGB image: (image_size, image_size, 3) uint8 RGB, contiguous.

        Raises:
            ValueError: for any other shape or dtype.
        """
        _check_image(image)
        return self.apply(image, self.sample(*image.shape[:2], rng))

    def sample(self, height: int, width: int, rng: Generator) -> ViewParameters:
        """Draw all choices of a view of a `height` x `width` image.

        The box of a padded crop lies in the image already resized to `image_size`.
        """
        if self.crop == "padded":
            top, left = (_index(2 * CROP_PADDING + 1, rng) - CROP_PADDING for _ in range(2))
            box = Box(top, left, self.image_size, self.image_size)
        else:
            box = sample_crop_box(height, width, rng, self.scale, self.ratio)
        flip = rng.random() < self.horizontal_flip
        return ViewParameters(
            box, flip, tuple(operation for policy in self.policies for operation in policy.sample(rng))
        )

    def reduction(self, height: int, width: int) -> int:
        """How many times smaller (1, 2, 4 or 8) a `height` x `width` image may be decoded without visible change.

        The bound: not even the smallest crop that can be drawn has fewer pixels than the view along either side. Over
        the crops that are drawn, views then differ by less than one level of 255 on average, which is less than
        between a bicubic and a Lanczos filter. It depends on the image alone, so that every view of it sees the same.
        """
        if self.crop == "padded":
            return 1
        narrowest = min(self.ratio[0], 1 / self.ratio[1])
        shortest = math.sqrt(self.scale[0] * height * width * narrowest)
        return max(k for k in (1, 2, 4, 8) if k == 1 or shortest >= k * self.image_size)

    def rows_needed(self, views: Sequence[ViewParameters]) -> int | None:
        """How many rows of the image, from the top, `views` show; None for all."""
        return None if self.crop == "padded" else max(view.box.top + view.box.height for view in views)

    def apply(self, image: np.ndarray, view: ViewParameters) -> np.ndarray:
        """Carry out `view`. The input is never written to, and may share memory with the result."""
        top, left, height, width = view.box
        if self.crop == "padded":
            image = cv2.copyMakeBorder(resize(image, self.image_size), *(CROP_PADDING,) * 4, cv2.BORDER_CONSTANT)
            top, left = top + CROP_PADDING, left + CROP_PADDING
        image = image[top : top + height, left : left + width]
        if view.flip:
            image = cv2.flip(image, 1)
        return apply_operations(resize(image, self.image_size), view.operations, self.fill)


def build_train_transform(
    image_size: int = 224,
    *,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float | None = 0.3,
    crop: Literal["random_resized", "padded"] | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    horizontal_flip: float = 0.5,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
) -> TrainTransform:
    """The paper's training transform; the defaults are Table 9's.

    Args:
        auto_augment: timm's policy string, see `parse_auto_augment`.
        color_jitter: strength. Takes effect only without `auto_augment` (or with one of the "3a" policies), as in timm
            and so in the authors' runs: Table 9's 0.3 is idle while RandAugment is on.
        crop: "random_resized" uses `scale` and `ratio`; "padded" shifts the image, resized to `image_size`, by up to 4
            pixels over black. None is the authors' rule: padded up to 32 pixels.
        horizontal_flip: probability. Set 0 where a mirror image is another class or none, such as digits.
        mean: in [0, 1], the colour of pixels that rotation, shear and translation uncover.

    Raises:
        ValueError: for a value out of range or an unknown policy.
    """
    _check_image_size(image_size)
    if crop not in (None, "random_resized", "padded"):
        raise ValueError(f"crop must be 'random_resized', 'padded' or None (by image size), got {crop!r}.")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be (low, high) with 0 < low <= high <= 1, got {scale}.")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio must be (low, high) with 0 < low <= high, got {ratio}.")
    if not 0 <= horizontal_flip <= 1:
        raise ValueError(f"horizontal_flip is a probability between 0 and 1, got {horizontal_flip}.")
    if color_jitter is not None and color_jitter < 0:
        raise ValueError(f"color_jitter must be 0 or more, got {color_jitter}.")
    policies: list[RandAugment | AutoAugment | ColorJitter] = []
    if auto_augment is not None:
        policies.append(parse_auto_augment(auto_augment))
    if color_jitter and (auto_augment is None or "3a" in auto_augment):
        policies.append(ColorJitter(color_jitter))
    return TrainTransform(
        image_size=image_size,
        crop=crop or ("padded" if image_size <= SMALL_IMAGE_SIZE else "random_resized"),
        scale=tuple(scale),
        ratio=tuple(ratio),
        horizontal_flip=horizontal_flip,
        policies=tuple(policies),
        fill=tuple(min(255, round(255 * channel)) for channel in mean),
    )


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side to `image_size / crop_ratio`, then the central square. Build it with `build_eval_transform`."""

    image_size: int
    crop_ratio: float

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The evaluation view of a (height, width, 3) uint8 RGB image: (image_size, image_size, 3) uint8 RGB.

        Raises:
            ValueError: for any other shape or dtype.
        """
        _check_image(image)
        image = _trim_ribbon(image)
        height, width = image.shape[:2]
        shorter = int(self.image_size / self.crop_ratio)
        resized_height = shorter if height <= width else int(shorter * height / width)
        resized_width = shorter if width <= height else int(shorter * width / height)
        if (height, width) == (resized_height, resized_width) == (self.image_size, self.image_size):
            return image
        resized = Image.fromarray(image).resize((resized_width, resized_height), Image.Resampling.BICUBIC)
        top = round((resized_height - self.image_size) / 2)
        left = round((resized_width - self.image_size) / 2)
        return np.array(resized.crop((left, top, left + self.image_size, top + self.image_size)))


def _trim_ribbon(image: np.ndarray, longest: int = 16) -> np.ndarray:
    """Cut the ends off an image more than `longest` times as long as wide.

    The central crop never shows them, and resizing them could take gigabytes.
    """
    height, width = image.shape[:2]
    top = max(0, height - longest * width) // 2
    left = max(0, width - longest * height) // 2
    return image[top : height - top, left : width - left]


def build_eval_transform(image_size: int = 224, *, crop_ratio: float | None = None) -> EvalTransform:
    """The paper's evaluation transform: shorter side 256, bicubic with antialiasing, central 224.

    Args:
        crop_ratio: central part kept, in (0, 1]. None is 0.875, and 1 up to 32 pixels, where an image of the right
            size passes unchanged, and from 384 on. Set 0.875 for the authors' published accuracies at 384.

    Raises:
        ValueError: for a value out of range.

    Source: facebookresearch/deit datasets.py and main.py (0.875 for every size above 32: 384 of a shorter side of
    438); timm/models/deit.py for 1 at 384.
    """
    _check_image_size(image_size)
    if crop_ratio is None:
        crop_ratio = 0.875 if SMALL_IMAGE_SIZE < image_size < LARGE_IMAGE_SIZE else 1.0
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crop_ratio must be above 0 and at most 1, got {crop_ratio}.")
    return EvalTransform(image_size, crop_ratio)


def _check_image_size(image_size: int) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size must be a whole number of pixels, got {image_size!r}.")
