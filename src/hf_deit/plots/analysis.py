"""Pictures of an analysis. The arguments of each function are what a function of paper/analysis.py returns."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .style import (
    CLASS,
    HEAD_COLORS,
    LABEL_SIZE,
    MAPS,
    MARKERS,
    MODEL_COLORS,
    SHARES,
    TICK_SIZE,
    TITLE_SIZE,
    add_colorbar,
    add_heading,
    new_figure,
    remove_frame,
    save_figure,
    shorten,
    text_color_on,
)


OPACITY = 0.65  # of attention over an image
LEAST_DISAGREEMENT = 0.25  # where the darkest colour stands, if no two predictors differ more


def plot_disagreement(path: str | os.PathLike, *, names, rates, images: int) -> None:
    """Draw Table 4 as a heat map with its numbers; the arguments come from [`disagreement`].

    The colours run from 0 to a quarter of the images at least, so that near agreement looks like it.
    """
    values = np.array(rates)
    labels = [shorten(name) for name in names]
    side, longest = max(0.72 * len(names), 3), max(map(len, labels))
    figure = new_figure(side + 2.0 + 0.085 * longest, side + 1.0 + 0.06 * longest)
    axes = figure.subplots()
    image = axes.imshow(values, cmap=SHARES, vmin=0, vmax=max(values.max(), LEAST_DISAGREEMENT))
    for row, column in np.ndindex(values.shape):
        color = "0.6" if row == column else text_color_on(image, values[row, column])
        text = f"{values[row, column]:.3f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=TICK_SIZE, color=color)
    axes.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=TICK_SIZE)
    axes.set_yticks(range(len(names)), labels, fontsize=TICK_SIZE)
    add_heading(figure, f"Different decisions, {images:,} images")
    remove_frame(axes)
    add_colorbar(figure, image, axes, "share of the images")
    save_figure(figure, path)


def plot_by_class(path: str | os.PathLike, *, quantity: str, classes, counts, series, lowest: int = 20) -> None:
    """Draw a share of the images by true class, for several heads; the arguments come from [`agreement_by_class`].

    With more than `lowest` classes, one panel shows all classes in order and without names, another the lowest with
    names.

    Args:
        quantity: name of the share, such as "agreement with the teacher".
    """
    values = 100 * np.array([one["by_class"] for one in series], dtype=float)  # None becomes NaN
    seen = np.flatnonzero(np.array(counts) > 0)
    many = len(seen) > lowest
    shown = seen[np.argsort(values[:, seen].mean(axis=0), kind="stable")][:lowest] if many else seen
    models = list(dict.fromkeys(one["model"] for one in series))
    marks = [
        {"color": HEAD_COLORS[one["head"]], "marker": MARKERS[models.index(one["model"]) % len(MARKERS)]}
        for one in series
    ]

    step = 0.085  # inches between the marks of a class; without it equal values would hide each other
    row_height = max(0.3, step * (len(series) + 1))
    height = max(3.6, 1.8 + row_height * len(shown) + 0.26 * math.ceil(len(series) / 2))
    figure = new_figure(13 if many else 9.5, height)
    *ranked, named = figure.subplots(1, 2, width_ratios=(1, 1.25)) if many else [figure.subplots()]
    rows = np.arange(len(shown))
    for number, (one, mark) in enumerate(zip(series, marks)):
        label = f"{shorten(one['label'])}  {100 * one['overall']:.1f} %"
        shift = (number - (len(series) - 1) / 2) * step / row_height
        named.plot(values[number, shown], rows + shift, linestyle="none", markersize=5.5, label=label, **mark)
    named.set_yticks(rows, [f"{shorten(classes[index])}  ({counts[index]})" for index in shown])
    named.set_ylim(len(shown) - 0.5, -0.5)
    named.set_xlabel(f"{quantity} (%)", fontsize=LABEL_SIZE)
    low, high = values[:, shown].min(), values[:, shown].max()
    margin = max(2, 0.05 * (high - low))
    named.set_xticks([tick for tick in MaxNLocator(6).tick_values(low - margin, high + margin) if 0 <= tick <= 100])
    named.set_xlim(low - margin, high + margin)
    named.grid(alpha=0.25, axis="x")
    for row in rows[:-1]:
        named.axhline(row + 0.5, color="0.9", linewidth=0.8, zorder=0)
    for axes in ranked:
        for one, mark in zip(values, marks):
            one = np.sort(one[seen])
            ranks = np.arange(1, len(one) + 1)
            axes.plot(ranks, one, linewidth=1.6, markersize=7, markevery=[len(one) // 4, len(one) // 2], **mark)
        axes.set_title(f"all {len(seen):,} classes, lowest first", fontsize=TITLE_SIZE)
        axes.set_xlabel("rank of the class, each head's own", fontsize=LABEL_SIZE)
        axes.set_ylabel(f"{quantity} (%)", fontsize=LABEL_SIZE)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        named.set_title(f"the {len(shown)} lowest (number of images)", fontsize=TITLE_SIZE)
    for axes in (*ranked, named):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=TICK_SIZE)
    add_heading(figure, f"{quantity[0].upper()}{quantity[1:]}, by class{'' if many else ' (number of images)'}")
    handles = named.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=TICK_SIZE, frameon=False)
    save_figure(figure, path)


def plot_confusion(path: str | os.PathLike, *, label: str, classes, cells, most: int = 25) -> None:
    """Draw the confusion matrix, or the most frequent confusions if there are more than `most` classes.

    The arguments come from [`confusion`].
    """
    if len(classes) > most:
        _plot_most_confused(path, label, classes, cells, most)
        return
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    for true, decision, count in cells:
        counts[true, decision] = count
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 0.52 * len(classes)
    figure = new_figure(max(6.5, side + 3.2), max(4.5, side + 1.6))
    axes = figure.subplots()
    # The square root keeps one confused image in a hundred visible.
    image = axes.imshow(shares, cmap=SHARES, norm=PowerNorm(0.5, vmin=0, vmax=100))
    for true, decision, count in cells:
        color = text_color_on(image, shares[true, decision])
        axes.text(decision, true, str(count), ha="center", va="center", fontsize=TICK_SIZE - 1, color=color)
    names = [shorten(name) for name in classes]
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    axes.set_xticks(range(len(names)), names, fontsize=TICK_SIZE, **slanted)
    axes.set_yticks(range(len(names)), names, fontsize=TICK_SIZE)
    axes.set_xlabel("decision", fontsize=LABEL_SIZE)
    axes.set_ylabel("true class", fontsize=LABEL_SIZE)
    add_heading(figure, f"{shorten(label)}: images by decision")
    remove_frame(axes)
    bar = add_colorbar(figure, image, axes, "share of the true class (%)")
    bar.set_ticks([0, 1, 5, 10, 25, 50, 75, 100])
    save_figure(figure, path)


def _plot_most_confused(path, label: str, classes, cells, most: int) -> None:
    totals = np.zeros(len(classes), dtype=int)
    for true, _, count in cells:
        totals[true] += count
    pairs = [cell for cell in cells if cell[0] != cell[1]]
    pairs = sorted(pairs, key=lambda cell: -cell[2] / totals[cell[0]])[:most]
    shares = [100 * count / totals[true] for true, _, count in pairs]
    figure = new_figure(10.5, max(3, 1.2 + 0.3 * len(pairs)))
    axes = figure.subplots()
    axes.barh(range(len(pairs)), shares, color=CLASS, height=0.7)
    for row, (share, (true, _, count)) in enumerate(zip(shares, pairs)):
        axes.text(share, row, f"  {count} of {totals[true]}", va="center", fontsize=TICK_SIZE)
    names = [f"{shorten(classes[true])}  →  {shorten(classes[decision])}" for true, decision, _ in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=TICK_SIZE)
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * max(shares, default=1))  # room for the numbers
    axes.set_xlabel("share of the true class decided so (%)", fontsize=LABEL_SIZE)
    add_heading(figure, f"{shorten(label)}: most frequent confusions, true class → decision")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TICK_SIZE)
    save_figure(figure, path)


def plot_token_similarity(path: str | os.PathLike, *, series: Sequence[Mapping]) -> None:
    """Draw the cosine of class and distillation token after each layer, one line per model, ±1 standard deviation.

    Args:
        series: for each model, what [`token_similarity`] returns over the images, and `model`: its name.
    """
    deepest = max(len(one["mean"]) for one in series)
    figure = new_figure(max(8, 3.5 + 0.5 * deepest), 5)
    axes = figure.subplots()
    for number, one in enumerate(series):
        color, marker = MODEL_COLORS[number % len(MODEL_COLORS)], MARKERS[number % len(MARKERS)]
        means, stds = np.array(one["mean"]), np.array(one["std"])
        depths = np.arange(len(means))
        end = f"{shorten(one['model'])}  {one['parameters']:.2f} → {one['output_mean']:.3f}"
        axes.plot(depths, means, color=color, marker=marker, markersize=5, linewidth=1.8, label=end)
        axes.fill_between(depths, means - stds, means + stds, color=color, alpha=0.18, linewidth=0)
        axes.plot(-1, one["parameters"], color=color, marker=marker, markersize=9, markeredgecolor="black")
        axes.errorbar(
            deepest, one["output_mean"], one["output_std"], color=color, marker=marker, markersize=9,
            markeredgecolor="black", capsize=3,
        )  # fmt: skip
    steps = [str(depth) for depth in range(1, deepest)]
    axes.set_xticks(range(-1, deepest + 1), ["learned\ntokens", "input", *steps, "output"], fontsize=TICK_SIZE)
    axes.set_xlim(-1.5, deepest + 0.5)
    axes.set_xlabel("after layer", fontsize=LABEL_SIZE)
    axes.set_ylabel("cosine, mean ± 1 standard deviation", fontsize=LABEL_SIZE)
    low = min(min(one["parameters"], one["output_mean"], *one["mean"]) for one in series)
    axes.set_ylim(min(-0.05, low - 0.1), 1.05)
    axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    add_heading(figure, "Similarity of the class and the distillation token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=TICK_SIZE)
    figure.legend(
        loc="outside lower center", ncols=2, fontsize=TICK_SIZE, frameon=False, title="model, learned tokens → output"
    )
    save_figure(figure, path)


def plot_attention(path: str | os.PathLike, *, model: str, images, captions, layer: int, layers: int, maps) -> None:
    """Draw the tokens' mean attention in the first and in the chosen layer, and their rollout, over each image.

    The arguments come from [`attention_maps`]. Where there are two tokens, the share of the attention that both give
    to the same patches stands below the second's map.

    Args:
        model: name of the model.
        images: `(images, height, width, 3)` uint8, drawn in grey beneath the maps.
        captions: one line for each image.
    """
    kinds = {"first": f"layer 1 of {layers}, mean", "mean": f"layer {layer} of {layers}, mean"}
    kinds = {kind: name for kind, name in kinds.items() if kind == "mean" or layer > 1}
    kinds["rollout"] = "rollout, all layers"
    columns = [(token, kind, f"{token} token\n{name}") for kind, name in kinds.items() for token in maps[0]]
    first = next(iter(maps[0]))
    figure = new_figure(1.1 + 2.3 * (1 + len(columns)), 0.9 + 2.6 * len(images))
    grid = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for row, (pixels, caption, tokens) in enumerate(zip(images, captions, maps)):
        grid[row, 0].imshow(pixels)
        grid[row, 0].set_title(shorten(caption, 25), fontsize=TICK_SIZE)
        for axes, (token, kind, heading) in zip(grid[row, 1:], columns):
            shown = _lay_over(axes, pixels, tokens[token][kind])
            axes.set_title(heading if row == 0 else "", fontsize=TICK_SIZE)
            if token != first:
                share = 100 * _overlap(tokens[token][kind], tokens[first][kind])
                axes.set_xlabel(f"{share:.0f} % as the {first} token", fontsize=TICK_SIZE)
    _finish_attention(figure, grid, shown, f"{shorten(model)}: attention to the patches")
    save_figure(figure, path)


def _overlap(one, other) -> float:
    """Share of the attention to the patches that two maps have in common, in [0, 1]."""
    one, other = (np.array(weights) / max(np.sum(weights), 1e-12) for weights in (one, other))
    return float(np.minimum(one, other).sum())


def plot_attention_heads(
    path: str | os.PathLike, *, model: str, images, captions, layer: int, layers: int, maps
) -> None:
    """Draw the attention of each head, one row for each image and token; arguments as for [`plot_attention`]."""
    rows = [(number, token) for number in range(len(images)) for token in maps[0]]
    heads = len(maps[0][rows[0][1]]["heads"])
    figure = new_figure(1.9 + 1.7 * (1 + heads), 0.8 + 1.8 * len(rows))
    grid = figure.subplots(len(rows), 1 + heads, squeeze=False)
    for row, (number, token) in enumerate(rows):
        grid[row, 0].imshow(images[number])
        first = token == next(iter(maps[number]))
        grid[row, 0].set_title(shorten(captions[number], 19) if first else "", fontsize=TICK_SIZE)
        grid[row, 0].set_ylabel(f"{token}\ntoken", fontsize=TICK_SIZE)
        for head, (axes, weights) in enumerate(zip(grid[row, 1:], maps[number][token]["heads"])):
            shown = _lay_over(axes, images[number], weights)
            axes.set_title(f"head {head + 1}" if row == 0 else "", fontsize=TICK_SIZE)
    _finish_attention(figure, grid, shown, f"{shorten(model)}: attention heads, layer {layer} of {layers}")
    save_figure(figure, path)


def overlay(pixels, weights, side: int) -> np.ndarray:
    """Lay a map of patches over a grey image, as in the pictures of attention but without a frame.

    Args:
        pixels: `(height, width, 3)` uint8.
        weights: rows x columns; the colours run from 0 to the largest.
        side: of the result, pixels.

    Returns:
        `(side, side, 3)` uint8.
    """
    weights = np.array(weights)
    colours = colormaps[MAPS](weights / max(weights.max(), 1e-12))[..., :3]
    layers = [np.broadcast_to(np.mean(pixels, axis=2, keepdims=True), np.shape(pixels)), 255 * colours]
    grey, coloured = (
        np.asarray(Image.fromarray(layer.astype(np.uint8)).resize((side, side), how), dtype=float)
        for layer, how in zip(layers, (Image.Resampling.BICUBIC, Image.Resampling.NEAREST))
    )
    return (OPACITY * coloured + (1 - OPACITY) * grey).round().astype(np.uint8)


def _lay_over(axes: Axes, pixels, weights) -> AxesImage:
    """Draw a map of patches over a grey image; the colours run from 0 to the map's largest weight."""
    weights = np.array(weights)
    height, width = pixels.shape[:2]
    axes.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    return axes.imshow(
        weights / max(weights.max(), 1e-12),
        cmap=MAPS,
        vmin=0,
        vmax=1,
        alpha=OPACITY,
        extent=extent,
        interpolation="nearest",
    )


