"""Kill a run, again and again: `python benchmarks/survival.py [--trials 20] [--signal KILL] [--stream] [--set ...]`.

A short distillation of handwritten digits is run once to its end. Then, in each trial, the same command is killed at a
random moment, every second time while a checkpoint is being written, and started again. The final weights, the moving
average and the logged losses must be those of the undisturbed run, bit for bit. Exit status 1 if one is not.

BOTH is SIGTERM and 0.2 seconds later SIGKILL. TWICE starts the command a second time while the first run goes on: the
second must be refused, and then the first is killed. `--set` changes the run, for example
`--set max_steps=22 --set save_total_limit=1 --set save_strategy=epoch`.

Everything happens in processes forked from this one, which has imported what they need.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import datasets
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
import run_distill  # noqa: E402
import run_teacher  # noqa: E402

from hf_deit.errors import run_script  # noqa: E402


SHORT = {
    "image_size": 16,
    "num_train_epochs": 3,
    "warmup_epochs": 1,
    "logging_steps": 1,
    "dataloader_num_workers": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}
STUDENT = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "no", "ema_decay": 0.9, "drop_path_rate": 0.1}


def write_digits(folder: Path) -> Path:
    """Scikit-learn's digits as parquet: 6 blocks to train on."""
    digits = load_digits()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    for split, rows in {"train": slice(0, 600), "test": slice(600, 700)}.items():
        images = [Image.fromarray((pixels * 15.9).astype("uint8")) for pixels in digits.images[rows]]
        content = datasets.Dataset.from_dict({"image": images, "label": digits.target[rows]}, features=features)
        content.to_parquet(folder / f"{split}.parquet", batch_size=100)
    return folder


def words(**keys) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def start(main, arguments: list[str], log: Path):
    """`main(arguments)` in a process of its own, with a process group of its own."""

    def run():
        os.setsid()
        with log.open("a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            run_script(lambda: main(arguments))

    process = get_context("fork").Process(target=run)
    process.start()
    return process


def finish(main, arguments: list[str], log: Path) -> float:
    begin, process = time.perf_counter(), start(main, arguments, log)
    process.join()
    if process.exitcode:
        sys.exit(f"a run that nobody disturbed ended with status {process.exitcode}:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - begin


def strike(process, output: Path, how: str, moment: float, in_a_save: bool, again) -> str:
    """Kills at `moment`, seconds from now, or while the next checkpoint after it is written. Returns what was met."""
    until = time.perf_counter() + moment
    while process.is_alive() and time.perf_counter() < until:
        time.sleep(0.001)
    while in_a_save and process.is_alive() and not any((output / "_unfinished").glob("*/*")):
        time.sleep(0.0002)
    if how == "TWICE" and (output / "_lock").exists():
        second = again()
        second.join(120)
        if second.exitcode != 1 and process.is_alive():
            return f"SECOND RUN ENDED WITH {second.exitcode}"
    writing = (output / "_unfinished").exists()
    number = signal.SIGTERM if how in ("TERM", "BOTH") else signal.SIGKILL
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(process.pid, number)
        if how == "BOTH":
            process.join(0.2)
            os.kill(process.pid, signal.SIGKILL)
    process.join(120)
    if process.is_alive():
        process.kill()
        return "HUNG"
    expected = {-signal.SIGKILL} if number == signal.SIGKILL else {os.EX_TEMPFAIL}
    if how == "BOTH":
        expected |= {-signal.SIGKILL}
    if process.exitcode == -signal.SIGTERM:
        return "before it began"  # in the fork itself
    if process.exitcode == 0 and (output / "trainer_state.json").exists():
        return "too late"
    if process.exitcode not in expected:
        return f"STATUS {process.exitcode}"
    return "while saving" if writing else "between saves"


def outcome(output: Path) -> dict:
    """What must be equal: every tensor, and the loss of each step."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return {
        "weights": load_file(output / "model.safetensors"),
        "average": load_file(last / "ema.safetensors"),
        "losses": losses,
    }


def differences(one: dict, other: dict) -> list[str]:
    tensors = [
        f"{kind} {name}"
        for kind in ("weights", "average")
        for name, value in one[kind].items()
        if not torch.equal(value, other[kind][name])
    ]
    return tensors + ["losses"] * (one["losses"] != other["losses"])


def orphans() -> int:
    """Processes of killed runs that are still there: they are copies of this one, and their parent is gone."""
    mine = Path("/proc/self/cmdline").read_bytes()
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            count += parent == "1" and (process / "cmdline").read_bytes() == mine
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM", "BOTH", "TWICE"), default="KILL")
    parser.add_argument("--set", action="append", default=[], help="key=value, an option of the run")
    parser.add_argument("--stream", action="store_true", help="read the training images while training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    moments = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "digits").mkdir()
        data = {"dataset_name": write_digits(folder / "digits")}
        teacher = folder / "teacher"
        recipe = str(ROOT / "recipes" / "quickstart_teacher.yaml")
        finish(run_teacher.main, [recipe, *words(output_dir=teacher, **data, **SHORT)], folder / "log")
        stream = {"streaming": True, "shuffle_buffer_size": 200} if args.stream else {}
        recipe = str(ROOT / "recipes" / "quickstart.yaml")
        arguments = [recipe, *words(**data, **SHORT, **STUDENT, **stream, teacher=teacher)]
        arguments += words(**dict(pair.split("=", 1) for pair in args.set))
        whole, output = folder / "whole", folder / "trial"
        seconds = finish(run_distill.main, [*arguments, *words(output_dir=whole)], folder / "log")
        expected = outcome(whole)
        print(f"undisturbed: {len(expected['losses'])} steps, {seconds:.1f} s", flush=True)

        trials = []
        while len(trials) < args.trials:
            shutil.rmtree(output, ignore_errors=True)
            command = (run_distill.main, [*arguments, *words(output_dir=output)], folder / "log")
            process = start(*command)
            moment, in_a_save = moments.uniform(0, seconds), len(trials) % 2 == 1
            met = strike(process, output, args.signal, moment, in_a_save, lambda command=command: start(*command))
            if (output / "trainer_state.json").exists():  # too late: it had ended
                continue
            kept = sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
            finish(run_distill.main, [*arguments, *words(output_dir=output)], folder / "log")
            different = differences(expected, outcome(output)) + [met] * met.isupper()
            different += [f"left {path.name}" for path in output.glob("_*") if path.name != "_set_aside"]
            trials.append({"met": met, "last_checkpoint": kept[-1] if kept else None, "equal": not different})
            verdict = f"DIFFERENT: {different[:3]}" if different else "equal"
            print(f"{len(trials):>3}  {met:<22}last checkpoint {trials[-1]['last_checkpoint']}  {verdict}", flush=True)
        time.sleep(15)  # a loader's worker looks for its parent every five seconds
        left = orphans()

    equal = sum(trial["equal"] for trial in trials)
    print(
        f"{args.signal}, {'streamed' if args.stream else 'map-style'}: {equal} of {len(trials)} equal bit for bit, "
        f"{left} processes left behind"
    )
    if args.json:
        args.json.write_text(
            json.dumps({"signal": args.signal, "stream": args.stream, "trials": trials, "left": left})
        )
    return int(equal < len(trials) or left > 0)


if __name__ == "__main__":
    sys.exit(main())
