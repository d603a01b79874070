"""Measured throughput next to the paper's: which rows of the paper a network has, and the points of Figure 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .model_names import ModelSpec
from .tables import PAPER_TABLES, PaperRow


def tradeoff_points(rows: Sequence[Mapping]) -> list[dict]:
    """Figure 1: throughput measured here against the paper's top-1, for every row of Table 5 that was measured.

    EfficientNets trained with RandAugment are left out: their marks would cover those of the same networks without.

    Args:
        rows: from [`throughput_rows`]; the first of two implementations of one network counts.

    Returns:
        `label`, `family`, `images_per_second`, `top1` (fraction in [0, 1], the paper's) for each.
    """
    points = {}
    for row in rows:
        for paper in paper_rows(row["name"], row["image_size"]):
            if paper in PAPER_TABLES["table5"] and not paper.name.endswith(" RA"):
                points.setdefault(
                    paper.name,
                    {
                        "label": paper.name,
                        "family": paper.family,
                        "images_per_second": row["images_per_second"],
                        "top1": round(paper.imagenet / 100, 4),
                    },
                )
    return list(points.values())


def paper_rows(name: str, image_size: int) -> list[PaperRow]:
    """The paper's rows of a network at a size, Table 5's first; no rows for a name that [`ModelSpec`] refuses.

    Args:
        name: as in `expand_models`.
        image_size: side of its images, pixels.
    """
    try:
        architecture = ModelSpec.parse(name).architecture
    except ValueError:  # a name that a user of the Python API chose
        return []
    rows = [row for table in ("table5", "table1", "table10") for row in PAPER_TABLES[table]]
    return [row for row in rows if (row.model, row.image_size) == (architecture, image_size)]
