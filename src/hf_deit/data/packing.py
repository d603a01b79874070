"""Pack a dataset into parquet files that are made for streaming: few files, row groups of a few megabytes.

The bytes of an image stay as they are, or an image that is larger than wanted is reduced and stored as a JPEG. A file
is whole or not there, and what it holds depends on the images and the settings alone: a pack that was interrupted goes
on with the next file and ends with the same bytes.

Images are read, decoded and encoded by threads, which spend their time in libraries that hold no lock of Python's; the
files are written one after the other. So only the images of a row group and those that the threads work at are in
memory.

Not here: finding the images (loading.py), row groups and their reading (streaming.py), the card and the Hub
(commands/pack.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image
from tqdm import tqdm

from ..arguments import available_cores
from ..errors import UserError, printable
from ..files import flush, read_json, write_whole
from ..processes import LOCK, only_run_in
from .decoding import BAD_IMAGES_FILE, DamagedImage, Part, decode_image, path_of, read_encoded
from .labels import check_labels, labels_in
from .streaming import ParquetWriter, StreamedImages


logger = logging.getLogger(__name__)

T = TypeVar("T")

# A file is what an interrupted pack does again.
FILE_BYTES = 256 << 20
SAMPLE = 64  # images from which the size of all is estimated, and on which views are compared
# Of the sides of a JPEG, and of the row groups of one file (the format's number is 16 bits wide).
MAX_JPEG_SIDE, MAX_ROW_GROUPS = 65_500, 32_767

UNFINISHED = "_packing.json"  # what is being packed; there until all files are whole
PACKED = ".packed"  # ends the name of a whole file until all are; so nobody loads half a dataset
WRITING = ".writing"
SHARD_KEY = "hf_deit.pack"  # of what a file says of itself in its footer


@dataclass(frozen=True)
class PackSettings:
    """What is stored of an image.

    Attributes:
        max_side: an image whose shorter side has more pixels is reduced to this shorter side (bicubic, antialiased,
            the longer side in proportion, rounded down) and stored as a JPEG, upright, in RGB. Any other image keeps
            its bytes. None: every image keeps its bytes.
        quality: of these JPEGs, 1 to 100 as libjpeg counts; colours at the full resolution (4:4:4).
        leave_out_damaged: leave out images that cannot be decoded; otherwise they are listed, and nothing is packed.

    Raises:
        ValueError: a value is out of range.
    """

    max_side: int | None = None
    quality: int = 90
    leave_out_damaged: bool = False

    def __post_init__(self):
        if self.max_side is not None and self.max_side < 1:
            raise UserError(f"max_side is {self.max_side}; use a number of pixels such as 256, or leave it unset")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality is {self.quality}; it must be from 1 to 100, such as 90")


class PackedSplit(NamedTuple):
    """One split of a finished pack: its files, its images and their bytes, and how many damaged ones were left out."""

    files: list[str]
    num_images: int
    num_bytes: int
    num_reduced: int
    num_left_out: int
    counts: list[int]


class _Packed(NamedTuple):
    """An image as it is stored. `size` is that of its source, in bytes; `data` is None for a damaged image."""

    data: bytes | None
    name: str | None
    label: int
    sha256: str
    size: int
    reduced: bool
    damage: str = ""


class _Plan(NamedTuple):
    """How a split is cut into files: file i has the images `bounds[i]` to `bounds[i + 1]` of the source."""

    split: str
    rows: Any
    bounds: list[int]

    def files(self) -> list[str]:
        """Return the names of the files."""
        total = len(self.bounds) - 1
        return [f"{self.split}-{number:05d}-of-{total:05d}.parquet" for number in range(total)]


def pack_dataset(
    splits: Mapping[str, Any],
    folder: str | os.PathLike,
    settings: PackSettings | None = None,
    *,
    place: str = "",
    num_workers: int | None = None,
    finish: Callable[[dict[str, PackedSplit]], None] | None = None,
) -> dict[str, PackedSplit]:
    """Write datasets as `<split>-00000-of-00010.parquet` with the columns `image`, `label` and `sha256`.

    `sha256` is that of the image's source file.

    Args:
        splits: images by the name of their split, "train" first, as [`load_image_dataset`] returns its parts; all with
            the same classes.
        folder: a new or empty directory, or one in which the same pack was interrupted, which then goes on.
        settings: what is stored of an image; its bytes by default.
        place: directory of the source. Paths of images are stored relative to it, others by their last part.
        num_workers: number of threads; by default one a core. More pay where the images lie on a network disk.
        finish: called when all files are whole, before the pack counts as finished, to write what stands beside them.

    Returns:
        What was packed of each split. `load_image_dataset(folder)` reads it, on disk or as a stream: the same classes,
        labels and order.

    Raises:
        ValueError: the directory holds anything else, or another pack; the source has changed since the pack was
            interrupted; images are damaged, which are all listed in `_bad_images.txt`; the disk is full; several
            labels an image.
    """
    folder, settings = Path(folder), settings or PackSettings()
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers is {num_workers}; use 1 or more threads, or leave it unset for one a core")
    num_workers = num_workers or available_cores()
    names = _class_names(splits)
    for split, rows in splits.items():
        check_labels(rows, len(names), split)
    if place and Path(os.path.abspath(folder)).is_relative_to(place):
        raise UserError(f"{str(folder)!r} is inside the source, {place!r}, which would then hold both: name another")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file; name a new directory")
    with only_run_in(folder):
        try:
            plans = _begin(folder, splits, settings, names, place, num_workers)
            packed = _write_all(folder, plans, settings, names, place, num_workers)
            if finish is not None:
                finish(packed)
            _finish(folder, plans)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"{str(folder)!r} cannot be written: {os.strerror(error.errno)}. The files that are whole are kept: "
                "free some space and start the same command again"
            ) from error
    return packed


def _class_names(splits: Mapping[str, Any]) -> list[str]:
    """Return the class names, which are those of all splits."""
    labels = {split: rows.features["label"] for split, rows in splits.items()}
    for split, label in labels.items():
        if not hasattr(label, "names"):
            raise UserError(f"the images of {split!r} have lists of labels; one label an image can be packed")
    names = [label.names for label in labels.values()]
    if any(other != names[0] for other in names[1:]):
        raise UserError(f"the splits {', '.join(splits)} have different classes; expected the same in the same order")
    return list(names[0])


# --- plan, and what goes on --------------------------------------------------------------------------------------


def _begin(
    folder: Path, splits: Mapping[str, Any], settings: PackSettings, names: list[str], place: str, num_workers: int
) -> list[_Plan]:
    """Return the plan: a new one, or that of the pack that was interrupted here, if it is the same."""
    what = {
        "settings": {"max_side": settings.max_side, "quality": settings.quality if settings.max_side else None},
        "classes": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        "splits": {split: [len(rows), _digest_of_listing(rows)] for split, rows in splits.items()},
    }
    there = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK)
    before = None
    if UNFINISHED in there:
        before = read_json(folder / UNFINISHED)
        if not isinstance(before, dict) or set(before) != {*what, "images a file"}:
            raise UserError(f"{str(folder / UNFINISHED)!r} is damaged: remove the directory and begin anew")
    elif there:
        found = "a finished pack" if "dataset.json" in there else f"other files, such as {printable(there[0])!r}"
        raise UserError(f"{str(folder)!r} holds {found}: name a new directory, or that of an unfinished pack")
    if before is None:
        sizes = {split: _images_per_file(rows, settings, num_workers) for split, rows in splits.items()}
        _warn_of_space(folder, {split: FILE_BYTES / sizes[split] * len(rows) for split, rows in splits.items()})
        write_whole(folder / UNFINISHED, json.dumps(what | {"images a file": sizes}, indent=1))
    else:
        if before["settings"] != what["settings"]:
            raise UserError(
                f"{str(folder)!r} has an unfinished pack with other settings, {json.dumps(before['settings'])}; "
                f"now they are {json.dumps(what['settings'])}: use the same ones, or another directory"
            )
        changed = [key for key in ("classes", "splits") if before[key] != what[key]]
        if changed:
            raise UserError(
                f"{str(folder)!r} has an unfinished pack of other images: the {' and the '.join(changed)} of the "
                "source differ (its images, their order or labels have changed, or it is another one): remove the "
                "directory and begin anew, or name another one"
            )
        sizes = before["images a file"]
    plans = []
    for split, rows in splits.items():
        count = -(-len(rows) // sizes[split])
        plans.append(_Plan(split, rows, [len(rows) * number // count for number in range(count + 1)]))
    if before is not None:
        whole = [(plan, number) for plan in plans for number in _whole_files(folder, plan)]
        for plan, number in whole:
            _check_source(folder, plan, number, place)
        logger.info("%d of %d files are packed already", len(whole), sum(len(plan.files()) for plan in plans))
    return plans


def _images_per_file(rows: Any, settings: PackSettings, num_workers: int) -> int:
    sample = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int)).tolist()
    packed = _in_threads(lambda row: _pack(row, settings, ""), _rows(rows, sample), num_workers)
    sizes = [len(each.data) for each in packed if each.data is not None]
    # no file needs more row groups than the format counts, not even with one image in each
    return min(max(1, round(FILE_BYTES / (np.mean(sizes) if sizes else FILE_BYTES))), MAX_ROW_GROUPS)


def _warn_of_space(folder: Path, num_bytes: Mapping[str, float]) -> None:
    status = os.statvfs(folder)
    free, needed = status.f_bavail * status.f_frsize, sum(num_bytes.values())
    if needed > free:
        logger.warning(
            "the pack will take about %.1f GB, and %r has %.1f GB left: free some space; a pack that the full disk "
            "ends goes on with the same command",
            *(needed / 1e9, str(folder), free / 1e9),
        )


def _path_of(folder: Path, file: str) -> Path | None:
    """Return the path of a file that is whole; None if it is not."""
    return next((path for path in (folder / (file + PACKED), folder / file) if path.exists()), None)


def _whole_files(folder: Path, plan: _Plan) -> list[int]:
    return [number for number, file in enumerate(plan.files()) if _path_of(folder, file) is not None]


def _check_source(folder: Path, plan: _Plan, number: int, place: str) -> None:
    """Refuse a source whose images are not those that were packed into this file.

    The size of every image is compared, and the bytes of the first one.
    """
    path = _path_of(folder, plan.files()[number])
    facts = _facts_of(path)
    start, end = plan.bounds[number : number + 2]
    # The sizes of a stream's images would have to be downloaded; those of its row groups are in the plan.
    streamed = isinstance(plan.rows, StreamedImages)
    same = streamed or facts["sizes"] == _digest_of(_sizes(plan.rows, start, end))
    if same and facts["images"]:
        first = next(iter(pq.ParquetFile(path).iter_batches(1, columns=["sha256"]))).column(0)[0].as_py()
        row = next(_rows(plan.rows, [facts["first"]]))
        try:
            same = hashlib.sha256(read_encoded(row["image"] or {})).hexdigest() == first
        except DamagedImage:
            same = False
    if not same:
        raise UserError(
            f"the source has changed since the pack in {str(folder)!r} began: images of {plan.split!r} from number "
            f"{start} to {end - 1} are not those that were packed. Remove the directory and begin anew"
        )


def _facts_of(path: Path | None) -> dict:
    assert path is not None
    return json.loads(pq.read_metadata(path).metadata[SHARD_KEY.encode()])


def _finish(folder: Path, plans: list[_Plan]) -> None:
    for plan in plans:
        for file in plan.files():
            with suppress(FileNotFoundError):  # renamed before the last interruption
                (folder / (file + PACKED)).rename(folder / file)
    flush(folder)
    (folder / UNFINISHED).unlink()


# --- the source's listing ----------------------------------------------------------------------------------------


def _digest_of_listing(rows: Any) -> str:
    """Return a digest of what is known of all images without reading one: order, labels and paths; of a stream, labels
    and the stored sizes of its row groups."""
    if isinstance(rows, StreamedImages):
        return _digest_of([rows.stored_labels(), rows.stored_sizes()])
    digest = hashlib.sha256(np.ascontiguousarray(labels_in(rows), "<i8").tobytes())
    paths = _of_rows(rows, _field(rows, "path"))
    for start in range(0, len(paths), 1 << 16):
        digest.update("".join(f"{path or ''}\0" for path in paths.slice(start, 1 << 16).to_pylist()).encode())
    return digest.hexdigest()


def _digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()


def _field(rows: Any, name: str) -> pa.ChunkedArray:
    """Return one field of the images without touching the others."""
    field = pc.StructFieldOptions(name)
    return pa.chunked_array(
        [pc.call_function("struct_field", [chunk], field) for chunk in rows.data.column("image").chunks]
    )


def _of_rows(rows: Any, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of a column of the whole table in the order of a subset's rows."""
    return column if rows._indices is None else column.take(rows._indices.column(0))


