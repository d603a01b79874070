"""analysis.py: a picture holds the numbers it was given, whole and readable."""

import numpy as np
import pytest
from PIL import Image
from support.pictures import LONG

from hf_deit.plots import analysis, style


RNG = np.random.default_rng(0)


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
    shapes = {"heads": (3, 4, 4), "mean": (4, 4), "first": (4, 4), "rollout": (4, 4)}
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
    "disagreement": (analysis.plot_disagreement, {"names": ["truth", "a", LONG], "rates": RATES, "images": 9}),
    "ten classes": (analysis.plot_by_class, by_class(10, ["a", LONG])),
    "many classes": (analysis.plot_by_class, by_class(60, ["a"])),
    "confusion": (analysis.plot_confusion, confusions(10)),
    "most confused": (analysis.plot_confusion, confusions(60)),
    "similarity": (analysis.plot_token_similarity, {"series": [similarity("a", 4), similarity(LONG, 12)]}),
    "attention": (analysis.plot_attention, attention(["class", "distillation"])),
    "attention of one token": (analysis.plot_attention, attention(["class"])),
    "heads": (analysis.plot_attention_heads, attention(["class", "distillation"])),
    "filters": (
        analysis.plot_patch_filters,
        {"model": LONG, "filters": RNG.normal(size=(10, 4, 4, 3)), "explained": [0.1] * 10},
    ),
    "positions": (
        analysis.plot_position_similarity,
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


@pytest.mark.parametrize("largest, darkest", [(0.0175, 0.25), (0.5, 0.5)])
def test_near_agreement_is_not_drawn_dark(tmp_path, drawn, largest, darkest):
    rates = [[0, largest], [largest, 0]]
    analysis.plot_disagreement(tmp_path / "picture.png", names=["a", "b"], rates=rates, images=9)
    assert drawn[0].axes[0].images[0].get_clim() == (0, darkest)


def test_the_first_layer_is_not_drawn_twice(tmp_path, drawn):
    numbers = attention(["class"]) | {"layer": 1}
    analysis.plot_attention(tmp_path / "picture.png", **numbers)
    titles = [axes.get_title() for axes in drawn[0].axes[1:3]]
    assert titles == ["class token\nlayer 1 of 3, mean", "class token\nrollout, all layers"]


def test_every_class_and_head_has_its_mark(tmp_path, drawn):
    numbers = by_class(4, ["a", "b"])
    numbers["counts"][2] = 0
    for one in numbers["series"]:
        one["by_class"] = [*one["by_class"][:2].tolist(), None, one["by_class"][3]]
    analysis.plot_by_class(tmp_path / "picture.png", **numbers)
    axes = drawn[0].axes[0]
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["class 0  (7)", "class 1  (7)", "class 3  (7)"]
    for line, one in zip(marks, numbers["series"], strict=True):
        assert list(line.get_xdata()) == [100 * value for value in one["by_class"] if value is not None]
        assert line.get_label() == f"{one['label']}  50.0 %"
        assert line.get_color() == style.HEAD_COLORS[one["head"]]
    looks = {(line.get_color(), line.get_marker()) for line in marks}
    assert len(looks) == len(marks) == 7
    heights = np.stack([line.get_ydata() for line in marks])
    assert (np.diff(heights, axis=0) > 0).all() and abs(heights - [0, 1, 2]).max() < 0.5


def test_of_many_classes_the_lowest_are_named(tmp_path, drawn):
    numbers = by_class(60, [])
    analysis.plot_by_class(tmp_path / "picture.png", **numbers)
    everything, named = drawn[0].axes
    values = 100 * numbers["series"][0]["by_class"]
    assert list(everything.lines[0].get_ydata()) == sorted(values)
    assert list(named.lines[0].get_xdata()) == sorted(values)[:20]
    assert named.get_yticklabels()[0].get_text() == f"class {values.argmin()}  (7)"


def test_a_confusion_matrix_holds_the_counts(tmp_path, drawn):
    cells = [[0, 0, 6], [0, 2, 2], [1, 1, 5]]
    analysis.plot_confusion(tmp_path / "picture.png", label="a", classes=["x", "y", "z"], cells=cells)
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[75, 0, 25], [0, 100, 0], [0, 0, 0]]
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert written == {((0, 0), "6"), ((2, 0), "2"), ((1, 1), "5")}  # column, row


