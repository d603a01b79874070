"""What three days have in store, done to a short run: `python benchmarks/faults.py [fault ...] [--json FILE]`.

Each fault is injected into a distillation of handwritten digits on recipes/run_distill.py's command line. The table
says what was seen. Where the same command is then given again, weights, moving average, losses and evaluations must be
those of a run that nobody disturbed, bit for bit. Exit status 1 if a fault was not handled as promised.

Here are the faults of disks, networks, processes, numbers and data; those of people are in mistakes.py. Everything
happens in processes forked from this one, which has imported what they need, but for launchers and torchrun's ranks.
Kills at random moments, while saving included, are in survival.py.
"""

import argparse
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lives
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from disturbed import FAULTY_STEP, Broken, Listed, Row, Run, clear, in_child, promise, undisturbed
from lives import DIGITS, FOLDER, HUB, SHARD, TEACHER, DistillationTrainer, distill
from mistakes import MISTAKES
from PIL import Image
from support.hub_server import HubHandler, HubListener
from transformers import AutoModelForImageClassification, TrainerCallback, trainer


FAULTS = Listed()


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
    if not lives.mount(disk, f"size={int(room_for * one)}"):
        return Row("not run: no right to mount a small disk", "")
    try:
        run = Run(f"{name}/run", **keys).start()
        run.ends(status=1)
        said = run.last_words
        promise(run.checkpoints and all(map(is_whole, run.checkpoints)), "whole checkpoints")
        subprocess.run(["mount", "-o", "remount,size=1G", disk], check=True)
        return clear(said, "space", run.goes_on())
    finally:
        lives.unmount(disk)


@FAULTS
def full_disk() -> Row:
    """full disk (tmpfs) while a checkpoint is written"""
    return fill_disk("small", 2.5)


@FAULTS
def full_disk_at_the_end() -> Row:
    """full disk (tmpfs) while the final model is written"""
    return fill_disk("larger", 6.1, save_total_limit=10)


def damage_checkpoint(name: str, damage: Callable[[bytes], bytes]) -> Row:
    run = Run(name).stopped_by(signal.SIGKILL, FAULTY_STEP)
    file = run.checkpoints[-1] / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    lost = run.goes_on()
    said = run.find(f"^skipping damaged checkpoint .*: {file.name}")
    promise(said, "a warning that names the file")
    return Row(said, lost)


