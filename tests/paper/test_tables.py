"""The paper's tables: they agree with the networks, with each other and with the recipes; names of models."""

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

from hf_deit import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from hf_deit.paper.tables import PAPER_TABLES
from hf_deit.paper.tradeoff import paper_rows


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ROWS = [row for table in PAPER_TABLES.values() for row in table]
TOP1 = {row.name: row.imagenet for row in PAPER_TABLES["table5"]}


def sweep(name):
    """A sweep's table: the paper's numbers by the name of the row and the title of the column."""
    table = yaml.safe_load((RECIPES / "tables" / f"{name}.yaml").read_text("utf-8"))
    rows = [row for row in table["rows"] if "paper" in row]
    return {row["name"]: dict(zip(table["columns"], row["paper"], strict=True)) for row in rows}


# --- a number that stands in two places ---


def test_tables_1_and_10_are_rows_of_table_5():
    table5 = {(row.name, row.image_size): row for row in PAPER_TABLES["table5"]}
    for row in PAPER_TABLES["table1"]:
        same = table5[row.name, row.image_size]
        assert (row.model, row.parameters) == (same.model, same.parameters)
        assert row.images_per_second == int(same.images_per_second)  # cut, as the paper prints it
    for row in PAPER_TABLES["table10"]:
        if same := table5.get((row.name, row.image_size)):
            assert (row.model, row.imagenet, row.real, row.v2) == (same.model, same.imagenet, same.real, same.v2)
            assert row.images_per_second == pytest.approx(same.images_per_second, rel=0.005)  # timed once more


def test_a_network_has_one_number_of_parameters_and_one_throughput_at_a_size():
    known = {}
    for row in PAPER_TABLES["table5"]:
        if row.name not in ("ViT-B/16", "EfficientNet-B5 RA"):  # another code; the paper prints B6's
            facts = (row.parameters, row.images_per_second)
            assert known.setdefault((row.model, row.image_size), facts) == facts


def test_the_sweeps_hold_the_same_numbers_as_table_5():
    table3, table2, table8, tokens = sweep("3"), sweep("2"), sweep("8"), sweep("tokens")
    names = ["DeiT-Ti", "DeiT-S", "DeiT-B", "DeiT-B↑384"]
    assert list(table3["no distillation"].values()) == [TOP1[name] for name in names]
    distilled = ["DeiT-Ti distilled", "DeiT-S distilled", "DeiT-B distilled", "DeiT-B distilled↑384"]
    assert list(table3["token: class + distillation"].values()) == [TOP1[name] for name in distilled]
    for name in ("DeiT-B", "RegNetY-4GF", "RegNetY-8GF", "RegNetY-16GF"):
        assert table2[name]["teacher"] == TOP1[name]
    assert list(table8["none: DeiT-B"].values()) == [TOP1["DeiT-B"], TOP1["DeiT-B↑384"]]
    assert tokens["no second token"]["B 224"] == TOP1["DeiT-B"]
    assert tokens["distillation token"]["B 224"] == TOP1["DeiT-B distilled"]


def test_the_sweep_of_table_10_holds_its_numbers():
    expected = {str(row.image_size): row.imagenet for row in PAPER_TABLES["table10"]}
    assert {name.split()[0]: row["ImageNet"] for name, row in sweep("10").items()} == expected


@pytest.mark.parametrize("path", sorted(RECIPES.glob("imagenet/deit_*.yaml")), ids=lambda path: path.stem)
def test_the_number_in_a_recipes_header_is_that_of_the_tables(path):
    parts = path.stem.split("_")
    if {"soft", "hard"} & set(parts):
        row = "usual distillation (soft)" if "soft" in parts else "hard distillation"
        column = f"{ {'tiny': 'Ti', 'small': 'S', 'base': 'B'}[parts[1]] } {384 if '384' in parts else 224}"
        expected = None if "1000ep" in parts else sweep("3")[row][column]
    else:
        model = parts[1] + "-distilled" * ("distilled" in parts)
        size = next((int(part) for part in parts if part.isdigit()), 224)
        rows = [row for row in ROWS if (row.model, row.image_size) == (model, size) and row.imagenet]
        rows = [row for row in rows if ("1000" in row.name) == ("1000ep" in parts) and row.name.startswith("DeiT")]
        expected = rows[0].imagenet if rows else None
    (line,) = re.findall(r"^# Expected: +(.+)$", path.read_text("utf-8"), re.MULTILINE)
    found = re.match(r"top-1 ([\d.]+)", line)
    assert (float(found[1]) if found else None) == expected


# --- the networks ---


LARGE = 40  # million parameters: the larger ones of a family take half a second each, in timm's own code


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] * (row.model.startswith("timm:") and row.parameters > LARGE))
        for row in {row.model: row for row in ROWS}.values()
    ],
    ids=lambda row: row.name,
)
def test_the_networks_have_the_papers_number_of_parameters(row):
    with torch.device("meta"):
        if row.model.startswith("timm:"):
            model = timm.create_model(row.model.removeprefix("timm:"))
        else:
            name, _, distilled = row.model.partition("-")
            config = DeiTConfig.from_size(name, use_distillation_token=bool(distilled), num_labels=1000)
            model = (DeiTForImageClassificationWithTeacher if distilled else DeiTForImageClassification)(config)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(millions - row.parameters) < max(1, 0.01 * row.parameters)  # the paper cuts or rounds, as it comes


def test_the_families_of_table_5_are_its_blocks():
    families = {row.family for row in PAPER_TABLES["table5"]}
    convnets = {"ResNet", "RegNetY", "EfficientNet", "KDforAA"}
    assert families == convnets | {"ViT", "DeiT", "DeiT distilled", "DeiT distilled, 1000 epochs"}


# --- names ---


def test_whoever_wrote_it_a_network_has_the_same_rows_in_the_paper():
    ours = paper_rows("base-distilled@384", 384)
    assert [row.images_per_second for row in ours] == [85.8, 85.8]
    assert ours == paper_rows("timm:deit_base_distilled_patch16_384", 384) == paper_rows("stock:base-distilled", 384)
    assert paper_rows("base-distilled", 448) == paper_rows("my network", 224) == []
