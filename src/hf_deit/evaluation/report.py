"""The arguments of run_eval.py, and its report of several models as JSON and as a table."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from .. import __version__
from ..arguments import DataArguments, available_cores, option, words
from ..errors import UserError
from ..processes import current_process
from .classifier import HEADS, Classifier
from .predict import Predictions


# Classes named below the table of a set whose classes are uneven; the JSON file has them all.
WORST_CLASSES = 5


@dataclass
class EvaluationArguments(DataArguments):
    """The models to evaluate and the images. A list is written with commas: `--models a,b`."""

    models: list[str] | None = option(
        None, "Models, with commas: directories, Hub ids, timm:<name>[?checkpoint=path], python:<module>:<factory>."
    )
    image_size: list[str] | None = option(
        None, "Sides of the views in pixels, with commas: every model is evaluated at each. Unset: each model's own."
    )
    crop_ratio: list[str] | None = option(
        None,
        "Shares of the shorter side that the centre crop keeps, with commas: every model is evaluated at each. Unset: "
        "each model's own.",
    )
    heads: list[str] | None = option(
        None,
        "Rows of the table for models with two heads, with commas: class, distillation, and the fusions softmax and "
        "logits. Unset: all four.",
    )
    trust_class_order: bool = option(
        False, "Do not compare class names: a model's i-th class is the dataset's i-th class."
    )
    output: str = option("outputs/evaluation", "Path of the results without suffix: <output>.md and <output>.json.")
    batch_size: int = option(256, "Images per batch in each process.")
    num_workers: int = option(
        lambda: min(4, available_cores()),
        "Processes that decode images, per process that evaluates. Default: the available cores, at most 4.",
    )

    def __post_init__(self):
        self.models, self.heads = words(self.models), words(self.heads) or list(HEADS)
        self.image_size = [_number(int, "image_size", word) for word in words(self.image_size)]
        self.crop_ratio = [_number(float, "crop_ratio", word) for word in words(self.crop_ratio)]
        if not self.models:
            raise UserError("models is not set: name one or several, with commas between them")
        if unknown := [head for head in self.heads if head not in HEADS]:
            raise UserError(f"heads has {unknown[0]!r}; the heads are {', '.join(HEADS)}")


def _number(kind: type, name: str, word: str) -> float:
    try:
        return kind(word)
    except ValueError:
        raise UserError(f"{name} has {word!r}; expected numbers with commas between them") from None


def evaluation_result(
    classifier: Classifier, predictions: Predictions, seconds: float, class_names: Sequence[str]
) -> dict:
    """The entry of one model, at one size and crop ratio, in the JSON file.

    Args:
        class_names: of the dataset, in order.
    """
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
        "classes": {
            class_names[number]: measured for number, measured in predictions.by_class(classifier.own_head).items()
        },
    }


def evaluation_report(
    args: EvaluationArguments,
    results: Sequence[dict],
    *,
    num_classes: int,
    command: Sequence[str],
    held_out: tuple[int, int] | None = None,
) -> dict:
    """Everything that repeats and explains a call of run_eval.py, ready for JSON.

    Args:
        args: the arguments of the call.
        results: from [`evaluation_result`].
        num_classes: number of classes of the dataset.
        command: words of the command line, the script first.
        held_out: number of images that were held out of the training images, and of how many; None for other splits.
    """
    state = current_process()
    device: Any = state.device
    return {
        "command": shlex.join(map(str, command)),
        "dataset": args.loading() | {"classes": num_classes, "held_out": held_out},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": state.num_processes,
        "batch_size": args.batch_size,
        "versions": {"hf_deit": __version__, "Python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "timm", "datasets")},
        "results": list(results),
    }


def evaluation_table(report: dict, heads: Sequence[str] = HEADS) -> str:
    """The report as Markdown: a row for each model and head in `heads`. An only head is always shown."""
    results = report["results"]
    counted = f"{results[0]['images']:,} images of {report['dataset']['name']}"
    if report["dataset"].get("held_out"):
        counted += ", held out of {1:,} training images ({0:,} in all)".format(*report["dataset"]["held_out"])
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
            numbers = [
                f"{100 * measured['top1']:.2f}",
                f"{100 * measured['top5']:.2f}" if "top5" in measured else "-",
                f"{measured['loss']:.4f}",
            ]
            name = f"{head} *" if head == result["own_head"] and len(result["heads"]) > 1 else head
            lines.append(f"| {' | '.join([*first, name, *numbers, speed])} |")
            first, speed = ["", "", ""], ""
    notes = []
    if any(len(result["heads"]) > 1 for result in results):
        notes.append(
            "softmax: mean of both heads' probabilities (the paper); logits: mean of their logits (the authors' code, "
            "stock Transformers, timm); *: the prediction that the model itself returns"
        )
    for result in results:
        if by_class := result.get("classes"):
            worst = [
                f"{name} {100 * measured['accuracy']:.1f} of {measured['images']}"
                for name, measured in list(by_class.items())[:WORST_CLASSES]
            ]
            balanced = 100 * result["heads"][result["own_head"]]["balanced_accuracy"]
            notes.append(
                f"the classes are uneven: balanced accuracy (the mean of the classes' top-1) of {result['model']} at "
                f"{result['image_size']}: {balanced:.2f}; worst classes: {', '.join(worst)} images"
            )
    matched = {result["model"]: result["classes_matched"] for result in results}
    notes += [f"classes of {model}: {how}" for model, how in matched.items() if how != "by name"]
    return "\n".join([*lines, *("\n" + note for note in notes)])
