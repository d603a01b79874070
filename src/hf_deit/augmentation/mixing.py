"""Augmentation of a batch on the device, in this order: normalisation, random erasing, Mixup or CutMix.

Every random number comes from the seeds of the views (see views.py): erasing uses the seed of the view, mixing uses
the seeds of the whole batch. A batch therefore does not depend on a resume or on other random draws of the process,
and there is no state to save.

Not here: the augmentation of single images (transforms.py).

Source: Table 9 of the paper (Mixup 0.8, CutMix 1.0, erasing 0.25) with "the timm customizations" (section 6); the
conventions are those of timm/data/mixup.py and timm/data/random_erasing.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError


# Area and aspect ratio of an erased rectangle (timm/data/random_erasing.py, after Zhong et al. 2020).
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


def normalize(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn `(batch, 3, height, width)` uint8 in [0, 255] into float32 `(x / 255 - mean) / std`; keep float input."""
    if pixel_values.is_floating_point():
        return pixel_values
    shift, scale = _shift_and_scale(tuple(mean), tuple(std), pixel_values.device)
    return torch.addcmul(shift, pixel_values, scale)


@functools.cache  # without the cache every step would copy tensors to the device and wait for them
def _shift_and_scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    center, scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return -center / scale, 1 / (255 * scale)


class MixedViews(dict):
    """A batch as the student sees it, on the device: `pixel_values` and `labels`, as [`Mixing`] returns them.

    Attributes:
        view_ids: `(batch, 2)` int64, epoch and position of each view; None where the dataset does not tell.
    """

    view_ids: np.ndarray | None = None


class Mixing:
    """Turns a batch of uint8 views and labels into the batch that student and teacher see.

    Args:
        num_labels: number of classes.
        mean, std: per channel, for pixels in [0, 1].
        mixup_alpha: parameter of the Beta distribution of Mixup's weight; 0 turns Mixup off. Paper: 0.8.
        cutmix_alpha: parameter of the Beta distribution of CutMix's weight; 0 turns CutMix off. Paper: 1.0.
        mix_prob: probability that a batch is mixed.
        mix_switch_prob: probability of CutMix if both Mixup and CutMix are on.
        random_erasing_prob: probability that a rectangle of a view is replaced by normal noise, drawn for each pixel
            and channel.

    Raises:
        ValueError: if a probability is outside [0, 1] or an alpha is negative.
    """

    def __init__(
        self,
        num_labels: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        mix_prob: float = 1.0,
        mix_switch_prob: float = 0.5,
        random_erasing_prob: float = 0.25,
    ):
        for name, value in (
            ("mix_prob", mix_prob),
            ("mix_switch_prob", mix_switch_prob),
            ("random_erasing_prob", random_erasing_prob),
        ):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; it must be a probability in [0, 1]")
        for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if value < 0:
                raise UserError(f"{name} is {value}; use a positive number, or 0 to turn it off")
        self.num_labels = num_labels
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.mix_prob = mix_prob if mixup_alpha or cutmix_alpha else 0.0
        self.mix_switch_prob = mix_switch_prob
        self.random_erasing_prob = random_erasing_prob

    def mix_batch(self, batch: Mapping[str, Any]) -> MixedViews:
        """Normalise, erase and mix a batch of the loader: `pixel_values`, `labels` and `view_seeds`.

        Datasets other than [`TrainViews`] give their views no seeds; they are drawn here.
        """
        view_seeds = batch.get("view_seeds")
        if view_seeds is None:
            view_seeds = torch.randint(2**63 - 1, (len(batch["labels"]),)).numpy()
        pixel_values, labels = self(batch["pixel_values"], batch["labels"], view_seeds)
        views = MixedViews(pixel_values=pixel_values, labels=labels)
        views.view_ids = batch.get("view_ids")
        return views

    def __call__(self, pixel_values: Tensor, labels: Tensor, view_seeds: np.ndarray) -> tuple[Tensor, Tensor]:
        """Normalise, erase and mix one batch.

        Args:
            pixel_values: `(batch, 3, height, width)` uint8, or float32 that is already normalised and is overwritten.
                Any batch size, odd ones too.
            labels: `(batch,)` int64.
            view_seeds: `(batch,)` non-negative int64, on the host.

        Returns:
            Normalised float32 pixels of the same shape, and the labels: `(batch, num_labels)` float32 if the batch
            may be mixed (`mix_prob > 0`), else unchanged. Label smoothing happens in the loss.
        """
        pixel_values = normalize(pixel_values, self.mean, self.std)
        if self.random_erasing_prob:
            pixel_values = self._erase(pixel_values, view_seeds)
        if not self.mix_prob:
            return pixel_values, labels
        return self._mix(pixel_values, F.one_hot(labels, self.num_labels).float(), np.random.default_rng(view_seeds))

    def _erase(self, pixel_values: Tensor, view_seeds: np.ndarray) -> Tensor:
        noise = torch.Generator(pixel_values.device)
        for view, seed in zip(pixel_values, view_seeds.tolist(), strict=True):
            rng = np.random.default_rng(seed)
            if rng.random() < self.random_erasing_prob:
                top, left, height, width = _erased_box(rng, *view.shape[1:])
                view[:, top : top + height, left : left + width].normal_(generator=noise.manual_seed(seed))
        return pixel_values

    def _mix(self, pixel_values: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mix view i with view `batch - 1 - i`, with one weight for the whole batch."""
        if rng.random() >= self.mix_prob:
            return pixel_values, targets
        partners = pixel_values.flip(0)
        cutmix_prob = self.mix_switch_prob if self.mixup_alpha and self.cutmix_alpha else float(self.cutmix_alpha > 0)
        if rng.random() < cutmix_prob:
            height, width = pixel_values.shape[-2:]
            weight = rng.beta(self.cutmix_alpha, self.cutmix_alpha)
            top, bottom, left, right = _cutmix_box(rng, height, width, weight)
            pixel_values[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
            weight = 1 - (bottom - top) * (right - left) / (height * width)  # the image may clip the box
        else:
            weight = rng.beta(self.mixup_alpha, self.mixup_alpha)
            pixel_values = torch.lerp(partners, pixel_values, weight)
        return pixel_values, torch.lerp(targets.flip(0), targets, weight)


def _erased_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) of a rectangle smaller than the image; all 0 if ten draws did not fit."""
    for _ in range(ERASING_ATTEMPTS):
        area = rng.uniform(*ERASED_AREA) * height * width
        aspect = math.exp(rng.uniform(*np.log(ERASED_ASPECT)))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
            return int(top), int(left), box_height, box_width
    return 0, 0, 0, 0


def _cutmix_box(rng: np.random.Generator, height: int, width: int, weight: float) -> tuple[int, int, int, int]:
    """Draw (top, bottom, left, right): a box of area `1 - weight` around a uniform centre, clipped to the image."""
    share = math.sqrt(1 - weight)
    bounds = []
    for size in (height, width):
        centre, half = int(rng.integers(size)), int(size * share) // 2
        bounds += [max(centre - half, 0), min(centre + half, size)]
    return tuple(bounds)
