"""What three days have in store, done to a short run: `python benchmarks/faults.py [fault ...] [--json FILE]`.

Each fault is injected into a distillation of handwritten digits on recipes/run_distill.py's command line. The table
says what was seen. Where the same command is then given again, weights, moving average and the loss of each step must
be those of a run that nobody disturbed, bit for bit. Exit status 1 if a fault was not handled as promised.

Everything happens in processes forked from this one, which has imported what they need, but for the ranks of torchrun.
Kills at random moments, while saving included, are in survival.py.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple


sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from support.hub_server import HubHandler, HubListener, HubServer


HUB = HubServer().__enter__()
os.environ.update(HUB.environment, OMP_NUM_THREADS="1")  # what is imported next reads it, once and for all

import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import survival  # noqa: E402
import torch  # noqa: E402
import torch.distributed.run as torchrun  # noqa: E402
from PIL import Image  # noqa: E402
from survival import ROOT, SHORT, STUDENT, run_distill, run_teacher, words  # noqa: E402
from transformers import AutoModelForImageClassification, TrainerCallback, trainer  # noqa: E402

from hf_deit.errors import run_script  # noqa: E402


FOLDER = Path(HUB.home.name)  # of everything, removed at the end
DIGITS, TEACHER = FOLDER / "digits", FOLDER / "teacher"
SHARD = "train-00003-of-00006.parquet"
# Of 27, with a checkpoint every 5: to go back to the last one costs two steps or little more.
FAULTY_STEP = 12
KINDS = {  # of runs
    "on disk": {},
    "streamed": {"dataset_name": "user/digits", "streaming": True, "shuffle_buffer_size": 60},
    "two ranks": {"per_device_train_batch_size": 32},
}


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

    def __init__(self, name: str, kind: str = "on disk", main: Callable = run_distill.main, **keys):
        self.output, self.log, self.main = FOLDER / name, FOLDER / f"{name.replace('/', ', ')}.log", main
        keys = {"dataset_name": DIGITS, "teacher": TEACHER, **SHORT, **STUDENT, **KINDS[kind]} | keys
        self.arguments = [str(ROOT / "recipes/quickstart.yaml"), *words(**keys, output_dir=self.output)]
        if kind == "two ranks":
            ranks = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
            self.main, self.arguments = torchrun.main, [*ranks, run_distill.__file__, *self.arguments]
        self.kind = kind
        self.log.touch()
        Run.all.append(self)

    def start(self) -> "Run":
        def main(arguments: list[str]) -> None:
            HUB.http.server_close()  # this process's share of it, which would keep the port open
            run_script(partial(self.main, arguments))

        self.said_before = self.log.stat().st_size
        self.process = survival.start(main, self.arguments, self.log)
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
        return int((self.find("^going on from .*, after step ") or "0").split()[-1])

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

    def ends(self, status: int, seconds: float = 300) -> float:
        """Waits for it. Returns the seconds it took."""
        begin = time.monotonic()
        self.process.join(seconds)
        promise(self.process.exitcode == status, f"status {status} in {seconds:.0f} s, not {self.process.exitcode}")
        return time.monotonic() - begin

    def is_undisturbed(self) -> str:
        different = survival.differences(undisturbed(self.kind), survival.outcome(self.output))
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
    return survival.outcome(run.output)


def prepare() -> None:
    """The digits, on disk and on our Hub, and a teacher."""
    DIGITS.mkdir()
    rows = pq.read_table(survival.write_digits(DIGITS) / "train.parquet")
    shards = {"test.parquet": (DIGITS / "test.parquet").read_bytes()}
    for number in range(6):
        file = io.BytesIO()
        pq.write_table(rows.slice(100 * number, 100), file, row_group_size=10)
        shards[SHARD.replace("3", str(number))] = file.getvalue()
    HUB.add_repo("dataset", "user/digits", shards)
    arguments = [str(ROOT / "recipes/quickstart_teacher.yaml"), *words(**SHORT, dataset_name=DIGITS)]
    survival.finish(run_teacher.main, [*arguments, *words(output_dir=TEACHER)], FOLDER / "teacher.log")


# The disk


def is_whole(checkpoint: Path) -> bool:
    """Whether its files are those of its manifest."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"].items()
    return all(hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == file["sha256"] for name, file in files)


def fill_disk(name: str, room_for: float, **keys) -> Row:
    """Trains on a disk that has room for so many checkpoints, and goes on when it has more."""
    undisturbed("on disk")
    one = sum(file.stat().st_size for file in FOLDER.glob("undisturbed, on disk/checkpoint-27/*"))
    disk = FOLDER / name
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(room_for * one)}", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        return Row("not run: no right to mount a small disk", "")
    try:
        run = Run(f"{name}/run", **keys).start()
        run.ends(status=1)
        said = run.last_words
        promise(run.checkpoints and all(map(is_whole, run.checkpoints)), "whole checkpoints")
        subprocess.run(["mount", "-o", "remount,size=1G", disk], check=True)
        return clear(said, "space", run.goes_on())
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def full_disk() -> Row:
    """full disk (tmpfs) while a checkpoint is written"""
    return fill_disk("small", 2.5)


