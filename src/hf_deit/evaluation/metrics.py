"""Top-k accuracy, with one label or several (ReaL), and disagreement, as `evaluate.Metric` modules without network.

`evaluate.load("accuracy")` fetches its script from the network and wants all logits (40 s for the 50,000 x 1,000 of
ImageNet's validation set). The metrics here are part of the package, take the few best classes of each sample instead
of logits, and keep everything in memory: no network, and no cache file that two processes could both write.

Not here: the loss, and what the trainer measures (accuracy.py).
Source: Table 4 of Touvron et al. 2021 (arXiv 2012.12877) for the disagreement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

# evaluate describes its inputs with three types of 🤗 datasets; imported from evaluate, they need no second door.
from evaluate.module import Features, Value
from evaluate.module import Sequence as ListOf

from ..errors import UserError
from .accuracy import top_k_accuracy


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
    """Share of the samples whose label is among the k best classes: `compute(...)` is [`top_k_accuracy`]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-k accuracy from the k best classes.",
            citation="",
            inputs_description="predictions: (samples, K) class numbers, best first; references: (samples,) labels.",
            features=Features({"predictions": ListOf(Value("int64")), "references": Value("int64")}),
        )

    def _compute(self, predictions, references, top_k: Sequence[int] = (1, 5)) -> dict[str, float]:
        return top_k_accuracy(predictions, references, top_k)


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
