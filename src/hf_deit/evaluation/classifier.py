"""Evaluation of any image classifier: ours, stock Transformers' or timm's, head by head, on any labelled images.

`load_classifier` reads a checkpoint in the forms that `load_teacher` takes, `predict` runs it over the images and
keeps the five best classes and the loss of each image and head, `Predictions.accuracy` counts. Every model sees the
images at its own size and crop ratio, with its own mean and deviation, unless told otherwise.

Not here: evaluation in the course of a training run (distillation_trainer.py), and what models do differently
(analysis.py). Images are always resized as in the paper (shorter side, bicubic, central square), also for models whose
makers squash the image or resize it bilinearly.

Source: section 5.2 of the paper (Table 3's class head, distillation head and fusion); facebookresearch/deit models.py
for the other fusion; arXiv 2006.07159 for labels in lists (ReaL).
"""

from __future__ import annotations

import inspect
import math
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from .. import __version__
from ..augmentation.mixing import normalize
from ..augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD, build_eval_transform
from ..data.views import EvalViews, collate_views
from ..models.classifiers import (
    FoundClassifier,
    Spec,
    class_names,
    class_order,
    find_classifier,
    fingerprint,
    first_line,
    logits_of,
    some_of,
)
from ..models.modeling_deit import DeiTPreTrainedModel, fuse_heads
from ..recipe import DataArguments, option
from .metrics import ReaLAccuracy, TopKAccuracy, top_classes


# What a model with two heads is asked for; the last two fuse both (see `fuse_heads`). A single head is a "class" head.
HEADS = ("class", "distillation", "softmax", "logits")


def load_classifier(
    spec: Spec, *, id2label: dict[int, str], image_size: int | None = None, trust_class_order: bool = False
) -> Classifier:
    """A classifier that answers in the order of a data set's classes.

    Classes are matched by name, as a teacher's are: the same set in another order is re-ordered. Where one side has no
    names (numbers, or LABEL_0, LABEL_1, ...), the i-th class is taken for the i-th.

    Args:
        spec: directory or Hub id, `timm:<name>`, `timm:<name>?checkpoint=<file>`, `python:<module>:<factory>`, or a
            module; see [`load_teacher`].
        id2label: the data set's classes.
        image_size: side in pixels to evaluate at, by default the model's own. Position embeddings are resized.
        trust_class_order: do not compare names: the model's i-th class is the data set's.

    Raises:
        ValueError: the spec cannot be read, weights are missing, the model returns no class logits or does not take
            that size, or its classes are not the data set's.
    """
    found = find_classifier(spec)
    own_size = found.image_size or (224, 224)
    if image_size is None and own_size[0] != own_size[1]:
        raise ValueError(f"model {found.name!r} reads images of {own_size}; views are square: pass image_size")
    return Classifier(found, image_size or own_size[0], id2label, trust_class_order)