def full_disk_at_the_end() -> Row:
    """full disk (tmpfs) while the final model is written"""
    return fill_disk("larger", 6.1, save_total_limit=10)


def damage_checkpoint(name: str, damage: Callable[[bytes], bytes]) -> Row:
    run = Run(name).start().reaches(FAULTY_STEP)
    run.process.kill()
    run.ends(status=-9)
    file = run.checkpoints[-1] / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    lost = run.goes_on()
    said = run.find(f"^{file.parent} is passed over: {file.name}")
    promise(said, "a warning that names the file")
    return Row(said, lost)


def truncated_file() -> Row:
    """a checkpoint's weights cut to half, after SIGKILL"""
    return damage_checkpoint("truncated", lambda data: data[: len(data) // 2])


def flipped_byte() -> Row:
    """a byte of a checkpoint's weights changed, after SIGKILL"""
    return damage_checkpoint("flipped", lambda data: data[:-999] + bytes([data[-999] ^ 1]) + data[-998:])


# The Hub


@contextmanager
def shard_missing() -> Iterator[None]:
    files = HUB.repositories["dataset", "user/digits"].at("main").files
    HUB.objects.clear()
    file = files.pop(SHARD)
    try:
        yield
    finally:
        files[SHARD] = file


def shard_gone() -> Row:
    """a shard of a stream is gone from the Hub in mid-run"""
    run = Run("shard gone", "streamed").start().reaches(FAULTY_STEP)
    with shard_missing():
        seconds = run.ends(status=1)
    return clear(run.last_words, SHARD, run.goes_on(), f"{seconds:.1f} s")


def shard_never_there() -> Row:
    """a shard of a stream, train-00003-of-00006, is missing at the start"""
    run = Run("shard never there", "streamed")
    with shard_missing():
        run.start().process.join(300)
    said = run.find(SHARD)
    promise(said, f"the file is named; it ended with status {run.process.exitcode} after {run.step} steps")
    return Row(said, "nothing" if run.process.exitcode else "its images: trained on the others", "at the start")


def server_down() -> Row:
    """HTTP server down for 30 s during a stream"""
    run = Run("server down", "streamed").start().reaches(FAULTY_STEP)
    begin = time.monotonic()
    HUB.down = True  # for those who are connected
    HUB.http.shutdown()
    HUB.http.server_close()
    time.sleep(30)
    step = run.step
    HUB.http = HubListener(("127.0.0.1", HUB.port), type("Handler", (HubHandler,), {"hub": HUB}))
    HUB.down = False
    threading.Thread(target=HUB.http.serve_forever, args=(0.02,), daemon=True).start()
    run.reaches(step + 1)
    waited = time.monotonic() - begin
    run.ends(status=0)
    promise(run.resumed_at == 0 and step < 27, "one run, which had to wait")
    said = f"waited after step {step}, went on by itself {waited:.0f} s after the server went down; warned: “"
    return Row(said + run.find("next try in") + "”", f"{run.is_undisturbed()}, no step done twice")


# Processes


def kill_one_of(run: Run, is_the_one: Callable[[psutil.Process], bool]) -> float:
    """Kills a child of the run. Returns the seconds until all of it had come down."""
    children = psutil.Process(run.process.pid).children()
    family = psutil.Process(run.process.pid).children(recursive=True)
    next(child for child in children if is_the_one(child)).kill()
    seconds = run.ends(status=1, seconds=60)
    promise(not psutil.wait_procs(family, 30)[1], "no process left behind")
    return seconds


def rank_killed() -> Row:
    """one rank of two killed (SIGKILL)"""
    run = Run("rank killed", "two ranks").start().reaches(FAULTY_STEP)
    seconds = kill_one_of(run, lambda child: child.environ()["RANK"] == "1")
    said = run.find("Signal 9")
    promise(said, "an error that names the signal")
    return Row(f"the other came down too; torchrun said: “{said}”", run.goes_on(), f"{seconds:.1f} s")


def worker_killed() -> Row:
    """a loader worker killed (SIGKILL)"""
    run = Run("worker killed").start().reaches(FAULTY_STEP)
    seconds = kill_one_of(run, lambda child: "resource_tracker" not in " ".join(child.cmdline()))
    return clear(run.last_words, "worker", run.goes_on(), f"{seconds:.1f} s")


# Numbers


class TurningNaN(torch.nn.Module):
    """The teacher, whose answer to one image is NaN from the faulty step on."""

    def __init__(self):
        super().__init__()
        self.teacher, self.step = AutoModelForImageClassification.from_pretrained(TEACHER), 0

    def forward(self, pixels):
        logits = self.teacher(pixels).logits
        self.step += len(pixels) > 1  # when it is loaded, it is shown one blank image
        if self.step >= FAULTY_STEP:
            logits[0] = torch.nan
        return logits


def teacher_turns_nan() -> Row:
    """a teacher begins to answer NaN"""
    run = Run("teacher turns NaN", teacher="python:__main__:TurningNaN").start()
    run.ends(status=1)
    said = run.last_words
    run.arguments += words(teacher=TEACHER)
    return clear(said, f"stopped at step {FAULTY_STEP}: teacher 'python", run.goes_on(), "in that step")


class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == FAULTY_STEP - 1:
            next(model.parameters()).data.flatten()[0] = torch.nan


def weight_turns_nan() -> Row:
    """a weight becomes NaN"""

    def poisoned(arguments: list[str]) -> None:
        trainer.DEFAULT_CALLBACKS.append(Poison)
        run_distill.main(arguments)

    run = Run("weight turns NaN", main=poisoned).start()
    run.ends(status=1)
    said, run.main = run.last_words, run_distill.main
    return clear(said, f"stopped at step {FAULTY_STEP}: .*not finite: the logits", run.goes_on(), "in that step")


def learning_rate_too_high() -> Row:
    """a learning rate of 1e30"""
    run = Run("learning rate too high", learning_rate=1e30).start()
    run.ends(status=1)
    step = run.step + 1
    return clear(run.last_words, f"stopped at step {step}: .*a learning rate too high", f"{step} steps", "at once")


# Images


def damages(png: bytes) -> list[bytes | None]:
    """What disks, downloads and scripts make of images."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).save(file, "JPEG")
    jpeg = file.getvalue()
    cut_short = [jpeg[:-20], jpeg[:300], jpeg[:2], png[:-40], png[:60], b"", None]
    return [*cut_short, bytes(500), b"no image", b"<html>404</html>", b"GIF89a" + png[6:], jpeg[:4] + png]


def damaged_images() -> Row:
    """12 damaged images among the 600 to train on"""
    undisturbed("on disk")
    rows = pq.read_table(DIGITS / "train.parquet")
    images = rows["image"].to_pylist()
    bad = dict(zip(range(0, 600, 50), damages(images[0]["bytes"]), strict=True))
    for index, content in bad.items():
        images[index] = {"bytes": content, "path": None}
    folder = FOLDER / "damaged digits"
    folder.mkdir()
    rows = rows.set_column(0, rows.schema.field("image"), pa.array(images, rows.schema.field("image").type))
    pq.write_table(rows, folder / "train.parquet")
    (folder / "test.parquet").write_bytes((DIGITS / "test.parquet").read_bytes())

    run = Run("damaged images", dataset_name=folder, num_repeats=1, max_bad_images=0.02).start()
    run.ends(status=0)
    listed = [line.split("\t") for line in (run.output / "_bad_images.txt").read_text().splitlines()[1:]]
    promise(sorted(int(index) for index, _, _ in listed) == list(bad), f"each listed once: {listed}")
    promise(run.step == 27 and all(reason for _, _, reason in listed), "27 steps, and a reason for each")
    outputs = run.output, FOLDER / "undisturbed, on disk"
    here, there = (json.loads((output / "all_results.json").read_text()) for output in outputs)
    promise(here["teacher_top1"] == there["teacher_top1"] and here["bad_images"] == 12, "the same evaluation")
    reasons = "; ".join(sorted({reason for _, _, reason in listed}))
    return Row(f"trained to the end; {len(listed)} listed: {reasons}", "these images: their neighbours stood in")


FAULTS = {
    fault.__name__: fault
    for fault in (
        *(full_disk, full_disk_at_the_end, truncated_file, flipped_byte, shard_gone, shard_never_there, server_down),
        *(rank_killed, worker_killed, teacher_turns_nan, weight_turns_nan, learning_rate_too_high, damaged_images),
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="fault", help=f"default: all of {', '.join(FAULTS)}")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if unknown := set(args.faults) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(unknown)}. There are {', '.join(FAULTS)}")
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)  # of the runs, too: what they said before they were killed counts
    prepare()

    rows = []
    try:
        print("| fault | what happened | lost | noticed after |\n|---|---|---|---|")
        for name in args.faults or FAULTS:
            row = {"fault": FAULTS[name].__doc__, "lost": "", "noticed": "", "as_promised": True}
            begin, runs_before = time.monotonic(), len(Run.all)
            try:
                row |= FAULTS[name]()._asdict()
            except Broken as error:
                row |= {"happened": f"NOT AS PROMISED: {error}", "as_promised": False}
                logs = [run.log.read_text(errors="replace")[-9000:] for run in Run.all[runs_before:]]
                print(name, *logs, sep="\n", file=sys.stderr)
            rows.append(row)
            happened = textwrap.shorten(row["happened"], 400, placeholder=" ...").replace("|", "\\|")
            print(f"| {row['fault']} | {happened} | {row['lost']} | {row['noticed']} |")
            print(f"({name}: {time.monotonic() - begin:.0f} s)", file=sys.stderr)
    finally:
        for run in Run.all:
            run.process.kill()
        HUB.__exit__()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    return int(any(not row["as_promised"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
