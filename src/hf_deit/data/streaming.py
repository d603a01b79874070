"""Images in parquet files, on the Hub or on disk, read one row group at a time when they are needed.

Nothing is downloaded or converted beforehand. At the start only the footer of each file is read, which lists the
number of images in each row group (`block` in the code). A stream therefore has a length and access by index, and is
as exact as a dataset on disk: the same rule of order, the same views, and an interrupted run resumes at its place
without reading earlier images. (`datasets.IterableDataset` can only be read from the start of a shard.)

The order of the images keeps streaming fast: see augmentation/repeated_augmentation.py. [`ParquetWriter`] writes files
that suit it; packing.py makes them of a dataset.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError, first_line, printable
from .decoding import check_paths


logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ROW_GROUP_BYTES = 8 << 30
# What ParquetWriter writes: large enough for a network disk, small enough for memory, and with so few images that a
# small dataset has a row group for each lane (augmentation/repeated_augmentation.py).
ROW_GROUP_BYTES, ROW_GROUP_IMAGES = 8 << 20, 256
# Seconds to wait before each further try: five minutes without the server do not end a run of days.
RETRY_WAITS = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60)


@dataclass
class _Block:
    """One row group in memory, and which of its rows have been requested."""

    bytes: pa.ChunkedArray
    paths: pa.ChunkedArray | None
    labels: list
    requested: set[int] = field(default_factory=set)  # row numbers
    last_use: int = 0

    @property
    def num_to_come(self) -> int:
        return len(self.labels) - len(self.requested)


class StreamedImages:
    """The images of parquet files, indexed like a list: `{"image": {"bytes", "path"}, "label"}`, encoded.

    A row group stays in memory while its images are being requested. Each loader worker has its own copy of the stream
    and its own row groups; the order of [`RepeatedAugmentationSampler`] keeps several workers from reading the same
    row group.

    Args:
        files: paths or URLs that fsspec opens (`hf://datasets/...`), all with the same columns.
        features: features of the two columns under their final names, "image" and "label".
        image_column, label_column: names of the columns in the files. Images are encoded bytes, or structs of bytes
            and path.
        classes: class index of each stored label; None if the stored label is the class index.

    Raises:
        ValueError: if a file is missing, unreachable for five minutes, or not a parquet file; on indexing, if a label
            is not in `classes`.
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
        """Images in each row group, in the order of the files."""
        return [size for size in np.diff(self._ends, prepend=0).tolist() if size]

    @property
    def schemas(self) -> list[pa.Schema]:
        """The schema of each file, including the features that datasets stored in it."""
        return [footer.schema.to_arrow_schema() for footer in self._footers]

    def stored_labels(self) -> list:
        """Read the label of every image, as it is stored: only this column of the files is fetched."""

        def read_file(file: int) -> list:
            def read(stream: BinaryIO) -> list:
                parquet = pq.ParquetFile(stream, metadata=self._footers[file], pre_buffer=True)
                return parquet.read(columns=[self._columns[1]], use_threads=False).column(0).to_pylist()

            return _read_with_retries(self._files[file], read)

        with ThreadPoolExecutor(16) as threads:
            labels = [label for part in threads.map(read_file, range(len(self._files))) for label in part]
        return labels[: len(self)]

    def stored_sizes(self) -> list[int]:
        """Bytes that the images of each row group take in its file, compressed as they are, from the footers."""
        image = self._columns[0]
        sizes = []
        for (file, group), size in zip(self._blocks, np.diff(self._ends, prepend=0).tolist(), strict=True):
            row_group = self._footers[file].row_group(group)
            columns = [row_group.column(number) for number in range(row_group.num_columns)]
            own = [each for each in columns if each.path_in_schema.split(".")[0] == image]
            sizes += [sum(each.total_compressed_size for each in own)] if size else []
        return sizes

    def take(self, num_images: int) -> StreamedImages:
        """Return a stream of the first `num_images` images."""
        first = copy.copy(self)
        first._ends = np.minimum(self._ends, num_images)
        first._open_blocks = {}
        return first

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Return several images; the row groups that they need are read in parallel."""
        indices = [range(len(self))[index] for index in indices]
        numbers = np.searchsorted(self._ends, indices, side="right").tolist()
        self._num_reads += len(indices)
        self._open(set(numbers))
        rows = []
        for index, number in zip(indices, numbers, strict=True):
            block, row = self._open_blocks[number], index - (int(self._ends[number - 1]) if number else 0)
            block.requested.add(row)
            image = {"bytes": block.bytes[row].as_py(), "path": None}
            if block.paths is not None:
                image["path"] = block.paths[row].as_py()
            if image["bytes"] is None and image["path"] is not None:
                self._check_path(image["path"])
            rows.append({"image": image, "label": self._class_index(block.labels[row])})
        return rows

    def _check_path(self, path: str) -> None:
        """Refuse a path without bytes that leads out of the files' folder; a remote file has no folder here."""
        if any("://" in file for file in self._files):
            raise UserError(
                f"{self._files[0]!r} or another file of the stream holds the path {printable(path)!r} in place of an "
                "image; only the bytes of images are streamed: write the files with the bytes (datasets' push_to_hub "
                "embeds them)"
            )
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in self._files])
        check_paths([path], [folder], "a streamed row")

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
        """Drop row groups that will hardly be requested again, because the epoch or their lane has moved on.

        A row group whose images were all requested may still be needed for the remaining repeats of its last image.
        """
        to_come = sum(block.num_to_come for block in self._open_blocks.values())
        for number, block in list(self._open_blocks.items()):
            if self._num_reads - block.last_use > (4 * to_come if block.num_to_come else to_come):
                del self._open_blocks[number]

    def _read_block(self, number: int) -> _Block:
        (file, group), (image_column, label_column) = self._blocks[number], self._columns
        footer = self._footers[file]
        if (size := footer.row_group(group).total_byte_size) > MAX_ROW_GROUP_BYTES:
            raise UserError(
                f"{self._files[file]!r}: row group {group} has {size:,} bytes, and at most {MAX_ROW_GROUP_BYTES:,} "
                "are read at once: write the file with smaller row groups"
            )

        def read(stream: BinaryIO) -> pa.Table:
            parquet = pq.ParquetFile(stream, metadata=footer, pre_buffer=True, page_checksum_verification=True)
            return parquet.read_row_group(group, columns=[image_column, label_column], use_threads=False)

        table = _read_with_retries(self._files[file], read).flatten()  # a struct's fields become columns
        if {label_column} - set(table.column_names) or len(table) != footer.row_group(group).num_rows:
            raise UserError(
                f"{self._files[file]!r} is damaged: row group {group} has {len(table)} rows and the columns "
                f"{printable(', '.join(table.column_names))}; expected {footer.row_group(group).num_rows} rows and "
                f"the columns {image_column!r} and {label_column!r}"
            )
        labels = table.column(label_column).to_pylist()
        if image_column in table.column_names:
            return _Block(table.column(image_column), None, labels)
        fields = [f"{image_column}.bytes", f"{image_column}.path"]
        if set(fields) - set(table.column_names):
            raise UserError(
                f"{self._files[file]!r}: the column {image_column!r} holds no images; expected bytes, or "
                "bytes and path"
            )
        columns = [table.column(name) for name in fields]
        return _Block(columns[0], columns[1] if len(columns) > 1 else None, labels)

    def _class_index(self, label: Any) -> int:
        if self._classes is None and isinstance(label, int):
            return label
        if label is None:
            raise UserError("a streamed image has no label (null): remove such images from the files")
        if self._classes is None:
            raise UserError(f"a streamed image has the label {label!r}; expected the number of a class")
        if label not in self._classes:
            raise UserError(
                f"a streamed image has the label {label!r}, which is none of the {len(self._classes)} classes of the "
                "evaluation split: use files whose label column is a ClassLabel, or streaming: false"
            )
        return self._classes[label]