class Classifier(nn.Module):
    """A frozen classifier in `eval()`, and what is needed to feed it. Made by [`load_classifier`].

    Attributes:
        name: the spec.
        model: what was loaded.
        heads: which of `HEADS` it answers with: all, or `("class",)`.
        own_head: the one that the model itself calls `logits`.
        image_size: side of its images, pixels.
        crop_ratio: share of the shorter side that its evaluation keeps; None: not known.
        mean, std: per channel, of pixels in [0, 1].
        classes_matched: how its classes were matched with the data set's, in words.
        sha256: fingerprint of the weights, as loaded.
    """

    def __init__(
        self, found: FoundClassifier, image_size: int, id2label: dict[int, str], trust_class_order: bool = False
    ):
        super().__init__()
        self.name = found.name
        self.sha256 = fingerprint(found.model)
        self.model = found.model.requires_grad_(False).to(memory_format=torch.channels_last)
        self.image_size = image_size
        self.crop_ratio = _without_rounding(found.crop_ratio, image_size)
        self.mean, self.std = found.mean or IMAGENET_MEAN, found.std or IMAGENET_STD
        self._options = {}
        self.register_buffer("class_order", None)
        self.eval()
        logits = self._try_size(found)
        order, self.classes_matched = _match_classes(found, logits["class"].shape[1], id2label, trust_class_order)
        if order is not None:
            self.class_order = torch.tensor(order)
        self.heads = HEADS if "distillation" in logits else HEADS[:1]
        fusion = getattr(getattr(self.model, "config", None), "head_fusion", "logits")
        self.own_head = fusion if len(self.heads) > 1 else "class"

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Logits, or log-probabilities, of each head.

        Args:
            pixel_values: float32 `(batch, 3, height, width)`, normalised with this model's mean and std.

        Returns:
            float32 `(batch, classes)` by head, in the data set's order of classes.
        """
        logits = {head: value.float() for head, value in self._logits(pixel_values).items()}
        if self.class_order is not None:
            logits = {head: value.index_select(1, self.class_order) for head, value in logits.items()}
        if "distillation" in logits:
            logits |= {way: fuse_heads(logits["class"], logits["distillation"], way) for way in HEADS[2:]}
        return logits

    def _logits(self, pixel_values: Tensor) -> dict[str, Tensor]:
        inner = getattr(self.model, "timm_model", self.model)
        if isinstance(getattr(inner, "head_dist", None), nn.Module):
            return self._logits_of_timm({"class": inner.head, "distillation": inner.head_dist}, pixel_values)
        output = self.model(pixel_values, **self._options)
        if getattr(output, "distillation_logits", None) is not None:
            return {"class": output.cls_logits, "distillation": output.distillation_logits}
        return {"class": logits_of(output)}

    def _logits_of_timm(self, heads: dict[str, nn.Module], pixel_values: Tensor) -> dict[str, Tensor]:
        """timm returns the mean of both heads alone: their own answers are overheard."""
        logits = {}
        hooks = [
            module.register_forward_hook(lambda *call, head=head: logits.update({head: call[-1]}))
            for head, module in heads.items()
        ]
        try:
            self.model(pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
        return logits

    @torch.no_grad()
    def _try_size(self, found: FoundClassifier) -> dict[str, Tensor]:
        """Make the model one for `image_size` and answer a blank image, so that what fails does so here."""
        size = self.image_size
        try:
            if found.image_size not in (None, (size, size)):
                self._resize()
            logits = self._logits(torch.zeros(1, 3, size, size))
        except Exception as error:  # whatever the foreign code raises
            raise ValueError(
                f"model {self.name!r} could not read a blank {size} x {size} image: {first_line(error)}. "
                f"Its own size is {found.image_size or 'not known'}"
            ) from error
        if logits["class"] is None or logits["class"].ndim != 2:
            raise ValueError(
                f"model {self.name!r} returns no class logits: give a classifier, not a feature extractor"
            )
        return logits

    def _resize(self) -> None:
        inner = getattr(self.model, "timm_model", self.model)
        if isinstance(inner, DeiTPreTrainedModel):  # ours; every model of Transformers has the method, as a refusal
            inner.resize_position_embeddings(self.image_size)
        elif hasattr(inner, "set_input_size"):  # timm's transformers
            inner.set_input_size(self.image_size)
        elif "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:  # stock's
            self._options = {"interpolate_pos_encoding": True}


@dataclass(frozen=True)
class Predictions:
    """What one classifier made of a set of images, in the order of the images.

    Attributes:
        name: the classifier's.
        image_size: side of the views, pixels.
        crop_ratio: share of the shorter side that was kept, in (0, 1].
        best_classes: by head, int64 `(samples, min(5, classes))`, best first.
        losses: by head, float32 `(samples,)`, nats: minus the log of the probability of the label. Of several labels
            the probabilities are added; without a label it is NaN.
        labels: int64 `(samples,)`; for sets such as ReaL a list of class numbers for each image, which may be empty.
    """

    name: str
    image_size: int
    crop_ratio: float
    best_classes: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    labels: np.ndarray | list[list[int]]

    def labelled(self) -> np.ndarray:
        """Which images have a label and count: bool `(samples,)`."""
        if isinstance(self.labels, list):
            return np.array([len(labels) > 0 for labels in self.labels])
        return np.ones(len(self.labels), dtype=bool)

    def accuracy(self) -> dict[str, dict[str, float]]:
        """By head `top1` and `top5`, fractions, and `loss`, the mean in nats, over the images that have a label."""
        metric = ReaLAccuracy() if isinstance(self.labels, list) else TopKAccuracy()
        counted = self.labelled()
        return {
            head: metric.compute(predictions=classes, references=self.labels)
            | {"loss": float(self.losses[head][counted].mean(dtype=np.float64))}
            for head, classes in self.best_classes.items()
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
    """Run a classifier over images. Under `accelerate launch` each process takes its share and all return the whole.

    Logits stay on the device; only the best classes and the losses leave it.

    Args:
        classifier: from [`load_classifier`]; it is moved to the device.
        images: with the columns `image` and `label`, as [`load_image_dataset`] returns them.
        crop_ratio: share of the shorter side that the centre crop keeps; by default the classifier's, and where that
            is not known that of [`build_eval_transform`].
        batch_size: of each process.
        num_workers: processes that decode the images.
        device: by default this process's GPU if there is one.

    Raises:
        ValueError: there are no images, or one is damaged.
    """
    if not len(images):
        raise ValueError("there are no images to evaluate on")
    state = _process()
    device = torch.device(device or state.device)
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

    batches = gather_object(batches)  # those of all processes, one process after another
    order = np.argsort([number for numbers, _, _ in batches for number in numbers])
    labels = [label for _, _, labels in batches for label in labels]
    labels = [labels[position] for position in order]

    def whole(part: int) -> dict[str, np.ndarray]:
        return {head: np.concatenate([results[head][part] for _, results, _ in batches])[order] for head in outputs}

    return Predictions(
        name=classifier.name,
        image_size=transform.image_size,
        crop_ratio=transform.crop_ratio,
        best_classes=whole(0),
        losses=whole(1),
        labels=labels if isinstance(labels[0], list) else np.array(labels),
    )


def _process() -> PartialState:
    """Which of how many processes this is. accelerate must be told that several are to talk without a GPU."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def _as_mask(labels: list[list[int]], logits: Tensor) -> Tensor:
    """`(batch, classes)` bool: which classes are among an image's labels."""
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for row, classes in zip(mask, labels, strict=True):
        row[classes] = True
    return mask.to(logits.device)


