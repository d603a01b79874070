"""Files that are whole or not there, also after the machine has lost its power."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Has the system put a file, or a folder's entries, on the disk before what follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