@FAULTS
def truncated_file() -> Row:
    """a checkpoint's weights cut to half, after SIGKILL"""
    return damage_checkpoint("truncated", lambda data: data[: len(data) // 2])


@FAULTS
def flipped_byte() -> Row:
    """a byte of a checkpoint's weights changed, after SIGKILL"""
    return damage_checkpoint("flipped", lambda data: data[:-999] + bytes([data[-999] ^ 1]) + data[-998:])


@contextmanager
def broken_record(name: str, damage: Callable[[bytes], bytes]) -> Iterator[Run]:
    """A run that replays a record of which the answers were changed."""
    record = FOLDER / f"{name} record"
    Run(f"{name} source", teacher_record=record).start().ends(status=0)
    file = next(path for path in record.iterdir() if path.suffix != ".json")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    run = Run(name, teacher_replay=record).start()
    run.ends(status=1)
    yield run
    file.write_bytes(whole)


@FAULTS
def flipped_bit_in_a_record() -> Row:
    """a bit of a recorded teacher answer changed"""
    middle = lambda data: len(data) // 2  # noqa: E731
    flip = lambda data: data[: middle(data)] + bytes([data[middle(data)] ^ 1]) + data[middle(data) + 1 :]  # noqa: E731
    with broken_record("flipped record", flip) as run:
        said, step = run.last_words, run.step + 1
    return clear(said, "record", run.goes_on(), f"in step {step}")


@FAULTS
def cut_record() -> Row:
    """a record cut to half"""
    with broken_record("cut record", lambda data: data[: len(data) // 2]) as run:
        said = run.last_words
    return clear(said, "record", run.goes_on())


@FAULTS
def full_disk_at_the_card() -> Row:
    """full disk while the model card is written"""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "README.md")

    run = Run("card", main=in_child(distill.main, lambda: setattr(DistillationTrainer, "create_model_card", full)))
    run.start().ends(status=1)
    said, run.main = run.last_words, distill.main
    return clear(said, "the disk is full", run.goes_on())


@FAULTS
def every_checkpoint_damaged() -> Row:
    """all checkpoints damaged"""
    run = Run("all damaged").stopped_by(signal.SIGKILL, FAULTY_STEP)
    for checkpoint in run.checkpoints:
        (checkpoint / "optimizer.pt").unlink()
    said = run.is_refused()
    for checkpoint in run.checkpoints:
        lives.remove(checkpoint)
    return clear(said, "are damaged", run.goes_on(), "before training")


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


@FAULTS
def shard_gone() -> Row:
    """a shard of a stream is gone from the Hub in mid-run"""
    run = Run("shard gone", "streamed").start().reaches(FAULTY_STEP)
    with shard_missing():
        seconds = run.ends(status=1)
    return clear(run.last_words, SHARD, run.goes_on(), f"{seconds:.1f} s")


@FAULTS
def shard_never_there() -> Row:
    """a shard of a stream, train-00003-of-00006, is missing at the start"""
    run = Run("shard never there", "streamed")
    with shard_missing():
        run.start().process.join(300)
    said = run.find(SHARD)
    promise(said, f"the file is named; it ended with status {run.process.exitcode} after {run.step} steps")
    return Row(said, "nothing" if run.process.exitcode else "its images: trained on the others", "at the start")


@FAULTS
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


@FAULTS
def hub_errors() -> Row:
    """the Hub answers with 503, four times, during a stream"""
    run = Run("hub errors", "streamed").start().reaches(FAULTY_STEP)
    HUB.fail_next(4, 503, "train-0000")
    run.ends(status=0)
    used = 4 - len(HUB.failures)
    HUB.failures.clear()
    said = run.find("next try in|503")
    promise(used, "it was asked")
    return Row(f"went on by itself after {used} of them; warned: “{said}”", run.is_undisturbed())


@FAULTS
def cut_answers() -> Row:
    """six answers of the Hub are cut off in their middle during a stream"""
    run = Run("cut answers", "streamed").start().reaches(2)
    HUB.cut_after(200, "", 6)
    run.ends(status=0)
    used = 6 - len(HUB.cuts)
    HUB.cuts.clear()
    promise(used, "it was asked")
    return Row(f"went on by itself after {used} of them", run.is_undisturbed())


@FAULTS
def upload_fails() -> Row:
    """the Hub answers with 500 to the upload at the end"""
    HUB.repositories.pop(("model", "user/student"), None)
    HUB.fail_next(50, 500, "preupload")
    run = Run("upload", push_to_hub=True, hub_model_id="user/student", hub_strategy="end").start()
    run.ends(status=1)
    HUB.failures.clear()
    said = run.last_words
    return clear(said, "cannot push to .*hf upload user/student", run.is_undisturbed())


# Processes


def kill_one_of(run: Run, is_the_one: Callable[[psutil.Process], bool]) -> float:
    """Kills a child of the run. Returns the seconds until all of it had come down."""
    children = psutil.Process(run.process.pid).children()
    family = psutil.Process(run.process.pid).children(recursive=True)
    next(child for child in children if is_the_one(child)).kill()
    seconds = run.ends(status=1, seconds=60)
    promise(not psutil.wait_procs(family, 30)[1], "no process left behind")
    return seconds


@FAULTS
def rank_killed() -> Row:
    """one rank of two killed (SIGKILL)"""
    run = Run("rank killed", "two ranks").start().reaches(FAULTY_STEP)
    seconds = kill_one_of(run, lambda child: child.environ()["RANK"] == "1")
    said = run.find("Signal 9")
    promise(said, "an error that names the signal")
    return Row(f"the other came down too; torchrun said: “{said}”", run.goes_on(), f"{seconds:.1f} s")


@FAULTS
def worker_killed() -> Row:
    """a loader worker killed (SIGKILL)"""
    run = Run("worker killed").start().reaches(FAULTY_STEP)
    seconds = kill_one_of(run, lambda child: "resource_tracker" not in " ".join(child.cmdline()))
    return clear(run.last_words, "worker", run.goes_on(), f"{seconds:.1f} s")


@FAULTS
def launcher_killed() -> Row:
    """`accelerate launch` killed (SIGKILL)"""
    run = Run("launcher killed")
    run.said_before = 0
    run.process = lives.fresh(run.arguments, run.log, launcher=True)
    run.reaches(FAULTY_STEP)
    (child,) = psutil.Process(run.process.pid).children()
    begin = time.monotonic()
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join()
    while (status := lives.bury(child.pid)) is None and time.monotonic() < begin + 60:
        time.sleep(0.01)
    seconds = time.monotonic() - begin
    promise(status == 75, f"status 75 of what it had launched, not {status}")
    said = run.find("stopped by SIGTERM")
    promise(said and not lives.all_gone(30), "one line, and nothing left behind")
    return Row(said, run.goes_on(), f"{seconds:.1f} s")


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


def taught_by(factory: str, cause: str) -> Row:
    """A run whose teacher goes wrong is stopped, and goes on with the right one."""
    run = Run(f"teacher {factory}", teacher=f"python:__main__:{factory}").start()
    run.ends(status=1)
    said = run.last_words
    run.changed(teacher=TEACHER)
    return clear(said, cause, run.goes_on(), "in that step")


@FAULTS
def teacher_turns_nan() -> Row:
    """a teacher begins to answer NaN"""
    return taught_by("TurningNaN", f"stopped at step {FAULTY_STEP}: the outputs of teacher 'python")


class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == FAULTY_STEP - 1:
            next(model.parameters()).data.flatten()[0] = torch.nan


@FAULTS
def weight_turns_nan() -> Row:
    """a weight becomes NaN"""

    poison = in_child(distill.main, lambda: trainer.DEFAULT_CALLBACKS.append(Poison))
    run = Run("weight turns NaN", main=poison).start()
    run.ends(status=1)
    said, run.main = run.last_words, distill.main
    return clear(said, f"stopped at step {FAULTY_STEP}: .*not finite: the logits", run.goes_on(), "in that step")


class Forgetful(TurningNaN):
    """The teacher, which returns nothing from the faulty step on."""

    def forward(self, pixels):
        logits = super().forward(pixels)
        return None if self.step >= FAULTY_STEP else logits


@FAULTS
def teacher_returns_nothing() -> Row:
    """a teacher begins to return None"""
    return taught_by("Forgetful", "teacher")


@FAULTS
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


@FAULTS
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


FAULTS |= MISTAKES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="fault", help=f"default: all of {', '.join(FAULTS)}")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if unknown := set(args.faults) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(unknown)}. There are {', '.join(FAULTS)}")
    lives.prepare()

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
        for process in lives.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        HUB.__exit__()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    return int(any(not row["as_promised"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
