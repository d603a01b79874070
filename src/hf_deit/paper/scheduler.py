"""Run the runs of sweeps on this machine: in which order, how many at a time, each as a process of a script.

Not here: which runs a table needs and which are done (`sweep.py`), and the command line (`recipes/run_table.py`).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import yaml

from ..teachers.record import is_recorded
from ..training.checkpoints import is_finished
from .sweep import Run, Sweep


@dataclass(frozen=True)
class Scheduler:
    """What runs of a sweep need of this machine.

    Args:
        recipes: the folder with run_distill.py and run_teacher.py.
        launcher: the command that starts these scripts: a Python, or `accelerate launch ...`.
        jobs: runs at a time; they share the machine's cores.
        options: keys and values added to every command line; None and "" are left out.
    """

    recipes: Path
    launcher: str
    jobs: int = 1
    options: Mapping[str, str | None] = field(default_factory=dict)

    def run_all(self, sweeps: Sequence[Sweep]) -> list[str]:
        """Run everything that the sweeps still need, seed by seed, and record each result.

        Of runs that read the same teacher outputs, the longest starts first and records them for the others.

        Returns:
            One line for each run that failed. Runs that need a failed run are left out.
        """
        planned = {run.stem: run for sweep in sweeps for run in sweep.to_do()}
        waiting = sorted(planned.values(), key=lambda run: (run.seed, -run.epochs))
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        running, failed = {}, []
        with ThreadPoolExecutor(self.jobs) as pool:
            while waiting or running:
                for run in list(waiting):
                    if len(running) < self.jobs and _is_ready(run, waiting, list(running.values())):
                        waiting.remove(run)
                        running[pool.submit(self.run, run)] = run
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    try:
                        metrics = future.result()
                    except ChildProcessError as error:
                        failed.append(str(error))
                        waiting = [
                            other for other in waiting if run.stem not in [needed.stem for needed in other.needs]
                        ]
                        continue
                    sweeps[0].record(run, metrics, versions=versions, finished=time.strftime("%Y-%m-%d"))
                    score = metrics["eval_top1"]
                    print(
                        f"{time.strftime('%H:%M:%S')} {run.stem}: top-1 {score:.4f}; {len(waiting)} to go", flush=True
                    )
        return failed

    def run(self, run: Run) -> dict:
        """Do one run in a process of its own, or read the result of a run that is finished.

        The output directory of the run gets its recipe and its log.

        Returns:
            The metrics of the run.

        Raises:
            ChildProcessError: the run failed, or its output directory holds a run with other settings.
        """
        output = Path(run.keys["output_dir"])
        output.mkdir(parents=True, exist_ok=True)
        recipe, results = output / "recipe.yaml", output / "all_results.json"
        before = yaml.safe_load(recipe.read_text("utf-8")) if recipe.exists() else None
        if before != run.keys and (before or is_finished(output)):
            raise ChildProcessError(f"{output} holds a run with other settings (its recipe.yaml): move or delete it")
        if is_finished(output):
            return json.loads(results.read_text("utf-8"))
        recipe.write_text(yaml.safe_dump(run.keys, sort_keys=False))
        command = [*shlex.split(self.launcher), str(self.recipes / run.script), str(recipe), *teacher_options(run)]
        for key, value in self.options.items():
            command += [f"--{key}", value] if value else []
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        with (output / "log.txt").open("w") as log:
            code = subprocess.call(command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": str(threads)} | os.environ)
        if code:
            raise ChildProcessError(f"{run.stem} ended with status {code}; see {output / 'log.txt'}")
        return json.loads(results.read_text("utf-8"))


def _is_ready(run: Run, waiting: Sequence[Run], running: Sequence[Run]) -> bool:
    """Whether everything that the run needs is there, and no other run is recording the teacher outputs it reads."""
    ahead = {other.stem for other in [*waiting, *running]}
    if ahead & {needed.stem for needed in run.needs}:
        return False
    being_recorded = {other.teacher_record for other in running if other.teacher_record}
    return run.teacher_record not in being_recorded or is_recorded(run.teacher_record, run.epochs)


def teacher_options(run: Run) -> list[str]:
    """The options with which a run replays its teacher's outputs if all are recorded, and records them otherwise."""
    record = run.teacher_record
    if record is None:
        return []
    if is_recorded(record, run.epochs):
        return ["--teacher_replay", record]
    # A run that has checkpoints but no record began without one, and must resume without one.
    began_without = any(Path(run.keys["output_dir"]).glob("checkpoint-*")) and not Path(record).exists()
    return [] if began_without else ["--teacher_record", record]
