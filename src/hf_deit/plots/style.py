"""Pictures of a run, of an analysis and of the paper's tables.

The only file that imports matplotlib, and without pyplot: no window, no global state touched.

Not here: collecting the numbers. A run's come from the Trainer's own log (`trainer.state.log_history`), an analysis'
from analysis.py, under the same names. Colours are those of Okabe & Ito (2008), which colour-blind readers can tell
apart; a head has one colour everywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage


FUSED, CLASS, DISTILLATION, TEACHER, OTHER = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
HEAD_COLORS = {"class": CLASS, "distillation": DISTILLATION, "class+distillation": FUSED, "teacher": TEACHER}
# Models side by side: the same palette, and a mark for whom colours do not help.
MODEL_COLORS = (CLASS, DISTILLATION, TEACHER, OTHER, "#E69F00", "#56B4E9", FUSED)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Scales of numbers: shares begin at white, maps are even in lightness.
SHARES, MAPS = "Blues", "viridis"
HEADING_SIZE, TITLE_SIZE, LABEL_SIZE, TICK_SIZE = 15, 13, 12, 11


# --- pictures of an analysis: each takes what the function of its subject in analysis.py returns ---------------------


# --- tables of the paper ---------------------------------------------------------------------------------------------


# --- what the pictures share -----------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def _save(figure: Figure, path: str | os.PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _heading(figure: Figure, text: str) -> None:
    """Smaller where the picture is narrow: a bold letter is some 0.65 of its size wide."""
    longest = max(map(len, text.splitlines()))
    size = min(HEADING_SIZE, 72 * figure.get_figwidth() / (0.65 * longest))
    figure.suptitle(text, fontsize=size, fontweight="bold")


def _without_frame(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _colorbar(figure: Figure, image: AxesImage, axes, label: str) -> Colorbar:
    bar = figure.colorbar(image, ax=axes, shrink=min(0.9, 5 / figure.get_figheight()), pad=0.02, aspect=30)
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE)
    return bar


def _readable_on(image: AxesImage, value: float) -> str:
    """Black or white, whichever is seen on the colour of `value`."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def _shortened(text: str, longest: int = 40) -> str:
    """With the middle left out: paths and class names differ at their ends. A head after a model's name stays."""
    name, colon, head = text.partition(": ")
    if len(head) > longest // 2:
        name, colon, head = text, "", ""
    half = (longest - len(colon + head) - 1) // 2
    short = text if len(text) <= longest else f"{name[:half]}…{name[-half:]}{colon}{head}"
    return short.replace("$", r"\$")  # else matplotlib reads a formula
