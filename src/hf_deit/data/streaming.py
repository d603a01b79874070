"""Images in parquet files, on the Hub or on disk, read one row group at a time as they are asked for.

Nothing is downloaded or converted beforehand: of each file only the footer is read at the start, which says how many
images each row group (a block) holds. So a stream has a length and any image of it can be asked for by index, which
makes it as exact as a set on disk: the same order rule, the same views, and an interrupted run goes on at its place
without reading what came before. (`datasets.IterableDataset` can only be read from a shard's start.)

What keeps this fast is the order the images are asked for in: see repeated_augmentation.py.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds to wait before each further try: a server that is away for five minutes does not end a run of days.
RETRY_WAITS = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60)


@dataclass
class _Block:
    """One row group in memory."""

    bytes: pa.ChunkedArray
    paths: pa.ChunkedArray | None
    labels: list
    asked_for: set[int] = field(default_factory=set)  # its rows
    last_use: int = 0

    @property
    def num_to_come(self) -> int:
        return len(self.labels) - len(self.asked_for)


class StreamedImages:
    """The images of parquet files, indexed like a list: `{"image": {"bytes", "path"}, "label"}`, encoded.

    A block stays in memory while its images are being asked for. Copies in loader workers each hold blocks of their
    own; a block is then read by several workers unless the order avoids it, as [`RepeatedAugmentationSampler`] does.

    Args:
        files: paths or URLs that fsspec opens (`hf://datasets/...`), all with the same columns.
        features: of the two columns under their final names, "image" and "label".
        image_column, label_column: their names in the files. Images are encoded bytes, or structs of bytes and path.
        classes: class of each stored label, where that is not the class index itself.

    Raises:
        ValueError: a file that is missing, unreachable for five minutes, or no parquet file; a label not in `classes`.
    """

    def __init__(
        self,
        files: Sequence[str],
        features: Mapping,
        *,
        image_column: str,
        label_column: str,
        classes: Mapping[int | str, int] | None = None,
    ):
        self.features = features
        self._files = list(files)
        self._columns = (image_column, label_column)
        self._classes = classes
        with ThreadPoolExecutor(16) as threads:
            self._footers = list(threads.map(_read_footer, self._files))
        self._blocks = [
            (file, group) for file, footer in enumerate(self._footers) for group in range(footer.num_row_groups)
        ]
        sizes = [self._footers[file].row_group(group).num_rows for file, group in self._blocks]
        self._ends = np.cumsum(sizes)
        self._open_blocks: dict[int, _Block] = {}
        self._num_reads = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def block_sizes(self) -> list[int]:
        """Images in each block, in the order of the files."""
        return [size for size in np.diff(self._ends, prepend=0).tolist() if size]

    def take(self, num_images: int) -> StreamedImages:
        """The first `num_images` of them."""
        first = copy.copy(self)
        first._ends = np.minimum(self._ends, num_images)
        first._open_blocks = {}
        return first

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Several images at once; the blocks they need are read at the same time."""
        indices = [range(len(self))[index] for index in indices]
        numbers = np.searchsorted(self._ends, indices, side="right").tolist()
        self._num_reads += len(indices)
        self._open(set(numbers))
        rows = []
        for index, number in zip(indices, numbers, strict=True):
            block, row = self._open_blocks[number], index - (int(self._ends[number - 1]) if number else 0)
            block.asked_for.add(row)
            image = {"bytes": block.bytes[row].as_py(), "path": None}
            if block.paths is not None:
                image["path"] = block.paths[row].as_py()
            rows.append({"image": image, "label": self._class_index(block.labels[row])})
        return rows

    def _open(self, numbers: set[int]) -> None:
        missing = numbers - self._open_blocks.keys()
        if missing:
            with ThreadPoolExecutor(min(8, len(missing))) as threads:
                self._open_blocks.update(zip(missing, threads.map(self._read_block, missing), strict=True))
        for number in numbers:
            self._open_blocks[number].last_use = self._num_reads
        if missing:
            self._close_idle_blocks()

    def _close_idle_blocks(self) -> None:
        """Forget what will hardly be asked for again: of an epoch that is over, or of a lane that has moved on.

        A block all of whose images were asked for may still see one again, for the rest of its repeats.
        """
        to_come = sum(block.num_to_come for block in self._open_blocks.values())
        for number, block in list(self._open_blocks.items()):
            if self._num_reads - block.last_use > (4 * to_come if block.num_to_come else to_come):
                del self._open_blocks[number]

    def _read_block(self, number: int) -> _Block:
        (file, group), (image_column, label_column) = self._blocks[number], self._columns
        footer = self._footers[file]

        def read(stream: BinaryIO) -> pa.Table:
            parquet = pq.ParquetFile(stream, metadata=footer, pre_buffer=True)
            return parquet.read_row_group(group, columns=[image_column, label_column], use_threads=False)

        table = _read_patiently(self._files[file], read).flatten()  # a struct's fields become columns
        labels = table.column(label_column).to_pylist()
        if image_column in table.column_names:
            return _Block(table.column(image_column), None, labels)
        return _Block(table.column(f"{image_column}.bytes"), table.column(f"{image_column}.path"), labels)

    def _class_index(self, label: int | str) -> int:
        if self._classes is None:
            return label
        if label not in self._classes:
            raise UserError(
                f"a streamed image has the label {label!r}, which is none of the {len(self._classes)} classes known "
                "(from the evaluation split): use files whose label column is a ClassLabel, or streaming: false"
            )
        return self._classes[label]


def read_schema(file: str) -> pa.Schema:
    """Of a parquet file's columns, with what datasets wrote into it of their features."""
    return _read_footer(file).schema.to_arrow_schema()


def _read_footer(file: str) -> pq.FileMetaData:
    return _read_patiently(file, lambda stream: pq.ParquetFile(stream).metadata)


def _read_patiently(file: str, read: Callable[[BinaryIO], T]) -> T:
    remote = "://" in file
    options = {"cache_type": "none"} if remote else {}  # what is read is kept by us
    for wait in (*RETRY_WAITS, None):
        try:
            filesystem, path = fsspec.core.url_to_fs(file)
            with filesystem.open(path, "rb", **options) as stream:
                return read(stream)
        except Exception as error:  # each client library, and each kind of broken answer, has exceptions of its own
            if not remote or wait is None or _is_final(error):
                raise UserError(f"cannot read {file!r}: {type(error).__name__}: {error}") from error
            logger.warning("reading %r failed (%s: %s); next try in %d s", file, type(error).__name__, error, wait)
            time.sleep(wait)
    raise AssertionError("the last try raises")


def _is_final(error: Exception) -> bool:
    """Whether another try would end the same way: no such file, no permission, not a parquet file."""
    status = getattr(getattr(error, "response", None), "status_code", None) or 0
    refused = 400 <= status < 500 and status not in (408, 429)  # too slow, too often
    return refused or isinstance(error, (FileNotFoundError, PermissionError, pa.ArrowInvalid))
