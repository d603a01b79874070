"""Errors that the user can fix, and the way a script ends."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix. Its message is one line: what was got, what was expected, and how to fix it.

    Scripts print only the message. Any other exception is a bug, in this package or in a library, and keeps its
    traceback.
    """


class NonFiniteError(UserError, FloatingPointError):
    """A loss or a gradient is not finite; the weights are those before the step that produced it."""


@contextmanager
def refusals_of_libraries() -> Iterator[None]:
    """Turn an error with which Transformers, accelerate or a missing package rejects an option into a [`UserError`].

    Only errors that one of these libraries itself raises are converted; an error of this package or of PyTorch passes
    unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        if not (isinstance(error, ImportError) or _raised_for_a_library(error)):
            raise
        text = " ".join(str(error).split())
        raise UserError(f"an option of this run was rejected: {text}") from error


def _raised_for_a_library(error: Exception) -> bool:
    """Whether the innermost package on the way to the error, the standard library aside, is one of theirs."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    packages = [file for file in files if "site-packages" in file.parts or Path(__file__).parent in file.parents]
    return bool(packages) and bool({"transformers", "accelerate"} & set(packages[-1].parts))


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`; a [`UserError`] becomes one line on stderr and exit status 1.

    A failure of the machine (a full disk, a loader worker that is killed) is reported in the same way. An exception of
    a loader worker is treated like an exception of this process. No line of the log carries control characters.
    """
    logging.setLogRecordFactory(_PrintableRecord)
    try:
        main()
    except SystemExit as error:
        if message := getattr(error, "message", None):
            print(message, file=sys.stderr, flush=True)
        raise
    except Exception as error:
        # PyTorch reports the death of a worker in a signal handler, which raises wherever it interrupts: also here.
        with suppress(RuntimeError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message = _message_of(error) if isinstance(error, UserError) else _done_by_the_machine(error)
        if message is None:
            raise
        sys.exit(f"error: {printable(message)}")


def _message_of(error: UserError) -> str:
    """Return the message of `error`.

    The text of an error that PyTorch re-raises from a loader worker is a whole traceback; the message is its end.
    """
    text = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback", text):
        return text
    *_, last_frame = re.finditer(r'^  File ".+", line \d+.*\n(?:    .*\n)*', text, re.MULTILINE)
    return text[last_frame.end() :].partition(": ")[2].strip()


def _done_by_the_machine(error: Exception) -> str | None:
    text, again = str(error), "Start the same command again to resume from the last checkpoint"
    if os.strerror(errno.ENOSPC) in text:  # safetensors raises its own exception type
        return f"the disk is full ({text.splitlines()[0]}). Free some space. {again}"
    # The death of a worker is noticed by PyTorch, or when this process takes a result from the worker's queue.
    dies = re.match(r"DataLoader worker \(pid.*", text)
    files = [Path(frame.filename).parts[-2:] for frame in traceback.extract_tb(error.__traceback__)]
    if dies or (isinstance(error, (OSError, EOFError)) and ("multiprocessing", "queues.py") in files):
        return (
            f"a loader worker died ({dies[0].strip() if dies else type(error).__name__}). Usual causes: out of memory "
            f"(see dmesg), a full /dev/shm, a crash in a library (use dataloader_num_workers: 0 to see it). {again}"
        )
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the type of an error without message."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."))


def printable(text: str) -> str:
    """The text as one line without control characters, which would act on a terminal; they are written as in Python.

    What a stranger may have written (names, settings, the errors of libraries about them) is printed through this.
    """
    if text.isprintable():
        return text
    kept = "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
    words = " ".join(part for part in re.split(r"[\t\n\r\f\v]+", text) if part)
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in words
    )


class _PrintableRecord(logging.LogRecord):
    """A line of the log without control characters; its own line ends stay, those of its values do not."""

    def getMessage(self) -> str:  # noqa: N802
        if isinstance(self.args, tuple):
            self.args = tuple(_line(value) for value in self.args)
        return "\n".join(map(printable, super().getMessage().split("\n")))


def _line(value: object) -> object:
    return printable(str(value)) if isinstance(value, (str, Exception)) else value


def some_of(names: Sequence[str], count: int = 3) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
