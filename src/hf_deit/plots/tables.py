"""Pictures of the paper's tables and of Figure 1."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..errors import UserError
from .style import (
    CLASS,
    DISTILLATION,
    FUSED,
    LABEL_SIZE,
    MARKERS,
    MODEL_COLORS,
    OTHER,
    TEACHER,
    TICK_SIZE,
    TITLE_SIZE,
    add_heading,
    new_figure,
    save_figure,
)


# Figure 1: colour of each family, and the side of its marks for the names, so that close curves stay readable.
FAMILIES = {
    "DeiT": (CLASS, "left"),
    "DeiT distilled": (DISTILLATION, "right"),
    "DeiT distilled, 1000 epochs": ("#E69F00", "left"),
    "EfficientNet": (TEACHER, "right"),
    "RegNetY": (OTHER, "left"),
    "ResNet": ("#56B4E9", "left"),
    "ViT": (FUSED, "right"),
}


def plot_table(
    points: Sequence[tuple[str, str, Sequence[float], float | None]],
    path: str | os.PathLike,
    title: str | None = None,
    lines: bool = False,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Draw a table of runs: a dot for each seed, a mark for the mean, and as text the mean and the paper's number.

    A line below the picture says what dot, bar and number are.

    Args:
        points: row, column, one value per seed (a cell without values is left out) and the paper's number; values and
            number in percent.
        path: the file to write; its suffix selects the format. Missing folders are created.
        title: one line above the picture.
        lines: if true, the columns are the ticks of one axis and each row is a line; otherwise each column is a panel.
        labels: what is written for a row or a column instead of its name.
    """
    points = [point for point in points if point[2]]
    rows, columns = (
        list(dict.fromkeys(point[0] for point in points)),
        list(dict.fromkeys(point[1] for point in points)),
    )
    if lines:
        figure = new_figure(8.5, 5.4)
    else:
        broken = sum(labels.get(row, row).count("\n") for row in rows)
        height = 2.2 + 0.45 * max(3, len(rows)) + 0.15 * broken
        figure = new_figure(3.4 + 4.6 * max(1, len(columns)), height)
    if title:
        add_heading(figure, title)
    if lines:
        _draw_lines(figure.subplots(), points, rows, columns, labels)
    elif columns:
        for column, axes in zip(columns, figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], strict=True):
            _draw_panel(axes, [point for point in points if point[1] == column], rows, labels)
            axes.set_title(labels.get(column, column), fontsize=LABEL_SIZE)
    papers = any(paper is not None for *_, paper in points) and not lines
    note = f"dot: one seed     {'line' if lines else 'bar'}: mean of the seeds"
    if papers:
        note += ", written beside them\nin brackets: the paper's number, on its dataset and at its size"
    figure.supxlabel(note, fontsize=TICK_SIZE, color="0.3")
    save_figure(figure, path)


def _draw_lines(axes: Axes, points, rows: list[str], columns: list[str], labels: Mapping[str, str]) -> None:
    for row, color in zip(rows, (FUSED, *MODEL_COLORS), strict=False):
        cells = {column: values for name, column, values, _ in points if name == row}
        places = [columns.index(column) for column in cells]
        means = [sum(values) / len(values) for values in cells.values()]
        axes.plot(places, means, color=color, label=labels.get(row, row), linewidth=1.8)
        for place, values in zip(places, cells.values(), strict=True):
            axes.plot([place] * len(values), values, "o", color=color, alpha=0.5, markersize=5)
    axes.set_xticks(range(len(columns)), [labels.get(column, column) for column in columns], fontsize=TICK_SIZE)
    axes.margins(x=0.1)
    axes.set_ylabel("top-1 (%)", fontsize=LABEL_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=TICK_SIZE, frameon=False)


def _draw_panel(axes: Axes, points, rows: list[str], labels: Mapping[str, str]) -> None:
    for row, _, values, paper in points:
        place, mean = rows.index(row), sum(values) / len(values)
        axes.plot(values, [place] * len(values), "o", color=CLASS, alpha=0.5, markersize=6)
        axes.plot([mean], [place], "|", color=FUSED, markersize=17, markeredgewidth=2.4)
        note = f"{mean:.1f}" + ("" if paper is None else f"  (paper: {paper})")
        axes.annotate(
            note, (max(values), place), xytext=(10, 0), textcoords="offset points", va="center", fontsize=TICK_SIZE - 1
        )
    axes.set_yticks(range(len(rows)), [labels.get(row, row) for row in rows], fontsize=TICK_SIZE)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    lowest, highest = (limit(value for _, _, values, _ in points for value in values) for limit in (min, max))
    span = max(highest - lowest, 1.0)
    axes.set_xlim(lowest - 0.15 * span, highest + 0.9 * span)  # room for the text
    axes.set_xlabel("top-1 (%)", fontsize=TICK_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis="x")


def plot_tradeoff(points: Sequence[Mapping], path: str | os.PathLike, device: str) -> None:
    """Draw Figure 1 of the paper: top-1 over images per second, one line per family of networks.

    Args:
        points: what [`tradeoff_points`] returns: `label`, `family`, `images_per_second` (measured) and `top1`
            (fraction in [0, 1], the paper's).
        path: the file to write; its suffix selects the format. Missing folders are created.
        device: the machine on which the throughput was measured, for the label of the axis.

    Raises:
        ValueError: if `points` is empty.
    """
    if not points:
        raise UserError("there are no points to draw: measure at least one model of the paper's Table 5")
    families: dict[str, list[Mapping]] = {}
    for point in sorted(points, key=lambda point: point["images_per_second"]):
        families.setdefault(point["family"], []).append(point)
    named = [family for family in FAMILIES if family in families]
    others = sorted(set(families) - set(named))

    figure = new_figure(11, 7)
    axes = figure.subplots()
    for number, family in enumerate([*named, *others]):
        rates = [point["images_per_second"] for point in families[family]]
        top1 = [100 * point["top1"] for point in families[family]]
        color, side = FAMILIES.get(family, ("0.45", "right"))
        mark = MARKERS[number % len(MARKERS)]
        axes.plot(rates, top1, label=family, color=color, marker=mark, linewidth=1.6, markersize=7)
        below = side == "left"
        for x, y, point in zip(rates, top1, families[family], strict=True):
            short = re.sub(r"^\w+-(?=\w)| distilled| / 1000 epochs", "", point["label"])
            axes.annotate(
                short,
                (x, y),
                xytext=(-6, -5) if below else (6, 5),
                textcoords="offset points",
                ha="right" if below else "left",
                va="top" if below else "bottom",
                fontsize=TICK_SIZE - 2,
                color=color,
            )
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.07)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Accuracy and throughput (Figure 1)", fontsize=TITLE_SIZE)
    axes.set_xlabel(f"images/s, measured on {device}", fontsize=LABEL_SIZE)
    axes.set_ylabel("ImageNet top-1, the paper's (%)", fontsize=LABEL_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.legend(fontsize=TICK_SIZE, frameon=False)
    save_figure(figure, path)
