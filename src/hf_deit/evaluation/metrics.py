"""Top-k accuracy, with one label or several (ReaL), and disagreement, as `evaluate.Metric` modules without network.

`evaluate.load("accuracy")` fetches its script from the network and wants all logits (40 s for the 50,000 x 1,000 of
ImageNet's validation set). The metrics here are part of the package, take the few best classes of each sample instead
of logits, and keep everything in memory: no network, and no cache file that two processes could both write.

Not here: the loss.
Source: Table 4 of Touvron et al. 2021 (arXiv 2012.12877) for the disagreement; its top-1 everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import evaluate
import numpy as np

# evaluate describes its inputs with three types of 🤗 datasets; imported from evaluate, they need no second door.
from evaluate.module import Features, Value
from evaluate.module import Sequence as ListOf

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


class _LocalMetric(evaluate.Metric):
    """A metric in memory, with `add_batch` and `compute` as in evaluate but without evaluate's files."""

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        # evaluate creates its cache folder here even for metrics in memory, which fails where the cache is read-only.
        return ""

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, float]:
        """Compute the metric of the arguments, or of everything that `add_batch` collected."""
        # Whole arrays skip evaluate's Arrow table, which encodes them value by value (0.6 s for 50,000 x 5).
        if predictions is not None and self.writer is None:
            compute: Any = self._compute
            return compute(predictions, references, **kwargs)
        return super().compute(predictions=predictions, references=references, **kwargs) or {}


class TopKAccuracy(_LocalMetric):
    """Share of the samples whose label is among the k best classes.

    `compute(predictions, references, top_k=(1, 5))`:
        predictions: `(samples, K)`, int, the K best classes of each sample, best first.
        references: `(samples,)`, int, the labels.
        top_k: the values of k. Those above K are left out.

    Returns:
        `{"top1": ..., "top5": ...}`, fractions in [0, 1].

    Raises:
        ValueError: if the shapes do not fit, or there are no samples.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-k accuracy from the k best classes.",
            citation="",
            inputs_description="predictions: (samples, K) class numbers, best first; references: (samples,) labels.",
            features=Features({"predictions": ListOf(Value("int64")), "references": Value("int64")}),
        )

    def _compute(self, predictions, references, top_k: Sequence[int] = (1, 5)) -> dict[str, float]:
        classes, labels = np.asarray(predictions), np.asarray(references)
        if classes.ndim != 2 or labels.shape != classes.shape[:1] or not classes.size:
            raise UserError(
                f"top-k accuracy got predictions {classes.shape} and references {labels.shape}; it needs "
                "(samples, K) class numbers, best first, and (samples,) labels, with at least one of each"
            )
        hits = classes == labels[:, None]
        return {f"top{k}": float(hits[:, :k].any(axis=1).mean()) for k in top_k if k <= classes.shape[1]}


class ReaLAccuracy(_LocalMetric):
    """Share of the samples one of whose labels is among the k best classes; samples without a label do not count.

    `compute(predictions, references, top_k=(1, 5))`:
        predictions: `(samples, K)`, int, the K best classes of each sample, best first.
        references: for each sample a list of labels, int, which may be empty.
        top_k: the values of k. Those above K are left out.

    Returns:
        `{"top1": ..., "top5": ...}`, fractions in [0, 1].

    Raises:
        ValueError: if the shapes do not fit, or no sample has a label.
    Source: "Are we done with ImageNet?" (arXiv 2006.07159), section 4: a prediction is right if it is one of the
        image's reassessed labels, and images without any are left out.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-k accuracy of samples with any number of labels.",
            citation="",
            inputs_description="predictions: (samples, K) class numbers, best first; references: lists of labels.",
            features=Features({"predictions": ListOf(Value("int64")), "references": ListOf(Value("int64"))}),
        )

    def _compute(self, predictions, references, top_k: Sequence[int] = (1, 5)) -> dict[str, float]:
        classes, counted = np.asarray(predictions), [len(labels) > 0 for labels in references]
        if classes.ndim != 2 or len(classes) != len(references) or not any(counted):
            raise UserError(
                f"ReaL accuracy got predictions {classes.shape} and {len(references)} lists of labels, "
                f"{sum(counted)} of them not empty; it needs (samples, K) class numbers, best first, and as many "
                "lists, at least one of them not empty"
            )
        hits = np.array([np.isin(row, labels) for row, labels in zip(classes, references, strict=True)])[counted]
        return {f"top{k}": float(hits[:, :k].any(axis=1).mean()) for k in top_k}


class Disagreement(_LocalMetric):
    """Share of the samples on which two predictors differ: two heads, student and teacher, or a head and the truth.

    `compute(predictions, references)`: both `(samples,)`, int, predicted classes. Their order does not matter.

    Returns:
        `{"disagreement": ...}`, a fraction in [0, 1].

    Raises:
        ValueError: if the shapes do not fit, or there are no samples.
    Source: Table 4, "the rate of different decisions".
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Rate of different decisions.",
            citation="",
            inputs_description="predictions, references: (samples,) class numbers.",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        one, other = np.asarray(predictions), np.asarray(references)
        if one.ndim != 1 or one.shape != other.shape or not one.size:
            raise UserError(
                f"disagreement got decisions of shapes {one.shape} and {other.shape}; "
                "it needs (samples,) class numbers twice, with at least one sample"
            )
        return {"disagreement": float((one != other).mean())}


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
        accuracy = TopKAccuracy().compute(predictions=best_classes[:, number], references=prediction.label_ids)
        prefix = "" if head == "fused" else f"{head}_"
        metrics |= {f"{prefix}{name}": value for name, value in accuracy.items()}
    labels: Any = prediction.label_ids
    if class_sizes(labels) is not None:
        metrics["balanced_accuracy"] = balanced_accuracy(best_classes[:, 0, 0], labels)
    return metrics
