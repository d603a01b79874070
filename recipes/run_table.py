"""Run a table of the paper: `python recipes/run_table.py <table> ... [--scale paper|small] [--seeds 0 1] [--jobs 2]`.

Prints the plan with an estimated time, starts the runs that have no result yet, each through the command line of
run_distill.py or run_teacher.py, and writes the table and its picture. A finished run is a small JSON file below
docs/results/, to be committed: a sweep that is stopped and started again, here or on another machine, resumes.
Of runs that show one teacher the same views, the longest runs first and records the teacher outputs for the others.
`recipes/README.md` lists the tables.
"""

import argparse
import sys
from pathlib import Path

from hf_deit.errors import run_script
from hf_deit.paper.claims import claims_markdown
from hf_deit.paper.scheduler import Scheduler
from hf_deit.paper.sweep import Sweep
from hf_deit.plots.tables import plot_table


RECIPES = Path(__file__).parent
RESULTS = RECIPES.parent / "docs" / "results"


def parse(argv: list[str] | None) -> argparse.Namespace:
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


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
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
            plot_table(each.points(), name.with_suffix(".png"), title=title, lines=each.is_a_line)
        print(title, parts, sep="\n\n")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    run_script(main)
