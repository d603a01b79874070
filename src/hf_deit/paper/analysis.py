"""Compare the decisions of trained models, and look inside a DeiT: Table 4 and the paper's section 4.

Every result is a dictionary of plain numbers. Its keys are the arguments of the function in `plots/analysis.py` that
draws the same subject, so the JSON file next to a picture holds all that the picture shows.

Not here: drawing (`plots/analysis.py`), and running classifiers over a dataset (`evaluation/predict.py`).
Source: sections 4 and 5.2 of the paper; Abnar and Zuidema 2020 (rollout); Dosovitskiy et al. 2021, figure 7 (filters,
positions).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from ..arguments import DataArguments, available_cores, option, words
from ..augmentation.mixing import normalize
from ..augmentation.transforms import EvalTransform, build_eval_transform
from ..data.views import EvalViews, collate_views
from ..errors import UserError
from ..evaluation.classifier import Classifier, load_classifier
from ..evaluation.predict import predict
from ..models.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTPreTrainedModel,
)


# Heads of an evaluation and their names in Table 4. Its "class+distil." adds the softmax outputs (section 4).
TABLE_4_HEADS = {"class": "class", "distillation": "distillation", "softmax": "class+distillation"}
DIGITS = 6  # after the point, in JSON: a millionth is less than one image of any dataset


@dataclass
class AnalysisArguments(DataArguments):
    """The models to analyse and the images. A list is written with commas: `--models a,b`."""

    image_size: int | None = option(None, "Side of the views, pixels; unset: each model's own.")
    crop_ratio: float | None = option(
        None, "Share of the shorter side that the centre crop keeps; unset: each model's own."
    )
    models: list[str] | None = option(
        None, "Models, with commas: directories, Hub ids, timm:<name>[?checkpoint=path], python:<module>:<factory>."
    )
    teacher: str | None = option(
        None, "The models' teacher, written like a model: it is analysed too, and the models' agreement with it."
    )
    trust_class_order: bool = option(
        False, "Do not compare class names: a model's i-th class is the dataset's i-th class."
    )
    attention_images: int = option(4, "Draw the attention over this many images, spread evenly over the dataset.")
    attention_layer: int = option(-1, "Layer whose attention is drawn: 1 is the first, -1 the last.")
    output_dir: str = option("outputs/analysis", "Folder for the pictures and their numbers as JSON.")
    batch_size: int = option(256, "Images per batch.")
    num_workers: int = option(
        lambda: min(4, available_cores()), "Processes that decode the images. Default: the available cores, at most 4."
    )

    def __post_init__(self):
        self.models = words(self.models)
        if not self.models:
            raise UserError("models is not set: name one or several, with commas between them")
        if self.teacher is not None and self.teacher not in self.models:
            self.models.append(self.teacher)
        if self.models == [self.teacher]:
            raise UserError("models names the teacher alone: name a student of this teacher too, or leave teacher out")
        if self.attention_images < 1:
            raise UserError(f"attention_images is {self.attention_images}; it must be at least 1")


# --- decisions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictor:
    """A source of one class for every image: the head of a model, a teacher, or the ground truth.

    Args:
        model: name of the model.
        head: `"class"`, `"distillation"`, `"class+distillation"`, `"teacher"` or `"ground truth"`.
        label: model and head in one text, for tables and legends.
        decisions: `(samples,)`, int, the predicted classes.
    """

    model: str
    head: str
    label: str
    decisions: np.ndarray


def short_names(specs: Sequence[str]) -> list[str]:
    """The shortest distinct names of models: the end of a path, the name in `timm:<name>?checkpoint=<file>`.

    Raises:
        ValueError: if a model is named twice.
    """
    if len(set(specs)) < len(specs):
        raise UserError(f"models names a model twice: {', '.join(specs)}. Name each model once")
    parts = [spec.rstrip("/").split("/") for spec in specs]
    for length in range(1, max(map(len, parts)) + 1):
        names = [
            re.sub(r"^timm:|\?.*", "", spec) if spec.startswith("timm:") else "/".join(each[-length:])
            for spec, each in zip(specs, parts)
        ]
        if len(set(names)) == len(names):
            return names
    return list(specs)


def predictors_of(name: str, best_classes: Mapping[str, np.ndarray], is_teacher: bool = False) -> list[Predictor]:
    """The heads of one model, in Table 4's order.

    Args:
        name: name of the model.
        best_classes: by head `(samples, K)`, int, best first: `Predictions.best_classes`.
        is_teacher: return the fused or only head alone.
    """
    heads = [head for head in TABLE_4_HEADS if head in best_classes]
    if is_teacher:
        return [Predictor(name, "teacher", f"{name} (teacher)", np.asarray(best_classes[heads[-1]])[:, 0])]
    labels = {head: name if len(heads) == 1 else f"{name}: {TABLE_4_HEADS[head]}" for head in heads}
    return [Predictor(name, TABLE_4_HEADS[head], labels[head], np.asarray(best_classes[head])[:, 0]) for head in heads]


def ground_truth(labels: np.ndarray | Sequence) -> Predictor:
    """The labels as a predictor.

    Raises:
        ValueError: if images may have several labels.
    """
    labels = list(labels)
    if any(np.ndim(label) for label in labels):
        raise UserError(
            "this dataset allows several labels an image, so no single true class exists to compare with: analyse the "
            "dataset with single labels (imagenet-1k for imagenet-real), and measure accuracy here with run_eval.py"
        )
    return Predictor("", "ground truth", "ground truth", np.array(labels))


def disagreement(predictors: Sequence[Predictor]) -> dict:
    """Table 4: the rate of different decisions of every pair of predictors.

    Returns:
        `names`, `images` (number of images) and `rates`, a symmetric square of fractions in [0, 1] with zero diagonal.
    """
    decisions = np.stack([predictor.decisions for predictor in predictors])
    rates = [(decisions != one).mean(axis=1) for one in decisions]
    return {
        "names": [predictor.label for predictor in predictors],
        "images": decisions.shape[1],
        "rates": _plain(rates),
    }


def disagreement_table(names: Sequence[str], rates: Sequence[Sequence[float]], images: int) -> str:
    """The result of [`disagreement`] as Markdown, with three digits as in the paper."""
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    lines += [[name, *(f"{rate:.3f}" for rate in row)] for name, row in zip(names, rates, strict=True)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nRate of different decisions, {images:,} images.\n"


def agreement_by_class(
    predictors: Sequence[Predictor], reference: Predictor, class_names: Sequence[str], labels: np.ndarray
) -> dict:
    """The rate at which each predictor agrees with `reference`, by true class: accuracy if that is the ground truth.

    Returns:
        `classes`, `counts` (images of each class), and a `series` for each predictor: `model`, `head`, `label`,
        `overall` (over all images) and `by_class`, fractions in [0, 1], None where a class has no image.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    series = []
    for predictor in predictors:
        equal = predictor.decisions == reference.decisions
        hits = np.bincount(labels, weights=equal, minlength=len(class_names))
        by_class = [hit / count if count else None for hit, count in zip(hits.tolist(), counts.tolist())]
        identity = {"model": predictor.model, "head": predictor.head, "label": predictor.label}
        series.append(identity | {"overall": _plain(equal.mean()), "by_class": _plain(by_class)})
    return {"classes": list(class_names), "counts": counts.tolist(), "series": series}


