"""Run a table of the paper as a sweep: each row for every seed.

Prints the plan with an estimated time, starts the runs that have no result yet, each as a process of `hf-deit distill`
or `hf-deit teacher`, and writes the table and its picture. A finished run is a small JSON file below
docs/results/, to be committed: a sweep that is stopped and started again, here or on another machine, resumes.
Of runs that show one teacher the same views, the longest runs first and records the teacher outputs for the others.
`recipes/README.md` lists the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..options.recipe import RECIPES


# A checkout collects the results that its documents show; what was installed writes where it is started.
RESULTS = RECIPES.parent / "docs" / "results" if (RECIPES.parent / "docs").is_dir() else Path("results")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="+", help="names of recipes/tables/*.yaml; runs that several tables share are done once"
    )
    parser.add_argument("--scale", default="small", help="name of recipes/scales/*.yaml")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="each row is run once for each seed; default: the scale's"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the machine's cores")
    parser.add_argument(
        "--launcher", default=sys.executable, help="command that starts a run, for example 'accelerate launch ...'"
    )
    parser.add_argument("--dataset_name", help="directory of the scale's dataset on this machine")
    parser.add_argument("--data_dir", help="directory of the official files, for a registered dataset")
    parser.add_argument("--plan", action="store_true", help="print the plan, run nothing")
    parser.add_argument(
        "--rebuild", action="store_true", help="run nothing; write tables and pictures of the runs that are finished"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished runs and tables")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs of the tables that the command line names, and write the tables and their pictures."""
    args = parse(argv)
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from ..paper.claims import claims_markdown
    from ..paper.scheduler import Scheduler
    from ..paper.sweep import Sweep
    from ..plots.tables import plot_table

    options = {"recipes": RECIPES, "results": args.results}
    sweeps = [Sweep(table, args.scale, args.seeds, **options) for table in args.tables]
    for each in sweeps:
        print(each.plan(args.jobs), flush=True)
    if args.plan:
        return
    data = {"dataset_name": args.dataset_name, "data_dir": args.data_dir}
    failed = [] if args.rebuild else Scheduler(RECIPES, args.launcher, args.jobs, data).run_all(sweeps)
    for each in sweeps:
        name = args.results / args.scale / f"table_{each.table}"
        name.parent.mkdir(parents=True, exist_ok=True)  # if every run failed
        title = f"{each.title}\n{each.caption}"
        parts = "\n".join(part for part in (each.markdown(), claims_markdown(each)) if part)
        name.with_suffix(".md").write_text(f"{title}\n\n{parts}", "utf-8")
        if any(values for _, _, values, _ in each.points()):
            picture = name.with_suffix(".png")
            plot_table(each.points(), picture, title=title, lines=each.is_a_line, labels=each.labels)
        print(title, parts, sep="\n\n")
    if failed:
        sys.exit("\n".join(failed))
