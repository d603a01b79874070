"""From a dataset's name to batches of augmented views.

`load_image_dataset` finds the images (registry name, local directory or Hub id) and gives them two columns, `image`
(encoded bytes) and `label`; `TrainViews` and `EvalViews` decode and augment them; `collate_views` makes the batch.
Pixels stay uint8 until they are on the device (mixing.py). Only this file imports datasets.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from transformers import DeiTImageProcessor

from .augmentation import IMAGENET_MEAN, IMAGENET_STD, EvalTransform


@dataclass(frozen=True)
class RegisteredDataset:
    """What must be known of a dataset to load it by its short name.

    Attributes:
        hub_id: repository on the Hub, or None for a set that `build` makes offline.
        label_column: of a set with several kinds of labels; other columns are told from their types.
        build: makes the two splits without network.
    """

    hub_id: str | None = None
    label_column: str | None = None
    build: Callable[[], datasets.DatasetDict] | None = None


def _handwritten_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 digits, 8x8 grey, one fifth of each class held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    train, held_out = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [Image.fromarray(image) for image in pixels[rows]], "label": digits.target[rows]}, features
            )
            for split, rows in (("train", train), ("test", held_out))
        }
    )


REGISTRY = {
    "digits": RegisteredDataset(build=_handwritten_digits),
    "fashion-mnist": RegisteredDataset("zalando-datasets/fashion_mnist"),
    "cifar10": RegisteredDataset("uoft-cs/cifar10"),
    "cifar100": RegisteredDataset("uoft-cs/cifar100", label_column="fine_label"),
    "imagenet-1k": RegisteredDataset("ILSVRC/imagenet-1k"),
}

# Names that mean "the held-out part", best first, where nobody said which split to evaluate on.
EVAL_SPLITS = ("validation", "val", "valid", "test")


def load_image_dataset(
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Loads a labelled image set as `{"train", "eval"}`, each with the columns `image` and `label`.

    Args:
        name: a name of [`REGISTRY`], a local directory (parquet files whose names begin with their split, or one
            folder per split holding one folder of images per class), or a Hub id.
        image_column, label_column: needed only where the set has several columns of that kind.
        train_split, eval_split: default to "train" and to the first of validation, val, valid, test that exists.
        max_train_samples, max_eval_samples: keep a random subset of that many images, the same for the same seed.
        seed: of the subsets.

    Returns:
        `image` is undecoded (`{"bytes", "path"}`); `label` is a `ClassLabel` with the class names.

    Raises:
        ValueError: nothing found under that name, no images in the directory, a split or column that isn't there.
    """
    entry = REGISTRY.get(name, RegisteredDataset())
    if entry.build is not None:
        splits = entry.build()
    elif Path(name).expanduser().is_dir():
        splits = _load_directory(Path(name).expanduser())
    else:
        splits = _load_from_hub(name, entry)
    eval_split = eval_split or next((split for split in EVAL_SPLITS if split in splits), EVAL_SPLITS[0])
    chosen = {
        "train": _choose_split(splits, train_split or "train", "train_split", name),
        "eval": _choose_split(splits, eval_split, "eval_split", name),
    }
    label_column = label_column or entry.label_column
    chosen = {split: _with_two_columns(rows, image_column, label_column, name) for split, rows in chosen.items()}
    if chosen["train"].features["label"].names != chosen["eval"].features["label"].names:
        raise ValueError(
            f"{name!r}: the classes of {chosen['train'].split} ({chosen['train'].features['label'].num_classes}) and "
            f"{chosen['eval'].split} ({chosen['eval'].features['label'].num_classes}) differ; both need the same"
        )
    for split, limit in (("train", max_train_samples), ("eval", max_eval_samples)):
        if limit is not None and limit < 1:
            raise ValueError(f"max_{split}_samples is {limit}; use a positive number, or leave it out for all images")
        if limit is not None and limit < len(chosen[split]):
            rows = np.random.default_rng(seed).permutation(len(chosen[split]))[:limit]
            chosen[split] = chosen[split].select(rows)
    return datasets.DatasetDict(chosen)


