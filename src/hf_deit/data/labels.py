"""Labels that are no class of the model: found before training, and in every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


class CheckedLabels:
    """A collator that looks at the labels of each batch before they go to the device.

    Args:
        collate: the collator itself.
        num_labels: number of classes.

    Raises:
        ValueError: when called, a label is no whole number in [0, classes).
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
                f"the labels of a batch are {got}; expected whole numbers, one an image: int64 ({len(examples)},). "
                "Check the label column and the collator"
            )
        _refuse_labels(labels.numpy(), self.num_labels, "of a batch")
        return batch


def check_labels(images: Sequence[dict], num_labels: int, part: str) -> None:
    """Looks at all labels of a set before anything is trained; a stream or a plain list is looked at by the batch.

    Args:
        images: as [`load_image_dataset`] returns them.
        num_labels: number of classes.
        part: "training" or "evaluation".

    Raises:
        ValueError: a label is no whole number in [0, classes).
    """
    if not hasattr(images, "with_format"):
        return
    labels = images.data.column("label").to_numpy()  # of a subset, those that are left out as well
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"the labels of the {part} images are {labels.dtype}; expected whole numbers in [0, {num_labels}), one an "
            "image: check label_column"
        )
    if len(_out_of_range(labels, num_labels)):
        _refuse_labels(images.with_format("numpy")["label"][:], num_labels, f"of the {part} set")


def _refuse_labels(labels: np.ndarray, num_labels: int, of: str) -> None:
    bad = _out_of_range(labels, num_labels)
    if len(bad):
        raise UserError(
            f"image number {bad[0]} {of} has the label {labels[bad[0]]}, and there are {num_labels} classes, 0 to "
            f"{num_labels - 1} ({len(bad)} of {len(labels)} such labels): a split without labels (-1), another "
            "label_column, or a model with too few classes (id2label)"
        )


def _out_of_range(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Places of the labels that are no class."""
    return np.flatnonzero((labels < 0) | (labels >= num_labels))