def _losses(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Minus the log of the labels' probability, `(batch,)` float32; targets are `(batch,)` labels or a mask."""
    if targets.dtype != torch.bool:
        return F.cross_entropy(logits, targets, reduction="none").cpu().numpy()
    log_probabilities = F.log_softmax(logits, dim=-1).masked_fill(~targets, -math.inf)
    return (-log_probabilities.logsumexp(dim=-1)).masked_fill(~targets.any(dim=-1), math.nan).cpu().numpy()


def _match_classes(
    found: FoundClassifier, num_labels: int, id2label: dict[int, str], trust_class_order: bool
) -> tuple[list[int] | None, str]:
    """For each class of the data set its number in the model (None: the same order), and how that is known."""
    wanted, own = class_names(id2label, keep_generic=True), found.names
    if num_labels != len(wanted):
        raise ValueError(
            f"model {found.name!r} knows {num_labels} classes{_such_as(own)}, the data set has {len(wanted)}"
            f"{_such_as(wanted)}. Evaluate it on its own classes, or fine-tune it on these first"
        )
    if trust_class_order:
        return None, "by position, as told"
    if own is None or _are_numbers(own):
        nameless = "the model has no class names"
    else:
        nameless = "the data set has no class names" if class_names(id2label) is None or _are_numbers(wanted) else None
    order = class_order(own, wanted) if own is not None else None
    if order is None and nameless is None:
        extra, missing = (sorted(set(one) - set(other)) or one for one, other in ((own, wanted), (wanted, own)))
        raise ValueError(
            f"model {found.name!r} has other classes{_such_as(extra)} than the data set{_such_as(missing)}. Fine-tune "
            "it on these first, or set trust_class_order if only the spelling differs"
        )
    if order is None:
        return None, f"by position: {nameless}"
    if order == sorted(order):
        return None, "by name"
    return order, "by name, re-ordered"


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name == str(number) for number, name in enumerate(names))


def _such_as(names: Sequence[str] | None) -> str:
    return f" ({some_of(names)})" if names else ""


def _without_rounding(crop_ratio: float | None, image_size: int) -> float | None:
    """A ratio such as 384 / 438, of which `int(384 / ratio)` must be 438 again and not 437."""
    if crop_ratio is None:
        return None
    exact = image_size / crop_ratio
    return math.nextafter(crop_ratio, 0) if int(exact) < round(exact, 6) == round(exact) else crop_ratio


# --- what run_eval.py reads and writes -----------------------------------------------------------------------------


