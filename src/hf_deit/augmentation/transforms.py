"""Augmentation of one image (paper, Table 9): from a uint8 image and a random generator to a uint8 view.

Every random choice of a view is drawn first (`TrainTransform.sample`) and applied afterwards (`TrainTransform.apply`),
so that the choices can be inspected, measured, replayed, or passed to a decoder that needs the crop box before it
decodes. The transforms keep no state and use no global generator.

Not here: decoding (decoding.py); normalisation, random erasing, Mixup and CutMix, which happen per batch on the device
(mixing.py).

Sources of the conventions: operations, magnitude ranges and policies follow timm/data/auto_augment.py, which the
authors train with; the crop follows torchvision's RandomResizedCrop; the 32-pixel rule and the evaluation size follow
the authors' main.py and datasets.py. Pixel operations give Pillow's results: by albumentations' functions that agree
with Pillow, else by look-up tables (albumentations' "pil" equalisation is one bin off, its automatic contrast ignores
pixels of value 255, its brightness and contrast round where Pillow truncates). Geometric operations are cubic like the
authors', with our own warp, because cv2's cubic warp took four fifths of RandAugment's time.
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


os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # otherwise importing albumentations looks online for a newer version


from transformers import DeiTImageProcessor

from ..errors import UserError
from .operations import Operation, apply_operations
from .policies import AutoAugment, ColorJitter, RandAugment, parse_auto_augment
from .random_draws import Generator, draw_index, draw_uniform


cv2.setNumThreads(0)  # loader workers already use all cores, and cv2's threads do not survive a fork

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SMALL_IMAGE_SIZE = 32  # up to this size the authors crop from a padded image instead of a random resized crop
LARGE_IMAGE_SIZE = 384  # from this size on, evaluation shows the whole shorter side
CROP_PADDING = 4

# --------------------------------------------------------------------------------------------------------------------
# The random choices of a view.


class Box(NamedTuple):
    """A rectangle in pixels. `top` and `left` may lie outside the image when the crop is padded."""

    top: int
    left: int
    height: int
    width: int


class ViewParameters(NamedTuple):
    """All random choices of one training view, in the order in which they are applied."""

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

    The area is uniform in `scale` (fractions of the image), width/height is log-uniform in `ratio`, the position is
    uniform. If ten boxes do not fit, the result is the largest central box whose ratio is in range.

    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    largest, smallest = height * width * scale[1], height * width * scale[0]
    for _ in range(10):
        area = draw_uniform(smallest, largest, rng)
        aspect = math.exp(draw_uniform(low, high, rng))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = draw_index(height - box_height + 1, rng), draw_index(width - box_width + 1, rng)
            return Box(top, left, box_height, box_width)
    if width / height < ratio[0]:
        box_width, box_height = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width, box_height = round(height * ratio[1]), height
    else:
        box_width, box_height = width, height
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


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
    """Resize a (height, width, 3) uint8 image to (size, size, 3), bicubic and antialiased.

    PyTorch's uint8 kernel uses Pillow's filter, is faster, and resizes rows before columns. The result is within one
    or two levels of Pillow's in the same order. Pillow 13 resizes columns first for some portrait images; uint8
    saturates between the two passes, so isolated pixels along harsh edges then differ by more.
    """
    if image.shape[:2] == (size, size):
        return image
    if not (image.flags.c_contiguous and image.flags.writeable):  # torch warns about read-only arrays
        image = image.copy()
    # (1, 3, height, width) with channels last in memory: the kernel is fast in this layout and keeps it
    pixels = torch.from_numpy(image.reshape(1, *image.shape).transpose(0, 3, 1, 2))
    resized = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return resized.numpy()[0].transpose(1, 2, 0)


@dataclass(frozen=True)
class TrainTransform:
    """The training transform: crop, flip, then `policies`. Build it with `build_train_transform`.

    The transform is immutable and picklable; a view depends only on the image and the generator.
    """

    image_size: int
    crop: Literal["random_resized", "padded"]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    horizontal_flip: float
    policies: tuple[RandAugment | AutoAugment | ColorJitter, ...]
    fill: tuple[int, int, int]

    def __call__(self, image: np.ndarray, rng: Generator) -> np.ndarray:
        """Return a view of a (height, width, 3) uint8 RGB image: (image_size, image_size, 3) uint8 RGB, contiguous.

        Raises:
            ValueError: if the image has another shape or dtype.
        """
        _check_image(image)
        return self.apply(image, self.sample(image.shape[0], image.shape[1], rng))

    def sample(self, height: int, width: int, rng: Generator) -> ViewParameters:
        """Draw all choices of a view of a `height` x `width` image.

        The box of a padded crop lies in the image already resized to `image_size`.
        """
        if self.crop == "padded":
            top, left = (draw_index(2 * CROP_PADDING + 1, rng) - CROP_PADDING for _ in range(2))
            box = Box(top, left, self.image_size, self.image_size)
        else:
            box = sample_crop_box(height, width, rng, self.scale, self.ratio)
        flip = rng.random() < self.horizontal_flip
        return ViewParameters(
            box, flip, tuple(operation for policy in self.policies for operation in policy.sample(rng))
        )

    def reduction(self, height: int, width: int) -> int:
        """Return the factor (1, 2, 4 or 8) by which a `height` x `width` image may be decoded smaller.

        The bound: even the smallest possible crop has at least as many pixels as the view along both sides. On average
        over the drawn crops, views then differ by less than one level of 255, less than between a bicubic and a
        Lanczos filter. The factor depends only on the image's size, so that all views of an image share the factor.
        """
        if self.crop == "padded":
            return 1
        narrowest = min(self.ratio[0], 1 / self.ratio[1])
        shortest = math.sqrt(self.scale[0] * height * width * narrowest)
        return max(k for k in (1, 2, 4, 8) if k == 1 or shortest >= k * self.image_size)

    def rows_needed(self, views: Sequence[ViewParameters]) -> int | None:
        """Return the number of rows, from the top of the image, that `views` need; None for all rows."""
        return None if self.crop == "padded" else max(view.box.top + view.box.height for view in views)

    def apply(self, image: np.ndarray, view: ViewParameters) -> np.ndarray:
        """Apply the choices `view` to an image. The input is never modified, and may share memory with the result."""
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
    """Build the paper's training transform; the defaults are those of Table 9.

    Args:
        image_size: side of the view in pixels.
        auto_augment: timm's policy string, see `parse_auto_augment`; None for none.
        color_jitter: strength. It takes effect only without `auto_augment` or with a "3a" policy, as in timm and
            therefore in the authors' runs: Table 9's 0.3 has no effect while RandAugment is on.
        crop: "random_resized" uses `scale` and `ratio`; "padded" resizes the image to `image_size` and shifts it by up
            to 4 pixels over black. None selects the authors' rule: "padded" up to 32 pixels, else "random_resized".
        scale: range of the crop's area, as a fraction of the image.
        ratio: range of the crop's width / height.
        horizontal_flip: probability. Set 0 if a mirrored image may be of another class or none, as with digits.
        mean: colour, in [0, 1], of the pixels that rotation, shear and translation uncover.

    Raises:
        ValueError: if a value is out of range or the policy is unknown.
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
    """The evaluation transform: shorter side to `image_size / crop_ratio`, then the central square.

    Build it with `build_eval_transform`.
    """

    image_size: int
    crop_ratio: float

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the evaluation view of a (height, width, 3) uint8 RGB image: (image_size, image_size, 3) uint8 RGB.

        Raises:
            ValueError: if the image has another shape or dtype.
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
    """Cut the ends off an image that is more than `longest` times as long as wide.

    The central crop never shows the ends, and resizing them could take gigabytes.
    """
    height, width = image.shape[:2]
    top = max(0, height - longest * width) // 2
    left = max(0, width - longest * height) // 2
    return image[top : height - top, left : width - left]


def build_eval_transform(image_size: int = 224, *, crop_ratio: float | None = None) -> EvalTransform:
    """Build the paper's evaluation transform: shorter side 256, bicubic with antialiasing, central 224.

    Args:
        image_size: side of the view in pixels.
        crop_ratio: share of the shorter side that the central crop keeps, in (0, 1]. None selects 0.875, but 1 up to
            32 pixels (an image of the right size passes unchanged) and from 384 on. Set 0.875 to reproduce the
            authors' published accuracies at 384.

    Raises:
        ValueError: if a value is out of range.

    Source: facebookresearch/deit datasets.py and main.py (0.875 for every size above 32, so at 384 a shorter side of
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


def build_image_processor(transform: EvalTransform) -> DeiTImageProcessor:
    """Build the image processor to save with a model: the evaluation transform, then ImageNet's mean and deviation.

    The class defaults of Transformers (resize to 256 x 256, mean and deviation 0.5) are not the paper's.
    """
    return DeiTImageProcessor(
        size={"shortest_edge": int(transform.image_size / transform.crop_ratio)},
        crop_size={"height": transform.image_size, "width": transform.image_size},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
