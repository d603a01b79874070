"""tables.py: pictures of the paper's tables and of Figure 1."""

import pytest
from support.pictures import lines

from hf_deit.plots import tables


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
    tables.plot_tradeoff(TRADEOFF, tmp_path / "new" / "tradeoff.png", device="a machine")
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
        tables.plot_tradeoff([], tmp_path / "none.png", device="a machine")


TABLE = [
    ("none", "224", [42.0, 44.0, 43.0], 81.8),
    ("none", "384", [45.0], 83.1),
    ("token", "224", [46.0, 47.0], None),
    ("token", "384", [], 84.2),
]


def test_a_table_shows_every_seed_the_mean_and_the_papers_number(tmp_path, drawn):
    tables.plot_table(TABLE, tmp_path / "table.png", title="Table 3")
    first, second = drawn[0].axes
    assert [axes.get_title() for axes in (first, second)] == ["224", "384"]
    seeds, mean = first.lines[:2]
    assert list(seeds.get_xdata()) == [42.0, 44.0, 43.0] and list(mean.get_xdata()) == [43.0]
    assert [text.get_text() for text in first.texts] == ["43.0  (paper: 81.8)", "46.5"]
    assert len(second.texts) == 1
    note = drawn[0]._supxlabel.get_text()
    assert "dot: one seed" in note and "bar: mean of the seeds" in note and "the paper's number" in note
    box = drawn[0].get_tightbbox().transformed(drawn[0].dpi_scale_trans)
    assert box.x1 <= drawn[0].bbox.x1 and box.y1 <= drawn[0].bbox.y1


def test_a_table_as_lines_joins_the_means(tmp_path, drawn):
    tables.plot_table(TABLE, tmp_path / "lines.png", lines=True)
    (axes,) = drawn[0].axes
    assert lines(axes)["none"] == ([0, 1], [43.0, 45.0])
    assert lines(axes)["token"] == ([0], [46.5])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["224", "384"]


@pytest.mark.parametrize("as_lines", [False, True])
def test_labels_stand_in_for_the_papers_names(tmp_path, drawn, as_lines):
    labels = {"224": "32 pixels\nfor the paper's 224", "token": "weak teacher\nfor the paper's token"}
    tables.plot_table(TABLE, tmp_path / "table.png", title="Table 3\ncifar10", lines=as_lines, labels=labels)
    figure = drawn[0]
    first, *more = figure.axes
    if as_lines:
        columns = [label.get_text() for label in first.get_xticklabels()]
        rows = [text.get_text() for text in first.get_legend().get_texts()]
        assert "line: mean of the seeds" in figure._supxlabel.get_text()
        assert "paper" not in figure._supxlabel.get_text()  # none of its numbers is drawn
    else:
        columns = [axes.get_title() for axes in (first, *more)]
        rows = [label.get_text() for label in first.get_yticklabels()]
    assert columns == [labels["224"], "384"] and rows == ["none", labels["token"]]
    assert figure.get_suptitle() == "Table 3\ncifar10"
    box = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert figure.bbox.x0 <= box.x0 and figure.bbox.y0 <= box.y0
    assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_a_table_without_runs_is_an_empty_picture(tmp_path):
    tables.plot_table([("none", "224", [], 81.8)], tmp_path / "table.png", title="Table 3")
    assert (tmp_path / "table.png").stat().st_size > 0
