"""What the runs of a table say of the paper's claims: differences paired by seed, their intervals, and a verdict.

A claim is data, in `recipes/tables/<table>.yaml`:

    claims:
      - {says: hard distillation beats none, more: [hard distillation], less: [no distillation]}
      - {says: soft distillation brings nothing, more: [soft distillation], less: [no distillation], within: 1.0}

`more` and `less` list rows, which are compared in each column, or pairs of a row and a column. The paper's difference
comes from the paper's numbers in the same file.

Not here: the runs and their numbers (`sweep.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from .sweep import Cell, Sweep, mean_and_deviation, mean_and_interval


@dataclass(frozen=True)
class Claim:
    """A statement of the paper about differences between cells.

    Attributes:
        says: the statement.
        column: the column in which rows are compared; "" if the claim names the column of each cell.
        more, less: cells; the difference is the sum of `more` minus the sum of `less`.
        within: None if the paper claims a positive difference; otherwise the paper claims none, and this is the
            difference in points of top-1 that would still count as none.
    """

    says: str
    column: str
    more: tuple[Cell, ...]
    less: tuple[Cell, ...]
    within: float | None = None

    @property
    def paper(self) -> float | None:
        """The paper's difference in points; None if the paper lacks a number."""
        more = [cell.paper for cell in self.more if cell.paper is not None]
        less = [cell.paper for cell in self.less if cell.paper is not None]
        whole = len(more) == len(self.more) and len(less) == len(self.less)
        return round(sum(more) - sum(less), 2) if whole else None

    def differences(self, sweep: Sweep) -> list[float]:
        """The difference for each seed in which all runs of the claim are done, in points of top-1."""
        more, less = ([sweep.values(cell) for cell in cells] for cells in (self.more, self.less))
        whole = [seed for seed in sweep.seeds if all(seed in values for values in more + less)]
        return [sum(values[seed] for values in more) - sum(values[seed] for values in less) for seed in whole]


def claims_of(sweep: Sweep) -> list[Claim]:
    """The claims of the sweep's table whose cells exist at its scale, in the order of the table's file.

    Raises:
        ValueError: a claim names a row or a column that the table does not have.
    """
    cells = {(cell.row, cell.column): cell for cell in sweep.cells}
    claims = []
    for said in sweep.said:
        terms = [*said["more"], *said["less"]]
        sweep.check_places(terms)
        in_each_column = any(isinstance(term, str) for term in terms)
        for column in dict.fromkeys(cell.column for cell in sweep.cells) if in_each_column else [""]:
            places = [(term, column) if isinstance(term, str) else tuple(term) for term in terms]
            if all(place in cells for place in places):
                found = [cells[place] for place in places]
                more, less = found[: len(said["more"])], found[len(said["more"]) :]
                claims.append(Claim(said["says"], column, tuple(more), tuple(less), said.get("within")))
    return claims


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t-test that the mean difference is zero; nan for fewer than two differences."""
    mean, deviation = mean_and_deviation(differences)
    if len(differences) < 2 or deviation == 0:
        return math.nan
    return float(2 * stats.t.sf(abs(mean) / deviation * math.sqrt(len(differences)), len(differences) - 1))


def verdict(differences: Sequence[float], within: float | None = None) -> str:
    """What differences, paired by seed, say of a claim, by the 95 % interval of their mean.

    Args:
        differences: one for each seed, points of top-1.
        within: see [`Claim`].

    Returns:
        "agrees", "against" or "not shown"; "not run" without a difference, "one seed" where there is no interval.
        A positive difference is claimed: "agrees" if the whole interval is above zero, "against" if it is below.
        No difference is claimed: "agrees" if the whole interval is within the bounds, "against" if it is outside.
    """
    if len(differences) < 2:
        return "one seed" if differences else "not run"
    mean, half = mean_and_interval(differences)
    lowest, highest = mean - half, mean + half
    if within is None:
        agrees, against = lowest > 0, highest < 0
    else:
        agrees, against = -within < lowest and highest < within, lowest > within or highest < -within
    return "agrees" if agrees else "against" if against else "not shown"


def claims_markdown(sweep: Sweep) -> str:
    """The claims as a table: the paper's difference, ours with its interval, and the verdict; "" without claims."""
    claims = claims_of(sweep)
    if not claims:
        return ""
    several = len({claim.column for claim in claims}) > 1
    lines = ["| the paper's claim | the paper's | here (95 %) | seeds | p | |", "|---|---|---|---|---|---|"]
    for claim in claims:
        differences = claim.differences(sweep)
        mean, half = mean_and_interval(differences)
        p = p_value(differences)
        cells = [
            claim.says + (f" ({claim.column})" if several and claim.column else ""),
            "" if claim.paper is None else f"{claim.paper:+.1f}",
            "" if not differences else f"{mean:+.2f}" if math.isnan(half) else f"{mean:+.2f} ± {half:.2f}",
            *(str(len(differences)), "" if math.isnan(p) else f"{p:.2g}", verdict(differences, claim.within)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
