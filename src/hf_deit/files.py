"""Files: read those that a stranger may have written, with limits; flush those that a run has written to the disk.

A file from outside may be a pipe that never ends, a device, a link to either, or larger than the memory. What is read
here is a regular file of a stated size. JSON of that size takes up to some 30 times as much memory.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import UserError, printable


MEBIBYTE = 1 << 20
# Configurations, manifests, headers: real ones are smaller than a tenth of this.
MAX_JSON_BYTES = 16 * MEBIBYTE

_TAR_BLOCK = 512


def read_file(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Read a whole regular file.

    Args:
        path: of the file; a link to a regular file counts as one.
        max_bytes: the largest size that is read.

    Raises:
        UserError: it is no regular file, or larger.
        OSError: it does not exist, or cannot be read.
    """
    # A pipe without a writer would block for ever.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise UserError("is no regular file")
        data = file.read(min(found.st_size, max_bytes) + 1)  # a buffer of this size is allocated
        if found.st_size < len(data) <= max_bytes:  # it has grown, or its size is not known beforehand
            data += file.read(max_bytes + 1 - len(data))
        if max(found.st_size, len(data)) > max_bytes:
            raise UserError(f"is larger than {max_bytes:,} bytes ({max(found.st_size, len(data)):,})")
        return data


def read_text(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Read a text file in UTF-8; the error of any other file is one line with its name.

    Raises:
        UserError: the file is missing, cannot be read, is no regular file, larger than `max_bytes`, or not UTF-8.
    """
    try:
        return read_file(path, max_bytes).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)!r} cannot be read: {printable(reason)}") from error


def read_json(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file; the error of any other file is one line with its name.

    Raises:
        UserError: as for [`read_text`], or the text is no JSON, or nested some thousand levels deep.
    """
    text = read_text(path, max_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is no valid JSON: {printable(str(error))}") from error


def check_tar(path: str | os.PathLike) -> None:
    """Refuse a tar file that ends early or is followed by another: readers would leave out the rest without a word.

    Only the headers of the members are read. A compressed tar has a checksum of its own and is not looked at.

    Raises:
        UserError: the file was cut, lacks the two blocks of zeros that end an archive, or holds several archives.
    """
    with open(path, "rb", buffering=0) as file:
        size, position = os.fstat(file.fileno()).st_size, 0
        while True:
            header = os.pread(file.fileno(), _TAR_BLOCK, position)
            if len(header) < _TAR_BLOCK:
                break
            if not header.strip(b"\0"):  # the end of the archive; what follows may only be zeros
                rest = position + _TAR_BLOCK
                for start in range(rest, size, MEBIBYTE):
                    if os.pread(file.fileno(), MEBIBYTE, start).strip(b"\0"):
                        raise UserError(
                            f"{str(path)!r} holds more than one archive ({size - rest:,} bytes follow the end of the "
                            "first), as `cat a.tar b.tar` makes it, and only the first would be read: unpack it with "
                            "tar --ignore-zeros and pack it again"
                        )
                if size - rest >= _TAR_BLOCK:
                    return
                break
            length = _size_of_member(header)
            if length is None:
                if position == 0:  # compressed, or no tar at all, which its reader says
                    return
                raise UserError(
                    f"{str(path)!r} is damaged: no header of a member at byte {position:,}; copy or download it again"
                )
            position += _TAR_BLOCK + -(-length // _TAR_BLOCK) * _TAR_BLOCK
            if position > size:
                break
    raise UserError(
        f"{str(path)!r} was cut: it ends at byte {size:,} without the two blocks of zeros that end a tar file, so "
        "images may be missing. Copy or download it again; if it is whole, append them with truncate -s +1024"
    )


def _size_of_member(header: bytes) -> int | None:
    """The size in a header of a tar member; None where the checksum shows that it is none."""
    try:
        if sum(header[:148], 8 * 32) + sum(header[156:]) != int(header[148:156].strip(b"\0 "), 8):
            return None
        number = header[124:136]
        return int.from_bytes(number[1:], "big") if number[0] == 0x80 else int(number.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return None


def flush(path: Path) -> None:
    """Write a file, or the entries of a folder, to the disk before returning (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is whole or not there: it is written aside, flushed, and renamed over `path`.

    For one writer at a time: what a killed one leaves beside the file, the next one replaces.
    """
    aside = path.with_name(f"_{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_text(text, "utf-8")
        flush(aside)
        aside.replace(path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)
