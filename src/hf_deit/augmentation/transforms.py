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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image


os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would otherwise ask the network for a newer one

from ..errors import UserError
from .operations import Operation, apply_operations
from .policies import AutoAugment, ColorJitter, Generator, RandAugment, _index, _uniform, parse_auto_augment


cv2.setNumThreads(0)  # loader workers share the cores already, and cv2's threads do not survive a fork

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SMALL_IMAGE_SIZE = 32  # up to here the authors crop from a padded border instead of zooming
LARGE_IMAGE_SIZE = 384  # from here on evaluation shows the whole shorter side
CROP_PADDING = 4

# --------------------------------------------------------------------------------------------------------------------
# Choices: what a view consists of.


class Box(NamedTuple):
    """A rectangle in pixels. `top` and `left` may lie outside the image when the crop is padded."""

    top: int
    left: int
    height: int
    width: int


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


# --------------------------------------------------------------------------------------------------------------------
# Operations on pixels, (height, width, 3) uint8 to the same.


# --------------------------------------------------------------------------------------------------------------------
# Policies: which operations, how often, how strong.


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
        raise UserError(f"expected a non-empty uint8 RGB array of shape (height, width, 3), got {got}.")


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
        raise UserError(f"crop must be 'random_resized', 'padded' or None (by image size), got {crop!r}.")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"scale must be (low, high) with 0 < low <= high <= 1, got {scale}.")
    if not 0 < ratio[0] <= ratio[1]:
        raise UserError(f"ratio must be (low, high) with 0 < low <= high, got {ratio}.")
    if not 0 <= horizontal_flip <= 1:
        raise UserError(f"horizontal_flip is a probability between 0 and 1, got {horizontal_flip}.")
    if color_jitter is not None and color_jitter < 0:
        raise UserError(f"color_jitter must be 0 or more, got {color_jitter}.")
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
        raise UserError(f"crop_ratio must be above 0 and at most 1, got {crop_ratio}.")
    return EvalTransform(image_size, crop_ratio)


def _check_image_size(image_size: int) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise UserError(f"image_size must be a whole number of pixels, got {image_size!r}.")