def _finish_attention(figure: Figure, grid, shown: AxesImage, title: str) -> None:
    for axes in grid.flat:
        remove_frame(axes)
        axes.set(xticks=[], yticks=[])
    add_heading(figure, title)
    add_colorbar(figure, shown, list(grid.flat), "attention, share of each map's largest")


def plot_patch_filters(path: str | os.PathLike, *, model: str, filters, explained) -> None:
    """Draw the principal components of the patch embedding as colours; the arguments come from [`patch_filters`].

    Grey is zero; each component is scaled by its own largest entry.
    """
    filters = np.array(filters)
    columns = min(7, len(filters))
    rows = math.ceil(len(filters) / columns)
    figure = new_figure(max(6, 1.25 * columns + 0.6), 1.0 + 1.5 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(filters) :]:
        axes.set_visible(False)
    for axes, one, share in zip(grid.flat, filters, explained):
        shown = 0.5 + 0.5 * one / max(np.abs(one).max(), 1e-12)
        axes.imshow(np.broadcast_to(shown, (*shown.shape[:2], 3)), interpolation="nearest")
        axes.set_title(f"{100 * share:.1f} %", fontsize=TICK_SIZE)
        remove_frame(axes)
        axes.set(xticks=[], yticks=[])
    title = f"{shorten(model)}: patch embedding,\nprincipal components and their share of the variance"
    add_heading(figure, title)
    save_figure(figure, path)


