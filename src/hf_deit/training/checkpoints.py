"""Checkpoints that are complete or absent, and verified before they are opened.

A checkpoint is written to a temporary folder, flushed to the disk, given a manifest of its files' sizes and hashes,
and renamed. A folder named `checkpoint-<step>` is therefore complete, a kill at any moment loses at most the steps
since the last checkpoint, and a byte that changed later is detected.

Not here: the contents of a checkpoint (Transformers' Trainer, ema.py) and when one is written (the settings).
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

from ..errors import UserError
from ..files import flush


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Temporary folder in output_dir: `checkpoint-<step>` is written inside it, then moved up by a rename.
UNFINISHED = "_unfinished"
# File that marks a finished run when it is in output_dir itself: the Trainer's history is written after the results.
HISTORY = "trainer_state.json"


class CheckpointError(UserError):
    """Raised when a checkpoint cannot be written, is damaged or cannot be resumed from."""


@contextmanager
def committed(output_dir: str | os.PathLike, name: str, facts: Mapping) -> Iterator[None]:
    """Turn `<output_dir>/_unfinished/<name>`, written inside the `with`, into a complete checkpoint on the disk.

    Only the process that saves enters; the other ranks must have written their files before the `with` ends.

    Args:
        output_dir: directory of the run.
        name: `checkpoint-<step>`. An existing checkpoint of that name is replaced.
        facts: facts of the run for the manifest; JSON.

    Raises:
        CheckpointError: the checkpoint could not be written. Its partial files are removed, so that a full disk has
            room for a log line; earlier checkpoints are unchanged.
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
            f"{last} is complete: free some space, then start the same command again to resume from it"
            if last
            else "there is no earlier checkpoint: free some space, then start the same command again"
        )
        raise CheckpointError(
            f"checkpoint {place} could not be written ({_line(error)}; {free:,} bytes free) and was removed; {kept}"
        ) from error
    finally:
        remove_unfinished(output_dir)


def remove_unfinished(output_dir: str | os.PathLike) -> None:
    """Remove the checkpoint that a killed run was writing."""
    aside = Path(output_dir) / UNFINISHED
    if aside.is_symlink():  # rmtree does not remove a link, and the run would write through it
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)


def is_finished(output_dir: str | os.PathLike) -> bool:
    """Return whether `output_dir` holds a finished run."""
    return Path(output_dir, HISTORY).exists()


def mark_unfinished(output_dir: str | os.PathLike) -> None:
    """Remove the mark of a finished run, for a run that starts or resumes."""
    Path(output_dir, HISTORY).unlink(missing_ok=True)


def verify_checkpoint(checkpoint: str | os.PathLike) -> str | None:
    """Return what is wrong with a checkpoint, in a few words, or None if every file is as written.

    Reads every file in full. A checkpoint of stock Transformers has no manifest, which counts as a problem.
    """
    folder = Path(checkpoint)
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        for name, expected in files.items():
            file = folder / name
            if not file.resolve().is_relative_to(folder.resolve()):
                return f"{name!r} leads outside the checkpoint"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes, expected {expected['bytes']:,}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has changed since it was written: its SHA-256 differs"
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the checkpoint is incomplete or was not written by hf_deit"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {_line(error)}"
    unlisted = {str(file.relative_to(folder)) for file in _files(folder)} - files.keys() - {MANIFEST}
    return f"{min(unlisted)!r} is not listed in {MANIFEST}" if unlisted else None


def refuse_links(output_dir: str | os.PathLike) -> None:
    """Refuse symbolic links out of `output_dir`, through which the run would write elsewhere.

    Raises:
        CheckpointError: `output_dir` holds a link that leads outside.
    """
    folder = Path(output_dir)
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"output_dir {str(folder)!r} holds the link {str(path.relative_to(folder))!r} to "
                f"{os.readlink(path)!r}, and the run would write there: remove the link, or choose another output_dir"
            )


@contextmanager
def pickles_refused(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Turn PyTorch's refusal of an unsafe pickle into a CheckpointError without advice to load the pickle anyway."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} holds a pickle of more than tensors and plain values, which could run "
            "foreign code and is not opened: hf_deit writes no such file, so use another checkpoint"
        ) from error


def last_good_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the newest complete checkpoint, or None. Each damaged checkpoint that is skipped logs a warning."""
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        if (problem := verify_checkpoint(checkpoint)) is None:
            return checkpoint
        logger.warning("skipping damaged checkpoint %s: %s", checkpoint, problem)
    return None


def checkpoint_to_resume(output_dir: str | os.PathLike, wanted: str) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        output_dir: directory of the run.
        wanted: "auto": the last complete checkpoint of an unfinished run, if there is one. "true": the last complete
            checkpoint, which must exist. Anything else: the directory of a checkpoint.

    Raises:
        CheckpointError: every checkpoint is damaged, a required checkpoint does not exist, or "auto" found a finished
            run, whose files the new run would overwrite.
    """
    folder, automatic = Path(output_dir), wanted.lower() == "auto"
    refuse_links(folder)
    if not automatic and wanted.lower() != "true":
        return _named_checkpoint(Path(wanted))
    found = _checkpoints(folder)
    if found and automatic and is_finished(folder):
        raise CheckpointError(
            f"output_dir {str(folder)!r} holds a finished run and its checkpoints: choose another output_dir, delete "
            f"this one, or resume the run with --resume_from_checkpoint {found[-1]}"
        )
    last = last_good_checkpoint(folder)
    if last is None and found:
        raise CheckpointError(
            f"cannot resume: all {len(found)} checkpoints in {str(folder)!r} are damaged (see the warnings); delete "
            "them to start from the beginning, or restore a copy"
        )
    if last is None and not automatic:
        raise CheckpointError(
            f"cannot resume: output_dir {str(folder)!r} holds no checkpoint; leave out resume_from_checkpoint to "
            "start from the beginning"
        )
    return last


def _named_checkpoint(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint is {str(checkpoint)!r}, which is not a directory: name a checkpoint, or leave "
            "out resume_from_checkpoint to resume from the last complete checkpoint in output_dir"
        )
    if problem := verify_checkpoint(checkpoint):
        if (checkpoint / MANIFEST).exists():
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} is damaged: {problem}. Name another checkpoint, or leave out "
                "resume_from_checkpoint to resume from the last complete checkpoint in output_dir"
            )
        logger.warning("checkpoint %s cannot be verified: %s", checkpoint, problem)
    return checkpoint


def facts_of(checkpoint: str | os.PathLike) -> dict:
    """Return the facts of the run that wrote a checkpoint; empty if the manifest is missing or unreadable."""
    try:
        facts = json.loads((Path(checkpoint) / MANIFEST).read_text("utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
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
        digest = hashlib.sha256()  # not hashlib.file_digest, which needs Python 3.11
        while chunk := content.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
