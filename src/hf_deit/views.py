"""From encoded images to batches of views: decode, augment, collate.

Pixels stay uint8 until they are on the device (mixing.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DeiTImageProcessor

from .augmentation import IMAGENET_MEAN, IMAGENET_STD, EvalTransform
from .decoding import decode_image


class TrainViews(torch.utils.data.Dataset):
    """Augmented views of a training set; index it with a [`View`] (a plain index is that view of epoch 0).

    A view is a pure function of `(seed, epoch, position)`: the process, the worker and what came before don't matter.

    Args:
        images: with the columns `image` and `label`, as [`load_image_dataset`] returns them.
        transform: from [`build_train_transform`]; called with the image and the view's random generator.
        seed: of all views.
    """

    def __init__(self, images: Sequence[dict], transform: Callable, seed: int = 0):
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, view: int) -> dict:
        return self.__getitems__([view])[0]

    def __getitems__(self, views: list[int]) -> list[dict]:
        """The views of one batch; neighbours of the same image share its decoding."""
        examples = []
        for index, group in itertools.groupby(views, key=int):
            row = self.images[index]
            image = decode_image(row["image"])
            for view in group:
                rng = np.random.default_rng([self.seed, getattr(view, "epoch", 0), getattr(view, "position", index)])
                view_seed = rng.integers(2**63)  # for what happens to the view on the device
                examples.append(
                    {"pixel_values": self.transform(image, rng), "labels": row["label"], "view_seeds": view_seed}
                )
        return examples


class EvalViews(torch.utils.data.Dataset):
    """The one view of each held-out image; `transform` is from [`build_eval_transform`], without augmentation."""

    def __init__(self, images: Sequence[dict], transform: Callable):
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        row = self.images[index]
        return {"pixel_values": self.transform(decode_image(row["image"])), "labels": row["label"]}


def build_image_processor(transform: EvalTransform) -> DeiTImageProcessor:
    """The evaluation transform and ImageNet's mean and standard deviation, as the processor saved with a model.

    Stock's class defaults (a 256 x 256 squash, mean and deviation 0.5) are not the paper's.
    """
    return DeiTImageProcessor(
        size={"shortest_edge": int(transform.image_size / transform.crop_ratio)},
        crop_size={"height": transform.image_size, "width": transform.image_size},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )


def collate_views(examples: list[dict]) -> dict[str, Tensor | np.ndarray]:
    """`pixel_values` `(batch, 3, height, width)` uint8 in channels-last memory, `labels` `(batch,)` int64, and for
    training `view_seeds` `(batch,)` int64, a NumPy array because it is read on the host."""
    pixels = torch.from_numpy(np.stack([example["pixel_values"] for example in examples]))
    batch = {
        "pixel_values": pixels.permute(0, 3, 1, 2),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
    if "view_seeds" in examples[0]:
        batch["view_seeds"] = np.array([example["view_seeds"] for example in examples])
    return batch
