"""What was found when a dataset was loaded: one block for the screen, dataset.json, and lines for the model card.

The summary is cheap: labels are counted, the headers of a few images are read, and no image is decoded. What would
cost more (the contents of a stream, identical images among very many) is said to be not known.

Not here: finding and loading the images (loading.py, folders.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import some_of
from ..files import write_whole
from .decoding import FORMATS, path_of
from .folders import IMAGE_FOLDERS, UnreadFiles
from .labels import count_by_class
from .loading import LoadedImages


FILE_NAME = "dataset.json"
SAMPLE = 8  # images whose header is read
# Limits of the search for identical images: a look at the size of a file takes long on a network disk.
MAX_FILES_COMPARED = 20_000
MAX_ROWS_COMPARED = 200_000
MAX_BYTES_COMPARED = 256 << 20


@dataclass(frozen=True)
class PartSummary:
    """The images of one part.

    Attributes:
        splits: the source's own names of the splits, slices included.
        num_images: number of images.
        counts: images of each class, in the order of the classes; None if unknown (a stream, lists of labels).
    """

    splits: str
    num_images: int
    counts: tuple[int, ...] | None


@dataclass(frozen=True)
class DatasetSummary:
    """Facts about a loaded dataset.

    `str()` is the block for the screen; [`DatasetSummary.facts`] and [`DatasetSummary.sentences`] are for others to
    read and name no directory of this machine.

    Attributes:
        name: the dataset, as it was asked for.
        place: absolute directory, or a page.
        layout: how the images are stored, in a few words.
        class_names: names of all classes, in the order of their numbers.
        parts: by "train" and "eval".
        sample: width, height (pixels) and mode of a few images; None if unknown (a stream).
        unread: files of image folders that are not read; None for other layouts, whose other files are not listed.
        held_out: number of images that were held out of the training images, and of how many; None for other splits.
        trained_on: evaluation images that are training images too, because the splits overlap.
        identical: evaluation images whose file is identical to that of a training image; None if unknown.
        empty_files: image files without content, among those whose size was looked at.
    """

    name: str
    place: str
    layout: str
    class_names: tuple[str, ...]
    parts: dict[str, PartSummary]
    sample: tuple[tuple[int, int, str], ...] | None
    unread: UnreadFiles | None
    held_out: tuple[int, int] | None
    trained_on: int
    identical: int | None
    empty_files: tuple[str, ...] = ()

    @property
    def evaluates_on_new_images(self) -> bool:
        """Whether the evaluation images may be called held-out: none of them is known to be a training image."""
        return "eval" in self.parts and not self.trained_on and not self.identical

    @property
    def classes_of_one_part(self) -> dict[str, list[str]]:
        """Class names that only "train", or only "eval", has images of."""
        counts = [part.counts for part in self.parts.values()]
        if len(counts) < 2 or None in counts:
            return {}
        only: dict[str, list[str]] = {"train": [], "eval": []}
        for name, train, held_out in zip(
            self.class_names, self.parts["train"].counts or (), self.parts["eval"].counts or (), strict=True
        ):
            if bool(train) != bool(held_out):
                only["train" if train else "eval"].append(name)
        return only

    @property
    def similar_class_names(self) -> list[tuple[str, ...]]:
        """Class names that differ only in upper and lower case or in blanks."""
        groups = defaultdict(list)
        for name in self.class_names:
            groups["".join(name.split()).casefold()].append(name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    def __str__(self) -> str:
        name = "" if os.path.abspath(os.path.expanduser(self.name)) == self.place else f"{self.name!r}: "
        lines = [("dataset", f"{name}{self.layout}, {self.place!r}")]
        titles = {"train": "to train", "eval": "to evaluate"}
        lines += [(titles[part], self._images_of(part)) for part in self.parts]
        if "eval" not in self.parts and "train" in self.parts:
            lines.append((titles["eval"], "nothing"))
        lines += [("sample", self._sample()), ("not read", self._unread()), ("identical", self._identical())]
        lines += [("note", note) for note in self._notes()]
        return "\n".join(f"{title:<13}{text}" for title, text in lines)

    def facts(self) -> dict:
        """Return the content of dataset.json."""
        return {
            "dataset": _without_directories(self.name),
            "layout": self.layout,
            "classes": len(self.class_names),
            "splits": {
                part: {
                    "splits": each.splits,
                    "images": each.num_images,
                    "images_by_class": None
                    if each.counts is None
                    else dict(zip(self.class_names, each.counts, strict=True)),
                }
                for part, each in self.parts.items()
            },
            "held_out_of_training_images": None
            if self.held_out is None
            else dict(zip(("images", "of"), self.held_out, strict=True)),
            "evaluation_images_trained_on": self.trained_on,
            "evaluation_images_identical_to_training_images": self.identical,
            "sample": None
            if self.sample is None
            else [dict(zip(("width", "height", "mode"), image, strict=True)) for image in self.sample],
            "not_read": None
            if self.unread is None
            else {
                "files": dict(self.unread.counts),
                "outside_the_class_folders": len(self.unread.beside),
                "such_as": [self._relative(path)[1:-1] for path in [*self.unread.paths, *self.unread.beside][:3]],
                "folders": [self._relative(path)[1:-1] for path in self.unread.folders[:20]],
                "empty_class_folders": [self._relative(path)[1:-1] for path in self.unread.empty[:20]],
            },
            "notes": self._notes(),
        }

    def sentences(self) -> list[str]:
        """Return what a model card says of the images, one sentence each."""
        titles = {"train": "Trained on", "eval": "Evaluated on"}
        lines = [f"{titles[part]} {self._images_of(part)}" for part in self.parts]
        lines += [f"Sizes and modes of {self._sample()}"] if self.sample else []
        lines += [f"Not read: {self._unread(examples=False)}"] if self._has_unread() else []
        lines += [f"Identical images in both splits: {self._identical()}"] if len(self.parts) == 2 else []
        lines += [note[:1].upper() + note[1:] for note in self._notes()]
        return lines

    def _images_of(self, part: str) -> str:
        each = self.parts[part]
        text = f"{each.num_images:,} images of the split {each.splits!r}"
        if self.held_out is not None and part == "eval":
            text = (
                f"{each.num_images:,} images: {self.held_out[0]:,} of the {self.held_out[1]:,} of the split "
                f"{each.splits!r} are held out, a share of each class, the same in every run"
            )
        if self.class_names:
            text += f"; {len(self.class_names):,} classes, {self.class_names[0]!r} to {self.class_names[-1]!r}"
        if each.counts is None:
            return f"{text}; images of each class: not known"
        present = [(count, name) for count, name in zip(each.counts, self.class_names, strict=True) if count]
        (small, smallest), (large, largest) = min(present), max(present, key=lambda item: item[0])
        if small == large:
            return f"{text}; {small:,} images of each class"
        return f"{text}; fewest images {smallest!r} ({small:,}), most {largest!r} ({large:,})"

    def _sample(self) -> str:
        if self.sample is None:
            return "not known: a stream is read while training"
        if not self.sample:
            return "no image could be opened"
        sizes = sorted({image[:2] for image in self.sample}, key=lambda size: (size[0] * size[1], size))
        modes = Counter(mode for *_, mode in self.sample)
        words = [f"{width} x {height}" for width, height in (sizes if len(sizes) < 3 else (sizes[0], sizes[-1]))]
        return f"{len(self.sample)} images: {' to '.join(words)} pixels, " + ", ".join(
            f"{mode} ({count})" for mode, count in modes.most_common()
        )

    def _has_unread(self) -> bool:
        unread = self.unread
        return unread is not None and bool(unread.paths or unread.beside or unread.folders or unread.empty)

    def _unread(self, examples: bool = True) -> str:
        if self.unread is None:
            return "other files are not listed for this layout"
        unread, texts = self.unread, []
        for paths, kind in (
            (unread.paths, f"files that are no image ({unread})"),
            (unread.beside, "files outside the class folders"),
            (unread.folders, "folders outside the splits in use"),
            (unread.empty, "empty class folders"),
        ):
            if paths:
                such_as = f", such as {some_of(list(map(self._relative, paths)))}" if examples else ""
                texts.append(f"{kind}: {len(paths):,}{such_as}")
        return "; ".join(texts) or "nothing: every file is an image in use"

    def _identical(self) -> str:
        if len(self.parts) < 2:
            return "not compared: there is one split"
        if self.trained_on:
            return f"{self.trained_on:,} of the images to evaluate are training images too, because the splits overlap"
        if self.identical is None:
            return "not compared: there are too many images, or they are streamed"
        if not self.identical:
            return "none of the images to evaluate is a training image"
        return f"{self.identical:,} of the images to evaluate are training images too, byte for byte"

    def _notes(self) -> list[str]:
        notes = []
        for names in self.similar_class_names[:3]:
            notes.append(
                f"the classes {' and '.join(map(repr, names))} differ only in upper and lower case or in blanks; if "
                "they are one class, give them one name"
            )
        words = {"train": "to train on, but none to evaluate on", "eval": "to evaluate on, but none to train on"}
        for part, names in self.classes_of_one_part.items():
            if names:
                shown = some_of(list(map(repr, names)))
                notes.append(f"classes with images {words[part]}: {len(names):,}, {shown}")
        if self.empty_files:
            files = some_of(list(map(self._relative, self.empty_files)))
            notes.append(f"empty image files, which count as damaged: {len(self.empty_files):,}, {files}")
        return notes

    def _relative(self, path: str) -> str:
        """Return a path inside the dataset, without the directories of this machine; printable."""
        return repr(os.path.relpath(path, self.place))

    def write(self, output_dir: str | os.PathLike) -> None:
        """Write dataset.json; the file is whole or not there."""
        write_whole(Path(output_dir, FILE_NAME), json.dumps(self.facts(), indent=1))


def summarize(images: LoadedImages) -> DatasetSummary:
    """Collect the facts about a loaded dataset.

    Args:
        images: as [`load_image_dataset`] returns them.
    """
    label = next(iter(images.values())).features["label"]
    names = tuple(getattr(label, "feature", label).names)
    counts = {part: count_by_class(rows, len(names)) for part, rows in images.items()}
    parts = {
        part: PartSummary(images.splits[part], len(rows), None if (of := counts[part]) is None else tuple(of.tolist()))
        for part, rows in images.items()
    }
    identical, empty = _compare(images)
    return DatasetSummary(
        name=images.name,
        place=images.place,
        layout=images.layout,
        class_names=names,
        parts=parts,
        sample=_sample_of(next(iter(images.values()))),
        unread=images.unread if images.layout == IMAGE_FOLDERS else None,
        held_out=images.held_out,
        trained_on=images.trained_on,
        identical=identical,
        empty_files=empty,
    )


def _without_directories(name: str) -> str:
    return Path(name).name or name if os.path.exists(name) else name


# --- a look at the images ----------------------------------------------------------------------------------------


def _sample_of(rows: Any) -> tuple[tuple[int, int, str], ...] | None:
    if not hasattr(rows, "with_format"):
        return None
    numbers = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int)).tolist()
    headers = (_header(rows[number]["image"]) for number in numbers)
    return tuple(header for header in headers if header is not None)


def _header(encoded: dict) -> tuple[int, int, str] | None:
    """Return width, height and mode by the header of an image; None if the image cannot be opened."""
    try:
        if encoded["bytes"] is not None:
            source: Any = io.BytesIO(encoded["bytes"])
        else:
            source = path_of(encoded["path"])
            if not stat.S_ISREG(os.stat(source).st_mode):  # a pipe would block
                return None
        with Image.open(source, formats=FORMATS) as image:
            return (*image.size, image.mode)
    except Exception:  # Pillow's readers raise what they like, and a damaged image is dealt with elsewhere
        return None


def _compare(images: LoadedImages) -> tuple[int | None, tuple[str, ...]]:
    """Count the evaluation images that are byte for byte training images, and list the empty files.

    Only images of the same size are read.
    """
    parts = {}
    for part, rows in images.items():
        if (found := _sizes_and_readers(rows)) is None:
            return None, ()
        parts[part] = found
    empty = tuple(path for sizes, _, paths in parts.values() for path, size in zip(paths, sizes) if size == 0)
    if set(parts) != {"train", "eval"}:
        return None, empty
    (train, read_train, _), (held_out, read_held_out, _) = parts["train"], parts["eval"]
    both = np.intersect1d(train[train > 0], held_out)
    candidates = {part: np.flatnonzero(np.isin(sizes, both)).tolist() for part, (sizes, *_) in parts.items()}
    if train[candidates["train"]].sum() + held_out[candidates["eval"]].sum() > MAX_BYTES_COMPARED:
        return None, empty
    known = {_digest(read_train, number) for number in candidates["train"]}
    return sum(_digest(read_held_out, number) in known for number in candidates["eval"]), empty


def _sizes_and_readers(rows: Any) -> tuple[np.ndarray, Callable[[int], bytes], Sequence[str]] | None:
    """Return the size of each encoded image in bytes (-1 if unknown), a function that reads one, and the paths."""
    if not hasattr(rows, "with_format") or len(rows) > MAX_ROWS_COMPARED or not len(rows):
        return None
    columns = rows.with_format("arrow").select_columns(["image"])
    if rows[0]["image"]["bytes"] is not None:
        sizes = [size for batch in columns.iter(1000) for size in _lengths(batch["image"])]
        return np.array(sizes), lambda number: rows[number]["image"]["bytes"] or b"", ()
    if len(rows) > MAX_FILES_COMPARED:
        return None
    paths = [path_of(row["path"]) for batch in columns.iter(1000) for row in batch["image"].to_pylist()]
    return np.array([_size_of_file(path) for path in paths]), partial(_content, paths), paths


def _lengths(images: Any) -> Iterable[int]:
    return (-1 if row["bytes"].as_py() is None else len(row["bytes"].as_buffer()) for row in images)


def _size_of_file(path: str) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _content(paths: Sequence[str], number: int) -> bytes:
    try:
        return Path(paths[number]).read_bytes()
    except OSError:
        return os.urandom(16)  # equal to nothing


def _digest(read: Callable[[int], bytes], number: int) -> bytes:
    return hashlib.blake2b(read(number), digest_size=16).digest()
