"""Run a table of the paper: `python recipes/run_table.py <table> ... [--scale paper|small] [--seeds 0 1] [--jobs 2]`.

Prints its plan with an estimate of the time, does the runs that have no result yet, each through the command line of
run_distill.py or run_teacher.py, and writes the table and its picture. A finished run is a small JSON file beneath
docs/results/, to be committed: stopped and started again, here or on another machine, a sweep goes on where it was.
Of runs that ask one teacher about the same views, the longest goes first and writes the answers down for the others.
`recipes/README.md` lists the tables.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import torch
import transformers
import yaml

from hf_deit import Sweep, exit_clearly, is_finished, is_recorded, plot_table


RECIPES = Path(__file__).parent
RESULTS = RECIPES.parent / "docs" / "results"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", help="names of recipes/tables/*.yaml; runs they share are done once")
    parser.add_argument("--scale", default="small", help="name of recipes/scales/*.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each row is run once for each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, the machine's cores shared among them")
    parser.add_argument("--launcher", default=sys.executable, help="for example 'accelerate launch --config_file ...'")
    parser.add_argument("--dataset_name", help="where the images of the scale's set lie on this machine")
    parser.add_argument("--data_dir", help="the same, for a registered set's official files")
    parser.add_argument("--plan", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished runs and tables")
    return parser.parse_args(argv)


def how_taught(run) -> list[str]:
    """The run's options: its teacher's answers are replayed where all are recorded, else asked for and recorded."""
    if run.answers is None:
        return []
    if is_recorded(run.answers, run.epochs):
        return ["--teacher_replay", run.answers]
    begun_without = any(Path(run.keys["output_dir"]).glob("checkpoint-*")) and not Path(run.answers).exists()
    return [] if begun_without else ["--teacher_record", run.answers]


def do(run, args: argparse.Namespace) -> dict:
    """One run as a process of its own. Its recipe and its log lie in its output directory."""
    output = Path(run.keys["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    recipe, results = output / "recipe.yaml", output / "all_results.json"
    before = yaml.safe_load(recipe.read_text("utf-8")) if recipe.exists() else None
    if before != run.keys and (before or is_finished(output)):
        raise ChildProcessError(f"{output} holds a run with other settings (its recipe.yaml): move or delete it")
    if is_finished(output):
        return json.loads(results.read_text("utf-8"))
    recipe.write_text(yaml.safe_dump(run.keys, sort_keys=False))
    command = [*shlex.split(args.launcher), str(RECIPES / run.script), str(recipe), *how_taught(run)]
    for key in ("dataset_name", "data_dir"):
        if getattr(args, key):
            command += [f"--{key}", getattr(args, key)]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with (output / "log.txt").open("w") as log:
        code = subprocess.call(command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": str(threads)} | os.environ)
    if code:
        raise ChildProcessError(f"{run.stem} ended with status {code}; see {output / 'log.txt'}")
    return json.loads(results.read_text("utf-8"))


def sweep(sweeps: list[Sweep], args: argparse.Namespace) -> list[str]:
    """Does what is to do, seed by seed. Returns what failed; what needs a failed run is left out."""
    planned = {run.stem: run for sweep in sweeps for run in sweep.to_do()}
    waiting = sorted(planned.values(), key=lambda run: (run.seed, -run.epochs))
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    running, failed = {}, []
    with ThreadPoolExecutor(args.jobs) as pool:
        while waiting or running:
            for run in list(waiting):
                ahead = {other.stem for other in [*waiting, *running.values()]}
                ready = not ahead & {needed.stem for needed in run.needs}
                if run.answers in {other.answers for other in running.values() if other.answers}:
                    ready &= is_recorded(run.answers, run.epochs)
                if ready and len(running) < args.jobs:
                    waiting.remove(run)
                    running[pool.submit(do, run, args)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    metrics = future.result()
                except ChildProcessError as error:
                    failed.append(str(error))
                    waiting = [other for other in waiting if run.stem not in {needed.stem for needed in other.needs}]
                    continue
                sweeps[0].record(run, metrics, versions=versions, finished=time.strftime("%Y-%m-%d"))
                score = metrics["eval_top1"]
                print(f"{time.strftime('%H:%M:%S')} {run.stem}: top-1 {score:.4f}; {len(waiting)} to go", flush=True)
    return failed


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    options = {"recipes": RECIPES, "results": args.results}
    sweeps = [Sweep(table, args.scale, args.seeds, **options) for table in args.tables]
    for each in sweeps:
        print(each.plan(args.jobs), flush=True)
    if args.plan:
        return
    failed = sweep(sweeps, args)
    for each in sweeps:
        name = args.results / args.scale / f"table_{each.table}"
        name.parent.mkdir(parents=True, exist_ok=True)  # if every run failed
        name.with_suffix(".md").write_text(f"{each.title}\n\n{each.markdown()}", "utf-8")
        plot_table(each.points(), name.with_suffix(".png"), title=each.title, lines=each.is_a_line)
        print(each.title, each.markdown(), sep="\n\n")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    exit_clearly(main)
