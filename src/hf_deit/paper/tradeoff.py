"""Measured throughput next to the paper's: rows, a table, and the points of Figure 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from ..errors import UserError
from .machine import device_name
from .tables import PAPER_TABLES, paper_rows
from .throughput import Throughput, ThroughputArguments


def throughput_rows(results: Sequence[Throughput], reference: str | None = None) -> list[dict]:
    """Results ready for JSON, with the paper's throughput.

    Args:
        results: the results of one run; the models of two runs did not take turns, so no ratio compares them.
        reference: name of the model that `ratio` compares with; the first if None.

    Returns:
        For each result its fields and `images_per_second`, `median_images_per_second`, `spread`, `ratio` (images per
        second over the reference's) and `paper_images_per_second` (None where the paper has none).

    Raises:
        ValueError: if no result has the name `reference`.
    """
    by_name = {result.name: result for result in results}
    reference = results[0].name if reference is None else reference
    if reference not in by_name:
        raise UserError(f"reference is {reference!r}; it must be one of the measured models: {', '.join(by_name)}")
    base = by_name[reference].images_per_second
    rows = []
    for result in results:
        paper = paper_rows(result.name, result.image_size)
        figures = {
            "images_per_second": result.images_per_second,
            "median_images_per_second": result.median_images_per_second,
            "spread": result.spread,
            "ratio": result.images_per_second / base,
            "paper_images_per_second": paper[0].images_per_second if paper else None,
        }
        rows.append(asdict(result) | figures)
    return rows


def throughput_table(rows: Sequence[Mapping], args: ThroughputArguments) -> str:
    """The rows of [`throughput_rows`] as Markdown, after a description of the measurement."""
    reference = args.reference or rows[0]["name"]
    titles = ["model", "pixels", "params (M)", "GMACs", "batch", "images/s", "median", "spread", f"x {reference}"]
    titles += ["memory (MB)", "images/s, the paper's V100"]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for row in rows:
        memory, paper = row["peak_memory"], row["paper_images_per_second"]
        cells = [
            *(row["name"], str(row["image_size"]), f"{row['parameters'] / 1e6:.1f}", f"{row['macs'] / 1e9:.2f}"),
            *(str(row["batch_size"]), f"{row['images_per_second']:.1f}", f"{row['median_images_per_second']:.1f}"),
            *(f"{row['spread']:.1%}", f"{row['ratio']:.3f}"),
            "not measured" if memory is None else f"{memory / 1e6:.0f}",
            "-" if paper is None else f"{paper:g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    how = ", ".join(
        [args.precision, "compiled" if args.torch_compile else "eager"] + ["channels last"] * args.channels_last
    )
    notes = [
        f"Measured here: {device_name(args.device)}, {how}, forward pass without gradients.",
        f"images/s: batch over the mean time of {args.runs} runs in {args.turns} turns (median: over the median time; "
        "spread: interquartile range of the times over their median). The last column is the paper's.",
        f"Batch size: {args.rule}. GMACs: 10^9 multiply-adds an image, each counted as one. Memory: weights, pixels "
        "and activations at their peak.",
    ]
    return "\n\n".join([*notes, "\n".join(lines)]) + "\n"


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