def test_of_many_classes_the_largest_shares_of_confusion_are_named(tmp_path, drawn):
    cells = [[0, 0, 6], [0, 2, 2], [1, 1, 50], [1, 2, 3]]
    analysis.plot_confusion(tmp_path / "picture.png", label="a", classes=["x", "y", "z"], cells=cells, most=2)
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["x  →  z", "y  →  z"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([25, 100 * 3 / 53])
    assert [text.get_text().strip() for text in axes.texts] == ["2 of 8", "3 of 53"]


def test_the_lines_of_similarity_are_the_means(tmp_path, drawn):
    series = [similarity("a", 3), similarity("b", 2)]
    analysis.plot_token_similarity(tmp_path / "picture.png", series=series)
    axes = drawn[0].axes[0]
    shown = {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert shown == {f"{one['model']}  -0.20 → 0.900": one["mean"] for one in series}
    for one, band in zip(series, axes.collections[::2]):
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(max(one["mean"]) + 0.1)
        assert heights.min() == pytest.approx(min(one["mean"]) - 0.1)


def test_attention_lies_over_its_image_as_a_share_of_its_largest(tmp_path, drawn):
    _, numbers = PICTURES["attention"]
    analysis.plot_attention(tmp_path / "picture.png", **numbers)
    analysis.plot_attention_heads(tmp_path / "picture.png", **numbers)
    columns = [(token, kind) for kind in ("first", "mean", "rollout") for token in ("class", "distillation")]
    grid = np.array(drawn[0].axes[:14]).reshape(2, 7)
    titles = [axes.get_title().split("\n") for axes in grid[0, 1:]]
    assert [title[0] for title in titles] == [f"{token} token" for token, _ in columns]
    assert [title[1] for title in titles[::2]] == ["layer 1 of 3, mean", "layer 3 of 3, mean", "rollout, all layers"]
    for row, tokens in zip(grid, numbers["maps"]):
        for axes, (token, kind) in zip(row[1:], columns):
            grey, shown = axes.images
            assert np.array(shown.get_array()) == pytest.approx(tokens[token][kind] / tokens[token][kind].max())
            assert shown.get_extent() == grey.get_extent()
            one, other = (tokens[name][kind] / tokens[name][kind].sum() for name in ("class", "distillation"))
            shared = 1 - np.abs(one - other).sum() / 2  # what is not moved from one map to the other
            expected = f"{100 * shared:.0f} % as the class token" if token == "distillation" else ""
            assert axes.get_xlabel() == expected
    grid = np.array(drawn[1].axes[:16]).reshape(4, 4)
    for row, (number, token) in zip(grid, [(0, "class"), (0, "distillation"), (1, "class"), (1, "distillation")]):
        assert (row[0].images[0].get_array() == PIXELS[number]).all()
        for axes, head in zip(row[1:], numbers["maps"][number][token]["heads"]):
            assert np.array(axes.images[1].get_array()) == pytest.approx(head / head.max())


def test_filters_are_grey_where_they_are_zero(tmp_path, drawn):
    filters = np.zeros((1, 2, 2, 3))
    filters[0, 0, 0] = 4, 0, -4
    analysis.plot_patch_filters(tmp_path / "picture.png", model="a", filters=filters, explained=[0.25])
    (axes,) = (axes for axes in drawn[0].axes if axes.get_visible())
    expected = np.full((2, 2, 3), 0.5)
    expected[0, 0] = 1, 0.5, 0
    assert np.array(axes.images[0].get_array()) == pytest.approx(expected)
    assert axes.get_title() == "25.0 %"


def test_the_map_of_a_patch_lies_where_the_patch_does(tmp_path, drawn):
    _, numbers = PICTURES["positions"]
    analysis.plot_position_similarity(tmp_path / "picture.png", **numbers)
    sheet, token = (axes.images[0].get_array() for axes in drawn[0].axes[:2])
    assert sheet.shape == (3 * 4 - 1, 4 * 5 - 1)
    for row, column in np.ndindex(3, 4):
        assert (sheet[row * 4 : row * 4 + 3, column * 5 : column * 5 + 4] == numbers["patches"][row, column]).all()
    assert (token == numbers["tokens"]["class"]).all()
