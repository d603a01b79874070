"""What trained models decide and what a DeiT looks like inside: Table 4 and the observations of the paper's section 4.

Every result is a dictionary of plain numbers, under the names with which the function of plots.py of the same subject
takes them: the JSON beside a picture is the picture.

Not here: drawing (plots.py), and running classifiers over a set of images (evaluation.py).
Source: sections 4 and 5.2 of the paper; Abnar and Zuidema 2020 (rollout); Dosovitskiy et al. 2021, figure 7 (filters,
positions).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..augmentation.mixing import normalize
from ..augmentation.transforms import EvalTransform
from ..data.views import EvalViews, collate_views
from ..models.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTPreTrainedModel,
)
from ..recipe import DataArguments, option


# Heads of an evaluation and their names in Table 4, whose "class+distil." adds the softmax outputs (section 4).
TABLE_4_HEADS = {"class": "class", "distillation": "distillation", "softmax": "class+distillation"}
DIGITS = 6  # after the point, in JSON; a millionth is less than one image of any set


@dataclass
class AnalysisArguments(DataArguments):
    """Which models to look into, on which images. Lists may be written with commas or blanks."""

    image_size: int | None = option(None, "Side of the views, pixels; unset: each model's own.")
    crop_ratio: float | None = option(
        None, "Share of the shorter side that the centre crop keeps; unset: each model's own."
    )
    models: list[str] | None = option(
        None, "Directories, Hub ids, timm:<name>[?checkpoint=path] or python:<module>:<factory>."
    )
    teacher: str | None = option(None, "What taught them, of the same forms: one model more, and agreement with it.")
    trust_class_order: bool = option(False, "Do not compare class names: a model's i-th class is the data set's.")
    attention_images: int = option(4, "Draw attention over this many images, spread evenly over the set.")
    attention_layer: int = option(-1, "Whose attention: 1 is the first layer, -1 the last.")
    output_dir: str = option("outputs/analysis", "Where the pictures go, and their numbers as JSON.")
    batch_size: int = option(256, "Images at a time.")
    num_workers: int = option(4, "Processes that decode the images.")

    def __post_init__(self):
        self.models = [word for text in self.models or () for word in text.replace(",", " ").split()]
        if not self.models:
            raise ValueError("models is not set: name one or several, with commas between them")
        if self.teacher is not None and self.teacher not in self.models:
            self.models.append(self.teacher)
        if self.models == [self.teacher]:
            raise ValueError("models names the teacher alone: name a model that it taught too, or leave teacher out")
        if self.attention_images < 1:
            raise ValueError(f"attention_images is {self.attention_images}; it must be at least 1")


# --- decisions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decider:
    """One who assigns every image a class: the head of a model, a teacher, or the truth.

    Args:
        model: its name.
        head: `"class"`, `"distillation"`, `"class+distillation"`, `"teacher"` or `"ground truth"`.
        label: the two in one, for tables and legends.
        decisions: `(samples,)`, int, classes.
    """

    model: str
    head: str
    label: str
    decisions: np.ndarray


def short_names(specs: Sequence[str]) -> list[str]:
    """The shortest names that tell the models apart: of paths the end, of `timm:<name>?checkpoint=<file>` the name.

    Raises:
        ValueError: if a model is named twice.
    """
    if len(set(specs)) < len(specs):
        raise ValueError(f"a model stands twice among {', '.join(specs)}: name each once")
    parts = [spec.rstrip("/").split("/") for spec in specs]
    for length in range(1, max(map(len, parts)) + 1):
        names = [
            re.sub(r"^timm:|\?.*", "", spec) if spec.startswith("timm:") else "/".join(each[-length:])
            for spec, each in zip(specs, parts)
        ]
        if len(set(names)) == len(names):
            return names
    return list(specs)


def deciders_of(name: str, best_classes: Mapping[str, np.ndarray], is_teacher: bool = False) -> list[Decider]:
    """The heads of one model, in Table 4's order.

    Args:
        name: of the model.
        best_classes: of each head `(samples, K)`, int, best first: `Predictions.best_classes`.
        is_teacher: its fused or only head alone counts.
    """
    heads = [head for head in TABLE_4_HEADS if head in best_classes]
    if is_teacher:
        return [Decider(name, "teacher", f"{name} (teacher)", np.asarray(best_classes[heads[-1]])[:, 0])]
    labels = {head: name if len(heads) == 1 else f"{name}: {TABLE_4_HEADS[head]}" for head in heads}
    return [Decider(name, TABLE_4_HEADS[head], labels[head], np.asarray(best_classes[head])[:, 0]) for head in heads]


def ground_truth(labels: np.ndarray | Sequence) -> Decider:
    """The labels as one who decides.

    Raises:
        ValueError: if images may have several labels.
    """
    labels = list(labels)
    if any(np.ndim(label) for label in labels):
        raise ValueError(
            "this set allows several labels an image, so there is no one true decision to compare with: analyse the "
            "set with single labels (imagenet-1k for imagenet-real), and take accuracy here from run_eval.py"
        )
    return Decider("", "ground truth", "ground truth", np.array(labels))


def disagreement(deciders: Sequence[Decider]) -> dict:
    """Table 4: the rate of different decisions of all pairs.

    Returns:
        `names`, `images` (their number) and `rates`, a symmetric square of fractions in [0, 1] with zero diagonal.
    """
    decisions = np.stack([decider.decisions for decider in deciders])
    rates = [(decisions != one).mean(axis=1) for one in decisions]
    return {
        "names": [decider.label for decider in deciders],
        "images": decisions.shape[1],
        "rates": _plain(rates),
    }


def disagreement_table(names: Sequence[str], rates: Sequence[Sequence[float]], images: int) -> str:
    """The same as Markdown, three digits as in the paper."""
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    lines += [[name, *(f"{rate:.3f}" for rate in row)] for name, row in zip(names, rates, strict=True)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nRate of different decisions, {images:,} images.\n"


def agreement_by_class(
    deciders: Sequence[Decider], reference: Decider, class_names: Sequence[str], labels: np.ndarray
) -> dict:
    """How often each head decides like `reference`, by true class. With the truth as reference this is accuracy.

    Returns:
        `classes`, `counts` (images of each), and a `series` a head: `model`, `head`, `label`, `overall` (over all
        images) and `by_class`, fractions in [0, 1], None where a class has no image.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    series = []
    for decider in deciders:
        equal = decider.decisions == reference.decisions
        hits = np.bincount(labels, weights=equal, minlength=len(class_names))
        by_class = [hit / count if count else None for hit, count in zip(hits.tolist(), counts.tolist())]
        identity = {"model": decider.model, "head": decider.head, "label": decider.label}
        series.append(identity | {"overall": _plain(equal.mean()), "by_class": _plain(by_class)})
    return {"classes": list(class_names), "counts": counts.tolist(), "series": series}