@dataclass
class EvaluationArguments(DataArguments):
    """Which models to evaluate on which images. Lists may be written with blanks or with commas."""

    models: list[str] | None = option(
        None, "Directories, Hub ids, timm:<name>[?checkpoint=path] or python:<module>:<factory>."
    )
    image_size: list[str] | None = option(None, "Sides of the views, pixels, in turn; unset: each model's own.")
    crop_ratio: list[str] | None = option(
        None, "Shares of the shorter side that the centre crop keeps, in turn; unset: each model's own."
    )
    heads: list[str] | None = option(
        None, "Of models with two heads: class, distillation, and their fusions softmax and logits; unset: all four."
    )
    trust_class_order: bool = option(False, "Do not compare class names: a model's i-th class is the data set's.")
    output: str = option("outputs/evaluation", "Where the results go: <output>.md and <output>.json.")
    batch_size: int = option(256, "Images at a time in each process.")
    num_workers: int = option(4, "Processes that decode images, for each process that evaluates.")

    def __post_init__(self):
        self.models, self.heads = _words(self.models), _words(self.heads) or list(HEADS)
        self.image_size = [_number(int, "image_size", word) for word in _words(self.image_size)]
        self.crop_ratio = [_number(float, "crop_ratio", word) for word in _words(self.crop_ratio)]
        if not self.models:
            raise ValueError("models is not set: name one or several, with commas between them")
        if unknown := [head for head in self.heads if head not in HEADS]:
            raise ValueError(f"heads has {unknown[0]!r}; the heads are {', '.join(HEADS)}")


def _words(value: str | list[str] | None) -> list[str]:
    """`"a, b"`, or `["a,b", "c"]`, as a list of words."""
    values = [value] if isinstance(value, str) else value or []
    return [word.strip() for text in values for word in str(text).split(",") if word.strip()]


def _number(kind: type, name: str, word: str) -> float:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{name} has {word!r}; expected numbers with commas between them") from None


def evaluation_result(classifier: Classifier, predictions: Predictions, seconds: float) -> dict:
    """One model at one size and crop ratio, as an entry of the JSON file."""
    images, counted = len(predictions.labels), int(predictions.labelled().sum())
    return {
        "model": classifier.name,
        "architecture": type(getattr(classifier.model, "timm_model", classifier.model)).__name__,
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "sha256": classifier.sha256,
        "classes_matched": classifier.classes_matched,
        "image_size": predictions.image_size,
        "crop_ratio": predictions.crop_ratio,
        "mean": list(classifier.mean),
        "std": list(classifier.std),
        "images": images,
        "images_without_label": images - counted,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
        "own_head": classifier.own_head,
        "heads": predictions.accuracy(),
    }


def evaluation_report(
    args: EvaluationArguments, results: Sequence[dict], *, num_classes: int, command: Sequence[str]
) -> dict:
    """All that is to be known of a call of run_eval.py, ready for JSON.

    Args:
        args: what was asked.
        results: from [`evaluation_result`].
        num_classes: of the data set.
        command: words of the command line, the script first.
    """
    state = _process()
    return {
        "command": shlex.join(map(str, command)),
        "dataset": args.loading() | {"classes": num_classes},
        "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else str(state.device),
        "processes": state.num_processes,
        "batch_size": args.batch_size,
        "versions": {"hf_deit": __version__, "Python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "timm", "datasets")},
        "results": list(results),
    }


def evaluation_table(report: dict, heads: Sequence[str] = HEADS) -> str:
    """The report as Markdown: a row for each model and head. A single head is shown whatever `heads` says."""
    results = report["results"]
    counted = f"{results[0]['images']:,} images of {report['dataset']['name']}"
    if without := results[0]["images_without_label"]:
        counted += f", {without:,} of them without a label and not counted"
    lines = [f"{counted}; accuracy in percent, loss in nats", ""]
    lines += ["| model | pixels | crop ratio | head | top-1 | top-5 | loss | images/s |"]
    lines += ["|---|--:|--:|---|--:|--:|--:|--:|"]
    for result in results:
        first = [result["model"], f"{result['image_size']}", f"{result['crop_ratio']:.4g}"]
        speed = f"{result['images_per_second']:,.0f}"
        for head, measured in result["heads"].items():
            if head not in heads and len(result["heads"]) > 1:
                continue
            numbers = [f"{100 * measured['top1']:.2f}", f"{100 * measured['top5']:.2f}", f"{measured['loss']:.4f}"]
            name = f"{head} *" if head == result["own_head"] and len(result["heads"]) > 1 else head
            lines.append(f"| {' | '.join([*first, name, *numbers, speed])} |")
            first, speed = ["", "", ""], ""
    notes = []
    if any(len(result["heads"]) > 1 for result in results):
        notes.append(
            "softmax: mean of both heads' probabilities (the paper); logits: mean of their logits (the authors' code, "
            "stock Transformers, timm); *: what the model itself answers"
        )
    matched = {result["model"]: result["classes_matched"] for result in results}
    notes += [f"classes of {model}: {how}" for model, how in matched.items() if how != "by name"]
    return "\n".join([*lines, *("\n" + note for note in notes)])
