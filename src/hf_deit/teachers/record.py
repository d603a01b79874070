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

import hashlib
import json
import logging
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback

from .. import __version__
from ..data.views import TrainViews
from ..processes import by_one_process
from ..training.checkpoints import flush
from ..training.distillation_config import DistillationConfig
from .teacher import Teacher


logger = logging.getLogger(__name__)

FORMAT = 1
HEADER = "record.json"
MAX_HEADER_BYTES = 1 << 20
MAX_CLASSES = 2**16 - 1  # class + 1 in two bytes
# Images whose bytes are part of the fingerprint, spread evenly over the set.
SAMPLED_IMAGES = 8
# Libraries whose versions may change a pixel by a level.
LIBRARIES = ("Pillow", "torch", "albumentations", "opencv-python-headless", "opencv-python", "simplejpeg")


# --- what the answers depend on --------------------------------------------------------------------------------------


def fingerprint_of_run(
    args: DistillationConfig,
    views: TrainViews,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str],
) -> dict[str, object]:
    """All that decides which pixels the teacher sees at which position, by name; values are JSON.

    Fields of [`DistillationConfig`] stand under their own names. The layout of a batch is its views per device and per
    step: how many ranks and accumulated batches make up a step changes no answer. Where the images lie is no part of
    it, nor is what only the student meets (loss, label smoothing, learning rate, length of the run).

    Raises:
        ValueError: the training set is no [`TrainViews`].
    """
    if not isinstance(views, TrainViews):
        raise ValueError(
            f"the training set is a {type(views).__name__}, and a teacher's answers can be recorded and replayed for "
            "TrainViews only: other sets don't say which view of the run an example is"
        )
    names = ("auto_augment", "color_jitter", "horizontal_flip", "random_crop", "min_crop_scale", "num_repeats")
    fingerprint = {
        "images": len(views),
        "labels and sampled images": fingerprint_of_images(views.images),
        "classes": len(class_names),
        "class names": _digest(json.dumps(list(class_names)).encode()),
        "view_seed": args.view_seed,
        "seed of the views": views.seed,
        "shuffle_buffer_size": args.shuffle_buffer_size,
        "blocks of a stream": views.block_sizes and _digest(json.dumps(views.block_sizes).encode()),
        "views of a device's batch": args.train_batch_size,
        "views of a step": args.effective_batch_size,
        "mean": mean,
        "std": std,
        # Rectangles are filled by the device's own generator.
        "noise of erasing": args.device.type if args.random_erasing_prob else None,
    }
    fingerprint |= {name: getattr(args, name) for name in names} | args.mixing_options()
    if is_dataclass(views.transform):
        parameters = {
            f"transform.{item.name}": getattr(views.transform, item.name) for item in fields(views.transform)
        }
    else:
        parameters = {"transform": views.transform}
    fingerprint |= {name: _shown(value) for name, value in parameters.items()}
    return json.loads(json.dumps(fingerprint))


def fingerprint_of_images(images: Sequence[Mapping]) -> str:
    """16 hexadecimal digits of the labels and of the encoded bytes of 8 images, wherever these lie.

    Of a stream, whose labels would have to be fetched, only the labels of the eight.
    """
    is_stream = hasattr(images, "block_sizes")
    if is_stream:
        images, labels = images.take(len(images)), []  # a copy: the blocks that are read here are not kept
    elif hasattr(images, "with_format"):
        labels = images.with_format("numpy")["label"][:]
    else:
        labels = [row["label"] for row in images] if isinstance(images, (list, tuple)) else []
    digest = hashlib.sha256(np.asarray(labels, "<i8").tobytes())
    sample = sorted(set(np.linspace(0, len(images) - 1, SAMPLED_IMAGES).astype(int).tolist()))
    for row in images.__getitems__(sample) if is_stream else [images[index] for index in sample]:
        digest.update(str(row["label"]).encode())
        digest.update(hashlib.sha256(_encoded(row["image"] or {})).digest())
    return digest.hexdigest()[:16]


def _shown(value: object) -> object:
    """What stands in record.json for a parameter of the transform."""
    if isinstance(value, (int, float, str)):
        return value
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return text if len(text) <= 80 else f"{text[:60]}... ({_digest(text.encode())})"