def confusion(decider: Decider, class_names: Sequence[str], labels: np.ndarray) -> dict:
    """Which class was taken for which.

    Returns:
        `label`, `classes`, and `cells`: `[true class, decision, images]` wherever there are any, most frequent first.
    """
    pairs, counts = np.unique(np.stack([labels, decider.decisions]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    cells = np.vstack([pairs, counts])[:, order].T.tolist()
    return {"label": decider.label, "classes": list(class_names), "cells": cells}


# --- inside a DeiT -------------------------------------------------------------------------------------------------


def as_deit(model: nn.Module, image_size: int | None = None) -> DeiTPreTrainedModel:
    """The model itself, or its weights as one of ours: timm's (also wrapped) and stock's DeiT and ViT.

    Args:
        image_size: what stock's is to read, pixels; its own if None.

    Raises:
        ValueError: if it is another network.
    """
    if isinstance(model, DeiTPreTrainedModel):
        return model
    inner = getattr(model, "timm_model", model)
    names = [name.rpartition(".")[2] for name in inner.state_dict()]
    distilled = "dist_token" in names or "distillation_token" in names
    kind = DeiTForImageClassificationWithTeacher if distilled else DeiTForImageClassification
    try:
        if getattr(getattr(inner, "config", None), "model_type", None) in ("deit", "vit"):
            # Stock's names in memory are not those on disk, which are ours.
            with tempfile.TemporaryDirectory() as folder:
                inner.save_pretrained(folder)
                ours = kind.from_pretrained(folder, image_size=image_size)
        else:
            ours = kind.from_original(inner.state_dict(), num_attention_heads=inner.blocks[0].attn.num_heads)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"a {type(inner).__name__} is no DeiT or ViT with a class token") from error
    return ours.eval().to(next(inner.parameters()).device)


def prefix_names(model: DeiTPreTrainedModel) -> list[str]:
    """The tokens before the patches, in order."""
    return ["class", "distillation"][: model.config.num_prefix_tokens]


@torch.no_grad()
def token_similarity(model: DeiTPreTrainedModel, batches: Iterable[Tensor]) -> dict:
    """Cosine of class and distillation token, from the parameters to the end of the network.

    Args:
        model: with a distillation token.
        batches: `(batch, channels, height, width)`, float, normalised.

    Returns:
        `images` (their number); `parameters`, the cosine of the two learned tokens, without their positions; `mean`
        and `std` (population) over the images, before the first and after each layer; `output_mean` and `output_std`
        behind the last layer norm, where the heads read.

    Raises:
        ValueError: without a distillation token, or without images.
    Source: section 4: 0.06 for the parameters, 0.93 at the last layer, and 0.999 with two class tokens.
    """
    if not model.config.use_distillation_token:
        raise ValueError("it has no distillation token to compare the class token with")
    rows = []
    for pixel_values in batches:
        outputs = model.base_model(pixel_values, output_hidden_states=True)
        states = [*outputs.hidden_states, outputs.last_hidden_state]
        rows.append(torch.stack([F.cosine_similarity(*state[:, :2].float().unbind(1), dim=-1) for state in states]))
    if not rows:
        raise ValueError("there are no images to compare the tokens over")
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
    """Where the class and the distillation token look.

    Args:
        pixel_values: `(images, channels, height, width)`, float, normalised.
        layer: 1 is the first, -1 the last.

    Returns:
        `layer` (from 1) of how many `layers`, and `maps`: one entry an image, by token: `heads` (a map of rows x
        columns a head), their `mean`, and `rollout`, attention through all layers. A map holds the weights of the
        patches; what is missing to 1 went to the tokens.

    Raises:
        ValueError: if there is no such layer.
    Source: Abnar and Zuidema 2020: the product over the layers of half attention, half identity for the residual.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= abs(layer) <= layers:
        raise ValueError(f"attention_layer is {layer}; the model has layers 1 to {layers}, or -1 for the last")
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
            through = rollout[image, number, prefix:].unflatten(-1, grid)
            found = {"heads": heads, "mean": heads.mean(0), "rollout": through}
            tokens[name] = {key: _plain(value) for key, value in found.items()}
        maps.append(tokens)
    return {"layer": index + 1, "layers": layers, "maps": maps}


def patch_filters(model: DeiTPreTrainedModel, count: int = 28) -> dict:
    """The first principal components of the filters that read the patches.

    Returns:
        `filters`: at most `count` of rows x columns x channels, unit length, the largest entry positive; `explained`:
        the share of the filters' variance that each holds, in [0, 1].

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
    """Cosine of every position embedding with those of the patches.

    Returns:
        `patches`: for each patch, by row and column, a map of rows x columns; `tokens`: for each token a map, by name.

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
    """The evaluation views of a set, batch by batch: as they are, and as a network takes them.

    Args:
        images: with the columns `image` and `label`, as [`load_image_dataset`] returns them.
        model: on whose device the batches are wanted.
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
    """`count` of `total` indices, evenly: sets are often sorted by class."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def _plain(values):
    """Arrays and numbers as JSON has them, rounded."""
    if isinstance(values, Tensor):
        values = values.cpu().double().numpy()
    if isinstance(values, (list, tuple)):
        return [_plain(value) for value in values]
    return values if values is None else np.round(np.asarray(values, dtype=float), DIGITS).tolist()
