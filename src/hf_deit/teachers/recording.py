"""A teacher whose outputs are written down while a run trains."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback

from ..durable import flush
from ..errors import UserError
from ..processes import by_one_process
from .record import (
    HEADER,
    MAX_CLASSES,
    Header,
    answers_file,
    differences,
    first_of_batch,
    versions_here,
    warn_of_approximation,
)
from .teacher import Teacher


class RecordingTeacher(TrainerCallback):
    """A teacher whose answers are written down as they are given; every rank writes its own.

    The directory is made, or gone on with where it holds the same record: an interrupted run that resumes writes the
    same answers again. [`commit`][RecordingTeacher.commit] puts them on the disk; [`DistillationTrainer`] calls it
    before each checkpoint.

    Args:
        teacher: the one whose outputs are recorded.
        fingerprint: makes that of the run (see [`fingerprint_of_views`]); called on one process.
        directory: of the record, on a file system that all ranks share.
        kind: "hard" or "soft", the distillation type.
        top_k: of "soft", how many logits of a view are kept.
        batch_size: views in a batch of one device.
        device: where the teacher runs, which the precision of its outputs depends on.

    Raises:
        ValueError: the directory holds a record of something else, other files or links, or cannot be written; there
            are more than 65,535 classes; when training starts, the run goes on from a step the record has not
            reached.
    """

    replays = None

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
            asked = fingerprint()
            if not 0 < asked["classes"] <= MAX_CLASSES:
                raise UserError(f"there are {asked['classes']:,} classes; a record holds at most {MAX_CLASSES:,}")
            kept = min(top_k, asked["classes"]) if kind == "soft" else None
            return self._begin(Header(kind, kept, 0, facts, asked, versions_here()))

        self.header = by_one_process(begin)
        Header.read(self.directory)  # by every rank: is it there?
        warn_of_approximation(self.header)
        self._asked: list[tuple[int, int, Tensor]] = []  # of this step: epoch, first position, logits
        self._open: tuple[int, int] | None = None  # epoch and file descriptor

    def _begin(self, header: Header) -> Header:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            entries = list(self.directory.iterdir())
            if links := [entry.name for entry in entries if entry.is_symlink()]:
                raise UserError(
                    f"teacher_record {str(self.directory)!r} holds the link {links[0]!r}, and a run would write where "
                    "it points: remove it, or choose another directory"
                )
            if not entries:
                header.write(self.directory)
                return header
        except OSError as error:
            raise self._unwritable(error) from error
        if not any(entry.name == HEADER for entry in entries):
            raise UserError(
                f"teacher_record {str(self.directory)!r} holds {entries[0].name!r} and no {HEADER}: choose a "
                "directory that is empty or not there"
            )
        found = Header.read(self.directory)
        if changes := differences(found.answers_of, header.answers_of):
            raise UserError(
                f"teacher_record {str(self.directory)!r} holds the record of another run: {changes}. Choose "
                "another directory, or set these as they were"
            )
        return found

    @property
    def classifier(self) -> Teacher:
        """The teacher itself."""
        return self.teacher

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self.teacher.describe()}, its {self.header.what} recorded in {self.directory}"

    def __call__(self, pixel_values: Tensor, view_ids: np.ndarray | None = None) -> Tensor:
        """The teacher's logits, float32 `(batch, classes)`; they are written when the step is found to be good.

        Args:
            pixel_values: what the teacher reads.
            view_ids: `(batch, 2)` int64, epoch and position of each view, on the host.
        """
        epoch, first = first_of_batch(view_ids, self.batch_size)
        logits = self.teacher(pixel_values)
        self._asked.append((epoch, first, logits))
        return logits

    # What the Trainer calls

    def on_train_begin(self, args, state, control, **kwargs):
        self._asked = []  # of a step that failed
        if state.global_step > self.header.steps:
            raise UserError(
                f"this run goes on from step {state.global_step:,}, and teacher_record {str(self.directory)!r} has "
                f"the answers of the first {self.header.steps:,} only: those between would be missing. Record from "
                "the start, in an output_dir of its own"
            )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Here the trainer has just waited for the device, so that reading from it costs no time."""
        self._write_asked()

    def on_train_end(self, args, state, control, **kwargs):
        self.commit(state.global_step)

    # What the trainer of this package calls

    def commit(self, steps: int) -> None:
        """What was recorded is on the disk, on all ranks, and then record.json says that `steps` are.

        Called by every rank at the same step.

        Raises:
            ValueError: it could not be written.
        """
        self._write_asked()
        self._close()
        PartialState().wait_for_everyone()
        self.header = replace(self.header, steps=max(steps, self.header.steps))
        if PartialState().is_main_process:
            try:
                self.header.write(self.directory)
            except OSError as error:
                raise self._unwritable(error) from error

    def _write_asked(self) -> None:
        for epoch, first, logits in self._asked:
            rows = self._rows(logits)
            try:
                # Not through mapped memory: of a page that two hosts write, one half would be lost.
                written = os.pwrite(self._descriptor(epoch), rows.tobytes(), first * rows.itemsize)
            except OSError as error:
                raise self._unwritable(error) from error
            if written != rows.nbytes:
                raise self._unwritable(f"{written} of {rows.nbytes} bytes were taken")
        self._asked = []

    def _rows(self, logits: Tensor) -> np.ndarray:
        rows = np.zeros(len(logits), self.header.dtype)
        rows["decision"] = logits.argmax(dim=1).cpu().numpy() + 1
        if self.header.kind == "soft" and self.header.keeps_all_logits:
            rows["logits"] = logits.cpu().numpy()
        elif self.header.kind == "soft":
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
            found, expected = os.fstat(descriptor), self.header.views_per_epoch * self.header.dtype.itemsize
            if not stat.S_ISREG(found.st_mode) or found.st_size not in (0, expected):
                raise UserError(
                    f"{str(path)!r} has {found.st_size:,} bytes, expected {expected:,}: it is damaged. Delete the "
                    "directory and record anew"
                )
            os.ftruncate(descriptor, expected)  # by each rank, to the same size
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