def _encoded(image: Mapping) -> bytes:
    if image.get("bytes") is not None or image.get("path") is None:
        return image.get("bytes") or b""
    try:
        return Path(image["path"]).read_bytes()
    except OSError:  # a damaged image, whose neighbour is shown
        return b""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _versions() -> dict[str, str]:
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
        fingerprint: see [`fingerprint_of_run`].
        versions: by library.
    """

    kind: str
    top_k: int | None
    steps: int
    teacher: dict[str, object]
    fingerprint: dict[str, object]
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
                raise ValueError(
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
            raise ValueError(
                f"{str(directory)!r} holds no {HEADER}: it is no record of a teacher's answers, which teacher_record "
                "makes, or not on a file system that all processes share"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
        if not good:
            raise ValueError(f"{str(path)!r} is damaged: kind, top_k, steps or teacher are not what is written there")
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


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Each field that is another one now, with both values."""
    return "; ".join(
        f"{name} is {now.get(name)!r}, recorded with {before.get(name)!r}"
        for name in {**now, **before}
        if now.get(name) != before.get(name)
    )


def _answers_file(directory: Path, epoch: int) -> Path:
    return directory / f"answers-{epoch:05d}.bin"


def _warn(message: str, *values: object) -> None:
    if PartialState().is_main_process:
        logger.warning(message, *values)


def _warn_of_approximation(header: Header) -> None:
    if header.kind == "soft" and not header.keeps_all_logits:
        _warn(
            "the teacher's answers are kept as their %d largest logits of %d: the rest of the probability, at "
            "temperature 1, is taken to be spread evenly over the other classes, which is an approximation "
            "(teacher_top_k: %d for the logits themselves)",
            *(header.top_k, header.fingerprint["classes"], header.fingerprint["classes"]),
        )


def _first_of_batch(view_ids: np.ndarray | None, batch_size: int) -> tuple[int, int]:
    """Epoch and first position of a batch, whose views must be those that the fingerprint's layout says."""
    if view_ids is None:
        raise ValueError(
            "the batch has no view_ids, so nobody knows which answers are its own: collate TrainViews with "
            "collate_views, or leave out teacher_record and teacher_replay"
        )
    (epoch, first), count = view_ids[0].tolist(), len(view_ids)
    in_a_row = (view_ids == np.stack([np.full(count, epoch), np.arange(first, first + count)], axis=1)).all()
    if count != batch_size or first % batch_size or not in_a_row:
        raise ValueError(
            f"a batch of {count} views begins at position {first} of epoch {epoch}; expected {batch_size} views in a "
            f"row from a multiple of {batch_size}, as the trainer's own loader deals them out (split_batches: false)"
        )
    return epoch, first


# --- recording -------------------------------------------------------------------------------------------------------