def _load_from_hub(name: str, entry: RegisteredDataset) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(entry.hub_id or name)
    except Exception as error:  # datasets, huggingface_hub and fsspec each raise their own for "not there"
        raise ValueError(
            f"dataset {name!r} could not be loaded: it is no local directory, and the Hub said "
            f"{type(error).__name__}: {str(error).splitlines()[0]}. Give the path of a directory of images or "
            "parquet files, or check the name and the network"
        ) from error


def _load_directory(directory: Path) -> datasets.DatasetDict:
    parquet_files: dict[str, list[str]] = {}
    for file in sorted(directory.rglob("*.parquet")):
        # train.parquet, train-00000-of-00002.parquet, test/0000.parquet
        stem = file.stem if file.parent == directory or not file.stem[0].isdigit() else file.parent.name
        parquet_files.setdefault(re.split(r"[-_.]", stem)[0], []).append(str(file))
    if parquet_files:
        return datasets.load_dataset("parquet", data_files=parquet_files)
    try:
        return datasets.load_dataset("imagefolder", data_dir=str(directory))
    except Exception as error:  # an empty directory ends in one of several internal errors
        raise ValueError(
            f"no images found in {str(directory)!r}: expected parquet files such as train.parquet and test.parquet, "
            "or folders such as train/<class>/<image>.jpg and val/<class>/<image>.jpg"
        ) from error


def _choose_split(splits: Mapping, split: str, option: str, name: str) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(f"{name!r} has no split {split!r}; it has {', '.join(splits)}: choose one with {option}")
    if len(splits[split]) == 0:
        raise ValueError(f"{name!r}: the split {split!r} holds no images; check the path")
    return splits[split]


def _choose_column(rows: datasets.Dataset, column: str | None, fits: Callable, kind: str, name: str) -> str:
    listing = f"{name!r} has the columns {', '.join(rows.column_names)}"
    if column is not None:
        if column not in rows.column_names:
            raise ValueError(f"no column {column!r}: {listing}; set {kind}_column to one of them")
        return column
    candidates = [name for name, feature in rows.features.items() if fits(name, feature)]
    if len(candidates) != 1:
        found = f"{len(candidates)} of them could be" if candidates else "none of them is recognised as"
        raise ValueError(f"{listing}, {found} the {kind} column: name it with {kind}_column")
    return candidates[0]


def _with_two_columns(
    rows: datasets.Dataset, image_column: str | None, label_column: str | None, name: str
) -> datasets.Dataset:
    image_column = _choose_column(
        rows, image_column, lambda _, feature: isinstance(feature, datasets.Image), "image", name
    )
    label_column = _choose_column(
        rows,
        label_column,
        lambda column, feature: isinstance(feature, datasets.ClassLabel) or column in ("label", "labels"),
        "label",
        name,
    )
    rows = rows.select_columns([image_column, label_column])
    rows = rows.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    if not isinstance(rows.features["label"], datasets.ClassLabel):
        rows = rows.class_encode_column("label")
    return rows.cast_column("image", datasets.Image(decode=False))


def decode_image(encoded: Mapping) -> np.ndarray:
    """One image as RGB.

    Args:
        encoded: `{"bytes": bytes or None, "path": str or None}`, any format and mode Pillow reads: grey, palette,
            CMYK, alpha (dropped), 16 bits (scaled down, not clipped).

    Returns:
        `(height, width, 3)` uint8, turned upright where the EXIF data says so, as Transformers' pipelines do.
    """
    source = io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"]
    with Image.open(source) as image:
        try:
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies upright images too
                image = ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF says nothing about the pixels (one such image is in ImageNet-1k)
            pass
        if image.mode.startswith("I"):  # Pillow would clip 16 bits to 255
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))


class TrainViews(torch.utils.data.Dataset):
    """Augmented views of a training set; index it with a [`View`] (a plain index is that view of epoch 0).

    A view is a pure function of `(seed, epoch, position)`: the process, the worker and what came before don't matter.

    Args:
        images: with the columns `image` and `label`, as [`load_image_dataset`] returns them.
        transform: from [`build_train_transform`]; called with the image and the view's random generator.
        seed: of all views.
    """

    def __init__(self, images: datasets.Dataset, transform: Callable, seed: int = 0):
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

    def __init__(self, images: datasets.Dataset, transform: Callable):
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
