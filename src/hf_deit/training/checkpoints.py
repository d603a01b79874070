"""Checkpoints that are complete or absent, and verified before they are opened.

A checkpoint is written to a temporary folder, flushed to the disk, given a manifest of its files' sizes and hashes,
and renamed. A folder named `checkpoint-<step>` is therefore complete, a kill at any moment loses at most the steps
since the last checkpoint, and a byte that changed later is detected. A rename never removes what stood there before.

Not here: the contents of a checkpoint (Transformers' Trainer, ema.py), when one is written (the settings), and how a
run has its output_dir for itself (processes.py).
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
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import flush, read_json
from ..processes import claim_directory, on_main_process


if TYPE_CHECKING:
    from ..options.distillation_config import DistillationConfig

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Temporary folder in output_dir: `checkpoint-<step>` is written inside it, then moved up by a rename.
UNFINISHED = "_unfinished"
# Folder in output_dir of the checkpoints that a run has turned away from by resuming from an earlier one.
SET_ASIDE = "_set_aside"
# Prefix of a checkpoint that is being replaced by another one of the same step.
REPLACED = "_replaced-"
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
        before = place.with_name(f"{REPLACED}{name}")
        if place.exists():
            place.rename(before)
        aside.rename(place)
        flush(place.parent)
        shutil.rmtree(before, ignore_errors=True)
    except Exception as error:  # safetensors and PyTorch have types of their own for a full disk
        free = _free_bytes(output_dir)
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


def _free_bytes(folder: str | os.PathLike) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # the folder is gone
        return 0


def remove_unfinished(output_dir: str | os.PathLike) -> None:
    """Remove the checkpoint that a killed run was writing, and put back one that the run was replacing."""
    aside = Path(output_dir) / UNFINISHED
    if aside.is_symlink():  # rmtree does not remove a link, and the run would write through it
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)
    for before in Path(output_dir).glob(f"{REPLACED}checkpoint-*"):
        place = before.with_name(before.name.removeprefix(REPLACED))
        if place.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(place)


def set_aside(output_dir: str | os.PathLike, after: int) -> list[Path]:
    """Move the checkpoints of later steps than `after` to `_set_aside`, where nothing resumes from or deletes them.

    Without this, rotation would keep them, as the highest numbers, and delete what the run writes from now on.

    Returns:
        Where they are now.
    """
    moved = []
    for checkpoint in _checkpoints(Path(output_dir)):
        if _step_of(checkpoint) <= after:
            continue
        place = Path(output_dir, SET_ASIDE, checkpoint.name)
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{checkpoint.name}.{number}")
        place.parent.mkdir(exist_ok=True)
        checkpoint.rename(place)
        moved.append(place)
    return moved


def keep_only(output_dir: str | os.PathLike, name: str) -> None:
    """Remove all checkpoints but the one of this name, if it is there."""
    if Path(output_dir, name).is_dir():
        for checkpoint in _checkpoints(Path(output_dir)):
            if checkpoint.name != name:
                shutil.rmtree(checkpoint, ignore_errors=True)


def claim_output_dir(args: DistillationConfig) -> None:
    """Lock `output_dir` for this run, and refuse a finished run in it, before anything is loaded.

    Every rank must call this function; the main process holds the lock.

    Raises:
        UserError: another run uses the directory, or it cannot be written.
        CheckpointError: it holds a finished run, and the options say neither to overwrite it nor to resume.
    """
    folder = args.output_dir

    def claim() -> None:
        try:
            folder.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"output_dir {folder!a} is not a name in UTF-8, which not every library can write to: choose "
                "another output_dir"
            ) from error
        claim_directory(folder)
        if (args.resume_from_checkpoint or "auto").lower() == "auto" and not args.overwrite_output_dir:
            refuse_finished(folder)

    on_main_process(claim)


def refuse_finished(output_dir: str | os.PathLike) -> None:
    """Raise a [`CheckpointError`] if `output_dir` holds a finished run."""
    if is_finished(output_dir):
        last = _checkpoints(Path(output_dir))[-1:]
        resume = f", or resume the run with --resume_from_checkpoint {last[0]}" if last else ""
        raise CheckpointError(
            f"output_dir {str(output_dir)!r} holds a finished run: choose another output_dir, replace the run with "
            f"--overwrite_output_dir true{resume}"
        )


def remove_finished(output_dir: str | os.PathLike) -> None:
    """Remove the checkpoints of a finished run and then its mark; the new run overwrites its other files."""
    for folder in (*_checkpoints(Path(output_dir)), Path(output_dir, SET_ASIDE)):
        shutil.rmtree(folder, ignore_errors=True)
    mark_unfinished(output_dir)


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
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing: the checkpoint is incomplete or was not written by hf_deit"
    try:
        files = read_json(folder / MANIFEST)["files"]
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
def loading(checkpoint: str | os.PathLike | None, what: str) -> Iterator[None]:
    """Turn what goes wrong while a part of a checkpoint is loaded into a CheckpointError of one line.

    PyTorch refuses an unsafe pickle with advice to load the pickle anyway, which is left out.
    """
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} holds a pickle of more than tensors and plain values, which could run "
            "foreign code and is not opened: hf_deit writes no such file, so use another checkpoint"
        ) from error
    except Exception as error:  # each format has types of its own
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise CheckpointError(
            f"cannot resume from checkpoint {str(checkpoint)!r}: {what} cannot be loaded ({_line(error)}). Name "
            "another checkpoint, or set model_name_or_path to this one to use only its weights"
        ) from error


def last_good_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """Return the newest complete checkpoint, or None. Each damaged checkpoint that is skipped logs a warning."""
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        if (problem := verify_checkpoint(checkpoint)) is None:
            return checkpoint
        logger.warning("skipping damaged checkpoint %s: %s", checkpoint, problem)
    return None


def checkpoint_to_resume(output_dir: str | os.PathLike, wanted: str, overwrite: bool = False) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        output_dir: directory of the run.
        wanted: "auto": the last complete checkpoint of an unfinished run, if there is one. "true": the last complete
            checkpoint, which must exist. Anything else: the directory of a checkpoint.
        overwrite: with "auto", start from the beginning where a finished run is found.

    Raises:
        CheckpointError: every checkpoint is damaged, a required checkpoint does not exist, or "auto" found a finished
            run, whose files the new run would overwrite.
    """
    folder, automatic = Path(output_dir), wanted.lower() == "auto"
    refuse_links(folder)
    if not automatic and wanted.lower() != "true":
        return _named_checkpoint(Path(wanted))
    found = _checkpoints(folder)
    if automatic and is_finished(folder):
        if overwrite:
            return None
        refuse_finished(folder)
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
        facts = read_json(Path(checkpoint) / MANIFEST)["run"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def facts_to_resume(output_dir: str | os.PathLike, wanted: str) -> dict:
    """Return the facts of the checkpoint that a run would resume from, which is not verified here; empty for none.

    Args:
        output_dir, wanted: as for [`checkpoint_to_resume`].
    """
    if wanted.lower() not in ("auto", "true"):
        return facts_of(wanted)
    if wanted.lower() == "auto" and is_finished(output_dir):
        return {}
    return next(map(facts_of, reversed(_checkpoints(Path(output_dir)))), {})


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


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
