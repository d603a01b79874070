"""Reject labels outside the classes of the model, before training and in every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


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
    if hasattr(images, "with_format"):
        labels = images.with_format("numpy")["label"][:]
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
