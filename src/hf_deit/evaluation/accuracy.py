"""Accuracy from the few best classes of each sample: the numbers behind `metrics.py`, and the trainer's three heads.

Nothing here needs evaluate, whose import takes as long as a third of PyTorch's.

Source: top-1 as everywhere in Touvron et al. 2021 (arXiv 2012.12877).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import EvalPrediction

# The order of the heads in the trainer's predictions. A model with one head has the first only.
HEADS = ("fused", "class", "distillation")

TOP_K = 5

# The classes of a set are uneven if the largest has this many times the images of the smallest.
UNEVEN = 1.5


def top_classes(logits: Tensor) -> Tensor:
    """Return the best class numbers of `(..., classes)` logits, int64, best first, on the device.

    Returns:
        `(..., 5)`, or `(..., 1)` of five classes and fewer, where the best five are always right.
    """
    return logits.topk(TOP_K if logits.shape[-1] > TOP_K else 1, dim=-1).indices


def top_k_accuracy(predictions: Any, references: Any, top_k: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Return the share of the samples whose label is among the k best classes.

    Args:
        predictions: `(samples, K)`, int, the K best classes of each sample, best first.
        references: `(samples,)`, int, the labels.
        top_k: the values of k. Those above K are left out.

    Returns:
        `{"top1": ..., "top5": ...}`, fractions in [0, 1].

    Raises:
        ValueError: if the shapes do not fit, or there are no samples.
    """
    classes, labels = np.asarray(predictions), np.asarray(references)
    if classes.ndim != 2 or labels.shape != classes.shape[:1] or not classes.size:
        raise UserError(
            f"top-k accuracy got predictions {classes.shape} and references {labels.shape}; it needs "
            "(samples, K) class numbers, best first, and (samples,) labels, with at least one of each"
        )
    hits = classes == labels[:, None]
    return {f"top{k}": float(hits[:, :k].any(axis=1).mean()) for k in top_k if k <= classes.shape[1]}


def class_sizes(labels: np.ndarray | None) -> np.ndarray | None:
    """Return the images of each class, `(classes,)`, if the classes are uneven, else None.

    Args:
        labels: `(samples,)`, int; None when they are not known. Classes without a sample do not count.
    """
    if labels is None or not len(labels):
        return None
    sizes = np.bincount(labels)
    present = sizes[sizes > 0]
    return sizes if present.max() >= UNEVEN * present.min() else None


def accuracy_by_class(decisions: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """Return for each class that has samples the share of them that is recognised (the class's recall).

    Args:
        decisions: `(samples,)`, int, predicted classes.
        labels: `(samples,)`, int.
    """
    sizes = np.bincount(labels)
    hits = np.bincount(labels, weights=decisions == labels, minlength=len(sizes))
    return {int(number): float(hits[number] / sizes[number]) for number in np.flatnonzero(sizes)}


def balanced_accuracy(decisions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over the classes of their accuracy, a fraction; see [`accuracy_by_class`].

    Source: scikit-learn's `balanced_accuracy_score`.
    """
    return float(np.mean(list(accuracy_by_class(decisions, labels).values())))


def names_of_metrics(heads: int, num_classes: int, labels: np.ndarray | None) -> list[str]:
    """Return the names of what [`three_head_accuracy`] measures for so many heads and classes on a set of labels."""
    prefixes = ["" if head == "fused" else f"{head}_" for head in HEADS[:heads]]
    rates = ("top1", "top5") if num_classes > TOP_K else ("top1",)
    names = ["loss", *(f"{prefix}{rate}" for prefix in prefixes for rate in rates)]
    return names if class_sizes(labels) is None else [*names, "balanced_accuracy"]


def three_head_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The trainer's `compute_metrics`: accuracy of every head, and the loss.

    Args:
        prediction: `predictions` is the pair `(best_classes, losses)`: `(samples, H, K)`, int, the K best classes of
            each head, best first, heads in the order of `HEADS` (H = 3, or 1 for a model with one head), and
            `(samples,)`, float, each sample's cross-entropy in nats. `label_ids` is `(samples,)`, int.

    Returns:
        `loss` (mean), `top1` and `top5` (the fused prediction, or the only head), and with three heads `class_top1`,
        `class_top5`, `distillation_top1`, `distillation_top5`; no top-5 if K is smaller; where the classes are uneven
        also `balanced_accuracy`, of the fused prediction (see [`balanced_accuracy`]). The Trainer puts `eval_` before
        each name.

    Raises:
        ValueError: if H is neither 1 nor 3, or the numbers of samples differ.
    """
    predictions: Any = prediction.predictions
    best_classes, losses = predictions
    heads = best_classes.shape[1] if best_classes.ndim == 3 else 0
    if heads not in (1, len(HEADS)) or losses.shape != best_classes.shape[:1]:
        raise UserError(
            f"evaluation got best classes {best_classes.shape} and losses {losses.shape}; "
            f"it needs (samples, heads, K) with 1 or {len(HEADS)} heads, and (samples,)"
        )
    metrics = {"loss": float(losses.mean(dtype=np.float64))}
    for number, head in enumerate(HEADS[:heads]):
        accuracy = top_k_accuracy(best_classes[:, number], prediction.label_ids)
        prefix = "" if head == "fused" else f"{head}_"
        metrics |= {f"{prefix}{name}": value for name, value in accuracy.items()}
    labels: Any = prediction.label_ids
    if class_sizes(labels) is not None:
        metrics["balanced_accuracy"] = balanced_accuracy(best_classes[:, 0, 0], labels)
    return metrics