class RecordingTeacher(TrainerCallback):
    """A teacher whose answers are written down as they are given; every rank writes its own.

    The directory is made, or gone on with where it holds the same record: an interrupted run that resumes writes the
    same answers again. [`commit`][RecordingTeacher.commit] puts them on the disk; [`DistillationTrainer`] calls it
    before each checkpoint.

    Args:
        teacher: the one that is asked.
        args: `teacher_record` is the directory, on a file system that all ranks share.
        fingerprint: makes that of the run; called on one process.

    Raises:
        ValueError: the directory holds a record of something else, other files or links, or cannot be written; there
            are more than 65,535 classes; when training starts, the run goes on from a step the record has not
            reached.
    """

    def __init__(self, teacher: Teacher, args: DistillationConfig, fingerprint: Callable[[], dict]):
        self.teacher = teacher
        self.directory = Path(args.teacher_record)
        self.batch_size = args.train_batch_size
        facts = {
            **{name: getattr(teacher, name) for name in ("name", "sha256", "num_parameters")},
            "device": args.device.type,  # which the precision of its answers depends on
        }

        def begin() -> Header:
            asked = fingerprint()
            if not 0 < asked["classes"] <= MAX_CLASSES:
                raise ValueError(f"there are {asked['classes']:,} classes; a record holds at most {MAX_CLASSES:,}")
            top_k = min(args.teacher_top_k, asked["classes"]) if args.distillation_type == "soft" else None
            return self._begin(Header(args.distillation_type, top_k, 0, facts, asked, _versions()))

        self.header = by_one_process(begin)
        Header.read(self.directory)  # by every rank: is it there?
        _warn_of_approximation(self.header)
        self._asked: list[tuple[int, int, Tensor]] = []  # of this step: epoch, first position, logits
        self._open: tuple[int, int] | None = None  # epoch and file descriptor

    def _begin(self, header: Header) -> Header:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            entries = list(self.directory.iterdir())
            if links := [entry.name for entry in entries if entry.is_symlink()]:
                raise ValueError(
                    f"teacher_record {str(self.directory)!r} holds the link {links[0]!r}, and a run would write where "
                    "it points: remove it, or choose another directory"
                )
            if not entries:
                header.write(self.directory)
                return header
        except OSError as error:
            raise self._unwritable(error) from error
        if not any(entry.name == HEADER for entry in entries):
            raise ValueError(
                f"teacher_record {str(self.directory)!r} holds {entries[0].name!r} and no {HEADER}: choose a "
                "directory that is empty or not there"
            )
        found = Header.read(self.directory)
        if differences := _differences(found.answers_of, header.answers_of):
            raise ValueError(
                f"teacher_record {str(self.directory)!r} holds the record of another run: {differences}. Choose "
                "another directory, or set these as they were"
            )
        return found

    def __call__(self, pixel_values: Tensor, view_ids: np.ndarray | None) -> Tensor:
        """The teacher's logits, float32 `(batch, classes)`; they are written when the step is found to be good.

        Args:
            pixel_values: what the teacher reads.
            view_ids: `(batch, 2)` int64, epoch and position of each view, on the host.
        """
        epoch, first = _first_of_batch(view_ids, self.batch_size)
        logits = self.teacher(pixel_values)
        self._asked.append((epoch, first, logits))
        return logits

    # What the Trainer calls

    def on_train_begin(self, args, state, control, **kwargs):
        self._asked = []  # of a step that failed
        if state.global_step > self.header.steps:
            raise ValueError(
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
            path = _answers_file(self.directory, epoch)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            self._open = epoch, descriptor
            found, expected = os.fstat(descriptor), self.header.views_per_epoch * self.header.dtype.itemsize
            if not stat.S_ISREG(found.st_mode) or found.st_size not in (0, expected):
                raise ValueError(
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

    def _unwritable(self, error: OSError | str) -> ValueError:
        return ValueError(
            f"teacher_record {str(self.directory)!r} cannot be written ({getattr(error, 'strerror', None) or error}): "
            "free some space or choose another directory, then start the same command again"
        )


# --- replaying -------------------------------------------------------------------------------------------------------


class ReplayedTeacher(TrainerCallback):
    """A record in the place of its teacher.

    Args:
        args: `teacher_replay` is the directory; `distillation_type` says what the loss needs.
        fingerprint: makes that of the run; called on one process.
        teacher: where it is there too, for its accuracy; then it must be the recorded one.

    Attributes:
        name: of the teacher that was recorded.
        sha256: of its weights.
        num_parameters: of it.
        what: what is replayed, in words.

    Raises:
        ValueError: there is no record, it is damaged, or of something else; "soft" is asked for and decisions were
            recorded; when training starts, the run is longer than the record.
    """

    def __init__(self, args: DistillationConfig, fingerprint: Callable[[], dict], teacher: Teacher | None = None):
        self.directory = Path(args.teacher_replay)
        self.batch_size = args.train_batch_size
        self.decides = args.distillation_type == "hard"
        self.header = by_one_process(lambda: self._open(fingerprint()))
        self.name = self.header.teacher["name"]
        self.sha256 = self.header.teacher["sha256"]
        self.num_parameters = self.header.teacher["num_parameters"]
        self.what = "decisions" if self.decides else self.header.what
        self._check_sizes()  # by every rank
        if not self.decides and self.header.kind == "hard":
            raise ValueError(
                f"distillation_type is 'soft' and teacher_replay {str(self.directory)!r} holds the teacher's "
                "decisions only: use 'hard', or record anew with distillation_type 'soft'"
            )
        if teacher is not None and teacher.sha256 != self.sha256:
            raise ValueError(
                f"teacher {teacher.name!r} has the weights {teacher.sha256}, and teacher_replay "
                f"{str(self.directory)!r} the answers of {self.name!r}, {self.sha256}: give that one, or leave it out"
            )
        if not self.decides:
            _warn_of_approximation(self.header)
        self._rows: tuple[int, np.ndarray] | None = None  # epoch and its file, in mapped memory

    def _open(self, fingerprint: dict) -> Header:
        header = Header.read(self.directory)
        if differences := _differences(header.fingerprint, fingerprint):
            raise ValueError(
                f"teacher_replay {str(self.directory)!r} holds answers to other views than this run's: {differences}. "
                "Set these as they were recorded, or record anew with teacher_record"
            )
        if header.kind == "soft" and header.top_k > fingerprint["classes"]:
            raise ValueError(f"{str(self.directory / HEADER)!r} is damaged: {header.top_k} logits of fewer classes")
        for library, here in _versions().items():
            if header.versions.get(library, here) != here:
                _warn(
                    "teacher_replay %r was recorded with %s %r, and here is %r: pixels may differ by a level from "
                    "those the teacher saw",
                    *(str(self.directory), library, header.versions[library], here),
                )
        return header

    def _check_sizes(self) -> None:
        header, expected = self.header, self.header.views_per_epoch * self.header.dtype.itemsize
        for epoch in range(-(-header.steps // header.steps_per_epoch)):
            path = _answers_file(self.directory, epoch)
            try:
                found = path.stat()
            except OSError as error:
                raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}): record anew") from error
            if not stat.S_ISREG(found.st_mode) or found.st_size != expected:
                raise ValueError(
                    f"{str(path)!r} has {found.st_size:,} bytes, expected {expected:,}: it is damaged. Copy it again, "
                    "or record anew"
                )

    def __call__(self, pixel_values: Tensor, view_ids: np.ndarray | None) -> Tensor:
        """What the teacher answered: int64 decisions `(batch,)` for "hard", float32 logits `(batch, classes)`.

        Args:
            pixel_values: not looked at; the answers go to its device.
            view_ids: `(batch, 2)` int64, epoch and position of each view, on the host.

        Raises:
            ValueError: a view was not recorded, or the file is damaged.
        """
        rows = self._read(*_first_of_batch(view_ids, self.batch_size))
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
            raise ValueError(
                f"this run takes {self.header.epochs(state.max_steps)}, and teacher_replay {str(self.directory)!r} "
                f"has the answers of {self.header.epochs(recorded)}: shorten this run, or let the recording one go on"
            )

    def _read(self, epoch: int, first: int) -> np.ndarray:
        if self._rows is None or self._rows[0] != epoch:
            try:
                mapped = np.memmap(
                    _answers_file(self.directory, epoch), self.header.dtype, "r", shape=self.header.views_per_epoch
                )
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"teacher_replay {str(self.directory)!r} has no answers of epoch {epoch} ({error}): let the run "
                    "that recorded go on, or shorten this one"
                ) from error
            self._rows = epoch, mapped
        rows = np.array(self._rows[1][first : first + self.batch_size])
        missing = np.flatnonzero(rows["decision"] == 0)
        if len(missing):
            raise ValueError(
                f"teacher_replay {str(self.directory)!r} has no answer for position {first + missing[0]} of epoch "
                f"{epoch}, which was never recorded: let the run that recorded go on, or shorten this one"
            )
        classes = self.header.fingerprint["classes"]
        if rows["decision"].max() > classes or ("classes" in rows.dtype.names and rows["classes"].max() >= classes):
            raise ValueError(
                f"{str(_answers_file(self.directory, epoch))!r} is damaged: from position {first} on it names a "
                f"class beyond the {classes}. Copy it again, or record anew"
            )
        return rows


def _to(device: torch.device, values: np.ndarray) -> Tensor:
    """Without waiting for what the device has still to do."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
