"""From a dataset's name to its images: encoded bytes and labels, decoded by nobody yet.

`load_image_dataset` finds the images (registry name, local directory or Hub id) and gives them two columns, `image`
and `label`; views.py makes batches of them. Only this file imports datasets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


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
