"""Record of teacher outputs: run the teacher once, store its outputs for every view, replay them to other students.

A view is a pure function of (seed, epoch, position), and mixing on the device is a pure function of the batch, so the
teacher outputs of a view are identified by (epoch, position). A record is a directory: `record.json` holds everything
the outputs depend on, and `answers-<epoch>.bin` has one row of fixed size for each position of an epoch:

    hard            class + 1 (2 bytes; 300 epochs of ImageNet's 1.28M views: 0.8 GB)
    soft            class + 1, then all logits as float32; the replayed logits equal the recorded ones bit for bit
    soft, k largest class + 1, then k classes (2 bytes), their logits (float32), and the log of the sum of the
                    exponentials of the other logits (float32): 6 k + 6 bytes

A row of zeros is a view that was not recorded, so a file can have its full size from the start (it takes no space
until rows are written), and rows can be written in any order, by any rank. After the rows of an epoch stand their
checksums, 8 bytes for each batch of a device: of a hash over epoch, position and rows. Every batch that is replayed is
verified: a record is read for weeks, and a flipped bit would train other weights without a word.

**The k largest logits are an approximation.** The remaining probability, at temperature 1, is spread evenly over the
other classes; at the higher temperatures of eq. 2 these classes then get more probability than the teacher gave them.

Everything the outputs depend on is compared before a row is used, and any difference is an error that names it. Not
compared: library versions, which only cause a warning, and images damaged later. A record holds numbers and JSON, no
code. Records of format 1 have no checksums and are refused.

Source: no other project does all of this. Shen and Xing 2021 (arXiv 2112.01528) and Wu et al. 2022 (TinyViT, arXiv
2207.10666) store the largest of a teacher's probabilities, per crop and per seed of a view.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import stat
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
from ..errors import UserError, printable
from ..files import MEBIBYTE, flush, read_file


logger = logging.getLogger(__name__)

FORMAT = 2
HEADER = "record.json"
CHECKSUM = np.dtype("V8")
LEFTOVER = re.compile(re.escape(HEADER) + r"\w+")  # of a header whose writing was killed
MAX_CLASSES = 2**16 - 1  # class + 1 is stored in two bytes
BATCH = "views of a device's batch"
_COUNTS = ("images", "classes", "views of a step", BATCH)
# Libraries whose versions may change a pixel value by 1 of 255.
LIBRARIES = ("Pillow", "torch", "albumentations", "opencv-python-headless", "opencv-python", "simplejpeg")


def versions_here() -> dict[str, str]:
    """Return the versions of hf_deit and of the libraries that may change a pixel value by 1 of 255, and the GPU."""
    versions = {"hf_deit": __version__}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["GPU"] = torch.cuda.get_device_name()
    return versions


@dataclass(frozen=True)
class Header:
    """Content of record.json.

    Attributes:
        kind: "hard" or "soft".
        top_k: number of logits kept per view; None for "hard".
        steps: number of optimizer steps, from the start of the run, whose views are all recorded.
        teacher: `name`, `sha256`, `num_parameters`, and the `device` that the teacher ran on.
        fingerprint: see [`fingerprint_of_views`].
        versions: version by library.
        data: keys of a recipe that name the images, with their values; not compared. None: not known.
    """

    kind: str
    top_k: int | None
    steps: int
    teacher: dict[str, Any]
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT
    data: dict[str, Any] | None = None

    @classmethod
    def read(cls, directory: Path) -> Header:
        """Read record.json and check types and ranges, because the file may come from a stranger.

        Raises:
            ValueError: record.json is missing, damaged, or of another format version.
        """
        path = directory / HEADER
        try:
            found = json.loads(read_file(path, MEBIBYTE).decode())
            if found["format"] != FORMAT:
                raise UserError(
                    f"its format is {found['format']!r}, and this version of hf_deit reads {FORMAT}: record anew"
                )
            header = cls(**found)
            teacher = header.teacher
            good = header.kind in ("hard", "soft") and (header.top_k is None) == (header.kind == "hard")
            good &= header.top_k is None or (type(header.top_k) is int and 0 < header.top_k <= MAX_CLASSES)
            good &= all(type(n) is int and 0 <= n < 2**63 for n in (header.steps, teacher["num_parameters"]))
            good &= isinstance(teacher["name"], str) and isinstance(teacher["device"], str)
            good &= re.fullmatch("[0-9a-f]{16}", teacher["sha256"]) is not None
            good &= isinstance(header.fingerprint, dict) and isinstance(header.versions, dict)
            good &= teacher["name"] == printable(teacher["name"])
            good &= all(type(n := header.fingerprint[name]) is int and 0 < n < 2**40 for name in _COUNTS)
            good &= header.data is None or all(map(_is_setting, header.data, header.data.values()))
        except FileNotFoundError as error:
            raise UserError(
                f"{str(directory)!r} holds no {HEADER}: name a directory that was written by teacher_record, on a "
                "file system that all processes share"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{str(path)!r} cannot be read: {printable(str(error))}") from error
        if not good:
            raise UserError(
                f"{str(path)!r} is damaged: a value of kind, top_k, steps, teacher, fingerprint, versions or data is "
                "out of range or of the wrong type. Copy the record again, or record anew"
            )
        return header

    def write(self, directory: Path) -> None:
        """Write record.json atomically, and flush it to the disk."""
        descriptor, aside = tempfile.mkstemp(prefix=HEADER, dir=directory)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(descriptor)
        os.chmod(aside, 0o644)  # temporary files are readable by their owner only
        os.replace(aside, directory / HEADER)
        flush(directory)

    @property
    def answers_of(self) -> dict[str, object]:
        """Everything the recorded outputs depend on: kind, top_k, teacher weights, device, fingerprint of views."""
        teacher = {f"the teacher's {name}": self.teacher[name] for name in ("sha256", "device")}
        return {"kind": self.kind, "top_k": self.top_k} | teacher | self.fingerprint

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.fingerprint["images"] // self.fingerprint["views of a step"])  # the trainer refuses 0

    @property
    def views_per_epoch(self) -> int:
        return self.steps_per_epoch * self.fingerprint["views of a step"]

    @property
    def num_epochs(self) -> int:
        """Number of files with answers: that of the epochs whose views are recorded, the last perhaps in part."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def bytes_per_epoch(self) -> int:
        """Size of the file of one epoch: its rows, then their checksums."""
        batches = self.views_per_epoch // self.fingerprint[BATCH]
        return self.views_per_epoch * self.dtype.itemsize + batches * CHECKSUM.itemsize

    def place_of_checksum(self, first: int) -> int:
        """Where in the file of an epoch the checksum of the batch from position `first` on stands."""
        batch = first // self.fingerprint[BATCH]
        return self.views_per_epoch * self.dtype.itemsize + batch * CHECKSUM.itemsize

    @property
    def dtype(self) -> np.dtype:
        """Layout of one row; see the module docstring."""
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
        """Name of the recorded outputs, for messages."""
        if self.kind == "hard":
            return "decisions"
        return "logits" if self.keeps_all_logits else f"{self.top_k} largest logits"

    def epochs(self, steps: int) -> str:
        return f"{steps:,} steps = {steps / self.steps_per_epoch:.4g} epochs"


