"""A record of teacher outputs in the place of the teacher."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import UserError
from ..processes import by_one_process
from .record import (
    HEADER,
    Header,
    answers_file,
    differences,
    first_of_batch,
    versions_here,
    warn,
    warn_of_approximation,
)
from .teacher import Teacher


class ReplayedTeacher(TrainerCallback):
    """A record in the place of its teacher.

    Args:
        fingerprint: makes that of the run (see [`fingerprint_of_views`]); called on one process.
        directory: of the record.
        kind: "hard" or "soft", what the loss needs.
        batch_size: views in a batch of one device.
        teacher: where it is there too, for its accuracy; then it must be the recorded one.

    Attributes:
        name: of the teacher that was recorded.
        sha256: of its weights.
        num_parameters: of it.
        replays: what is replayed, in words.
        classifier: the teacher itself, where it is in memory; it is run in evaluations only.

    Raises:
        ValueError: there is no record, it is damaged, or of something else; "soft" is asked for and decisions were
            recorded; when training starts, the run is longer than the record.
    """

    def __init__(
        self,
        fingerprint: Callable[[], dict],
        *,
        directory: str | os.PathLike,
        kind: str,
        batch_size: int,
        teacher: Teacher | None = None,
    ):
        self.directory = Path(directory)
        self.classifier = teacher
        self.batch_size = batch_size
        self.decides = kind == "hard"
        self.header = by_one_process(lambda: self._open(fingerprint()))
        self.name = self.header.teacher["name"]
        self.sha256 = self.header.teacher["sha256"]
        self.num_parameters = self.header.teacher["num_parameters"]
        self.replays = "decisions" if self.decides else self.header.what
        self._check_sizes()  # by every rank
        if not self.decides and self.header.kind == "hard":
            raise UserError(
                f"distillation_type is 'soft' and teacher_replay {str(self.directory)!r} holds the teacher's "
                "decisions only: use 'hard', or record anew with distillation_type 'soft'"
            )
        if teacher is not None and teacher.sha256 != self.sha256:
            raise UserError(
                f"teacher {teacher.name!r} has the weights {teacher.sha256}, and teacher_replay "
                f"{str(self.directory)!r} the answers of {self.name!r}, {self.sha256}: give that one, or leave it out"
            )
        if not self.decides:
            warn_of_approximation(self.header)
        self._rows: tuple[int, np.ndarray] | None = None  # epoch and its file, in mapped memory

    def _open(self, fingerprint: dict) -> Header:
        header = Header.read(self.directory)
        if changes := differences(header.fingerprint, fingerprint):
            raise UserError(
                f"teacher_replay {str(self.directory)!r} holds answers to other views than this run's: {changes}. "
                "Set these as they were recorded, or record anew with teacher_record"
            )
        if header.kind == "soft" and header.top_k > fingerprint["classes"]:
            raise UserError(f"{str(self.directory / HEADER)!r} is damaged: {header.top_k} logits of fewer classes")
        for library, here in versions_here().items():
            if header.versions.get(library, here) != here:
                warn(
                    "teacher_replay %r was recorded with %s %r, and here is %r: pixels may differ by a level from "
                    "those the teacher saw",
                    *(str(self.directory), library, header.versions[library], here),
                )
        return header

    def _check_sizes(self) -> None:
        header, expected = self.header, self.header.views_per_epoch * self.header.dtype.itemsize
        for epoch in range(-(-header.steps // header.steps_per_epoch)):
            path = answers_file(self.directory, epoch)
            try:
                found = path.stat()
            except OSError as error:
                raise UserError(f"{str(path)!r} cannot be read ({error.strerror}): record anew") from error
            if not stat.S_ISREG(found.st_mode) or found.st_size != expected:
                raise UserError(
                    f"{str(path)!r} has {found.st_size:,} bytes, expected {expected:,}: it is damaged. Copy it again, "
                    "or record anew"
                )

    def commit(self, steps: int) -> None:
        """Nothing is recorded; see [`TeacherOutputs`]."""

    def describe(self) -> str:
        """One line for the start of a run."""
        run = "not in memory" if self.classifier is None else "run in evaluations only"
        return f"{self.name}, its {self.replays} replayed from {self.directory}; {run}"

    def __call__(self, pixel_values: Tensor, view_ids: np.ndarray | None = None) -> Tensor:
        """What the teacher answered: int64 decisions `(batch,)` for "hard", float32 logits `(batch, classes)`.

        Args:
            pixel_values: not looked at; the answers go to its device.
            view_ids: `(batch, 2)` int64, epoch and position of each view, on the host.

        Raises:
            ValueError: a view was not recorded, or the file is damaged.
        """
        rows = self._read(*first_of_batch(view_ids, self.batch_size))
        device = pixel_values.device
        if self.decides:
            return _to(device, rows["decision"].astype(np.int64) - 1)
        logits = _to(device, np.ascontiguousarray(rows["logits"], np.float32))
        if self.header.keeps_all_logits:
            return logits
        num_classes = self.header.fingerprint["classes"]
        others = rows["rest"] - np.float32(math.log(num_classes - self.header.top_k))
        whole = _to(device, np.ascontiguousarray(others)).unsqueeze(1).repeat(1, num_classes)
        return whole.scatter_(1, _to(device, rows["classes"].astype(np.int64)), logits)

    def on_train_begin(self, args, state, control, **kwargs):
        recorded = self.header.steps
        if state.max_steps > recorded:
            raise UserError(
                f"this run takes {self.header.epochs(state.max_steps)}, and teacher_replay {str(self.directory)!r} "
                f"has the answers of {self.header.epochs(recorded)}: shorten this run, or let the recording one go on"
            )

    def _read(self, epoch: int, first: int) -> np.ndarray:
        if self._rows is None or self._rows[0] != epoch:
            try:
                mapped = np.memmap(
                    answers_file(self.directory, epoch), self.header.dtype, "r", shape=self.header.views_per_epoch
                )
            except (OSError, ValueError) as error:
                raise UserError(
                    f"teacher_replay {str(self.directory)!r} has no answers of epoch {epoch} ({error}): let the run "
                    "that recorded go on, or shorten this one"
                ) from error
            self._rows = epoch, mapped
        rows = np.array(self._rows[1][first : first + self.batch_size])
        missing = np.flatnonzero(rows["decision"] == 0)
        if len(missing):
            raise UserError(
                f"teacher_replay {str(self.directory)!r} has no answer for position {first + missing[0]} of epoch "
                f"{epoch}, which was never recorded: let the run that recorded go on, or shorten this one"
            )
        classes = self.header.fingerprint["classes"]
        if rows["decision"].max() > classes or ("classes" in rows.dtype.names and rows["classes"].max() >= classes):
            raise UserError(
                f"{str(answers_file(self.directory, epoch))!r} is damaged: from position {first} on it names a "
                f"class beyond the {classes}. Copy it again, or record anew"
            )
        return rows


def _to(device: torch.device, values: np.ndarray) -> Tensor:
    """Without waiting for what the device has still to do."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
