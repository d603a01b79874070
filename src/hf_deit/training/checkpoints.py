"""Checkpoints that can be trusted: whole or not there, checked before they are opened.

A checkpoint is written aside, flushed to the disk, given a manifest of its files' sizes and hashes, and renamed. What
is called `checkpoint-<step>` is therefore whole, a kill at any moment loses at most the steps since the last one, and
a byte that changed later is noticed.

Not here: what stands in a checkpoint (Transformers' Trainer, ema.py) and when one is written (the settings).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..durable import flush
from ..errors import UserError


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Of the name beneath which a checkpoint is written; the Trainer writes `checkpoint-<step>` inside.
UNFINISHED = "_unfinished"
# Lies in the output directory itself when a run is finished: the Trainer's history is written after the results.
HISTORY = "trainer_state.json"


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is not what was written."""


@contextmanager
def committed(output_dir: str | os.PathLike, name: str, facts: Mapping) -> Iterator[None]:
    """Around the writing of `<output_dir>/_unfinished/<name>`: at the end it is whole, on the disk, at its own place.

    For one process. Those of other ranks have written their files before the block ends.

    Args:
        name: `checkpoint-<step>`. One of that name that is there already is replaced.
        facts: about the run, for the manifest; JSON.

    Raises:
        CheckpointError: it could not be written. What there was of it is removed, so that a full disk has room for a
            log line; the checkpoints before it are as they were.
    """
    aside, place = Path(output_dir) / UNFINISHED / name, Path(output_dir) / name
    try:
        yield
        manifest = {"run": dict(facts), "files": {}}
        for file in _files(aside):
            manifest["files"][str(file.relative_to(aside))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            flush(file)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        flush(aside / MANIFEST)
        for folder in {aside, *(file.parent for file in _files(aside))}:
            flush(folder)
        if place.exists():
            shutil.rmtree(place)
        aside.rename(place)
        flush(place.parent)
    except Exception as error:  # safetensors and PyTorch have types of their own for a full disk
        free = shutil.disk_usage(output_dir).free
        shutil.rmtree(aside, ignore_errors=True)
        last = last_good_checkpoint(output_dir)
        kept = (
            f"{last} is whole: free some space, then start the same command again" if last else "there is none before"
        )
        raise CheckpointError(
            f"{place} could not be written ({_line(error)}; {free:,} bytes of space left) and was removed; {kept}"
        ) from error
    finally:
        remove_unfinished(output_dir)


def remove_unfinished(output_dir: str | os.PathLike) -> None:
    """Removes what a killed run was writing."""
    aside = Path(output_dir) / UNFINISHED
    if aside.is_symlink():  # which rmtree leaves, and which would be written through
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)


def is_finished(output_dir: str | os.PathLike) -> bool:
    """Whether a run came to its end there."""
    return Path(output_dir, HISTORY).exists()


def mark_unfinished(output_dir: str | os.PathLike) -> None:
    """For a run that begins or goes on."""
    Path(output_dir, HISTORY).unlink(missing_ok=True)


def problem_of(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is the one that was written.

    Reads all of it. A checkpoint of stock Transformers has no manifest, which is a problem too.
    """
    folder = Path(checkpoint)
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        for name, expected in files.items():
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()):
                return f"{name!r} leads out of it"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes, not the {expected['bytes']:,} that were written"
            if _sha256(file) != expected["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end, or not by hf_deit"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {_line(error)}"
    unlisted = {str(file.relative_to(folder)) for file in _files(folder)} - files.keys() - {MANIFEST}
    return f"{min(unlisted)!r} was not written with it" if unlisted else None


def refuse_links(output_dir: str | os.PathLike) -> None:
    """A link in a directory that a stranger could have filled would have a run write where it points.

    Raises:
        CheckpointError: there is one that leads out of it.
    """
    folder = Path(output_dir)
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"output_dir {str(folder)!r} holds the link {str(path.relative_to(folder))!r} to "
                f"{os.readlink(path)!r}, and a run would write there: remove it, or choose another output_dir"
            )


@contextmanager
def pickles_refused(checkpoint: str | os.PathLike) -> Iterator[None]:
    """PyTorch refuses a pickle that would run code, and then says how to run it; here it ends with the refusal."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} holds a pickle of more than tensors and plain values, which could run "
            "foreign code and is not opened: hf_deit writes none, so take another checkpoint"
        ) from error


def last_good_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint, or None. Each damaged one that is passed over is one warning."""
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        if (problem := problem_of(checkpoint)) is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, problem)
    return None


def checkpoint_to_resume(output_dir: str | os.PathLike, wanted: str) -> Path | None:
    """Where a run goes on from; None if it starts anew.

    Args:
        output_dir: of the run.
        wanted: "auto": the last whole checkpoint of an unfinished run, if there is one. "true": the last whole one,
            which must be there. Else a checkpoint's directory.

    Raises:
        CheckpointError: there are only damaged ones, none where there must be, or `output_dir` holds a finished run,
            with which this one would be mixed.
    """
    folder, automatic = Path(output_dir), wanted.lower() == "auto"
    refuse_links(folder)
    if not automatic and wanted.lower() != "true":
        return _named_checkpoint(Path(wanted))
    found = _checkpoints(folder)
    if found and automatic and is_finished(folder):
        raise CheckpointError(
            f"output_dir {str(folder)!r} holds a finished run and its checkpoints: choose another output_dir, delete "
            f"this one, or go on from it with --resume_from_checkpoint {found[-1]}"
        )
    last = last_good_checkpoint(folder)
    if last is None and found:
        raise CheckpointError(
            f"of the {len(found)} checkpoints in {str(folder)!r} none is whole (see the warnings): delete them to "
            "start anew, or bring back a copy"
        )
    if last is None and not automatic:
        raise CheckpointError(f"there is no checkpoint in {str(folder)!r} to go on from")
    return last


def _named_checkpoint(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint is {str(checkpoint)!r}, which is no directory: name a checkpoint, or leave it "
            "out to go on from the last whole one in output_dir"
        )
    if problem := problem_of(checkpoint):
        if (checkpoint / MANIFEST).exists():
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} is damaged: {problem}. Name another, or leave out "
                "resume_from_checkpoint to go on from the last whole one in output_dir"
            )
        logger.warning("checkpoint %s cannot be verified: %s", checkpoint, problem)
    return checkpoint


def facts_of(checkpoint: str | os.PathLike) -> dict:
    """What the run that wrote a checkpoint said about itself; empty where there is no manifest."""
    try:
        facts = json.loads((Path(checkpoint) / MANIFEST).read_text("utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _checkpoints(folder: Path) -> list[Path]:
    """Those of a run, oldest first."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
