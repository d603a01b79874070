"""How long people wait at the start: `python benchmarks/start_time.py [--rounds 7] [--json FILE] [--busy]`.

Whole processes in turns: `import torch`, help, three refusals, and the quickstart until the progress bar of its first
training (its teacher's) shows a step, after which it is killed. Each is compared with the `import torch` of the same
round. With --busy another process keeps one core busy meanwhile.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from import_time import BASE, rows, table

from hf_deit.paper.machine import describe_machine


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DISTILL = ["-m", "hf_deit", "distill", "quickstart"]
# The command line, and how the process ends: its status, or None for the one that is killed.
PROGRAMS = {
    BASE: (["-c", BASE], 0),
    "hf-deit --help": (["-m", "hf_deit", "--help"], 0),
    "hf-deit distill --help": (["-m", "hf_deit", "distill", "--help"], 0),
    "a wrong key": ([*DISTILL, "--epochs", "3"], 1),
    "a wrong value": ([*DISTILL, "--image_size", "big"], 2),
    "a dataset that is not there": ([*DISTILL, "--dataset_name", "nowhere/at/all"], 1),
    "first step of the quickstart": ([str(RECIPES / "run_distill.py"), str(RECIPES / "quickstart.yaml")], None),
}
FIRST_STEP = re.compile(rb"\b[1-9]\d*/\d+ \[")  # of tqdm's bar


def run(arguments: list[str], status: int | None) -> tuple[float, float]:
    """Seconds of a fresh process in an empty folder: by the clock, and of processor time, all its threads together.

    Those of loader workers are not counted.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        said = b""
        while (some := os.read(process.stderr.fileno(), 4096)) and not (status is None and FIRST_STEP.search(said)):
            said += some
        if status is None:
            seconds = time.perf_counter() - start
            process.send_signal(signal.SIGKILL)
        _, ended, usage = os.wait4(process.pid, 0)
        if status is not None:
            seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(ended)  # reaped above
        process.stderr.close()
    if process.returncode != (-signal.SIGKILL if status is None else status):
        raise SystemExit(f"{arguments} ended with status {process.returncode}: {said.decode()}")
    return seconds, usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def one_core_busy(wanted: bool):
    if not wanted:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="how often each program is run; one more warms up")
    parser.add_argument("--busy", action="store_true", help="keep one core busy with another process")
    parser.add_argument("--json", type=Path, help="where everything measured is written")
    args = parser.parse_args()

    times = {program: [] for program in PROGRAMS}
    with one_core_busy(args.busy):
        for number in range(args.rounds + 1):
            for program, (arguments, status) in PROGRAMS.items():
                measured = run(arguments, status)
                if number:  # the first round fills the caches of the disk
                    times[program].append(measured)
    found = rows(times, BASE)
    print(f"medians of {args.rounds}", table(found, BASE), sep="\n\n")
    if args.json:
        machine = describe_machine("cpu") | {"one core busy": args.busy}
        report = {"machine": machine, "rounds": args.rounds, "programs": found}
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
