"""Which class a label stands for: the same classes, in the same order, in all splits; what is none is refused.

Labels outside the classes of the model are refused before training and in every batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ..errors import UserError, some_of
from .folders import sort_classes
from .registry import RegisteredDataset
from .streaming import StreamedImages


logger = logging.getLogger(__name__)


class CheckedLabels:
    """Collator that checks the labels of each batch before they are moved to the device.

    Args:
        collate: the collator to wrap.
        num_labels: number of classes.

    Raises:
        ValueError: when called, if a label is not a whole number in [0, num_labels).
    """

    def __init__(self, collate: Callable[[list], dict], num_labels: int):
        self.collate = collate
        self.num_labels = num_labels

    def __call__(self, examples: list) -> dict:
        batch = self.collate(examples)
        labels = batch.get("labels")
        if labels is None:
            return batch
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.dtype != torch.int64:
            got = f"a {type(labels).__name__}"
            if isinstance(labels, Tensor):
                got = f"{labels.dtype} {tuple(labels.shape)}"
            raise UserError(
                f"the labels of a batch are {got}; expected whole numbers, one per image: int64 ({len(examples)},). "
                "Check label_column and the collator"
            )
        _refuse_labels(labels.numpy(), self.num_labels, "of a batch")
        return batch


def labels_of(images: Any) -> np.ndarray | None:
    """Return the labels of all images, `(images,)` int64, without decoding one; None where they are not at hand.

    Args:
        images: as [`load_image_dataset`] returns them, or rows in a list. The labels of a stream are not at hand.
    """
    if isinstance(images, datasets.Dataset):
        labels = labels_in(images)
    else:
        labels = [row["label"] for row in images] if isinstance(images, (list, tuple)) else []
    return np.asarray(labels, np.int64) if len(labels) else None


def all_labels_of(dataset: Any, option: str) -> np.ndarray:
    """Return the labels of a training set, `(images,)` int64, for an option that cannot do without them.

    Raises:
        ValueError: the labels are not at hand, as those of a stream.
    """
    labels = labels_of(getattr(dataset, "images", ()))
    if labels is None:
        raise UserError(
            f"{option} needs the labels of all training images, and this training set does not have them at hand (a "
            f"stream would have to be downloaded for them). Leave out {option}, or streaming"
        )
    return labels


def check_labels(images: Any, num_labels: int, part: str) -> None:
    """Check all labels of a dataset before training; the labels of a stream or a list are checked batch by batch.

    Args:
        images: as [`load_image_dataset`] returns them.
        num_labels: number of classes.
        part: "training" or "evaluation".

    Raises:
        ValueError: a label is not a whole number in [0, num_labels).
    """
    if not hasattr(images, "with_format"):
        return
    labels = images.data.column("label").to_numpy()  # for a subset, this includes the images left out
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"the labels of the {part} images are {labels.dtype}; expected whole numbers in [0, {num_labels}), one "
            "per image. Check label_column"
        )
    if len(_out_of_range(labels, num_labels)):
        _refuse_labels(images.with_format("numpy")["label"][:], num_labels, f"of the {part} images")


def _refuse_labels(labels: np.ndarray, num_labels: int, of: str) -> None:
    bad = _out_of_range(labels, num_labels)
    if len(bad):
        raise UserError(
            f"image number {bad[0]} {of} has the label {labels[bad[0]]}, but the {num_labels} classes are 0 to "
            f"{num_labels - 1} ({len(bad)} of {len(labels)} labels are outside). Check that the split has labels (-1 "
            "means none), label_column, and the number of classes of the model (id2label)"
        )


def _out_of_range(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Return the positions of the labels that are outside [0, num_labels)."""
    return np.flatnonzero((labels < 0) | (labels >= num_labels))


# --- the classes of a dataset --------------------------------------------------------------------------------------


