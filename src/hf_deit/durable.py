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
