"""From encoded images to batches of views: decode, augment, collate.

Pixels stay uint8 until they are on the device; mixing.py normalises them there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import DeiTImageProcessor

from ..arguments import DataArguments
from ..augmentation.transforms import (
    Box,
    TrainTransform,
    ViewParameters,
    build_eval_transform,
    build_image_processor,
    build_train_transform,
)
from ..errors import UserError
from .decoding import DamagedImage, Part, decode_image, read_encoded
from .loading import LoadedImages, load_image_dataset


# If this many images in a row are damaged, the dataset itself is taken to be wrong.
MAX_BAD_RUN = 100


class ViewBatch(list):
    """Examples whose pixels share one array, `pixels`: `(batch, height, width, 3)` uint8, collated without a copy.

    Separate arrays would cost more than 0.1 ms a view, because the system allocates their memory anew every time.
    """

    pixels: np.ndarray


class TrainViews(torch.utils.data.Dataset):
    """Augmented views of the training images; index with a [`View`] (a plain index is the view of epoch 0).

    A view is a pure function of `(seed, epoch, position)`: process, worker and earlier views do not matter. A damaged
    image is replaced by the next intact image, with that image's label; the example then lists the damaged ones as
    `bad_images`, each `(index, path or None, reason)`.

    Args:
        images: rows with the columns `image` and `label`, as [`load_image_dataset`] returns them.
        transform: from [`build_train_transform`].
        seed: seed of all views, 0 or more.

    Raises:
        ValueError: if the seed is negative; on indexing, if 100 images in a row, or all images, are damaged.
    """

    def __init__(self, images: Any, transform: TrainTransform, seed: int = 0):
        if seed < 0:
            raise UserError(f"the seed of the views is {seed}; it must be 0 or more")
        self.images = images
        self.transform = transform
        self.seed = int(seed)  # shifted further than a NumPy integer is wide
        self._rng = random.Random()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, view: int) -> dict:
        return self.__getitems__([view])[0]

    def __getitems__(self, views: list[int]) -> ViewBatch:
        """Return the views of one batch. Consecutive views of one image share its decoding."""
        batch = ViewBatch()
        batch.pixels = np.empty((len(views), self.transform.image_size, self.transform.image_size, 3), np.uint8)
        groups = [(index, list(group)) for index, group in itertools.groupby(views, key=int)]
        rows = _rows(self.images, [index for index, _ in groups])
        for (index, group), row in zip(groups, rows, strict=True):
            batch += self._views_of_one_image(index, row, group, batch.pixels[len(batch) :])
        return batch

    @property
    def block_sizes(self) -> list[int] | None:
        """Images in each row group of a stream, for [`RepeatedAugmentationSampler`]; None for random access."""
        return getattr(self.images, "block_sizes", None)

    def _views_of_one_image(self, index: int, row: dict, views: list[int], out: np.ndarray) -> list[dict]:
        bad_images = []
        for offset in range(min(len(self), MAX_BAD_RUN)):
            if offset:
                row = self.images[(index + offset) % len(self)]
            try:
                examples = self._augment(row, views, out)
            except DamagedImage as damage:
                bad_images.append(((index + offset) % len(self), _path(row), str(damage)))
                continue
            if bad_images:
                examples[0]["bad_images"] = bad_images
            return examples
        number, path, reason = bad_images[-1]
        raise UserError(
            f"{len(bad_images)} training images in a row are damaged, from number {index} to number {number} (path "
            f"{path}: {reason}). Check the path and the columns of the dataset"
        )

    def _augment(self, row: dict, views: list[int], out: np.ndarray) -> list[dict]:
        drawn = []  # the choices come before the decoding, so that only the rows that the views show are decoded

        def choose_part(height: int, width: int) -> Part:
            reduction = self.transform.reduction(height, width)
            for view in views:
                drawn.append(self._draw(view, -(-height // reduction), -(-width // reduction)))
            return Part(reduction, self.transform.rows_needed([choices for _, choices in drawn]))

        pixels = decode_image(row["image"], choose_part)
        examples = []
        for view, (view_seed, choices), place in zip(views, drawn, out, strict=False):
            place[...] = self.transform.apply(pixels, choices)
            known_by = {"view_seeds": view_seed, "view_ids": _epoch_and_position(view)}
            examples.append({"pixel_values": place, "labels": row["label"]} | known_by)
        return examples

    def _draw(self, view: int, height: int, width: int) -> tuple[int, ViewParameters]:
        """Draw the view's seed for the operations on the device, and its choices for an image of this size."""
        epoch, position = _epoch_and_position(view)
        self._rng.seed(self.seed << 96 | epoch << 64 | position)  # several times faster than seeding NumPy
        view_seed = self._rng.getrandbits(63)
        return view_seed, self.transform.sample(height, width, self._rng)


class EvalViews(torch.utils.data.Dataset):
    """One view of each evaluation image, without augmentation; `transform` comes from [`build_eval_transform`].

    Raises:
        ValueError: on indexing, if the image is damaged. An evaluation skips no image.
    """

    def __init__(self, images: Any, transform: Callable):
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        row = self.images[index]
        try:
            image = decode_image(row["image"])
        except DamagedImage as damage:
            raise UserError(
                f"evaluation image number {index} (path {_path(row)}) is damaged: {damage}. Evaluation skips no "
                "image, because that would change the accuracy: replace the file, or remove the image from the dataset"
            ) from damage
        return {"pixel_values": self.transform(image), "labels": row["label"]}


