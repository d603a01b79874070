"""Run one classifier over a dataset: the best classes and the loss of each image and head.

Not here: loading the classifier (`classifier.py`), the report of several models (`report.py`).

Source: arXiv 2006.07159 for labels in lists (ReaL).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..augmentation.mixing import normalize
from ..augmentation.transforms import build_eval_transform
from ..data.views import EvalViews, collate_views
from ..errors import UserError
from ..processes import current_process
from .accuracy import accuracy_by_class, balanced_accuracy, class_sizes, top_classes
from .classifier import Classifier
from .metrics import ReaLAccuracy, TopKAccuracy


@dataclass(frozen=True)
class Predictions:
    """The predictions of one classifier for a dataset, in the order of the images.

    Attributes:
        name: the classifier's.
        image_size: side of the views, pixels.
        crop_ratio: share of the shorter side that was kept, in (0, 1].
        best_classes: by head, int64 `(samples, min(5, classes))`, best first.
        losses: by head, float32 `(samples,)`, nats: minus the log of the probability of the label. The probabilities
            of several labels are added; the loss of an image without a label is NaN.
        labels: int64 `(samples,)`; for datasets such as ReaL a list of class numbers for each image, possibly empty.
    """

    name: str
    image_size: int
    crop_ratio: float
    best_classes: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    labels: np.ndarray | list[list[int]]

    def labelled(self) -> np.ndarray:
        """The images that have a label and so count, as bool `(samples,)`."""
        if isinstance(self.labels, list):
            return np.array([len(labels) > 0 for labels in self.labels])
        return np.ones(len(self.labels), dtype=bool)

    def accuracy(self) -> dict[str, dict[str, float]]:
        """`top1` and `top5` (fractions) and the mean `loss` (nats) of each head, over the images that have a label.

        Where the classes are uneven (see [`class_sizes`]) also `balanced_accuracy`.
        """
        metric = ReaLAccuracy() if isinstance(self.labels, list) else TopKAccuracy()
        counted = self.labelled()
        measured = {
            head: metric.compute(predictions=classes, references=self.labels)
            | {"loss": float(self.losses[head][counted].mean(dtype=np.float64))}
            for head, classes in self.best_classes.items()
        }
        if not isinstance(self.labels, list) and class_sizes(self.labels) is not None:
            for head, classes in self.best_classes.items():
                measured[head]["balanced_accuracy"] = balanced_accuracy(classes[:, 0], self.labels)
        return measured

    def by_class(self, head: str) -> dict[int, dict[str, float]]:
        """`accuracy` (a fraction) and number of `images` of each class, the worst first; empty where classes are even.

        Args:
            head: a key of `best_classes`.
        """
        if isinstance(self.labels, list) or (sizes := class_sizes(self.labels)) is None:
            return {}
        accuracy = accuracy_by_class(self.best_classes[head][:, 0], self.labels)
        return {
            number: {"accuracy": accuracy[number], "images": int(sizes[number])}
            for number in sorted(accuracy, key=lambda number: accuracy[number])
        }


def predict(
    classifier: Classifier,
    images: Sequence[dict],
    *,
    crop_ratio: float | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
) -> Predictions:
    """Run a classifier over images. Under `accelerate launch` each process runs its share and returns all predictions.

    Logits stay on the device; only the best classes and the losses are copied from it.

    Args:
        classifier: from [`load_classifier`]; it is moved to the device.
        images: with the columns `image` and `label`, as [`load_image_dataset`] returns them.
        crop_ratio: share of the shorter side that the centre crop keeps; by default the classifier's, or that of
            [`build_eval_transform`] if the classifier's is unknown.
        batch_size: images per batch in each process.
        num_workers: processes that decode the images.
        device: by default this process's GPU, or the CPU without one.

    Raises:
        ValueError: there are no images, or one is damaged.
    """
    if not len(images):
        raise UserError("there are no images to evaluate on")
    state = current_process()
    device = torch.device(device or str(state.device))
    ratio = classifier.crop_ratio if crop_ratio is None else crop_ratio
    transform = build_eval_transform(classifier.image_size, crop_ratio=ratio)
    share = range(state.process_index, len(images), state.num_processes)
    loader = DataLoader(
        Subset(EvalViews(images, transform), share),
        batch_size,
        num_workers=num_workers,
        collate_fn=collate_views,
        pin_memory=device.type == "cuda",
    )
    classifier.to(device)
    batches = []
    for batch in loader:
        pixels, labels = batch["pixel_values"].to(device, non_blocking=True), batch["labels"]
        outputs = classifier(normalize(pixels, classifier.mean, classifier.std))
        targets = labels.to(device) if isinstance(labels, Tensor) else _as_mask(labels, outputs["class"])
        results = {
            head: (top_classes(logits).cpu().numpy(), _losses(logits, targets)) for head, logits in outputs.items()
        }
        numbers, share = share[: len(labels)], share[len(labels) :]
        batches.append((numbers, results, labels.tolist() if isinstance(labels, Tensor) else labels))

    batches = gather_object(batches)  # the batches of all processes, one process after another
    order = np.argsort([number for numbers, _, _ in batches for number in numbers])
    labels = [label for _, _, labels in batches for label in labels]
    labels = [labels[position] for position in order]

    def whole(part: int) -> dict[str, np.ndarray]:
        heads = classifier.heads  # and not those of a batch: this process may have had none
        return {head: np.concatenate([results[head][part] for _, results, _ in batches])[order] for head in heads}

    return Predictions(
        name=classifier.name,
        image_size=transform.image_size,
        crop_ratio=transform.crop_ratio,
        best_classes=whole(0),
        losses=whole(1),
        labels=labels if isinstance(labels[0], list) else np.array(labels),
    )


def _as_mask(labels: list[list[int]], logits: Tensor) -> Tensor:
    """`(batch, classes)` bool, true for the classes among an image's labels."""
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for row, classes in zip(mask, labels, strict=True):
        row[classes] = True
    return mask.to(logits.device)


def _losses(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Minus the log of the labels' probability, `(batch,)` float32; `targets` are `(batch,)` labels or a mask."""
    if targets.dtype != torch.bool:
        return F.cross_entropy(logits, targets, reduction="none").cpu().numpy()
    log_probabilities = F.log_softmax(logits, dim=-1).masked_fill(~targets, -math.inf)
    return (-log_probabilities.logsumexp(dim=-1)).masked_fill(~targets.any(dim=-1), math.nan).cpu().numpy()