def _sizes(rows: Any, start: int, end: int) -> list[int]:
    """The bytes of each image in the source, -1 for a missing file; no image is read."""
    rows = rows.select(range(start, end))
    lengths = _of_rows(rows, _lengths(rows)).to_pylist()
    paths = _of_rows(rows, _field(rows, "path")).to_pylist()
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(_size_of, lengths, paths))


def _lengths(rows: Any) -> pa.ChunkedArray:
    return pa.chunked_array([pc.call_function("binary_length", [chunk]) for chunk in _field(rows, "bytes").chunks])


def _size_of(length: int | None, path: str | None) -> int:
    if length is not None or path is None:
        return -1 if length is None else length
    try:
        return os.stat(path_of(path)).st_size
    except (OSError, ValueError):
        return -1


def _name_of(path: str | None, place: str) -> str | None:
    """Return the path of an image inside its dataset, without the directories of this machine; None if it has none."""
    if path is None:
        return None
    inside = os.path.normpath(path_of(path))
    if os.path.isabs(inside) or "://" in path:
        inside = os.path.relpath(inside, place) if place and os.path.isabs(inside) else os.path.basename(inside)
    inside = os.path.basename(inside) if inside.startswith("..") else inside
    try:
        inside.encode()
    except UnicodeEncodeError:  # the name is not UTF-8
        inside = quote(os.fsencode(inside))
    return inside.replace(os.sep, "/")


