"""Errors that are the user's to mend, and how a script ends."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UserError(ValueError):
    """What was asked for cannot be done. The message is one line: what was got, what was expected, how to mend it.

    Scripts print the message alone. Any other exception is a bug, here or in a library, and keeps its traceback.
    """


class NonFiniteError(UserError, FloatingPointError):
    """A loss or a gradient that is not finite; the weights are those before it."""


@contextmanager
def refusals_of_libraries() -> Iterator[None]:
    """Turn what Transformers, accelerate or a missing package refuse about the user's options into a [`UserError`].

    Only what one of these libraries itself raises counts: an error of ours, or of PyTorch, passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        frames = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        raised_by = {"transformers", "accelerate"} & set(frames[-1]) or isinstance(error, ImportError)
        if not raised_by:
            raise
        text = " ".join(str(error).split())
        raise UserError(f"an option of this run was refused: {text}") from error


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`; a [`UserError`] becomes one line on stderr and exit status 1.

    So does what the machine does to a run: a full disk, a loader's worker that is killed. What a loader's worker
    raises counts like what is raised in this process.
    """
    try:
        main()
    except SystemExit as error:
        if message := getattr(error, "message", None):
            print(message, file=sys.stderr, flush=True)
        raise
    except Exception as error:
        # PyTorch reports a worker's death by a signal handler that raises wherever it interrupts, also here.
        with suppress(RuntimeError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message = _message_of(error) if isinstance(error, UserError) else _done_by_the_machine(error)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def _message_of(error: UserError) -> str:
    """The message; of an error that PyTorch re-raises from a worker, the end of the traceback that is its text."""
    text = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback", text):
        return text
    *_, last_frame = re.finditer(r'^  File ".+", line \d+.*\n(?:    .*\n)*', text, re.MULTILINE)
    return text[last_frame.end() :].partition(": ")[2].strip()


def _done_by_the_machine(error: Exception) -> str | None:
    text, again = str(error), "Start the same command again: it resumes from its last checkpoint"
    if os.strerror(errno.ENOSPC) in text:  # safetensors has a type of its own for it
        return f"the disk is full ({text.splitlines()[0]}). Free some space. {again}"
    # A worker that dies is noticed by PyTorch, or where its result is taken from its queue.
    dies = re.match(r"DataLoader worker \(pid.*", text)
    files = [Path(frame.filename).parts[-2:] for frame in traceback.extract_tb(error.__traceback__)]
    if dies or (isinstance(error, (OSError, EOFError)) and ("multiprocessing", "queues.py") in files):
        return (
            f"a loader worker died ({dies[0].strip() if dies else type(error).__name__}). Usual causes: no memory "
            f"left (see dmesg), a full /dev/shm, a crash of a library (dataloader_num_workers: 0 shows it). {again}"
        )
    return None