def confusion(predictor: Predictor, class_names: Sequence[str], labels: np.ndarray) -> dict:
    """The confusion matrix of a predictor, without its zeros.

    Returns:
        `label`, `classes`, and `cells`: `[true class, decision, images]` for each pair that occurs, most frequent
        first.
    """
    pairs, counts = np.unique(np.stack([labels, predictor.decisions]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    cells = np.vstack([pairs, counts])[:, order].T.tolist()
    return {"label": predictor.label, "classes": list(class_names), "cells": cells}


# --- inside a DeiT -------------------------------------------------------------------------------------------------


def as_deit(model: nn.Module, image_size: int | None = None) -> DeiTPreTrainedModel:
    """The model itself, or our model with the weights of timm's (also wrapped) or stock's DeiT or ViT.

    Args:
        model: a network.
        image_size: side of the images that a stock model is to read, pixels; None: the model's own.

    Raises:
        ValueError: if the model is another network.
    """
    if isinstance(model, DeiTPreTrainedModel):
        return model
    inner = getattr(model, "timm_model", model)
    names = [name.rpartition(".")[2] for name in inner.state_dict()]
    distilled = "dist_token" in names or "distillation_token" in names
    kind = DeiTForImageClassificationWithTeacher if distilled else DeiTForImageClassification
    try:
        if getattr(getattr(inner, "config", None), "model_type", None) in ("deit", "vit"):
            # Stock's tensor names in memory differ from those on disk; ours are those on disk.
            with tempfile.TemporaryDirectory() as folder:
                inner.save_pretrained(folder)
                ours = kind.from_pretrained(folder, image_size=image_size)
        else:
            ours = kind.from_original(inner.state_dict(), num_attention_heads=inner.blocks[0].attn.num_heads)
    except (ValueError, AttributeError) as error:
        raise UserError(f"a {type(inner).__name__} is not a DeiT or ViT with a class token") from error
    return ours.eval().to(next(inner.parameters()).device)


def prefix_names(model: DeiTPreTrainedModel) -> list[str]:
    """The names of the tokens before the patches, in order."""
    return ["class", "distillation"][: model.config.num_prefix_tokens]


@torch.no_grad()
def token_similarity(model: DeiTPreTrainedModel, batches: Iterable[Tensor]) -> dict:
    """Cosine between class and distillation token, from the parameters to the end of the network.

    Args:
        model: a network with a distillation token.
        batches: `(batch, channels, height, width)`, float, normalised.

    Returns:
        `images` (number of images); `parameters`, the cosine of the two learned tokens, without their positions;
        `mean` and `std` (population) over the images, before the first and after each layer; `output_mean` and
        `output_std` after the final layer norm, where the heads read.

    Raises:
        ValueError: if the model has no distillation token, or there are no images.
    Source: section 4: 0.06 for the parameters, 0.93 at the last layer, and 0.999 with two class tokens.
    """
    if not model.config.use_distillation_token:
        raise UserError("the model has no distillation token to compare the class token with")
    rows = []
    for pixel_values in batches:
        outputs = model.base_model(pixel_values, output_hidden_states=True)
        states = [*outputs.hidden_states, outputs.last_hidden_state]
        rows.append(torch.stack([F.cosine_similarity(*state[:, :2].float().unbind(1), dim=-1) for state in states]))
    if not rows:
        raise UserError("there are no images to compare the tokens over")
    cosines = torch.cat(rows, dim=1).double().cpu().numpy()  # (layers + 2, images)
    means, stds = cosines.mean(axis=1), cosines.std(axis=1)
    tokens = (token.float().flatten() for token in model.base_model.embeddings.prefix_tokens())
    return {
        "images": cosines.shape[1],
        "parameters": _plain(F.cosine_similarity(*tokens, dim=0).item()),
        "mean": _plain(means[:-1]),
        "std": _plain(stds[:-1]),
        "output_mean": _plain(means[-1]),
        "output_std": _plain(stds[-1]),
    }


@torch.no_grad()
def attention_maps(model: DeiTPreTrainedModel, pixel_values: Tensor, layer: int = -1) -> dict:
    """Attention from the class token and the distillation token to the patches.

    Args:
        model: a DeiT.
        pixel_values: `(images, channels, height, width)`, float, normalised.
        layer: 1 is the first, -1 the last.

    Returns:
        `layer` (from 1), the number of `layers`, and `maps`: one entry per image, by token: `heads` (a map of rows x
        columns for each head), the `mean` of these, `first`, the mean in the first layer, and `rollout`, attention
        through all layers. A map holds the weights of the patches; together with those of the prefix tokens they sum
        to 1.

    Raises:
        ValueError: if the model has no such layer.
    Source: Abnar and Zuidema 2020: the product over the layers of half attention, half identity for the residual.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= abs(layer) <= layers:
        raise UserError(f"attention_layer is {layer}; the model has layers 1 to {layers}, or -1 for the last")
    index = layer - 1 if layer > 0 else layers + layer
    attentions = model.base_model(pixel_values, output_attentions=True).attentions
    rollout = torch.eye(attentions[0].shape[-1], device=pixel_values.device)
    for weights in attentions:
        rollout = (0.5 * weights.float().mean(1) + 0.5 * torch.eye(len(rollout[-1]), device=rollout.device)) @ rollout

    names = prefix_names(model)
    prefix, grid = len(names), model.config.grid_size
    chosen = attentions[index].float()  # (images, heads, tokens, tokens): from, to
    maps = []
    for image in range(len(pixel_values)):
        tokens = {}
        for number, name in enumerate(names):
            heads = chosen[image, :, number, prefix:].unflatten(-1, grid)
            first = attentions[0][image, :, number, prefix:].float().mean(0).unflatten(-1, grid)
            through = rollout[image, number, prefix:].unflatten(-1, grid)
            found = {"heads": heads, "mean": heads.mean(0), "first": first, "rollout": through}
            tokens[name] = {key: _plain(value) for key, value in found.items()}
        maps.append(tokens)
    return {"layer": index + 1, "layers": layers, "maps": maps}


def patch_filters(model: DeiTPreTrainedModel, count: int = 28) -> dict:
    """The first principal components of the patch projection's filters.

    Returns:
        `filters`: at most `count` arrays of rows x columns x channels, unit length, the largest entry positive;
        `explained`: the share of the filters' variance that each component holds, in [0, 1].

    Source: Dosovitskiy et al. 2021, figure 7 (left).
    """
    kernels = model.base_model.embeddings.patch_embeddings.projection.weight.detach().float().cpu()
    kernels = kernels.permute(0, 2, 3, 1)  # (width, rows, columns, channels)
    matrix = kernels.flatten(1).double().numpy()
    _, scales, components = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    shown = components[:count]
    shown = shown * np.sign(shown[np.arange(len(shown)), np.abs(shown).argmax(axis=1)])[:, None]
    variance = scales**2 / (scales**2).sum()
    return {
        "filters": _plain(shown.reshape(-1, *kernels.shape[1:])),
        "explained": _plain(variance[:count]),
    }


def position_similarity(model: DeiTPreTrainedModel) -> dict:
    """Cosine between every position embedding and those of the patches.

    Returns:
        `patches`: for each patch, by row and column, a map of rows x columns; `tokens`: by name, a map for each token.

    Source: Dosovitskiy et al. 2021, figure 7 (middle).
    """
    positions = F.normalize(model.base_model.embeddings.position_embeddings.detach().double().cpu()[0], dim=-1)
    names, grid = prefix_names(model), model.config.grid_size
    cosines = (positions @ positions[len(names) :].T).unflatten(1, grid)  # (tokens, rows, columns)
    return {
        "patches": _plain(cosines[len(names) :].unflatten(0, grid)),
        "tokens": {name: _plain(cosines[number]) for number, name in enumerate(names)},
    }


def eval_pixels(
    images: Sequence[dict],
    *,
    model: nn.Module,
    transform: EvalTransform,
    mean: Sequence[float],
    std: Sequence[float],
    **loading,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The evaluation views of a dataset, batch by batch: as pixels, and normalised for a network.

    Args:
        images: with the columns `image` and `label`, as [`load_image_dataset`] returns them.
        model: the normalised batches go to the device of this model.
        transform: from [`build_eval_transform`].
        mean, std: per channel, of pixels in [0, 1].
        loading: arguments of PyTorch's DataLoader, such as `batch_size`.

    Yields:
        `(batch, size, size, 3)` uint8, and `(batch, 3, size, size)` float32, normalised.
    """
    for batch in DataLoader(EvalViews(images, transform), collate_fn=collate_views, **loading):
        pixels = batch["pixel_values"]
        device = next(model.parameters()).device
        yield pixels.permute(0, 2, 3, 1).numpy(), normalize(pixels.to(device), mean, std)


def spread_evenly(count: int, total: int) -> list[int]:
    """`count` of `total` indices at even distances, because datasets are often sorted by class."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


# --- a whole analysis ----------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One result of an analysis.

    Attributes:
        subject: the kind of result, such as `"confusion"`.
        name: the subject, and the model's name where the result is about one model.
        numbers: the result as plain numbers.
        images: `(images, height, width, 3)` uint8, the pixels under attention maps.
    """

    subject: str
    name: str
    numbers: dict
    images: np.ndarray | None = None


@dataclass(frozen=True)
class AnalysedModel:
    """A model of an analysis, the crop ratio of its views, and its predictors for all images."""

    name: str
    classifier: Classifier
    crop_ratio: float
    predictors: list[Predictor]
    is_teacher: bool


def predict_with_all(
    args: AnalysisArguments, images: Sequence[dict], class_names: Sequence[str]
) -> list[AnalysedModel]:
    """Load every model of `args` and run it over the images, one after another.

    Raises:
        ValueError: a model cannot be read, has other classes, or is named twice.
    """
    models = []
    for name, spec in zip(short_names(args.models), args.models, strict=True):
        classifier = load_classifier(
            spec,
            id2label=dict(enumerate(class_names)),
            image_size=args.image_size,
            trust_class_order=args.trust_class_order,
        )
        predictions = predict(
            classifier,
            images,
            crop_ratio=args.crop_ratio,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
        )
        is_teacher = spec == args.teacher
        predictors = predictors_of(name, predictions.best_classes, is_teacher)
        models.append(AnalysedModel(name, classifier, predictions.crop_ratio, predictors, is_teacher))
    return models


def compare_decisions(
    models: Sequence[AnalysedModel], truth: Predictor, class_names: Sequence[str]
) -> Iterator[Result]:
    """Every comparison of what the models decide.

    Yields:
        Subjects `"disagreement"`, `"accuracy_by_class"`, `"teacher_agreement_by_class"` if one model is the teacher,
        and `"confusion"` for each model.
    """
    predictors = [predictor for model in models for predictor in model.predictors]
    yield Result("disagreement", "disagreement", disagreement([truth, *predictors]))
    accuracy = agreement_by_class(predictors, truth, class_names, truth.decisions)
    yield Result("accuracy_by_class", "accuracy_by_class", {"quantity": "accuracy"} | accuracy)
    for teacher in (model for model in models if model.is_teacher):
        students = [predictor for model in models if not model.is_teacher for predictor in model.predictors]
        agreement = agreement_by_class(students, teacher.predictors[-1], class_names, truth.decisions)
        agreement["quantity"] = "agreement with the teacher"
        yield Result("teacher_agreement_by_class", "teacher_agreement_by_class", agreement)
    for model in models:
        mistakes = confusion(model.predictors[-1], class_names, truth.decisions)
        yield Result("confusion", f"confusion_{model.name}", mistakes)


def look_inside(
    models: Sequence[AnalysedModel],
    images: Sequence[dict],
    class_names: Sequence[str],
    args: AnalysisArguments,
    report: Callable[[str], object] = print,
) -> Iterator[Result]:
    """Everything shown of the inside of each model that is a DeiT or ViT; `report` gets a line for what is left out.

    Yields:
        Subjects `"attention"`, `"filters"` and `"positions"` for each such model, and then `"token_similarity"` of
        all models with a distillation token.
    """
    similarities = []
    shown = Subset(images, spread_evenly(args.attention_images, len(images)))
    for name, classifier, crop_ratio in ((model.name, model.classifier, model.crop_ratio) for model in models):
        try:
            model = as_deit(classifier.model, classifier.image_size)
        except ValueError as error:
            report(f"{name}: no attention, tokens, filters or positions to show: {error}")
            continue
        transform = build_eval_transform(classifier.image_size, crop_ratio=crop_ratio)
        views = partial(eval_pixels, transform=transform, mean=classifier.mean, std=classifier.std, model=model)
        if model.config.use_distillation_token:
            loaded = views(images, batch_size=args.batch_size, num_workers=args.num_workers)
            similarities.append(
                {"model": name} | token_similarity(model, (pixel_values for _, pixel_values in loaded))
            )
        else:
            report(f"{name}: one token, so no similarity of two")
        ((pixels, pixel_values),) = views(shown, batch_size=len(shown))
        captions = [f"{class_names[shown[i]['label']]}  (no. {shown.indices[i]})" for i in range(len(shown))]
        named = {"model": name}
        maps = named | {"captions": captions} | attention_maps(model, pixel_values, args.attention_layer)
        yield Result("attention", f"attention_{name}", maps, pixels)
        yield Result("filters", f"filters_{name}", named | patch_filters(model))
        yield Result("positions", f"positions_{name}", named | position_similarity(model))
    if similarities:
        yield Result("token_similarity", "token_similarity", {"series": similarities})


def write_result(folder: Path, result: Result, plots: Mapping[str, Callable]) -> None:
    """Write the numbers of a result as `<name>.json`, and pictures drawn from that JSON.

    Args:
        folder: made if it does not exist.
        result: characters of its name that do not belong in a file name become hyphens.
        plots: by suffix of the picture's name; `plot` is called with the picture's path, the numbers and, where the
            result has them, its `images`.
    """
    stem = re.sub(r"[^\w.-]+", "-", result.name)
    text = json.dumps(result.numbers, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(text + "\n", "utf-8")
    pixels = {} if result.images is None else {"images": result.images}
    for suffix, plot in plots.items():
        plot(folder / f"{stem}{suffix}.png", **json.loads(text), **pixels)


def _plain(values):
    """Arrays, tensors and numbers as rounded numbers and lists for JSON."""
    if isinstance(values, Tensor):
        values = values.cpu().double().numpy()
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    return values if values is None else np.round(np.asarray(values, dtype=float), DIGITS).tolist()
