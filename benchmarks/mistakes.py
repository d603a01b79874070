"""Faults that people make, for faults.py: other settings, files and commands than before, keys and full terminals."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import lives
import pyarrow as pa
import pyarrow.parquet as pq
from disturbed import FAULTY_STEP, Listed, Row, Run, clear, in_child, promise
from lives import DIGITS, FOLDER, HUB, SHORT, TEACHER, distill, teacher, words


MISTAKES = Listed()


def warned_of(run: Run, pattern: str) -> Row:
    """Start the run again: it goes on to its end, after a warning like that."""
    run.start().ends(status=0)
    said = run.find(pattern)
    promise(said, "a warning that names it")
    return Row(said, "nothing")


@MISTAKES
def same_command_twice() -> Row:
    """the same command while the run goes on"""
    run, second = Run("twice").start().reaches(5), Run("twice")
    said = second.is_refused()
    run.ends(status=0)
    return clear(said, r"is in use by another run \(process \d+", run.is_undisturbed())


@MISTAKES
def finished_run_again() -> Row:
    """the command of a finished run"""
    run = Run("finished").start()
    run.ends(status=0)
    begin = time.monotonic()
    said = run.is_refused()
    return clear(said, "holds a finished run", run.is_undisturbed(), f"{time.monotonic() - begin:.1f} s")


@MISTAKES
def interrupted() -> Row:
    """Ctrl-C"""
    run = Run("interrupted").stopped_by(signal.SIGINT, FAULTY_STEP, status=130)
    said = run.find("interrupted by Ctrl-C")
    promise(said, "one line")
    return Row(said, run.goes_on())


@MISTAKES
def terminal_closed() -> Row:
    """the terminal is closed (SIGHUP)"""
    run = Run("hung up").stopped_by(signal.SIGHUP, FAULTY_STEP)
    return Row("it ended", run.goes_on())


@MISTAKES
def terminated() -> Row:
    """SIGTERM to all its processes, as Slurm sends it"""
    run = Run("terminated").start().reaches(FAULTY_STEP)
    os.killpg(run.process.pid, signal.SIGTERM)
    run.ends(status=75)
    said = run.find("stopped by SIGTERM")
    promise(said, "one line")
    return Row(said, run.goes_on())


@MISTAKES
def nobody_reads() -> Row:
    """`| head -1`"""
    reader, writer = os.pipe()

    def piped() -> None:
        os.close(reader)  # of this process: then nobody reads
        os.dup2(writer, 1)

    run = Run("head", main=in_child(distill.main, piped))
    run.start()
    os.close(reader)
    os.close(writer)
    run.ends(status=1)
    said, run.main = run.last_words, distill.main
    return clear(said, "nobody reads the output", run.goes_on())


@MISTAKES
def directory_deleted() -> Row:
    """the current directory was deleted"""
    place = FOLDER / "to delete"
    place.mkdir()

    def deleted() -> None:
        os.chdir(place)
        place.rmdir()

    run = Run("deleted")
    run.start(prepare=deleted).ends(status=1)
    said = run.last_words
    return clear(said, "current directory no longer exists", run.goes_on(), "at the start")


@MISTAKES
def output_not_writable() -> Row:
    """an output_dir on a read-only file system"""
    disk = FOLDER / "read-only"
    disk.mkdir()
    if not lives.mount(disk, "ro,size=1M"):
        return Row("not run: no right to mount a file system", "")
    try:
        said = Run("read-only/run").is_refused()
    finally:
        lives.unmount(disk)
    return clear(said, "cannot be written: Read-only", "nothing", "before anything is loaded")


@MISTAKES
def mistyped_key() -> Row:
    """a mistyped key"""
    return clear(Run("key", learning_rat=1).is_refused(), "learning_rate", "nothing", "at the start")


@MISTAKES
def mistyped_record() -> Row:
    """a mistyped record"""
    return clear(Run("no record", teacher_replay=FOLDER / "recrod").is_refused(), "recrod", "nothing", "at the start")


@MISTAKES
def another_record() -> Row:
    """the record of another augmentation"""
    source = Run("other views", teacher_record=FOLDER / "other record", color_jitter=0.1).start()
    source.ends(status=0)
    said = Run("another record", teacher_replay=FOLDER / "other record").is_refused()
    return clear(said, "color_jitter", "nothing", "at the start")


@MISTAKES
def other_teacher() -> Row:
    """another teacher on resuming"""
    arguments = [str(lives.ROOT / "recipes/quickstart_teacher.yaml"), *words(**SHORT | {"seed": 1})]
    other = FOLDER / "another teacher"
    lives.finish(teacher.main, [*arguments, *words(dataset_name=DIGITS, output_dir=other)], FOLDER / "other.log")
    run = Run("other teacher").stopped_by(signal.SIGKILL, FAULTY_STEP).changed(teacher=other)
    run.start().ends(status=0)
    said = run.find("resuming with teacher|resuming with .*another teacher")
    promise(said, "a warning that names it")
    card = (run.output / "README.md").read_text()
    promise(re.search(r"another teacher", card), "a card that names the new one")
    promise(re.search(rf"teacher {TEACHER.name}\b", card), "a card that names the one before")
    return Row(said, "nothing; the card names both teachers")


@MISTAKES
def other_label() -> Row:
    """one label of 600 changed on resuming"""
    folder = FOLDER / "relabelled"
    shutil.copytree(DIGITS, folder)
    run = Run("other label", dataset_name=folder).stopped_by(signal.SIGKILL, FAULTY_STEP)
    rows = pq.read_table(folder / "train.parquet")
    labels = rows["label"].to_pylist()
    labels[300] = (labels[300] + 1) % 10
    kind = rows.schema.field("label").type
    pq.write_table(rows.set_column(1, rows.schema.field("label"), pa.array(labels, kind)), folder / "train.parquet")
    return warned_of(run, "^resuming with ")


@MISTAKES
def other_student() -> Row:
    """a wider student on resuming"""
    run = Run("other student").stopped_by(signal.SIGKILL, FAULTY_STEP).changed(hidden_size=96)
    said = run.is_refused()
    run.arguments = run.arguments[:-2]
    return clear(said, "another student.*hidden_size", run.goes_on(), "before training")


@MISTAKES
def other_batch() -> Row:
    """another batch size on resuming"""
    run = Run("other batch").stopped_by(signal.SIGKILL, FAULTY_STEP).changed(per_device_train_batch_size=32)
    return warned_of(run, "resuming with batch size")


@MISTAKES
def earlier_checkpoint() -> Row:
    """back to an earlier checkpoint, and SIGKILL soon after"""
    run = Run("earlier", save_total_limit=10).stopped_by(signal.SIGKILL, 22)
    run.changed(resume_from_checkpoint=run.output / "checkpoint-10").stopped_by(signal.SIGKILL, 17)
    said = run.find("moved to")
    promise(said and run.checkpoints[-1].name == "checkpoint-15", "newer checkpoints set aside")
    run.arguments = run.arguments[:-2]
    lost = run.goes_on()
    return Row(said, lost)


@MISTAKES
def no_right_to_upload() -> Row:
    """a repository that belongs to somebody else"""
    said = Run("not mine", push_to_hub=True, hub_model_id="stranger/student").is_refused()
    return clear(said, "may not write there", "nothing", "before training")


@MISTAKES
def pipe_among_images() -> Row:
    """a named pipe among the images of a folder"""
    folder = FOLDER / "photos"
    for label, image in ((row["label"], row["image"]) for row in pq.read_table(DIGITS / "train.parquet").to_pylist()):
        place = folder / "train" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Path(place, f"{len(list(place.iterdir()))}.png").write_bytes(image["bytes"])
    os.mkfifo(folder / "train/3/pipe.png")
    run = Run("pipe", dataset_name=folder, eval_fraction=0.1).start()
    run.process.join(120)
    promise(run.process.exitcode is not None, "no hang")
    if run.process.exitcode:
        return clear(run.last_words, "pipe.png", "nothing", "at the start")
    said = run.find("pipe.png|damaged")
    promise(said, "the file is named")
    return Row(said, "nothing")


@MISTAKES
def leftovers() -> Row:
    """a half-written checkpoint of a killed run, and a folder of the user"""
    run = Run("leftovers").stopped_by(signal.SIGKILL, FAULTY_STEP)
    shutil.copytree(run.checkpoints[-1], run.output / "_unfinished/checkpoint-12")
    (run.output / "my notes").mkdir()
    lost = run.goes_on()
    promise(not (run.output / "_unfinished").exists(), "nothing left")
    promise((run.output / "my notes").is_dir(), "what is not the run's is left alone")
    return Row("the half was removed, the folder left", lost)


@MISTAKES
def history_edited() -> Row:
    """trainer_state.json of the last checkpoint edited by hand"""
    run = Run("edited").stopped_by(signal.SIGKILL, FAULTY_STEP)
    file = run.checkpoints[-1] / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 3}))
    lost = run.goes_on()
    said = run.find("^skipping damaged checkpoint")
    promise(said, "a warning that names the file")
    return Row(said, lost)


@MISTAKES
def token_missing() -> Row:
    """no token, with push_to_hub"""

    def without_token() -> None:
        os.environ.pop("HF_TOKEN")

    run = Run("no token", main=in_child(distill.main, without_token), push_to_hub=True, hub_model_id="user/student")
    HUB.repositories.pop(("model", "user/student"), None)
    return clear(run.is_refused(), "token is missing", "nothing", "before training")
