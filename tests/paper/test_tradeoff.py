"""Measured throughput next to the paper's: rows, table and the points of Figure 1."""

import json
from dataclasses import replace

import pytest
from support.throughput import arguments

from hf_deit.paper.throughput import (
    Throughput,
    throughput_rows,
    throughput_table,
)
from hf_deit.paper.tradeoff import tradeoff_points


TINY = Throughput("tiny", 224, 5_717_416, 1_250_000_000, 8, 57_000_000, (1.0, 1.0, 1.0, 3.0))
NETS = [
    TINY,
    replace(TINY, name="timm:resnet50", seconds=(0.5, 0.5, 1.0, 1.0)),
    replace(TINY, name="mine", peak_memory=None, seconds=(2.0,)),
    replace(TINY, name="tiny-distilled", batch_size=4),
]


def test_the_papers_figure_is_the_mean_and_the_ratio_is_within_the_run():
    rows = throughput_rows(NETS, "timm:resnet50")
    assert [row["images_per_second"] for row in rows] == [8 / 1.5, 8 / 0.75, 4.0, 4 / 1.5]
    assert [row["ratio"] for row in rows] == pytest.approx([0.5, 1.0, 0.375, 0.25])
    assert rows[0]["median_images_per_second"] == 8.0 and rows[0]["spread"] == pytest.approx(0.5)
    assert [row["paper_images_per_second"] for row in rows] == [2536.5, 1226.1, None, 2529.5]
    assert [row["ratio"] for row in throughput_rows(NETS)][:2] == pytest.approx([1.0, 2.0])
    assert json.loads(json.dumps(rows))[0]["seconds"] == [1.0, 1.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="reference is 'huge'"):
        throughput_rows(NETS, "huge")


def test_a_network_at_another_size_has_no_figure_in_the_paper():
    (row,) = throughput_rows([replace(TINY, image_size=288)])
    assert row["paper_images_per_second"] is None


def test_the_table_says_what_was_measured_and_what_is_the_papers():
    args = arguments(batch_size=None, precision="bfloat16", runs=4, turns=2)
    text = throughput_table(throughput_rows(NETS), args)
    assert "Measured here: " in text and "bfloat16, eager" in text and "4 runs in 2 turns" in text
    assert "doubled while that raises images/s by 5%" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert len({len(line) for line in lines}) == 1
    titles, _, tiny, _, mine, _ = lines
    assert titles[-1] == "images/s, the paper's V100" and titles[8] == "x tiny"
    assert tiny == ["tiny", "224", "5.7", "1.25", "8", "5.3", "8.0", "50.0%", "1.000", "57", "2536.5"]
    assert mine[-2:] == ["not measured", "-"]


def test_the_scatter_pairs_measured_speed_with_the_papers_accuracy():
    points = {point["label"]: point for point in tradeoff_points(throughput_rows(NETS))}
    assert set(points) == {"DeiT-Ti", "ResNet-50", "DeiT-Ti distilled", "DeiT-Ti distilled / 1000 epochs"}
    assert points["ResNet-50"] == {
        "label": "ResNet-50",
        "family": "ResNet",
        "images_per_second": 8 / 0.75,
        "top1": 0.762,
    }
    longer = points["DeiT-Ti distilled / 1000 epochs"]
    assert (longer["family"], longer["top1"]) == ("DeiT distilled, 1000 epochs", 0.766)