class ParquetWriter:
    """Writes images as they are streamed best: row groups of at most 8 MiB or 256 images, with checksums of the pages.

    The columns are `image` (bytes and path), `label`, and `sha256`, with the features by which the datasets library
    knows them. The same images give the same file.

    Args:
        stream: file that is open for writing.
        class_names: in the order of the labels.
    """

    def __init__(self, stream: BinaryIO, class_names: Sequence[str]):
        features = {
            "image": {"_type": "Image"},
            "label": {"names": list(class_names), "_type": "ClassLabel"},
            "sha256": {"dtype": "string", "_type": "Value"},
        }
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        self._schema = pa.schema(
            [("image", image), ("label", pa.int64()), ("sha256", pa.string())],
            {"huggingface": json.dumps({"info": {"features": features}})},
        )
        # Images do not become smaller; statistics and a dictionary of them would hold them once more.
        compression: Any = {"image.bytes": "NONE", "image.path": "ZSTD", "label": "ZSTD", "sha256": "ZSTD"}
        options: Any = {"compression": compression, "use_dictionary": False, "write_statistics": ["label"]}
        self._writer = pq.ParquetWriter(stream, self._schema, write_page_checksum=True, **options)
        self._rows: list[tuple[bytes, str | None, int, str]] = []
        self._num_bytes = 0

    def add(self, data: bytes, path: str | None, label: int, sha256: str) -> None:
        """Add an encoded image."""
        is_full = self._num_bytes + len(data) > ROW_GROUP_BYTES or len(self._rows) == ROW_GROUP_IMAGES
        if self._rows and is_full:
            self._write_row_group()
        self._rows.append((data, path, label, sha256))
        self._num_bytes += len(data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what is left, and the footer with `metadata`."""
        if self._rows:
            self._write_row_group()
        self._writer.add_key_value_metadata(dict(metadata))
        self._writer.close()

    def close(self) -> None:
        """Give up a file that is not finished: it gets no footer."""
        self._writer.is_open = False

    def _write_row_group(self) -> None:
        data, paths, labels, digests = zip(*self._rows, strict=True)
        image = pa.StructArray.from_arrays(
            [pa.array(data, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
        )
        table = pa.Table.from_arrays([image, pa.array(labels, pa.int64()), pa.array(digests)], schema=self._schema)
        self._writer.write_table(table, row_group_size=len(table))
        self._rows, self._num_bytes = [], 0


def read_schema(file: str) -> pa.Schema:
    """Read the schema of a parquet file, including the features that datasets stored in it."""
    return _read_footer(file).schema.to_arrow_schema()


def _read_footer(file: str) -> pq.FileMetaData:
    return _read_with_retries(file, lambda stream: pq.ParquetFile(stream).metadata)


def _read_with_retries(file: str, read: Callable[[BinaryIO], T]) -> T:
    remote = "://" in file
    options = {"cache_type": "none"} if remote else {}  # StreamedImages keeps what is read

    def open_and_read() -> T:
        filesystem, path = fsspec.core.url_to_fs(file)
        with filesystem.open(path, "rb", **options) as stream:
            return read(cast(BinaryIO, _WholeRanges(stream)) if hasattr(stream, "size") else stream)

    try:
        return with_retries(file, open_and_read) if remote else open_and_read()
    except Exception as error:  # each client library and each kind of broken response raises its own exceptions
        raise UserError(f"cannot read {file!r}: {type(error).__name__}: {first_line(error)}") from error


def with_retries(name: str, read: Callable[[], T]) -> T:
    """Return what `read` returns; if it fails, try again for five minutes, unless it would fail the same way.

    Args:
        name: what is read, for the log.
        read: reads something over a network.

    Raises:
        Exception: that of the last try.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            return read()
        except Exception as error:  # see _read_with_retries
            if wait is None or _is_final(error):
                raise
            reason = first_line(error)
            logger.warning("reading %r failed (%s: %s); next try in %d s", name, type(error).__name__, reason, wait)
            time.sleep(wait)
    raise AssertionError("the last try raises")


class _WholeRanges:
    """A remote file whose server must send the whole of each range that is asked for, and no more.

    Otherwise a short answer would look like a damaged file, which is final, and is only a bad connection.
    """

    closed = False

    def __init__(self, file: Any):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        rest = self._file.size - self._file.tell()
        wanted = rest if size is None or size < 0 else min(size, rest)
        data = self._file.read(wanted) if wanted > 0 else b""
        if len(data) != max(wanted, 0):
            raise ConnectionError(f"the server sent {len(data):,} bytes of {wanted:,}")
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        """Left to whoever opened the file."""


def _is_final(error: Exception) -> bool:
    """True if another try would fail the same way: no such file, no permission, no parquet file, our own refusal."""
    status = getattr(getattr(error, "response", None), "status_code", None) or 0
    refused = 400 <= status < 500 and status not in (408, 429)  # request timeout, too many requests
    return refused or isinstance(error, (FileNotFoundError, PermissionError, pa.ArrowInvalid, UserError))