# --- one image ---------------------------------------------------------------------------------------------------


def _pack(row: Mapping, settings: PackSettings, place: str) -> _Packed:
    """Read and decode one image, which shows whether it is damaged, and return what is stored of it."""
    encoded, label = row["image"] or {}, row["label"]
    name = _name_of(encoded.get("path"), place)
    try:
        data = read_encoded(encoded)
    except DamagedImage as damage:
        length = None if encoded.get("bytes") is None else len(encoded["bytes"])
        return _Packed(None, name, label, "", _size_of(length, encoded.get("path")), False, str(damage))
    sha256, size = hashlib.sha256(data).hexdigest(), len(data)
    try:
        stored = reduce_image(data, settings)
    except DamagedImage as damage:
        return _Packed(None, name, label, sha256, size, False, str(damage))
    return _Packed(stored, name, label, sha256, size, stored is not data)


def reduce_image(data: bytes, settings: PackSettings) -> bytes:
    """Return what is stored of an encoded image: `data` itself, or a smaller JPEG, see [`PackSettings`].

    The image is decoded in either case.

    Raises:
        DamagedImage: it cannot be decoded.
    """
    side, sides = settings.max_side, (0, 0)

    def choose_part(height: int, width: int) -> Part:
        nonlocal sides
        sides = (height, width)
        if side is None or min(sides) <= side:
            return Part()
        # libjpeg halves the sides exactly enough if twice the pixels that are wanted remain
        return Part(max(k for k in (1, 2, 4, 8) if k == 1 or min(sides) >= 2 * k * side))

    pixels = decode_image({"bytes": data, "path": None}, choose_part)
    if side is None or min(sides) <= side:
        return data
    height, width = (int(side * length / min(sides)) for length in sides)  # as evaluation resizes
    if max(height, width) > MAX_JPEG_SIDE:
        return data
    resized = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    return simplejpeg.encode_jpeg(resized, settings.quality, "RGB", "444")


