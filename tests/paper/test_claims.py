"""Claims: intervals and p against scipy's own paired test, verdicts, and which claims a scale can decide."""

import math

import numpy as np
import pytest
import yaml
from scipy import stats
from support.sweeps import FILES, made_up_sweep, write_recipes

from hf_deit.paper.claims import claims_markdown, claims_of, p_value, verdict


CLAIMS = [
    {"says": "the token helps", "more": ["token"], "less": ["none"]},
    {"says": "erasing changes nothing", "more": ["erasing"], "less": ["none"], "within": 1.0},
    {
        "says": "the token helps more at 384",
        "more": [["token", "384"], ["none", "224"]],
        "less": [["none", "384"], ["token", "224"]],
    },
    {"says": "of a row that this scale leaves out", "more": ["other"], "less": ["none"]},
]
PAPER = {"none": [81.8, 83.1], "erasing": [4.3, 0.1], "token": [83.0, 84.2], "other": [82.0, "-"]}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The made-up table with claims, and both of its columns in every row."""
    write_recipes(tmp_path)
    rows = [row | {"paper": PAPER[row["name"]]} for row in FILES["tables/a"]["rows"]]
    table = FILES["tables/a"] | {"rows": rows, "claims": CLAIMS}
    (tmp_path / "recipes/tables/a.yaml").write_text(yaml.safe_dump(table))
    monkeypatch.chdir(tmp_path)
    return lambda seeds=(0, 1, 2, 3, 4): made_up_sweep("little", seeds)


def finish(sweep, values):
    """Record a result of each run; `values`: row -> one accuracy in percent by seed, for both columns."""
    for cell in sweep.cells:
        for seed, value in zip(sweep.seeds, values.get(cell.row, ()), strict=False):
            run = sweep.run_of(cell, seed)
            metrics = {"eval_top1": value / 100, "eval_class_top1": value / 100}
            sweep.record(run, {"train_samples_per_second": 1.0} | metrics)


def test_p_and_interval_are_those_of_scipys_paired_test(sweep):
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 5, 20):
        none, token = 50 + rng.normal(size=seeds), 50.6 + rng.normal(size=seeds)
        theirs = stats.ttest_rel(token, none)
        pairs = (token - none).tolist()
        assert p_value(pairs) == pytest.approx(theirs.pvalue, rel=1e-9)
        low, high = theirs.confidence_interval(0.95)
        assert verdict(pairs) == ("agrees" if low > 0 else "against" if high < 0 else "not shown")
        assert (p_value(pairs) < 0.05) == (verdict(pairs) != "not shown")
        assert verdict([-pair for pair in pairs]) == {"agrees": "against", "against": "agrees"}.get(
            verdict(pairs), "not shown"
        )
    assert math.isnan(p_value([1.0])) and math.isnan(p_value([])) and math.isnan(p_value([1.0, 1.0]))


@pytest.mark.parametrize(
    ("differences", "within", "expected"),
    [
        ([], None, "not run"),
        ([3.0], None, "one seed"),
        ([3.0, 3.1, 2.9], None, "agrees"),
        ([-3.0, -3.1, -2.9], None, "against"),
        ([3.0, -2.0, 1.0], None, "not shown"),
        ([0.3, 0.4, 0.35], None, "agrees"),
        ([0.3, 0.4, 0.35], 1.0, "agrees"),  # not zero, and yet nothing by the bound that was fixed before
        ([3.0, 3.1, 2.9], 1.0, "against"),
        ([-3.0, -3.1, -2.9], 1.0, "against"),
        ([0.9, 1.1, 1.0], 1.0, "not shown"),
        ([5.0, -5.0, 0.0], 1.0, "not shown"),  # a wide interval around zero shows nothing
    ],
)
def test_the_verdict_is_the_intervals(differences, within, expected):
    assert verdict(differences, within) == expected


def test_a_claim_is_compared_in_each_column_and_left_out_where_a_row_is(sweep):
    claims = [(claim.says, claim.column, claim.paper) for claim in claims_of(sweep())]
    assert claims == [
        ("the token helps", "224", 1.2),
        ("the token helps", "384", 1.1),
        ("erasing changes nothing", "224", -77.5),
        ("erasing changes nothing", "384", -83.0),
        ("the token helps more at 384", "", -0.1),
    ]


def test_differences_are_paired_by_seed_over_the_seeds_that_are_whole(sweep):
    mine = sweep()
    finish(mine, {"none": [50, 52, 54, 56], "token": [51, 54, 53], "erasing": [50, 52, 54, 56, 58]})
    claims = {(claim.says, claim.column): claim for claim in claims_of(mine)}
    assert claims["the token helps", "224"].differences(mine) == pytest.approx([1, 2, -1])
    assert claims["erasing changes nothing", "224"].differences(mine) == pytest.approx([0] * 4)
    assert claims["the token helps more at 384", ""].differences(mine) == pytest.approx([0] * 3)
    table = claims_markdown(mine)
    half = stats.t.interval(0.95, 2, scale=stats.sem([1, 2, -1]))[1]
    p = stats.ttest_1samp([1, 2, -1], 0).pvalue
    assert f"| the token helps (224) | +1.2 | +0.67 ± {half:.2f} | 3 | {p:.2g} | not shown |" in table
    assert "| erasing changes nothing (224) | -77.5 | +0.00 ± 0.00 | 4 |  | agrees |" in table


def test_what_is_not_run_says_so(sweep):
    mine = sweep([0, 1])
    assert claims_markdown(mine).count("| 0 |  | not run |") == 5
    finish(mine, {"none": [50], "token": [51]})
    assert "| the token helps (224) | +1.2 | +1.00 | 1 |  | one seed |" in claims_markdown(mine)


def test_a_claim_of_an_unknown_row_is_refused(sweep, tmp_path):
    path = tmp_path / "recipes/tables/a.yaml"
    for term in ("tokens", ["token", "512"]):
        path.write_text(
            yaml.safe_dump(FILES["tables/a"] | {"claims": [{"says": "x", "more": [term], "less": ["none"]}]})
        )
        with pytest.raises(ValueError, match="a claim of 'Table A' names"):
            claims_of(sweep())
    path.write_text(yaml.safe_dump(FILES["tables/a"]))
    assert claims_markdown(sweep()) == ""
