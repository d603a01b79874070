"""The picture of one run, report.png: losses, learning rate and accuracies.

Not here: the numbers, which come from the Trainer's log (`trainer.state.log_history`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..errors import UserError
from .style import (
    CLASS,
    DISTILLATION,
    FUSED,
    LABEL_SIZE,
    OTHER,
    TEACHER,
    TICK_SIZE,
    TITLE_SIZE,
    add_heading,
    new_figure,
    save_figure,
)


# Log key, legend, style. The fused line is broad, because it often coincides with the lines of the two heads above it.
LOSSES = (
    ("loss", "training loss", {"color": FUSED}),
    ("class_loss", "class head", {"color": CLASS}),
    ("distillation_loss", "distillation head", {"color": DISTILLATION}),
    ("eval_loss", "evaluation loss", {"color": OTHER, "linestyle": "--"}),
)
RATES = (("learning_rate", "learning rate", {"color": FUSED}),)
FEW = 12  # with at most so many values a line has a mark at each
ACCURACIES = (
    ("eval_top1", "fused", {"color": FUSED, "linewidth": 3.2}),
    ("eval_class_top1", "class head", {"color": CLASS}),
    ("eval_distillation_top1", "distillation head", {"color": DISTILLATION}),
    ("eval_ema_top1", "moving average", {"color": OTHER, "linestyle": "--"}),
)


class Report:
    """The picture of a run; as the last value of a notebook's cell it is shown there.

    Attributes:
        path: the PNG file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()

    def __repr__(self) -> str:
        return f"report of the run: {self.path}"


def plot_run(
    log_history: Sequence[Mapping[str, float]],
    path: str | os.PathLike,
    teacher_top1: float | None = None,
    title: str | None = None,
    held_out: bool = False,
) -> None:
    """Draw the parts of the loss, the learning rate and the top-1 of the heads over the epochs, side by side.

    Args:
        log_history: the Trainer's entries, in order. A panel without logged values is left out. Of two entries for the
            same epoch (a final evaluation), the later one counts.
        path: the file to write; its suffix selects the format (`report.png`). Missing folders are created.
        teacher_top1: fraction in [0, 1], drawn as a horizontal line in the panel of the heads.
        title: one line above the panels.
        held_out: whether none of the evaluation images is known to be a training image; the panel then says so.

    Raises:
        ValueError: if `teacher_top1` is not a fraction.
    """
    if teacher_top1 is not None and not 0 <= teacher_top1 <= 1:
        raise UserError(f"teacher_top1 is {teacher_top1}; it must be a fraction in [0, 1], for example 0.972")

    panels = [lines for lines in (LOSSES, RATES, ACCURACIES) if any(_points(log_history, key) for key, _, _ in lines)]
    figure = new_figure(5 * max(1, len(panels)), 4.8)
    if title:
        add_heading(figure, title)
    if not panels:
        figure.text(0.5, 0.5, "nothing was logged", ha="center", va="center", fontsize=LABEL_SIZE, color="0.4")
    for lines, axes in zip(panels, figure.subplots(1, max(1, len(panels)), squeeze=False)[0] if panels else []):
        if lines is LOSSES:
            _draw(axes, log_history, lines, title="Losses", unit="nats")
            # An evaluation loss alone would be taken for the training loss.
            _finish(axes, "" if _points(log_history, "loss") else "training loss: not logged")
        elif lines is RATES:
            _draw(axes, log_history, lines, title="Learning rate", unit="")
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
            _finish(axes)
        else:
            name = "Held-out accuracy" if held_out else "Accuracy"
            _draw(axes, log_history, lines, title=name, unit="top-1 (%)", percent=True)
            if teacher_top1 is not None:
                level = 100 * teacher_top1
                axes.axhline(level, color=TEACHER, linestyle=":", linewidth=2, label=f"teacher  {level:.1f} %")
            _finish(axes)
    save_figure(figure, path)


def _points(log_history: Sequence[Mapping[str, float]], key: str) -> dict[float, float]:
    """The logged values by epoch."""
    return {entry["epoch"]: entry[key] for entry in log_history if key in entry and "epoch" in entry}


def _draw(axes: Axes, log_history, lines, title: str, unit: str, percent: bool = False) -> None:
    """Draw each logged line; with `percent`, in percent and with the last value in the legend."""
    axes.set_title(title, fontsize=TITLE_SIZE)
    axes.set_ylabel(unit, fontsize=LABEL_SIZE)
    axes.set_xlabel("epoch", fontsize=LABEL_SIZE)
    for key, label, style in lines:
        points = _points(log_history, key)
        if not points:
            continue
        epochs, values = list(points), list(points.values())
        if percent:
            values = [100 * value for value in values]
            label = f"{label}  {values[-1]:.1f} %"
        evaluated = key.startswith("eval_")
        axes.plot(
            epochs,
            values,
            **{
                "label": label,
                "linewidth": 1.6,
                "marker": "o" if evaluated or len(points) <= FEW else None,
                "markersize": 4,
                # With more than about thirty evaluations, all marks together would hide the line.
                "markevery": math.ceil(len(points) / 30),
                **style,
            },
        )


def _finish(axes: Axes, note: str = "") -> None:
    """Draw grid, frame and legend; the note stands above the legend's lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.set_xlim(left=0)
    long = axes.get_xlim()[1] >= 3  # a shorter run has its marks between the epochs
    axes.xaxis.set_major_locator(MaxNLocator(integer=long, nbins=6))
    # One line needs no legend where the title says what it is.
    if note or [line.get_label() for line in axes.lines] != [axes.get_title().lower()]:
        # White behind it: a teacher's line may pass below.
        look = {"fontsize": TICK_SIZE, "title_fontsize": TICK_SIZE, "framealpha": 0.85, "edgecolor": "none"}
        axes.legend(handlelength=2.6, title=note or None, **look)
