"""The pictures of a run and of an analysis: what is drawn is what was given, and missing parts do not hurt."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_deit.plots import style as plots


def evaluation(epoch: float, loss: float, fused: float, one: float, other: float) -> dict[str, float]:
    heads = {"eval_top1": fused, "eval_class_top1": one, "eval_distillation_top1": other}
    return {"epoch": epoch, "eval_loss": loss, **heads}


HISTORY = [
    {"epoch": 0.5, "step": 1, "loss": 2.0, "class_loss": 2.2, "distillation_loss": 1.8, "learning_rate": 5e-4},
    {"epoch": 1.0, "step": 2, "loss": 1.5, "class_loss": 1.7, "distillation_loss": 1.3, "learning_rate": 1e-3},
    evaluation(1.0, 1.4, 0.50, 0.40, 0.45),
    evaluation(2.0, 1.0, 0.70, 0.60, 0.65),
    {"epoch": 2.0, "step": 4, "train_runtime": 12.0, "train_loss": 1.75},
    evaluation(2.0, 0.9, 0.72, 0.62, 0.66),  # the final evaluation
]


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures = []
    savefig = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_the_lines_are_the_log(tmp_path, drawn):
    path = tmp_path / "new" / "report.png"
    plots.plot_run(HISTORY, path, teacher_top1=0.9, title="a run")

    losses, rates, accuracies = drawn[0].axes
    assert lines(losses) == {
        "training loss": ([0.5, 1.0], [2.0, 1.5]),
        "class head": ([0.5, 1.0], [2.2, 1.7]),
        "distillation head": ([0.5, 1.0], [1.8, 1.3]),
        "evaluation loss": ([1.0, 2.0], [1.4, 0.9]),
    }
    assert list(lines(rates).values()) == [([0.5, 1.0], [5e-4, 1e-3])]
    assert lines(accuracies) == {
        "fused  72.0 %": ([1.0, 2.0], [50.0, 72.0]),
        "class head  62.0 %": ([1.0, 2.0], [40.0, 62.0]),
        "distillation head  66.0 %": ([1.0, 2.0], [45.0, 66.0]),
        "teacher  90.0 %": ([0, 1], [90.0, 90.0]),
    }
    assert drawn[0].get_suptitle() == "a run"
    with Image.open(path) as image:
        assert image.size == (2250, 720)


def test_a_head_has_one_colour_in_all_panels(tmp_path, drawn):
    plots.plot_run(HISTORY, tmp_path / "report.png")
    losses, _, accuracies = (
        {line.get_label().split("  ")[0]: line.get_color() for line in axes.lines} for axes in drawn[0].axes
    )
    for head in ("class head", "distillation head"):
        assert losses[head] == accuracies[head]
    assert len(set(accuracies.values())) == 3


def test_all_text_lies_inside_the_picture(tmp_path, drawn):
    plots.plot_run(HISTORY, tmp_path / "report.png", teacher_top1=0.9, title="a run")
    figure = drawn[0]
    box, figure_box = figure.get_tightbbox().transformed(figure.dpi_scale_trans), figure.bbox
    assert figure_box.x0 <= box.x0 and figure_box.y0 <= box.y0 and box.x1 <= figure_box.x1 and box.y1 <= figure_box.y1


@pytest.mark.parametrize("history", [[], HISTORY[:1], HISTORY[3:4], [{"train_runtime": 1.0}]])
def test_missing_series_are_said_not_raised(tmp_path, drawn, history):
    plots.plot_run(history, tmp_path / "report.png")
    logged = {key for entry in history for key in entry}
    for axes, key in zip(drawn[0].axes, ("loss", "learning_rate", "top1")):
        empty = not any(key in name for name in logged - {"train_loss"})
        assert [text.get_text() for text in axes.texts] == (["not logged"] if empty else [])


def test_one_point_is_visible(tmp_path, drawn):
    plots.plot_run(HISTORY[:1], tmp_path / "report.png")
    assert all(line.get_marker() == "o" for line in drawn[0].axes[0].lines)


def test_a_loss_that_is_not_finite_does_not_stop_the_picture(tmp_path):
    plots.plot_run([*HISTORY, {"epoch": 3.0, "loss": float("nan")}], tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_percent_for_a_fraction_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"97.2.*fraction in \[0, 1\]"):
        plots.plot_run(HISTORY, tmp_path / "report.png", teacher_top1=97.2)


def test_pyplot_and_its_backend_are_left_alone():
    program = (
        "import sys, hf_deit.plots.style as plots, tempfile, os\n"
        "plots.plot_run([], os.path.join(tempfile.mkdtemp(), 'report.png'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    source = str(Path(plots.__file__).parents[2])
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": source, "PATH": ""}, timeout=120)


# --- pictures of an analysis -----------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
LONG = "a_model_with_a_name_that_is_longer_than_any_legend_should_have_to_hold"
PIXELS = RNG.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def by_class(classes: int, models: list[str]) -> dict:
    heads = [(model, head) for model in models for head in ("class", "distillation", "class+distillation")]
    series = [
        {"model": model, "head": head, "label": f"{model}: {head}", "overall": 0.5, "by_class": RNG.random(classes)}
        for model, head in [*heads, ("t", "teacher")]
    ]
    names = [f"class {number}" for number in range(classes)]
    return {"quantity": "accuracy", "classes": names, "counts": [7] * classes, "series": series}


def attention(tokens: list[str]) -> dict:
    shapes = {"heads": (3, 4, 4), "mean": (4, 4), "rollout": (4, 4)}
    maps = [{token: {kind: RNG.random(shape) for kind, shape in shapes.items()} for token in tokens} for _ in PIXELS]
    return {"model": LONG, "captions": ["cat", LONG], "images": PIXELS, "layer": 3, "layers": 3, "maps": maps}


def similarity(model: str, layers: int) -> dict:
    values = {"mean": RNG.random(layers + 1).tolist(), "std": [0.1] * (layers + 1)}
    return values | {"model": model, "parameters": -0.2, "output_mean": 0.9, "output_std": 0.02, "images": 9}


def confusions(classes: int) -> dict:
    cells = [[true, decision, 1 + true + decision] for true in range(classes) for decision in (true, 0)]
    return {"label": LONG, "classes": [f"class {number}" for number in range(classes)], "cells": cells}


RATES = np.array([[0, 0.1, 0.25], [0.1, 0, 0.5], [0.25, 0.5, 0]])
PICTURES = {
    "disagreement": (plots.plot_disagreement, {"names": ["truth", "a", LONG], "rates": RATES, "images": 9}),
    "ten classes": (plots.plot_by_class, by_class(10, ["a", LONG])),
    "many classes": (plots.plot_by_class, by_class(60, ["a"])),
    "confusion": (plots.plot_confusion, confusions(10)),
    "most confused": (plots.plot_confusion, confusions(60)),
    "similarity": (plots.plot_token_similarity, {"series": [similarity("a", 4), similarity(LONG, 12)]}),
    "attention": (plots.plot_attention, attention(["class", "distillation"])),
    "attention of one token": (plots.plot_attention, attention(["class"])),
    "heads": (plots.plot_attention_heads, attention(["class", "distillation"])),
    "filters": (
        plots.plot_patch_filters,
        {"model": LONG, "filters": RNG.normal(size=(10, 4, 4, 3)), "explained": [0.1] * 10},
    ),
    "positions": (
        plots.plot_position_similarity,
        {"model": LONG, "patches": RNG.random((3, 4, 3, 4)), "tokens": {"class": RNG.random((3, 4))}},
    ),
}


@pytest.mark.parametrize("subject", PICTURES)
def test_a_picture_of_an_analysis_is_whole(tmp_path, drawn, subject):
    plot, numbers = PICTURES[subject]
    plot(tmp_path / "new" / "picture.png", **numbers)
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        assert len(np.unique(np.array(picture.convert("L")))) > 20
    figure = drawn[0]
    box, figure_box = figure.get_tightbbox().transformed(figure.dpi_scale_trans), figure.bbox
    assert figure_box.x0 <= box.x0 and figure_box.y0 <= box.y0 and box.x1 <= figure_box.x1 and box.y1 <= figure_box.y1
    heading = figure._suptitle.get_window_extent()
    assert figure_box.x0 <= heading.x0 and heading.x1 <= figure_box.x1


def test_the_heat_map_is_the_table_and_says_its_numbers(tmp_path, drawn):
    plot, numbers = PICTURES["disagreement"]
    plot(tmp_path / "picture.png", **numbers)
    axes = drawn[0].axes[0]
    assert (axes.images[0].get_array() == RATES).all()
    assert [float(text.get_text()) for text in axes.texts] == RATES.flatten().tolist()


def test_every_class_and_head_has_its_mark(tmp_path, drawn):
    numbers = by_class(4, ["a", "b"])
    numbers["counts"][2] = 0
    for one in numbers["series"]:
        one["by_class"] = [*one["by_class"][:2].tolist(), None, one["by_class"][3]]
    plots.plot_by_class(tmp_path / "picture.png", **numbers)
    axes = drawn[0].axes[0]
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["class 0  (7)", "class 1  (7)", "class 3  (7)"]
    for line, one in zip(marks, numbers["series"], strict=True):
        assert list(line.get_xdata()) == [100 * value for value in one["by_class"] if value is not None]
        assert line.get_label() == f"{one['label']}  50.0 %"
        assert line.get_color() == plots.HEAD_COLORS[one["head"]]
    looks = {(line.get_color(), line.get_marker()) for line in marks}
    assert len(looks) == len(marks) == 7
    heights = np.stack([line.get_ydata() for line in marks])
    assert (np.diff(heights, axis=0) > 0).all() and abs(heights - [0, 1, 2]).max() < 0.5


def test_of_many_classes_the_lowest_are_named(tmp_path, drawn):
    numbers = by_class(60, [])
    plots.plot_by_class(tmp_path / "picture.png", **numbers)
    everything, named = drawn[0].axes
    values = 100 * numbers["series"][0]["by_class"]
    assert list(everything.lines[0].get_ydata()) == sorted(values)
    assert list(named.lines[0].get_xdata()) == sorted(values)[:20]
    assert named.get_yticklabels()[0].get_text() == f"class {values.argmin()}  (7)"


def test_a_confusion_matrix_holds_the_counts(tmp_path, drawn):
    cells = [[0, 0, 6], [0, 2, 2], [1, 1, 5]]
    plots.plot_confusion(tmp_path / "picture.png", label="a", classes=["x", "y", "z"], cells=cells)
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[75, 0, 25], [0, 100, 0], [0, 0, 0]]
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert written == {((0, 0), "6"), ((2, 0), "2"), ((1, 1), "5")}  # column, row


def test_of_many_classes_the_largest_shares_of_confusion_are_named(tmp_path, drawn):
    cells = [[0, 0, 6], [0, 2, 2], [1, 1, 50], [1, 2, 3]]
    plots.plot_confusion(tmp_path / "picture.png", label="a", classes=["x", "y", "z"], cells=cells, most=2)
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["x  →  z", "y  →  z"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([25, 100 * 3 / 53])
    assert [text.get_text().strip() for text in axes.texts] == ["2 of 8", "3 of 53"]


def test_the_lines_of_similarity_are_the_means(tmp_path, drawn):
    series = [similarity("a", 3), similarity("b", 2)]
    plots.plot_token_similarity(tmp_path / "picture.png", series=series)
    axes = drawn[0].axes[0]
    shown = {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert shown == {f"{one['model']}  -0.20 → 0.900": one["mean"] for one in series}
    for one, band in zip(series, axes.collections[::2]):
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(max(one["mean"]) + 0.1)
        assert heights.min() == pytest.approx(min(one["mean"]) - 0.1)


def test_attention_lies_over_its_image_as_a_share_of_its_largest(tmp_path, drawn):
    _, numbers = PICTURES["attention"]
    plots.plot_attention(tmp_path / "picture.png", **numbers)
    plots.plot_attention_heads(tmp_path / "picture.png", **numbers)
    columns = [("class", "mean"), ("distillation", "mean"), ("class", "rollout"), ("distillation", "rollout")]
    grid = np.array(drawn[0].axes[:10]).reshape(2, 5)
    for row, tokens in zip(grid, numbers["maps"]):
        for axes, (token, kind) in zip(row[1:], columns):
            grey, shown = axes.images
            assert np.array(shown.get_array()) == pytest.approx(tokens[token][kind] / tokens[token][kind].max())
            assert shown.get_extent() == grey.get_extent()
    grid = np.array(drawn[1].axes[:16]).reshape(4, 4)
    for row, (number, token) in zip(grid, [(0, "class"), (0, "distillation"), (1, "class"), (1, "distillation")]):
        assert (row[0].images[0].get_array() == PIXELS[number]).all()
        for axes, head in zip(row[1:], numbers["maps"][number][token]["heads"]):
            assert np.array(axes.images[1].get_array()) == pytest.approx(head / head.max())


def test_filters_are_grey_where_they_are_zero(tmp_path, drawn):
    filters = np.zeros((1, 2, 2, 3))
    filters[0, 0, 0] = 4, 0, -4
    plots.plot_patch_filters(tmp_path / "picture.png", model="a", filters=filters, explained=[0.25])
    (axes,) = (axes for axes in drawn[0].axes if axes.get_visible())
    expected = np.full((2, 2, 3), 0.5)
    expected[0, 0] = 1, 0.5, 0
    assert np.array(axes.images[0].get_array()) == pytest.approx(expected)
    assert axes.get_title() == "25.0 %"


def test_the_map_of_a_patch_lies_where_the_patch_does(tmp_path, drawn):
    _, numbers = PICTURES["positions"]
    plots.plot_position_similarity(tmp_path / "picture.png", **numbers)
    sheet, token = (axes.images[0].get_array() for axes in drawn[0].axes[:2])
    assert sheet.shape == (3 * 4 - 1, 4 * 5 - 1)
    for row, column in np.ndindex(3, 4):
        assert (sheet[row * 4 : row * 4 + 3, column * 5 : column * 5 + 4] == numbers["patches"][row, column]).all()
    assert (token == numbers["tokens"]["class"]).all()


def test_a_long_name_loses_its_middle_and_keeps_its_head():
    assert plots._shortened("short: class") == "short: class"
    shortened = plots._shortened(f"{LONG}: class+distillation")
    assert (
        len(shortened) <= 40 and shortened.startswith("a_model_") and shortened.endswith("_hold: class+distillation")
    )
    assert plots._shortened("abcdefghi", 5) == "ab…hi"


TRADEOFF = [
    {"label": "DeiT-S", "family": "DeiT", "images_per_second": 940.0, "top1": 0.798},
    {"label": "DeiT-Ti", "family": "DeiT", "images_per_second": 2536.0, "top1": 0.722},
    {"label": "DeiT-B↑384", "family": "DeiT", "images_per_second": 85.9, "top1": 0.831},
    {
        "label": "DeiT-Ti distilled / 1000 epochs",
        "family": "DeiT distilled, 1000 epochs",
        "images_per_second": 2529.0,
        "top1": 0.766,
    },
    {"label": "RegNetY-4GF", "family": "RegNetY", "images_per_second": 1156.0, "top1": 0.80},
    {"label": "ViT-B/16", "family": "ViT", "images_per_second": 85.9, "top1": 0.779},
    {"label": "KDforAA-B8", "family": "KDforAA", "images_per_second": 25.2, "top1": 0.858},
]


def test_the_tradeoff_is_a_line_a_family_from_slow_to_fast(tmp_path, drawn):
    plots.plot_tradeoff(TRADEOFF, tmp_path / "new" / "tradeoff.png", device="a machine")
    (axes,) = drawn[0].axes
    assert lines(axes)["DeiT"] == ([85.9, 940.0, 2536.0], pytest.approx([83.1, 79.8, 72.2]))
    assert [line.get_label() for line in axes.lines] == [
        "DeiT",
        "DeiT distilled, 1000 epochs",
        "RegNetY",
        "ViT",
        "KDforAA",
    ]
    assert {text.get_text() for text in axes.texts} == {"Ti", "S", "B↑384", "4GF", "B/16", "B8"}
    assert axes.get_xscale() == "log" and "a machine" in axes.get_xlabel() and "paper" in axes.get_ylabel()
    box, frame = drawn[0].get_tightbbox().transformed(drawn[0].dpi_scale_trans), drawn[0].bbox
    assert frame.x0 <= box.x0 and frame.y0 <= box.y0 and box.x1 <= frame.x1 and box.y1 <= frame.y1
    with pytest.raises(ValueError, match="no points"):
        plots.plot_tradeoff([], tmp_path / "none.png", device="a machine")


TABLE = [
    ("none", "224", [42.0, 44.0, 43.0], 81.8),
    ("none", "384", [45.0], 83.1),
    ("token", "224", [46.0, 47.0], None),
    ("token", "384", [], 84.2),
]


def test_a_table_shows_every_seed_the_mean_and_the_papers_number(tmp_path, drawn):
    plots.plot_table(TABLE, tmp_path / "table.png", title="Table 3")
    first, second = drawn[0].axes
    assert [axes.get_title() for axes in (first, second)] == ["224", "384"]
    seeds, mean = first.lines[:2]
    assert list(seeds.get_xdata()) == [42.0, 44.0, 43.0] and list(mean.get_xdata()) == [43.0]
    assert [text.get_text() for text in first.texts] == ["43.0  (paper: 81.8)", "46.5"]
    assert len(second.texts) == 1
    box = drawn[0].get_tightbbox().transformed(drawn[0].dpi_scale_trans)
    assert box.x1 <= drawn[0].bbox.x1 and box.y1 <= drawn[0].bbox.y1


def test_a_table_as_lines_joins_the_means(tmp_path, drawn):
    plots.plot_table(TABLE, tmp_path / "lines.png", lines=True)
    (axes,) = drawn[0].axes
    assert lines(axes)["none"] == ([0, 1], [43.0, 45.0])
    assert lines(axes)["token"] == ([0], [46.5])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["224", "384"]


def test_a_table_without_runs_is_an_empty_picture(tmp_path):
    plots.plot_table([("none", "224", [], 81.8)], tmp_path / "table.png", title="Table 3")
    assert (tmp_path / "table.png").stat().st_size > 0
