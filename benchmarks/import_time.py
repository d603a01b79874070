"""How long until the first line of a program runs: `python benchmarks/import_time.py [--rounds 7] [--json FILE]`.

`import hf_deit` and the same of its peers, each in a fresh process, in turns. The processor time says more than the
wall clock where the machine does other work as well. All but hf_deit import PyTorch themselves. Not here: the commands
(start_time.py).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from hf_deit.paper.machine import describe_machine


BASE, OURS = "import torch", "import torch, hf_deit"
STATEMENTS = (
    BASE,
    OURS,
    "import torch, transformers",
    "import timm",
    "from transformers import ViTForImageClassification",
    "from hf_deit import DeiTForImageClassification",
)
PROGRAMS = {statement: ["-c", statement] for statement in STATEMENTS}


def run(arguments: list[str]) -> tuple[float, float]:
    """Seconds of a fresh process: by the clock, and of processor time, all its threads together."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # reaped above
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return seconds, usage.ru_utime + usage.ru_stime


def rows(times: dict[str, list[tuple[float, float]]], compared_with: str) -> list[dict]:
    """Medians, and medians of what the programs of one round differ by: from `import torch`, and times another."""
    found = []
    for program, measured in times.items():
        row: dict = {"program": program}
        for column, kind in enumerate(("wall", "cpu")):
            seconds, base, others = ([pair[column] for pair in times[name]] for name in (program, BASE, compared_with))
            row[kind] = median(seconds)
            row[f"{kind}_beyond_torch"] = median(own - torch for own, torch in zip(seconds, base, strict=True))
            row[f"{kind}_ratio"] = median(own / other for own, other in zip(seconds, others, strict=True))
        found.append(row | {"runs": measured})
    return found


def table(found: list[dict], compared_with: str) -> str:
    ratio = f"times `{compared_with}`"
    lines = [
        f"| program | wall s | beyond torch | {ratio} | processor s | beyond torch | {ratio} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = (
            f"{row[kind]:.2f} | {row[f'{kind}_beyond_torch']:.2f} | {row[f'{kind}_ratio']:.2f}"
            for kind in ("wall", "cpu")
        )
        lines.append(f"| {row['program']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="how often each program is run; one more warms up")
    parser.add_argument("--json", type=Path, help="where everything measured is written")
    args = parser.parse_args()

    times = {program: [] for program in PROGRAMS}
    for number in range(args.rounds + 1):
        for program, arguments in PROGRAMS.items():
            measured = run(arguments)
            if number:  # the first round fills the caches of the disk
                times[program].append(measured)
    found = rows(times, OURS)
    print(f"medians of {args.rounds}", table(found, OURS), sep="\n\n")
    if args.json:
        report = {"machine": describe_machine("cpu"), "rounds": args.rounds, "programs": found}
        args.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