# --- files -------------------------------------------------------------------------------------------------------


def _rows(rows: Any, numbers: Any, at_once: int = 16) -> Iterator[dict]:
    for start in range(0, len(numbers), at_once):
        yield from rows.__getitems__(list(numbers[start : start + at_once]))


def _in_threads(function: Callable[[Any], T], items: Any, num_workers: int) -> Iterator[T]:
    """Yield the results in order, while a few more are computed."""
    pool, pending = ThreadPoolExecutor(num_workers), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_all(
    folder: Path, plans: list[_Plan], settings: PackSettings, names: list[str], place: str, num_workers: int
) -> dict[str, PackedSplit]:
    """Write the files that are missing, and return what all files hold."""
    for left in folder.glob(f"*{WRITING}"):
        left.unlink()
    damaged: list[tuple[str, int, str | None, str]] = []
    num_images = sum(len(plan.rows) for plan in plans)
    interval = 0.1 if sys.stderr is not None and sys.stderr.isatty() else 30.0  # seconds; a log file is not filled
    with tqdm(total=num_images, unit=" images", desc="pack", mininterval=interval) as bar:
        for plan in plans:
            for number, file in enumerate(plan.files()):
                start, end = plan.bounds[number : number + 2]
                if (path := _path_of(folder, file)) is not None:
                    bar.initial += end - start  # counts as done, but not into the speed
                    bar.update(end - start)
                    damaged += [(plan.split, *each) for each in _facts_of(path)["left_out"]]
                    continue
                rows = _rows(plan.rows, range(start, end))
                images = _in_threads(lambda row: _pack(row, settings, place), rows, num_workers)
                found = _write_file(folder / file, images, start, names, settings.leave_out_damaged, bar)
                damaged += [(plan.split, *each) for each in found]
    if not damaged:
        (folder / BAD_IMAGES_FILE).unlink(missing_ok=True)
        return {plan.split: _packed_split(folder, plan, len(names)) for plan in plans}
    lines = [f"{split}\t{index}\t{printable(name or '')}\t{printable(why)}" for split, index, name, why in damaged]
    write_whole(folder / BAD_IMAGES_FILE, "\n".join(["split\tindex\tpath\treason", *lines, ""]))
    if not settings.leave_out_damaged:
        split, index, name, why = damaged[0]
        raise UserError(
            f"{len(damaged)} of {num_images} images are damaged, such as number {index} of {split!r} (path "
            f"{printable(str(name))}: {printable(why)}); all are listed in {str(folder / BAD_IMAGES_FILE)!r}: repair "
            "them, or leave them out with leave_out_damaged, and start the same command again"
        )
    packed = {plan.split: _packed_split(folder, plan, len(names)) for plan in plans}
    if empty := [split for split, each in packed.items() if not each.num_images]:
        raise UserError(
            f"every image of {empty[0]!r} is damaged, see {str(folder / BAD_IMAGES_FILE)!r}: nothing can be packed"
        )
    return packed


