"""Colours, sizes and helpers that all pictures share.

The pictures use matplotlib without pyplot: no window opens and no global state changes. A head has the same colour in
every picture.

Source: the colours are those of Okabe & Ito (2008), which colour-blind readers can tell apart.
"""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine


FUSED, CLASS, DISTILLATION, TEACHER, OTHER = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
HEAD_COLORS = {"class": CLASS, "distillation": DISTILLATION, "class+distillation": FUSED, "teacher": TEACHER}
# Models in one picture: the same palette, and a different mark for readers who cannot use the colours.
MODEL_COLORS = (CLASS, DISTILLATION, TEACHER, OTHER, "#E69F00", "#56B4E9", FUSED)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Colour maps: shares begin at white, maps change evenly in lightness.
SHARES, MAPS = "Blues", "viridis"
HEADING_SIZE, TITLE_SIZE, LABEL_SIZE, TICK_SIZE = 15, 13, 12, 11


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure; the sizes are in inches."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write the figure with 150 dots per inch; missing folders are created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def add_heading(figure: Figure, text: str) -> None:
    """Write a bold heading, smaller in a narrow picture: a bold letter is about 0.65 of its size wide."""
    longest = max(map(len, text.splitlines()))
    size = min(HEADING_SIZE, 72 * figure.get_figwidth() / (0.65 * longest))
    figure.suptitle(text, fontsize=size, fontweight="bold")


def remove_frame(axes: Axes) -> None:
    """Hide the frame and the tick marks of the axes."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def add_colorbar(figure: Figure, image: AxesImage, axes: Axes | list[Axes], label: str) -> Colorbar:
    """Add an opaque colour bar with a label beside the axes."""
    bar = figure.colorbar(image, ax=axes, shrink=min(0.9, 5 / figure.get_figheight()), pad=0.02, aspect=30)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE)
    return bar


def text_color_on(image: AxesImage, value: float) -> str:
    """Return "black" or "white", whichever is readable on the image's colour of `value`."""
    red, green, blue, _ = image.cmap(float(image.norm(value)))  # pyright: ignore[reportArgumentType]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def shorten(text: str, longest: int = 40) -> str:
    """Cut the middle out of a long name, as paths and class names differ at their ends; keep a head after ": "."""
    name, colon, head = text.partition(": ")
    if len(head) > longest // 2:
        name, colon, head = text, "", ""
    half = (longest - len(colon + head) - 1) // 2
    short = text if len(text) <= longest else f"{name[:half]}…{name[-half:]}{colon}{head}"
    return short.replace("$", r"\$")  # otherwise matplotlib reads a formula