def _is_setting(name: object, value: object) -> bool:
    """Whether both may stand in a recipe that is printed."""
    texts = [part for part in (name, value) if isinstance(part, str)]
    return (
        isinstance(name, str)
        and isinstance(value, (str, int, float, bool, type(None)))
        and (all(text == printable(text) and len(text) < 1000 for text in texts))
    )


def is_recorded(directory: str | os.PathLike, epochs: float) -> bool:
    """Return True if `directory` holds a record of at least `epochs` epochs.

    Raises:
        ValueError: record.json is damaged, or of another format version.
    """
    if not Path(directory, HEADER).exists():
        return False
    header = Header.read(Path(directory))
    return header.steps >= math.ceil(epochs * header.steps_per_epoch)


def checksum(epoch: int, first: int, rows: np.ndarray) -> bytes:
    """Return the checksum of the rows of one batch, which begins at position `first`."""
    return hashlib.blake2b(f"{epoch} {first} ".encode() + rows.tobytes(), digest_size=CHECKSUM.itemsize).digest()


def missing_in(rows: np.ndarray, epoch: int, first: int) -> str | None:
    """Say which of the views of a batch, which begins at position `first`, was not recorded; None: all were."""
    missing = np.flatnonzero(rows["decision"] == 0)
    return f"no teacher outputs for position {first + missing[0]} of epoch {epoch}" if len(missing) else None