def _packed_split(folder: Path, plan: _Plan, num_classes: int) -> PackedSplit:
    counts, facts = np.zeros(num_classes, int), []
    for file in plan.files():
        path = _path_of(folder, file)
        labels = pq.read_table(path, columns=["label"]).column(0).to_numpy()
        counts += np.bincount(labels, minlength=num_classes)
        facts.append(_facts_of(path))
    num_bytes, reduced = (sum(each[name] for each in facts) for name in ("bytes", "reduced"))
    left_out = sum(len(each["left_out"]) for each in facts)
    return PackedSplit(plan.files(), int(counts.sum()), num_bytes, reduced, left_out, counts.tolist())


def _write_file(
    path: Path, images: Iterator[_Packed], start: int, names: list[str], leave_out_damaged: bool, bar: tqdm
) -> list[tuple[int, str | None, str]]:
    """Write one file, unless it has damaged images that are not to be left out; return its damaged images."""
    aside = path.with_name(path.name + WRITING)
    damaged: list[tuple[int, str | None, str]] = []
    facts: dict[str, Any] = {"images": 0, "bytes": 0, "reduced": 0, "first": None, "left_out": damaged}
    sizes: list[int] = []
    try:
        with aside.open("wb") as stream, closing(ParquetWriter(stream, names)) as writer:
            for index, image in enumerate(images, start):
                bar.update()
                sizes.append(image.size)
                if image.data is None:
                    damaged.append((index, image.name, image.damage))
                if image.data is None or (damaged and not leave_out_damaged):  # only the list is still made
                    continue
                if not isinstance(image.label, int) or not 0 <= image.label < len(names):
                    raise UserError(
                        f"image number {index} (path {image.name}) has the label {image.label!r}, but the "
                        f"{len(names)} classes are 0 to {len(names) - 1}: remove it from the source"
                    )
                writer.add(image.data, image.name, image.label, image.sha256)
                facts["first"] = index if facts["first"] is None else facts["first"]
                facts["images"] += 1
                facts["bytes"] += len(image.data)
                facts["reduced"] += image.reduced
            if damaged and not leave_out_damaged:
                return damaged
            writer.finish({SHARD_KEY: json.dumps(facts | {"sizes": _digest_of(sizes)})})
            stream.flush()
            os.fsync(stream.fileno())
        aside.rename(path.with_name(path.name + PACKED))
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)
    return damaged
