"""Replaying: reads teacher outputs from a record instead of running the teacher.

Not here: where the record lies, and how it gets onto this machine (record_source.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from ..errors import UserError
from ..processes import on_main_process
from .record import (
    HEADER,
    Header,
    damage_of,
    differences,
    first_of_batch,
    map_epoch,
    missing_in,
    versions_here,
    warn,
    warn_of_approximation,
)
from .record_source import LocalRecord, RecordSource, source_of
from .teacher import Teacher


class ReplayedTeacher(TrainerCallback):
    """Source of teacher outputs that reads a record instead of running the teacher.

    Args:
        fingerprint: returns the fingerprint of the run (see [`fingerprint_of_views`]); called on one process.
        record: directory of the record, or `owner/name` of one on the Hub, perhaps with `@<branch, tag or commit>`.
        kind: "hard" or "soft", the distillation type.
        batch_size: views in a batch of one device.
        teacher: the recorded teacher, optional, to report its accuracy.
        commit: commit of a record on the Hub that the run goes on with; by default that of the branch. Called on one
            process.

    Attributes:
        name: name of the recorded teacher.
        sha256: fingerprint of the teacher's weights.
        num_parameters: number of parameters of the teacher.
        replays: name of the replayed outputs, for messages.
        record_on_hub: name and commit of a record on the Hub; None for one in a directory.
        classifier: the teacher itself if given, else None; it is run in evaluations only.

    Raises:
        ValueError: the record is missing, damaged or of another run, or cannot be fetched; `kind` is "soft" and the
            record holds decisions only; `teacher` is not the recorded one; when training starts, the run is longer
            than the record.
    """

    def __init__(
        self,
        fingerprint: Callable[[], dict],
        *,
        record: str | os.PathLike,
        kind: str,
        batch_size: int,
        teacher: Teacher | None = None,
        commit: Callable[[str], str | None] = lambda record: None,
    ):
        self.classifier = teacher
        self.batch_size = batch_size
        self.decides = kind == "hard"

        def open_on_main() -> tuple[Header, str | None]:
            source = source_of(record, commit(str(record)))
            return self._open(source, fingerprint), source.commit

        self.header, found = on_main_process(open_on_main)
        self.source = source_of(record, found)
        self.record_on_hub = None if found is None else record_at(self.source.name, found)
        self.name = self.header.teacher["name"]
        self.sha256 = self.header.teacher["sha256"]
        self.num_parameters = self.header.teacher["num_parameters"]
        self.replays = "decisions" if self.decides else self.header.what
        if isinstance(self.source, LocalRecord):
            self.source.check_files(self.header)  # on every rank, to check that all ranks share the file system
        if not self.decides and self.header.kind == "hard":
            raise UserError(
                f"distillation_type is 'soft', but teacher_replay {self.source.shown!r} holds the teacher's "
                "decisions only: use 'hard', or record anew with distillation_type 'soft'"
            )
        if teacher is not None and teacher.sha256 != self.sha256:
            raise UserError(
                f"teacher {teacher.name!r} has the weights {teacher.sha256}, but teacher_replay "
                f"{self.source.shown!r} holds outputs of {self.name!r} with the weights {self.sha256}: set teacher "
                "to the recorded one, or leave it out"
            )
        if not self.decides:
            warn_of_approximation(self.header)
        self._rows: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch; its rows and checksums, mapped

    def _open(self, source: RecordSource, views: Callable[[], dict]) -> Header:
        header, fingerprint = source.header(), views()
        if changes := differences(header.fingerprint, fingerprint):
            raise UserError(
                f"teacher_replay {source.shown!r} holds teacher outputs for other views: {changes}. Use the "
                "recorded settings, or record anew with teacher_record"
            )
        if header.kind == "soft" and header.top_k > fingerprint["classes"]:
            raise UserError(
                f"{HEADER!r} of {source.shown} is damaged: top_k is {header.top_k}, above the number of classes"
            )
        for library, here in versions_here().items():
            if header.versions.get(library, here) != here:
                warn(
                    "teacher_replay %r was recorded with %s %r, but this run uses %r: pixel values may differ by 1 of "
                    "255 from those that the teacher saw",
                    *(source.shown, library, header.versions[library], here),
                )
        source.check_files(header)
        return header

    def commit(self, steps: int) -> None:
        """Do nothing, because nothing is recorded; see [`TeacherOutputs`]."""

    def describe(self) -> str:
        """Return one line for the banner of a run."""
        run = "not in memory" if self.classifier is None else "run in evaluations only"
        return f"{self.name}, its {self.replays} replayed from {self.source.shown}; {run}"

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
                f"this run takes {self.header.epochs(state.max_steps)}, but teacher_replay {self.source.shown!r} "
                f"holds {self.header.epochs(recorded)}: shorten this run, or resume the recording run"
            )
        if state.global_step >= state.max_steps:
            return
        first = state.global_step // self.header.steps_per_epoch
        self.source.begin(self.header, first, (state.max_steps - 1) // self.header.steps_per_epoch)
        if self.record_on_hub is not None:
            _on_each_host(lambda: self.source.file(first))

    def _read(self, epoch: int, first: int) -> np.ndarray:
        if self._rows is None or self._rows[0] != epoch:
            file = self.source.file(epoch)
            try:
                self._rows = epoch, *map_epoch(file, self.header)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"teacher_replay {self.source.shown!r} has no teacher outputs for epoch {epoch} ({error}): "
                    "resume the recording run, or shorten this run"
                ) from error
        _, mapped, checksums = self._rows
        rows = np.array(mapped[first : first + self.batch_size])
        if missing := missing_in(rows, epoch, first):
            raise UserError(
                f"teacher_replay {self.source.shown!r} has {missing}: resume the recording run, or shorten this run"
            )
        if damage := damage_of(rows, self.header, epoch, first, checksums[first // self.batch_size]):
            raise UserError(f"{str(self.source.file(epoch))!r} is damaged: {damage}. {self.source.advice}")
        return rows


def record_at(name: str, commit: str) -> str:
    """Return how a checkpoint names a record on the Hub, `owner/name[@revision]`, and the commit that is replayed."""
    return f"{name} at commit {commit}"


def _on_each_host(action: Callable[[], object]) -> None:
    """Run `action` on one process of each host, while the others wait; its [`UserError`] reaches every rank."""
    problem = None
    if PartialState().is_local_main_process:
        try:
            action()
        except UserError as error:
            problem = error
    problems = gather_object([problem])
    if error := next(filter(None, problems), None):
        error.said_by_main_process = not PartialState().is_main_process  # one line is enough
        raise error


def _to(device: torch.device, values: np.ndarray) -> Tensor:
    """Copy to the device without waiting for its pending work."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