def damage_of(rows: np.ndarray, header: Header, epoch: int, first: int, stored: np.void) -> str | None:
    """Say how the rows of a batch differ from what was recorded; None: they do not.

    Args:
        rows: of the batch, which begins at position `first`.
        stored: the checksum that stands in the file.
    """
    if stored.tobytes() != checksum(epoch, first, rows):
        return f"the checksum of positions {first} to {first + len(rows) - 1} of epoch {epoch} is another"
    classes = header.fingerprint["classes"]
    if rows["decision"].max() > classes or (
        "classes" in (rows.dtype.names or ()) and rows["classes"].max() >= classes
    ):
        return f"a row from position {first} on has a class above {classes - 1}"
    return None


def map_epoch(path: Path, header: Header) -> tuple[np.ndarray, np.ndarray]:
    """Map the file of one epoch into memory: its rows, and the checksum of each batch.

    Raises:
        OSError, ValueError: the file is missing, or has another size.
    """
    batches = header.views_per_epoch // header.fingerprint[BATCH]
    rows = np.memmap(path, header.dtype, "r", shape=header.views_per_epoch)
    return rows, np.memmap(path, CHECKSUM, "r", rows.nbytes, shape=batches)


def problem_in(path: Path, header: Header, epoch: int) -> str | None:
    """Read the recorded views of an epoch, and say what is wrong with the first bad batch; None: all are well.

    Raises:
        OSError, ValueError: the file is missing, or has another size.
    """
    size, (rows, checksums) = header.fingerprint[BATCH], map_epoch(path, header)
    views = (header.steps - epoch * header.steps_per_epoch) * header.fingerprint["views of a step"]
    for number in range(min(views // size, len(checksums))):
        first = number * size
        batch = np.array(rows[first : first + size])
        if problem := missing_in(batch, epoch, first) or damage_of(batch, header, epoch, first, checksums[number]):
            return problem
    return None


def size_problem(path: Path, header: Header) -> str | None:
    """Say why a file cannot be the one of an epoch, from its type and size; None: it can."""
    try:
        found = path.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode) or found.st_size != header.bytes_per_epoch:
        return f"has {found.st_size:,} bytes, expected {header.bytes_per_epoch:,}: the file is damaged"
    return None


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Describe each field that differs, with both values."""
    return "; ".join(
        f"{name} is {now.get(name)!r}, recorded with {before.get(name)!r}"
        for name in {**now, **before}
        if now.get(name) != before.get(name)
    )


def answers_file(directory: Path, epoch: int) -> Path:
    """Return the path of the file with the rows of one epoch."""
    return directory / f"answers-{epoch:05d}.bin"


def warn(message: str, *values: object) -> None:
    """Log a warning on the main process only."""
    if PartialState().is_main_process:
        logger.warning(message, *values)


def warn_of_approximation(header: Header) -> None:
    """Warn if the record keeps only the largest logits."""
    if header.kind == "soft" and not header.keeps_all_logits:
        warn(
            "teacher outputs are approximated by the %d largest logits of %d: the remaining probability, at "
            "temperature 1, is spread evenly over the other classes; record with teacher_top_k: %d to keep all logits",
            *(header.top_k, header.fingerprint["classes"], header.fingerprint["classes"]),
        )


def first_of_batch(view_ids: np.ndarray | None, batch_size: int) -> tuple[int, int]:
    """Return the epoch and first position of a batch, after checking that its views are consecutive."""
    if view_ids is None:
        raise UserError(
            "the batch has no view_ids, which identify its teacher outputs: use TrainViews with collate_views, or "
            "leave out teacher_record and teacher_replay"
        )
    (epoch, first), count = view_ids[0].tolist(), len(view_ids)
    in_a_row = (view_ids == np.stack([np.full(count, epoch), np.arange(first, first + count)], axis=1)).all()
    if count != batch_size or first % batch_size or not in_a_row:
        raise UserError(
            f"a batch of {count} views begins at position {first} of epoch {epoch}; expected {batch_size} views in a "
            f"row from a multiple of {batch_size}: use the trainer's own data loader, with split_batches: false"
        )
    return epoch, first
