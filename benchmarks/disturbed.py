"""A run for faults.py and mistakes.py: a command line that can be given again, and what is promised of it."""

import os
import re
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import lives
import torch.distributed.run as torchrun
from lives import DIGITS, FOLDER, ON_HUB, ROOT, SHORT, STUDENT, TEACHER, distill, words


# Of 27, with a checkpoint every 5: to go back to the last one costs two steps or little more.
FAULTY_STEP = 12
KINDS = {"on disk": {}, "streamed": ON_HUB, "two ranks": {"per_device_train_batch_size": 32}}  # of runs


class Row(NamedTuple):
    happened: str
    lost: str
    noticed: str = ""


class Broken(Exception):
    """A fault was not handled as promised."""


def promise(kept: object, what: str) -> None:
    if not kept:
        raise Broken(what)


def clear(said: str, cause: str, lost: str, noticed: str = "") -> Row:
    """What a run says at its end is one line for its user, with the cause in it."""
    promise(said.startswith("error: ") and re.search(cause, said), f"one clear line. It said: “{said}”. Lost: {lost}")
    return Row(said, lost, noticed)


class Run:
    """A command line, and the process that executes it: a second `start()` gives the same command again."""

    all: list["Run"] = []

    def __init__(self, name: str, kind: str = "on disk", main: Callable = distill.main, **keys):
        self.output, self.log, self.main = FOLDER / name, FOLDER / f"{name.replace('/', ', ')}.log", main
        keys = {"dataset_name": DIGITS, "teacher": TEACHER, **SHORT, **STUDENT, **KINDS[kind]} | keys
        self.arguments = [str(ROOT / "recipes/quickstart.yaml"), *words(**keys, output_dir=self.output)]
        if kind == "two ranks":
            ranks = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
            self.main, self.arguments = torchrun.main, [*ranks, str(ROOT / "recipes/run_distill.py"), *self.arguments]
        self.kind = kind
        self.log.touch()
        Run.all.append(self)

    def changed(self, **keys) -> "Run":
        """The same run with more words on its command line, of which the last of a key counts."""
        self.arguments = [*self.arguments, *words(**keys)]
        return self

    def start(self, **how) -> "Run":
        self.said_before = self.log.stat().st_size
        self.process = lives.start(self.main, self.arguments, self.log, **how)
        return self

    @property
    def said(self) -> str:
        """Since the last start."""
        return self.log.read_bytes()[self.said_before :].decode(errors="replace")

    def find(self, pattern: str) -> str:
        """The last line like that, without the names of this machine's folders; empty if there is none."""
        lines = [line for line in self.said.splitlines() if re.search(pattern, line)]
        return lines[-1].strip().replace(f"{self.output}/", "").replace(f"{FOLDER}/", "") if lines else ""

    @property
    def last_words(self) -> str:
        return self.find(r"^(error|\S*Error): ")

    @property
    def resumed_at(self) -> int:
        return int((self.find("^resuming from .*, after step ") or "0").split()[-1])

    @property
    def step(self) -> int:
        """The last one that is done."""
        return self.resumed_at + self.said.count("\n{'loss':")

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(self.output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    def reaches(self, step: int) -> "Run":
        end = time.monotonic() + 300
        while self.step < step:
            promise(self.process.is_alive() and time.monotonic() < end, f"step {step} within five minutes")
            time.sleep(0.01)
        return self

    def stopped_by(self, number: int, at: int, status: int | None = None) -> "Run":
        """Starts it and sends a signal after a step."""
        os.kill(self.start().reaches(at).process.pid, number)
        self.ends(status=-number if status is None else status)
        return self

    def ends(self, status: int, seconds: float = 300) -> float:
        """Waits for it. Returns the seconds it took."""
        begin = time.monotonic()
        self.process.join(seconds)
        promise(self.process.exitcode == status, f"status {status} in {seconds:.0f} s, not {self.process.exitcode}")
        if status == 1 and self.kind != "two ranks":  # torchrun prints tracebacks of its own
            promise("Traceback (most" not in self.said, "no traceback")
        return time.monotonic() - begin

    def is_refused(self) -> str:
        """Starts it; it must refuse before it trains a step. Returns what it says."""
        self.start().ends(status=1)
        promise(not self.said.count("\n{'loss':"), "an error before the first step")
        return self.last_words

    def is_undisturbed(self) -> str:
        different = lives.differences(undisturbed(self.kind), lives.outcome(self.output))
        promise(not different, f"an end as if nothing had happened: {len(different)} differ, such as {different[:2]}")
        return "nothing: equal bit for bit"

    def goes_on(self) -> str:
        """The same command again. Returns what was lost."""
        step = self.step
        self.start().ends(status=0)
        again = max(0, step - self.resumed_at)
        return f"{self.is_undisturbed()}, {again} step{'s' * (again != 1)} done twice"


@cache
def undisturbed(kind: str) -> dict:
    run = Run(f"undisturbed, {kind}", kind).start()
    run.ends(status=0)
    return lives.outcome(run.output)


class Listed(dict):
    """Faults by name; a decorator."""

    def __call__(self, fault: Callable[[], Row]) -> Callable[[], Row]:
        self[fault.__name__] = fault
        return fault


def in_child(main: Callable, change: Callable[[], object]) -> Callable:
    """A `main` that first changes something in its own process."""
    return partial(_after, change, main)


def _after(change: Callable, main: Callable, arguments: list[str]) -> object:
    change()
    return main(arguments)
