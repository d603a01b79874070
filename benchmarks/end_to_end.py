"""Which side limits a run: `python benchmarks/end_to_end.py [recipe.yaml ...] [--steps 60] [--key value ...]`.

For each recipe the views alone (its loader, nobody training), the steps alone (a DistillationTrainer's, from the
moment the batch is there), and both together as they run; and the share of a step spent waiting for its views. By
default the quickstart; a recipe's teacher is trained first if it is not there. Other keys are the recipes'.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from peers import synchronize
from transformers import TrainerCallback

from hf_deit.commands.distill import build_trainer
from hf_deit.paper.machine import describe_machine


ROOT = Path(__file__).resolve().parents[1]


WARM_UP = 10  # steps; the loader's workers start, and the first batches lie ready


class StepTimes(TrainerCallback):
    """When each step had its views, and when it ended."""

    def __init__(self):
        self.begins, self.ends = [], []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begins.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        synchronize(torch.device(args.device))
        self.ends.append(time.perf_counter())


def measure(recipe: Path, overrides: Sequence[str], steps: int) -> dict:
    """Views per second of the loader, of the steps and of both; the share of the time spent waiting."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "output_dir": folder,
            "max_steps": WARM_UP + steps,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        keys = (word for name, value in fixed.items() for word in (f"--{name}", str(value)))
        trainer = build_trainer([str(recipe), *overrides, *keys], command=sys.argv)
        alone = views_alone(trainer, steps)
        times = StepTimes()
        trainer.add_callback(times)
        trainer.train()
    views = trainer.get_total_train_batch_size(trainer.args)
    computing = [end - begin for begin, end in zip(times.begins, times.ends, strict=True)][WARM_UP:]
    waiting = [begin - end for begin, end in zip(times.begins[1:], times.ends[:-1], strict=True)][WARM_UP - 1 :]
    together = sum(computing) + sum(waiting)
    return {
        "recipe": recipe.name,
        "views_alone": alone,
        "steps_alone": views / median(computing),
        "together": views * len(computing) / together,
        "waiting": sum(waiting) / together,
    }


def views_alone(trainer, steps: int) -> float:
    """Views per second of the trainer's loader while nothing else runs."""
    batches = (batch for _ in iter(int, 1) for batch in trainer.get_train_dataloader())
    for _ in islice(batches, WARM_UP):
        pass
    start, views = time.perf_counter(), 0
    for batch in islice(batches, steps):
        views += len(batch["labels"])
    return views / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, default=[ROOT / "recipes" / "quickstart.yaml"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args, overrides = parser.parse_known_args()
    machine, rows = describe_machine("cuda" if torch.cuda.is_available() else "cpu"), []
    print(machine, flush=True)
    for recipe in args.recipes:
        rows.append(measure(recipe, overrides, args.steps))
    print("\n| recipe | views/s: the loader alone | the steps alone | together | waiting for views | limited by |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        side = "the loader" if row["views_alone"] < row["steps_alone"] else "the steps"
        speeds = " | ".join(f"{row[name]:,.0f}" for name in ("views_alone", "steps_alone", "together"))
        print(f"| {row['recipe']} | {speeds} | {row['waiting']:.1%} | {side} |")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
