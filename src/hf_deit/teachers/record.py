"""Ask the teacher once: its answers to every view of a run, written down, and replayed to further students.

A view is a pure function of (seed, epoch, position), and what becomes of it on the device one of its batch, so the
teacher's answer belongs to (epoch, position) and needs no teacher a second time. A record is a directory:
`record.json` says what it was asked about, `answers-<epoch>.bin` has one row of fixed size for each position of an
epoch:

    hard            class + 1 (2 bytes; 300 epochs of ImageNet's 1.28M views: 0.8 GB)
    soft            the same, then all logits as float32; what is replayed is what was recorded, bit for bit
    soft, k largest the same, then k classes (2 bytes), their logits (float32), and the log of the sum of the
                    exponentials of the other logits (float32): 6 k + 6 bytes

A row of zeros is a view nobody has asked about, so a file can be laid out in full (and takes no room until it is
filled) before its rows come in any order, from any rank.

**The k largest logits are an approximation.** The probability they leave, at temperature 1, is spread evenly over the
other classes; at the higher temperatures of eq. 2 these then have more of it than the teacher gave them.

Everything the answers depend on is compared before a row is used; any difference is refused by name. Not compared: the
versions of libraries, which get a warning, and damage to images since. A record holds numbers and JSON, no code.

Source: no peer has it whole. Shen and Xing 2021 (arXiv 2112.01528) and Wu et al. 2022 (TinyViT, arXiv 2207.10666)
store the largest of a teacher's probabilities, per crop and per seed of a view.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from .. import __version__
from ..durable import flush
from ..errors import UserError


logger = logging.getLogger(__name__)

FORMAT = 1
HEADER = "record.json"
MAX_HEADER_BYTES = 1 << 20
MAX_CLASSES = 2**16 - 1  # class + 1 in two bytes
# Libraries whose versions may change a pixel by a level.
LIBRARIES = ("Pillow", "torch", "albumentations", "opencv-python-headless", "opencv-python", "simplejpeg")


# --- what the answers depend on --------------------------------------------------------------------------------------


def versions_here() -> dict[str, str]:
    """Versions of hf_deit and of the libraries that may change a pixel by a level, and the GPU."""
    versions = {"hf_deit": __version__}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["GPU"] = torch.cuda.get_device_name()
    return versions


# --- the directory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What record.json says.

    Attributes:
        kind: "hard" or "soft".
        top_k: logits kept of a view; None for "hard".
        steps: every view of the optimiser steps before this number is recorded.
        teacher: `name`, `sha256`, `num_parameters` and the `device` it answered on.
        fingerprint: see [`fingerprint_of_views`].
        versions: by library.
    """

    kind: str
    top_k: int | None
    steps: int
    teacher: dict[str, Any]
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT

    @classmethod
    def read(cls, directory: Path) -> Header:
        """Checks types and ranges: the file may come from a stranger.

        Raises:
            ValueError: there is none, it cannot be read, or another version wrote it.
        """
        path = directory / HEADER
        try:
            with path.open("rb") as file:
                found = json.loads(file.read(MAX_HEADER_BYTES).decode())
            if found["format"] != FORMAT:
                raise UserError(
                    f"it is of format {found['format']!r}, and this version of hf_deit knows {FORMAT}: record anew"
                )
            header = cls(**found)
            teacher = header.teacher
            good = header.kind in ("hard", "soft") and (header.top_k is None) == (header.kind == "hard")
            good &= header.top_k is None or (type(header.top_k) is int and 0 < header.top_k <= MAX_CLASSES)
            good &= all(type(n) is int and 0 <= n < 2**63 for n in (header.steps, teacher["num_parameters"]))
            good &= isinstance(teacher["name"], str) and isinstance(teacher["device"], str)
            good &= re.fullmatch("[0-9a-f]{16}", teacher["sha256"]) is not None
            good &= isinstance(header.fingerprint, dict) and isinstance(header.versions, dict)
        except FileNotFoundError as error:
            raise UserError(
                f"{str(directory)!r} holds no {HEADER}: it is no record of a teacher's answers, which teacher_record "
                "makes, or not on a file system that all processes share"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{str(path)!r} cannot be read: {error}") from error
        if not good:
            raise UserError(f"{str(path)!r} is damaged: kind, top_k, steps or teacher are not what is written there")
        return header

    def write(self, directory: Path) -> None:
        """Whole or not at all, and on the disk."""
        descriptor, aside = tempfile.mkstemp(prefix=HEADER, dir=directory)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(descriptor)
        os.chmod(aside, 0o644)  # of a temporary file nobody else may read
        os.replace(aside, directory / HEADER)
        flush(directory)

    @property
    def answers_of(self) -> dict[str, object]:
        """Who was asked what: the same answers come of the same."""
        teacher = {f"the teacher's {name}": self.teacher[name] for name in ("sha256", "device")}
        return {"kind": self.kind, "top_k": self.top_k} | teacher | self.fingerprint

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.fingerprint["images"] // self.fingerprint["views of a step"])  # 0: refused by the trainer

    @property
    def views_per_epoch(self) -> int:
        return self.steps_per_epoch * self.fingerprint["views of a step"]

    @property
    def dtype(self) -> np.dtype:
        """Of one row; see the head of this file."""
        columns = [("decision", "<u2")]
        if self.kind == "soft" and self.keeps_all_logits:
            columns += [("logits", "<f4", (self.top_k,))]
        elif self.kind == "soft":
            columns += [("classes", "<u2", (self.top_k,)), ("logits", "<f4", (self.top_k,)), ("rest", "<f4")]
        return np.dtype(columns)

    @property
    def keeps_all_logits(self) -> bool:
        return self.top_k == self.fingerprint["classes"]

    @property
    def what(self) -> str:
        """What is recorded, in words."""
        if self.kind == "hard":
            return "decisions"
        return "logits" if self.keeps_all_logits else f"{self.top_k} largest logits"

    def epochs(self, steps: int) -> str:
        return f"{steps:,} steps = {steps / self.steps_per_epoch:.4g} epochs"


def is_recorded(directory: str | os.PathLike, epochs: float) -> bool:
    """Whether a record lies there that is as long as a run of so many epochs.

    Raises:
        ValueError: record.json is damaged, or of another version.
    """
    if not Path(directory, HEADER).exists():
        return False
    header = Header.read(Path(directory))
    return header.steps >= math.ceil(epochs * header.steps_per_epoch)


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Each field that is another one now, with both values."""
    return "; ".join(
        f"{name} is {now.get(name)!r}, recorded with {before.get(name)!r}"
        for name in {**now, **before}
        if now.get(name) != before.get(name)
    )


def answers_file(directory: Path, epoch: int) -> Path:
    """The file of one epoch's rows."""
    return directory / f"answers-{epoch:05d}.bin"


def warn(message: str, *values: object) -> None:
    """Log a warning once, not once a rank."""
    if PartialState().is_main_process:
        logger.warning(message, *values)


def warn_of_approximation(header: Header) -> None:
    """Say that the record keeps fewer than all logits, where it does."""
    if header.kind == "soft" and not header.keeps_all_logits:
        warn(
            "the teacher's answers are kept as their %d largest logits of %d: the rest of the probability, at "
            "temperature 1, is taken to be spread evenly over the other classes, which is an approximation "
            "(teacher_top_k: %d for the logits themselves)",
            *(header.top_k, header.fingerprint["classes"], header.fingerprint["classes"]),
        )


def first_of_batch(view_ids: np.ndarray | None, batch_size: int) -> tuple[int, int]:
    """Epoch and first position of a batch, whose views must be those that the fingerprint's layout says."""
    if view_ids is None:
        raise UserError(
            "the batch has no view_ids, so nobody knows which answers are its own: collate TrainViews with "
            "collate_views, or leave out teacher_record and teacher_replay"
        )
    (epoch, first), count = view_ids[0].tolist(), len(view_ids)
    in_a_row = (view_ids == np.stack([np.full(count, epoch), np.arange(first, first + count)], axis=1)).all()
    if count != batch_size or first % batch_size or not in_a_row:
        raise UserError(
            f"a batch of {count} views begins at position {first} of epoch {epoch}; expected {batch_size} views in a "
            f"row from a multiple of {batch_size}, as the trainer's own loader deals them out (split_batches: false)"
        )
    return epoch, first


# --- recording -------------------------------------------------------------------------------------------------------


# --- replaying -------------------------------------------------------------------------------------------------------
