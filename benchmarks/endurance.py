"""Does a long run stay the size it was? `python benchmarks/endurance.py [--minutes 30]`.

Runs a distillation of handwritten digits, streamed, evaluated and saved again and again, and looks every few seconds
at all of its processes: memory (PSS: shared pages counted once), open descriptors, number of processes. Draws a
picture, and prints the growth from the second to the last quarter of the run. Exit status 1 if memory grew by more
than 2 % or descriptors or processes by any.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
from matplotlib.figure import Figure
from survival import ROOT, STUDENT, words, write_digits


def sample(process: psutil.Process, begin: float) -> dict | None:
    """Sums over the process and its workers; None when it has ended."""
    try:
        family = [process, *process.children(recursive=True)]
        return {
            "minutes": (time.monotonic() - begin) / 60,
            "megabytes": sum(one.memory_full_info().pss for one in family) / 1e6,
            "descriptors": sum(one.num_fds() for one in family),
            "processes": len(family),
            "zombies": sum(one.status() == psutil.STATUS_ZOMBIE for one in family),
        }
    except psutil.Error:
        return None


def draw(samples: list[dict], path: Path) -> None:
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    units = {"megabytes": "memory (MB)", "descriptors": "open descriptors", "processes": "processes"}
    for axes, (key, label) in zip(panels, units.items(), strict=True):
        axes.plot([one["minutes"] for one in samples], [one[key] for one in samples], color="#0072B2", linewidth=1.4)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0, top=1.2 * max(one[key] for one in samples))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("minutes")
    figure.suptitle("A distillation run with two loader workers, evaluated and saved throughout", fontweight="bold")
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "endurance.png")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "digits").mkdir()
        keys = {"dataset_name": write_digits(folder / "digits"), "image_size": 16, "use_cpu": True}
        run = ROOT / "recipes" / "run_distill.py"
        teacher = [run.with_name("run_teacher.py"), run.with_name("quickstart_teacher.yaml")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        short = words(**keys, num_train_epochs=3, warmup_epochs=1, output_dir=folder / "teacher")
        subprocess.run([sys.executable, *teacher, *short], check=True, **quiet)
        endless = words(
            **(keys | STUDENT | {"save_steps": 100, "eval_strategy": "steps", "eval_steps": 50, "logging_steps": 10}),
            **{"num_train_epochs": 100_000, "dataloader_num_workers": 2, "streaming": True, "disable_tqdm": True},
            **{"teacher": folder / "teacher", "output_dir": folder / "run"},
        )
        process = psutil.Popen([sys.executable, run, *endless], **quiet)
        begin, samples = time.monotonic(), []
        try:
            while time.monotonic() - begin < 60 * args.minutes:
                time.sleep(args.every)
                if (one := sample(process, begin)) is None or not process.is_running():
                    sys.exit("the run ended by itself")
                samples.append(one)
        finally:
            for one in [process, *process.children(recursive=True)]:
                one.kill()
            process.wait()

    quarter = len(samples) // 4
    growth = {}
    for key in ("megabytes", "descriptors", "processes", "zombies"):
        early = median(one[key] for one in samples[quarter : 2 * quarter])
        late = median(one[key] for one in samples[-quarter:])
        growth[key] = late - early
        print(f"{key:<12}{early:>10.1f} in the second quarter, {late:>10.1f} in the last: {late - early:+.1f}")
    draw(samples, args.picture)
    memory = samples[quarter]["megabytes"]
    return int(growth["megabytes"] > 0.02 * memory or any(growth[key] > 0 for key in growth if key != "megabytes"))


if __name__ == "__main__":
    sys.exit(main())
