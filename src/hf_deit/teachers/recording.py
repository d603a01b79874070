"""Recording: runs the teacher in training and writes its outputs to a record."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback

from ..errors import UserError
from ..files import flush
from ..processes import on_main_process
from .record import (
    HEADER,
    LEFTOVER,
    MAX_CLASSES,
    Header,
    answers_file,
    checksum,
    differences,
    first_of_batch,
    versions_here,
    warn_of_approximation,
)
from .teacher import Teacher


class RecordingTeacher(TrainerCallback):
    """Teacher that records its outputs while it runs; every rank writes the outputs of its own views.

    The directory is created if it does not exist. A run that resumes continues its own record and writes the same
    outputs again. [`commit`][RecordingTeacher.commit] flushes the outputs to the disk; [`DistillationTrainer`] calls
    `commit` before each checkpoint.

    Args:
        teacher: teacher whose outputs are recorded.
        fingerprint: returns the fingerprint of the run (see [`fingerprint_of_views`]); called on one process.
        directory: directory of the record, on a file system that all ranks share.
        kind: "hard" or "soft", the distillation type.
        top_k: number of logits kept per view, for "soft".
        batch_size: views in a batch of one device.
        device: device that the teacher runs on, which affects the precision of its outputs.
        data: keys of a recipe that name the images, for whoever gets the record; not compared.

    Raises:
        ValueError: the directory holds the record of another run, other files or links, or cannot be written; there
            are more than 65,535 classes; when training starts, the run resumes from a step that the record has not
            reached.
    """

    replays: str | None = None
    record_on_hub: str | None = None

    def __init__(
        self,
        teacher: Teacher,
        fingerprint: Callable[[], dict],
        *,
        directory: str | os.PathLike,
        kind: str,
        top_k: int,
        batch_size: int,
        device: torch.device,
        data: Mapping[str, Any] | None = None,
    ):
        self.teacher = teacher
        self.name, self.sha256, self.num_parameters = teacher.name, teacher.sha256, teacher.num_parameters
        self.directory = Path(directory)
        self.batch_size = batch_size
        facts = {
            "name": teacher.name,
            "sha256": teacher.sha256,
            "num_parameters": teacher.num_parameters,
            "device": device.type,
        }

        def begin() -> Header:
            views = fingerprint()
            if not 0 < views["classes"] <= MAX_CLASSES:
                raise UserError(
                    f"there are {views['classes']:,} classes; a record holds at most {MAX_CLASSES:,}: leave out "
                    "teacher_record"
                )
            kept = min(top_k, views["classes"]) if kind == "soft" else None
            return self._begin(Header(kind, kept, 0, facts, views, versions_here(), data=dict(data or {})))

        self.header = on_main_process(begin)
        Header.read(self.directory)  # on every rank, to check that all ranks share the file system
        warn_of_approximation(self.header)
        self._pending: list[tuple[int, int, Tensor]] = []  # outputs of this step: epoch, first position, logits
        self._open: tuple[int, int] | None = None  # epoch and file descriptor

    def _begin(self, header: Header) -> Header:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            entries = list(self.directory.iterdir())
            for entry in [entry for entry in entries if LEFTOVER.fullmatch(entry.name) and entry.is_file()]:
                if not entry.is_symlink():
                    entry.unlink()
                    entries.remove(entry)
            if links := [entry.name for entry in entries if entry.is_symlink()]:
                raise UserError(
                    f"teacher_record {str(self.directory)!r} holds the link {links[0]!r}, and the run would write "
                    "where the link points: remove the link, or choose another directory"
                )
            if not entries:
                header.write(self.directory)
                return header
        except OSError as error:
            raise self._unwritable(error) from error
        if not any(entry.name == HEADER for entry in entries):
            raise UserError(
                f"teacher_record {str(self.directory)!r} holds {entries[0].name!r} and no {HEADER}: choose a "
                "directory that is empty or does not exist"
            )
        found = Header.read(self.directory)
        if changes := differences(found.answers_of, header.answers_of):
            raise UserError(
                f"teacher_record {str(self.directory)!r} holds the record of another run: {changes}. Choose "
                "another directory, or restore these settings"
            )
        return found

    @property
    def classifier(self) -> Teacher:
        """The teacher itself."""
        return self.teacher

    def describe(self) -> str:
        """Return one line for the banner of a run."""
        return f"{self.teacher.describe()}, its {self.header.what} recorded in {self.directory}"

    def __call__(self, pixel_values: Tensor, view_ids: np.ndarray | None = None) -> Tensor:
        """Return the teacher's logits, float32 `(batch, classes)`, and record them if the step is healthy.

        Args:
            pixel_values: normalised pixels, input of the teacher.
            view_ids: `(batch, 2)` int64, epoch and position of each view, on the host.
        """
        epoch, first = first_of_batch(view_ids, self.batch_size)
        logits = self.teacher(pixel_values)
        # A copy: a network may write its next output into the same memory.
        self._pending.append((epoch, first, logits.detach().clone()))
        return logits

    # Called by the Trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._pending = []  # drops the outputs of a step that failed
        if state.global_step > self.header.steps:
            raise UserError(
                f"this run resumes from step {state.global_step:,}, but teacher_record {str(self.directory)!r} holds "
                f"teacher outputs of the first {self.header.steps:,} steps only, so those between would be missing: "
                "record from the first step, in a new output_dir"
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Write the outputs of this step: the trainer has just waited for the device, so reading costs no time."""
        self._write_pending()

    def on_train_end(self, args, state, control, **kwargs):
        self.commit(state.global_step)

    # Called by DistillationTrainer

    def commit(self, steps: int) -> None:
        """Flush the recorded outputs of all ranks to the disk, then set `steps` in record.json.

        Every rank calls this at the same step.

        Raises:
            ValueError: the record could not be written.
        """
        self._write_pending()
        self._close()
        PartialState().wait_for_everyone()
        self.header = replace(self.header, steps=max(steps, self.header.steps))
        if PartialState().is_main_process:
            try:
                self.header.write(self.directory)
            except OSError as error:
                raise self._unwritable(error) from error

    def _write_pending(self) -> None:
        for epoch, first, logits in self._pending:
            rows = self._rows(logits)
            try:
                # No memory mapping: if two hosts wrote to the same page, the rows of one would be lost.
                file, check = self._descriptor(epoch), checksum(epoch, first, rows)
                written = os.pwrite(file, rows.tobytes(), first * rows.itemsize)
                written += os.pwrite(file, check, self.header.place_of_checksum(first))
            except OSError as error:
                raise self._unwritable(error) from error
            if written != rows.nbytes + len(check):
                raise self._unwritable(f"only {written} of {rows.nbytes + len(check)} bytes were written")
        self._pending = []

    def _rows(self, logits: Tensor) -> np.ndarray:
        rows = np.zeros(len(logits), self.header.dtype)
        rows["decision"] = logits.argmax(dim=1).cpu().numpy() + 1
        if self.header.kind == "soft" and self.header.keeps_all_logits:
            rows["logits"] = logits.cpu().numpy()
        elif self.header.top_k is not None:
            largest, classes = logits.topk(self.header.top_k, dim=1)
            rest = logits.scatter(1, classes, -math.inf).logsumexp(dim=1)
            for name, values in {"classes": classes, "logits": largest, "rest": rest}.items():
                rows[name] = values.cpu().numpy()
        return rows

    def _descriptor(self, epoch: int) -> int:
        if self._open is None or self._open[0] != epoch:
            self._close()
            path = answers_file(self.directory, epoch)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            self._open = epoch, descriptor
            found, expected = os.fstat(descriptor), self.header.bytes_per_epoch
            if not stat.S_ISREG(found.st_mode) or found.st_size not in (0, expected):
                raise UserError(
                    f"{str(path)!r} has {found.st_size:,} bytes, expected {expected:,}: the file is damaged. Delete "
                    "the directory and record anew"
                )
            os.ftruncate(descriptor, expected)  # every rank sets the same size
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            descriptor, self._open = self._open[1], None
            try:
                os.fsync(descriptor)
                flush(self.directory)
            except OSError as error:
                raise self._unwritable(error) from error
            finally:
                os.close(descriptor)

    def _unwritable(self, error: OSError | str) -> UserError:
        return UserError(
            f"teacher_record {str(self.directory)!r} cannot be written ({getattr(error, 'strerror', None) or error}): "
            "free some space or choose another directory, then start the same command again"
        )