def hold_out(labels: np.ndarray, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Choose a share of the images of each class at random, the same for the same labels and seed.

    Args:
        labels: class of each image, `(images,)` int64.
        fraction: share to hold out, in (0, 1). Of a class with at least two images, at least one is held out and at
            least one is kept; the only image of a class is kept.

    Returns:
        Positions of the images that are kept and of those that are held out, both in rising order.
    """
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares = np.minimum(np.maximum(np.rint(sizes * fraction), 1), sizes - 1).astype(int)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(classes[order], kind="stable")]  # the images of each class together, in random order
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    is_held_out = rank < np.repeat(shares, sizes)
    return np.sort(order[~is_held_out]), np.sort(order[is_held_out])


def class_names_of(rows: datasets.Dataset) -> list[str]:
    """The names of all classes, in the order of their numbers; of lists of labels too."""
    label = rows.features["label"]
    return (label.feature if isinstance(label, datasets.List) else label).names


def labels_in(rows: datasets.Dataset) -> np.ndarray:
    """Return the labels as `(images,)` int64; `rows["label"]` of a subset would slice the table image by image."""
    labels = rows.data.column("label").to_numpy()
    return labels if rows._indices is None else labels[rows._indices.column(0).to_numpy()]


def count_by_class(rows: Any, num_classes: int) -> np.ndarray | None:
    """Count the images of each class, `(classes,)`; None for a stream and for lists of labels, which nobody counts."""
    if isinstance(rows, StreamedImages) or isinstance(rows.features["label"], datasets.List):
        return None
    labels = labels_in(rows)
    return np.bincount(labels[(labels >= 0) & (labels < num_classes)], minlength=num_classes)


def check_number_of_classes(rows: Any, name: str, split: str) -> None:
    """Refuse a training set whose images are of fewer than two classes.

    Raises:
        UserError: it is.
    """
    names = class_names_of(rows)
    counts = count_by_class(rows, len(names))
    found = names if counts is None else [label for label, count in zip(names, counts, strict=True) if count]
    if len(found) < 2:
        raise UserError(
            f"{name!r}: {len(found)} class found in {split}: {some_of([repr(label) for label in found])}; "
            "at least 2 are needed. In a directory expected train/<class>/<image>.jpg with a folder for each class"
        )


def warn_of_classes_not_trained(chosen: Mapping[str, Any], used: Mapping[str, str]) -> None:
    """Warn of classes that are evaluated and have no training image."""
    if "train" not in chosen or "eval" not in chosen:
        return
    names = class_names_of(chosen["train"])
    train, held_out = (count_by_class(chosen[part], len(names)) for part in ("train", "eval"))
    if train is None or held_out is None:
        return
    if missing := [label for label, a, b in zip(names, train, held_out, strict=True) if b and not a]:
        logger.warning(
            "%d classes of %s have no image in %s, such as %s: the model cannot learn them. A slice of images that "
            "are sorted by class leaves classes out; eval_fraction holds out images of every class",
            *(len(missing), used["eval"], used["train"], some_of([repr(label) for label in missing])),
        )


def values_of_classes(
    rows: datasets.Dataset, entry: RegisteredDataset | None, name: str
) -> tuple[list, Sequence[str]]:
    """Return the values of a column of plain numbers or words, in the order of the classes, and the class names."""
    if not isinstance(rows.features["label"], datasets.Value):
        return class_names_of(rows), class_names_of(rows)
    values = rows.unique("label")
    _refuse_labels_without_meaning(values, rows, name)
    if all(isinstance(value, int) for value in values):
        if entry is not None and max(values) < entry.num_classes:
            return list(range(entry.num_classes)), entry.class_names or list(map(str, range(entry.num_classes)))
        values = sorted(values)
    else:
        values = sort_classes(values)
    return values, list(map(str, values))


def _refuse_labels_without_meaning(values: Sequence, rows: datasets.Dataset, name: str) -> None:
    """Refuse what is no class number and no word, naming the first image that has it."""

    def refuse(value: Any, why: str) -> None:
        column = rows.with_format("arrow")["label"][:].combine_chunks()
        number = pc.index(pc.is_null(column), True) if value is None else pc.index(column, value)
        raise UserError(f"{name!r}: image number {number} of the split {rows.split} has the label {value!r}, {why}")

    for value in values:
        if value is None or (isinstance(value, str) and not value.strip()):
            refuse(value, "which is none; remove the images without a label from the dataset, or label them")
        if isinstance(value, int) and value < 0:
            refuse(
                value,
                "and a negative number usually means that there is none; remove these images, or number the "
                "classes from 0",
            )
        if not isinstance(value, (int, str)):
            refuse(
                value,
                f"of the type {rows.features['label'].dtype}; expected whole numbers or words: store the "
                "names of the classes, or set label_column to another column",
            )


def in_the_order_of(names: list[str], rows: datasets.Dataset, name: str, splits: tuple[str, str]) -> datasets.Dataset:
    """Number the classes of `rows` as in `names`, by their names."""
    own = class_names_of(rows)
    if own == names:
        return rows
    missing, extra = ([x for x in a if x not in set(b)] for a, b in ((names, own), (own, names)))
    if missing or extra:
        differences = [
            f"{split} has {len(classes)} classes that {other} lacks, {some_of([repr(label) for label in classes])}"
            for split, other, classes in ((*splits, missing), (*reversed(splits), extra))
            if classes
        ]
        raise UserError(
            f"{name!r}: the classes of {splits[0]} ({len(names)}) and {splits[1]} ({len(own)}) differ; both splits "
            f"need the same classes: {' and '.join(differences)}"
        )
    column = rows.with_format("arrow")["label"][:].cast(pa.int64())
    number = {label: old for old, label in enumerate(own)}
    labels = pc.index_in(column, pa.array([number[label] for label in names], pa.int64())).cast(pa.int64())
    labels = pc.if_else(pc.is_null(labels), column, labels)  # no label of a class: refused where labels are checked
    return rows.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=names))


def with_class_names(
    rows: datasets.Dataset, values: Sequence, class_names: Sequence[str], name: str
) -> datasets.Dataset:
    """Number the labels by the position of their value in `values`, under these class names.

    Raises:
        UserError: a label is none of the values, or of another kind.
    """
    if not isinstance(rows.features["label"], datasets.Value):
        return rows
    column = rows.with_format("arrow")["label"][:]
    if pa.types.is_integer(column.type):
        column = column.cast(pa.int64())  # the stored type may be too small for all classes
    numbers = pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
    if len(values) and numbers != isinstance(values[0], int):
        if not all(value.isdecimal() for value in map(str, values)):
            raise UserError(
                f"{name!r}: the labels of {rows.split} are {column.type}, but the classes are called "
                f"{some_of(list(class_names))}; expected labels of one kind in both splits: store them as names"
            )
        column = column.cast(pa.string())
        values = list(map(str, values))
    labels = pc.index_in(column, pa.array(values, column.type))
    if labels.null_count:
        unknown = pc.unique(column.filter(pc.is_null(labels))).to_pylist()
        raise UserError(
            f"{name!r}: {rows.split} has {len(unknown)} classes that the training images don't have, such as "
            f"{', '.join(map(str, unknown[:3]))}; both splits need the same classes"
        )
    feature = datasets.ClassLabel(names=list(class_names))
    return rows.remove_columns("label").add_column("label", labels.cast(pa.int64()), feature=feature)