def plot_position_similarity(path: str | os.PathLike, *, model: str, patches, tokens: Mapping) -> None:
    """Draw a small map at the place of each patch, and one map for each token; see [`position_similarity`]."""
    patches = np.array(patches)
    rows, columns = patches.shape[:2]
    # All maps share one sheet, with an empty line between them: hundreds of axes would take minutes.
    sheet = np.full((rows * (rows + 1) - 1, columns * (columns + 1) - 1), np.nan)
    for row, column in np.ndindex(rows, columns):
        top, left = row * (rows + 1), column * (columns + 1)
        sheet[top : top + rows, left : left + columns] = patches[row, column]
    low = min(np.nanmin(sheet), *(np.min(values) for values in tokens.values()))
    scale = {"cmap": MAPS, "vmin": low, "vmax": 1, "interpolation": "nearest"}

    figure = new_figure(12.5, 8.2)
    panels = figure.subplot_mosaic([["patches", name] for name in tokens], width_ratios=(2.3, 1))
    shown = panels["patches"].imshow(sheet, **scale)
    panels["patches"].set_title("each patch with all patches", fontsize=LABEL_SIZE)
    panels["patches"].set_xticks(np.arange(columns) * (columns + 1) + (columns - 1) / 2, range(1, columns + 1))
    panels["patches"].set_yticks(np.arange(rows) * (rows + 1) + (rows - 1) / 2, range(1, rows + 1))
    panels["patches"].set_xlabel("column of the patch", fontsize=LABEL_SIZE)
    panels["patches"].set_ylabel("row of the patch", fontsize=LABEL_SIZE)
    for name, values in tokens.items():
        panels[name].imshow(np.array(values), **scale)
        panels[name].set_title(f"{name} token with all patches", fontsize=LABEL_SIZE)
        panels[name].set(xticks=[], yticks=[])
    for axes in panels.values():
        remove_frame(axes)
        axes.tick_params(labelsize=TICK_SIZE if max(rows, columns) <= 16 else TICK_SIZE - 3)
    add_heading(figure, f"{shorten(model)}: position embeddings")
    add_colorbar(figure, shown, list(panels.values()), "cosine")
    save_figure(figure, path)
