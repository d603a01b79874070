"""Slow imports, which come once a command line is read, without a search for garbage among what they make."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def late_imports() -> Iterator[None]:
    """Look for no garbage inside the `with` of a command, which only imports, nor later among what was imported.

    They make millions of objects that stay. Looking through them again and again would be a quarter of the time of
    importing Transformers, and of each search after that.
    """
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:  # a second run in one process must not keep the garbage of the first
            gc.freeze()
        if was_enabled:
            gc.enable()
