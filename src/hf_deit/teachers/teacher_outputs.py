"""The contract of what teaches a student: a network, a network that is recorded, or a record alone."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from .teacher import Teacher


class TeacherOutputs(Protocol):
    """What the trainer needs of what teaches a student: a [`Teacher`], one that is recorded, or a record alone.

    Attributes:
        name: of the teacher.
        sha256: fingerprint of its weights, 16 hexadecimal digits.
        num_parameters: of its networks together.
        classifier: the network, where it is in memory; its accuracy is that of this.
        replays: what is replayed from a record, in words; None where the network itself is run.
        record_on_hub: name and commit of the record on the Hub that is replayed; None for any other.
    """

    name: str
    sha256: str
    num_parameters: int
    replays: str | None
    record_on_hub: str | None

    @property
    def classifier(self) -> Teacher | None: ...

    def __call__(self, pixel_values: Tensor, view_ids: np.ndarray | None = None) -> Tensor:
        """Logits `(batch, classes)` float32 in the student's order; from a record also decisions `(batch,)` int64.

        Args:
            pixel_values: float `(batch, 3, height, width)`, normalised with the student's mean and std.
            view_ids: `(batch, 2)` int64, epoch and position of each view, on the host.
        """
        ...

    def commit(self, steps: int) -> None:
        """Make sure that everything up to this optimiser step is on the disk; the trainer calls it on every rank."""
        ...

    def describe(self) -> str:
        """One line for the start of a run."""
        ...