def _epoch_and_position(view: int) -> tuple[int, int]:
    return getattr(view, "epoch", 0), getattr(view, "position", int(view))


def _rows(images: Any, indices: list[int]) -> list[dict]:
    """Fetch several rows, in one call if `images` supports it, as PyTorch's loader does."""
    if hasattr(images, "__getitems__"):
        return images.__getitems__(indices)
    return [images[index] for index in indices]


def _path(row: dict) -> str | None:
    return (row["image"] or {}).get("path")


def collate_views(examples: list[dict]) -> dict[str, Tensor | np.ndarray | list]:
    """Collate examples into one batch.

    Returns:
        `pixel_values`: `(batch, 3, height, width)` uint8 in channels-last memory.
        `labels`: `(batch,)` int64; for ImageNet-ReaL the lists of labels, unchanged.
        `view_seeds`: training only, `(batch,)` int64, a NumPy array because the host reads it.
        `view_ids`: training only, `(batch, 2)` int64, epoch and position, a NumPy array as well.
        `bad_images`: only if images were replaced, the examples' lists joined.
    """
    if isinstance(examples, ViewBatch):
        pixels = torch.from_numpy(examples.pixels)
    else:
        pixels = default_collate([torch.from_numpy(example["pixel_values"]) for example in examples])
    labels = [example["labels"] for example in examples]
    batch = {
        "pixel_values": pixels.permute(0, 3, 1, 2),
        "labels": labels if isinstance(labels[0], list) else torch.tensor(labels),
    }
    for name in ("view_seeds", "view_ids"):
        if name in examples[0]:
            batch[name] = np.array([example[name] for example in examples])
    bad_images = [bad for example in examples for bad in example.get("bad_images", ())]
    if bad_images:
        batch["bad_images"] = bad_images
    return batch


class LoadedViews(NamedTuple):
    """Everything that a run needs to know about its images.

    Attributes:
        train: augmented views of the training images.
        eval: plain views of the evaluation images; None if there is nothing to evaluate on.
        id2label: class names by number.
        processor: image processor that turns an image into an evaluation view, for the model's repository.
        images: the images themselves, and where they come from.
    """

    train: TrainViews
    eval: EvalViews | None
    id2label: dict[int, str]
    processor: DeiTImageProcessor
    images: LoadedImages


def load_views(data_args: DataArguments, *, seed: int = 42, rows: Any = None, **transform_options) -> LoadedViews:
    """Load a dataset as views to train on and to evaluate on.

    Args:
        data_args: the images and their size.
        seed: seed of the views; in a run [`DistillationConfig.view_seed`].
        rows: the dataset itself, see [`load_image_dataset`].
        transform_options: arguments of [`build_train_transform`]; in a run [`DistillationConfig.transform_options`].

    Raises:
        ValueError: if [`load_image_dataset`] or one of the transforms raises it.
    """
    images = load_image_dataset(**data_args.loading(), rows=rows)
    train = TrainViews(images["train"], build_train_transform(data_args.image_size, **transform_options), seed)
    transform = build_eval_transform(data_args.image_size, crop_ratio=data_args.crop_ratio)
    id2label = dict(enumerate(images["train"].features["label"].names))
    held_out = EvalViews(images["eval"], transform) if "eval" in images else None
    return LoadedViews(train, held_out, id2label, build_image_processor(transform), images)


def difference_of_views(
    rows: Any, change: Callable[[bytes], bytes], image_size: int = 224, num_images: int = 64
) -> dict[str, float]:
    """Measure how far views move if another file of each image is stored.

    Args:
        rows: images, as [`load_image_dataset`] returns them; evenly spread ones are compared, damaged ones left out.
        change: from the bytes of an image file to those of the other one.
        image_size: side of the views in pixels.
        num_images: number of images, with one view of each kind.

    Returns:
        Mean absolute difference of the pixels, in levels of 255, as means over the images and as the largest of one
        image: "evaluation", "evaluation, largest", and of the same random resized crops (to half a pixel of the image
        that is stored), without flips and RandAugment, "training" and "training, largest". Empty if no image could be
        decoded.
    """
    to_eval = build_eval_transform(image_size)
    to_train = build_train_transform(image_size, auto_augment=None, color_jitter=None, horizontal_flip=0)
    numbers = np.unique(np.linspace(0, len(rows) - 1, num_images).astype(int)).tolist()
    levels = []
    for number in numbers:
        try:
            data = read_encoded(rows[number]["image"] or {})
            images = [decode_image({"bytes": each, "path": None}) for each in (data, change(data))]
        except DamagedImage:
            continue
        drawn = to_train.sample(images[0].shape[0], images[0].shape[1], np.random.default_rng(number))
        crops = [drawn] * 2
        if to_train.crop != "padded":  # the box of a padded crop lies in the image of the right size
            down, across = (b / a for a, b in zip(images[0].shape[:2], images[1].shape[:2], strict=True))
            top, left, height, width = drawn.box
            box = Box(round(top * down), round(left * across), round(height * down) or 1, round(width * across) or 1)
            crops = [drawn, drawn._replace(box=box)]
        views = [(to_eval(image), to_train.apply(image, crop)) for image, crop in zip(images, crops, strict=True)]
        levels.append([np.abs(x.astype(int) - y).mean() for x, y in zip(*views, strict=True)])
    if not levels:
        return {}
    (evaluation, training), (worst, worst_training) = np.mean(levels, 0).tolist(), np.max(levels, 0).tolist()
    return {
        "evaluation": evaluation,
        "evaluation, largest": worst,
        "training": training,
        "training, largest": worst_training,
    }
