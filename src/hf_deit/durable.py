"""Flush files to the disk, so that after a loss of power a file is either complete or missing."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Write a file, or the entries of a folder, to the disk before returning (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is whole or not there: it is written aside, flushed, and renamed over `path`."""
    aside = path.with_name(f"_{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_text(text, "utf-8")
        flush(aside)
        aside.replace(path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)
