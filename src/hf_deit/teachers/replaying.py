"""Replaying: reads teacher outputs from a record instead of running the teacher."""

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
from ..processes import on_main_process
from .record import (
    CHECKSUM,
    HEADER,
    Header,
    answers_file,
    checksum,
    differences,
    first_of_batch,
    versions_here,
    warn,
    warn_of_approximation,
)
from .teacher import Teacher


class ReplayedTeacher(TrainerCallback):
    """Source of teacher outputs that reads a record instead of running the teacher.

    Args:
        fingerprint: returns the fingerprint of the run (see [`fingerprint_of_views`]); called on one process.
        directory: directory of the record.
        kind: "hard" or "soft", the distillation type.
        batch_size: views in a batch of one device.
        teacher: the recorded teacher, optional, to report its accuracy.

    Attributes:
        name: name of the recorded teacher.
        sha256: fingerprint of the teacher's weights.
        num_parameters: number of parameters of the teacher.
        replays: name of the replayed outputs, for messages.
        classifier: the teacher itself if given, else None; it is run in evaluations only.

    Raises:
        ValueError: the record is missing, damaged or of another run; `kind` is "soft" and the record holds decisions
            only; `teacher` is not the recorded one; when training starts, the run is longer than the record.
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
        self.header = on_main_process(lambda: self._open(fingerprint()))
        self.name = self.header.teacher["name"]
        self.sha256 = self.header.teacher["sha256"]
        self.num_parameters = self.header.teacher["num_parameters"]
        self.replays = "decisions" if self.decides else self.header.what
        self._check_sizes()  # on every rank
        if not self.decides and self.header.kind == "hard":
            raise UserError(
                f"distillation_type is 'soft', but teacher_replay {str(self.directory)!r} holds the teacher's "
                "decisions only: use 'hard', or record anew with distillation_type 'soft'"
            )
        if teacher is not None and teacher.sha256 != self.sha256:
            raise UserError(
                f"teacher {teacher.name!r} has the weights {teacher.sha256}, but teacher_replay "
                f"{str(self.directory)!r} holds outputs of {self.name!r} with the weights {self.sha256}: set teacher "
                "to the recorded one, or leave it out"
            )
        if not self.decides:
            warn_of_approximation(self.header)
        self._rows: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch; its rows and checksums, mapped

    def _open(self, fingerprint: dict) -> Header:
        header = Header.read(self.directory)
        if changes := differences(header.fingerprint, fingerprint):
            raise UserError(
                f"teacher_replay {str(self.directory)!r} holds teacher outputs for other views: {changes}. Use the "
                "recorded settings, or record anew with teacher_record"
            )
        if header.kind == "soft" and header.top_k > fingerprint["classes"]:
            raise UserError(
                f"{str(self.directory / HEADER)!r} is damaged: top_k is {header.top_k}, above the number of classes"
            )
        for library, here in versions_here().items():
            if header.versions.get(library, here) != here:
                warn(
                    "teacher_replay %r was recorded with %s %r, but this run uses %r: pixel values may differ by 1 of "
                    "255 from those that the teacher saw",
                    *(str(self.directory), library, header.versions[library], here),
                )
        return header

    def _check_sizes(self) -> None:
        header, expected = self.header, self.header.bytes_per_epoch
        for epoch in range(-(-header.steps // header.steps_per_epoch)):
            path = answers_file(self.directory, epoch)
            try:
                found = path.stat()
            except OSError as error:
                raise UserError(
                    f"{str(path)!r} cannot be read ({error.strerror}): copy the record again, or record anew"
                ) from error
            if not stat.S_ISREG(found.st_mode) or found.st_size != expected:
                raise UserError(
                    f"{str(path)!r} has {found.st_size:,} bytes, expected {expected:,}: the file is damaged. Copy "
                    "the record again, or record anew"
                )

    def commit(self, steps: int) -> None:
        """Do nothing, because nothing is recorded; see [`TeacherOutputs`]."""

    def describe(self) -> str:
        """Return one line for the banner of a run."""
        run = "not in memory" if self.classifier is None else "run in evaluations only"
        return f"{self.name}, its {self.replays} replayed from {self.directory}; {run}"

    def __call__(self, pixel_values: Tensor, view_ids: np.ndarray | None = None) -> Tensor:
        """Return the teacher outputs: int64 decisions `(batch,)` for "hard", else float32 logits `(batch, classes)`.

        Args:
            pixel_values: used only for its device, on which the outputs are returned.
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
                f"this run takes {self.header.epochs(state.max_steps)}, but teacher_replay {str(self.directory)!r} "
                f"holds {self.header.epochs(recorded)}: shorten this run, or resume the recording run"
            )

    def _read(self, epoch: int, first: int) -> np.ndarray:
        if self._rows is None or self._rows[0] != epoch:
            try:
                file, views = answers_file(self.directory, epoch), self.header.views_per_epoch
                mapped = np.memmap(file, self.header.dtype, "r", shape=views)
                checksums = np.memmap(file, CHECKSUM, "r", mapped.nbytes, shape=views // self.batch_size)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"teacher_replay {str(self.directory)!r} has no teacher outputs for epoch {epoch} ({error}): "
                    "resume the recording run, or shorten this run"
                ) from error
            self._rows = epoch, mapped, checksums
        rows = np.array(self._rows[1][first : first + self.batch_size])
        missing = np.flatnonzero(rows["decision"] == 0)
        if len(missing):
            raise UserError(
                f"teacher_replay {str(self.directory)!r} has no teacher outputs for position {first + missing[0]} of "
                f"epoch {epoch}: resume the recording run, or shorten this run"
            )
        if self._rows[2][first // self.batch_size].tobytes() != checksum(epoch, first, rows):
            raise UserError(
                f"{str(answers_file(self.directory, epoch))!r} is damaged: the checksum of positions {first} to "
                f"{first + self.batch_size - 1} of epoch {epoch} is another. Copy the record again, or record anew"
            )
        classes = self.header.fingerprint["classes"]
        if rows["decision"].max() > classes or (
            "classes" in (rows.dtype.names or ()) and rows["classes"].max() >= classes
        ):
            raise UserError(
                f"{str(answers_file(self.directory, epoch))!r} is damaged: a row from position {first} on has "
                f"a class above {classes - 1}. Copy the record again, or record anew"
            )
        return rows


def _to(device: torch.device, values: np.ndarray) -> Tensor:
    """Copy to the device without waiting for its pending work."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
