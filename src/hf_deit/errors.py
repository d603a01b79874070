"""Errors that the user can fix, and the way a script ends: one line, whatever ended it.

Nothing here imports a library, so that a script can be under `run_script` before it imports any.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """An error that the user can fix. Its message is one line: what was got, what was expected, and how to fix it.

    Scripts print only the message. Any other exception is a bug, in this package or in a library, and keeps its
    traceback.
    """


class NonFiniteError(UserError, FloatingPointError):
    """A loss or a gradient is not finite; the weights are those before the step that produced it."""


# EX_TEMPFAIL of sysexits.h: temporary failure, "the user is invited to retry".
EXIT_STATUS = 75
# What the shell reports of a program that Ctrl-C ended.
INTERRUPTED_STATUS = 128 + signal.SIGINT


class Preempted(SystemExit):
    """Exit with status 75, raised after SIGTERM; a program that calls the trainer may catch this exception."""

    def __init__(self, message: str):
        super().__init__(EXIT_STATUS)
        self.message = message


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


@contextmanager
def clear_hub_errors(name: str, advice: Callable[[], str], mend: str) -> Iterator[None]:
    """Turn errors raised inside huggingface_hub while something is pushed into a one-line [`UserError`].

    Args:
        name: of the repository.
        advice: returns what to do next, the end of the message.
        mend: what to do where the token may not write, such as "set hub_model_id to <your name>/<model>".
    """
    try:
        yield
    except Exception as error:  # httpx, xet and huggingface_hub have dozens of unrelated types
        frames = traceback.extract_tb(error.__traceback__)
        if not any("huggingface_hub" in Path(frame.filename).parts for frame in frames):
            raise
        raise UserError(f"cannot push to {name!r} on the Hub: {why_of_hub(error, mend)}. {advice()}") from error


def why_of_hub(error: BaseException, mend: str) -> str:
    """Return why an upload failed, in one line; `mend` as for [`clear_hub_errors`]."""
    while error.__cause__ is not None and not hasattr(error, "response") and not isinstance(error, ValueError):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip().rstrip(".: ") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # The first line of an HTTP error is enough; errors about names and front matter need all lines.
    reason = lines[0] if status else ": ".join(lines)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        reason = "the token is missing or not valid: run `hf auth login`, or set HF_TOKEN"
    elif status in (403, 404):
        reason = (
            "the token may not write there: the name belongs to somebody else, or the token is read-only; "
            f"{mend}, or use a token with write permission"
        )
    elif status is None and not isinstance(error, ValueError):
        reason = f"the connection failed ({reason})"
    return reason


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`; a [`UserError`] becomes one line on stderr and exit status 1.

    A failure of the machine (a full disk, a loader worker that is killed) is reported in the same way. An exception of
    a loader worker is treated like an exception of this process. No line of the log carries control characters.
    SIGTERM, also that of a launcher that dies, ends the script with status 75, and Ctrl-C with status 130; each prints
    one line. `main` should import what takes long.
    """
    logging.setLogRecordFactory(_PrintableRecord)
    try:
        with sigterm_raises():
            _prepare_process()
            main()
            _leave_group()
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as error:
        if message := getattr(error, "message", None):
            _say(message)
        raise
    except KeyboardInterrupt:
        _say("interrupted by Ctrl-C; the same command resumes a training run from its last checkpoint")
        sys.exit(INTERRUPTED_STATUS)
    except Exception as error:
        # PyTorch reports the death of a worker in a signal handler, which raises wherever it interrupts: also here.
        with suppress(RuntimeError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message = _message_of(error) if isinstance(error, UserError) else _done_by_the_machine(error)
        if message is None:
            raise
        _drop_what_nobody_reads()
        sys.exit(1 if getattr(error, "said_by_main_process", False) else f"error: {printable(message)}")


def _leave_group() -> None:
    """Leave the other processes of a run that is over. Left to the end of the interpreter, this may abort a rank."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise [`Preempted`] inside the `with`. A handler that somebody else has set stays in place.

    At the end of the `with` of a script nothing is left to save: a later SIGTERM does not change how the script ends.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    if not in_main_thread or signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, _ignore):
        yield
        return
    signal.signal(signal.SIGTERM, _raise_preempted)
    hook = sys.unraisablehook
    sys.unraisablehook = partial(_raise_again, hook)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, _ignore)
        sys.unraisablehook = hook


def _raise_preempted(number, frame) -> None:
    signal.signal(signal.SIGTERM, _ignore)  # a second one must not interrupt what ends the run
    raise Preempted("stopped by SIGTERM. Start the same command again")


def _raise_again(hook: Callable, unraisable) -> None:
    """Send SIGTERM once more when Python has dropped the exception of the first one, and with it the end of the run.

    The handler may interrupt a callback of a weak reference (each import has some) or a `__del__`, which must not
    raise. Nor may this hook, so the signal comes a little later.
    """
    if not isinstance(unraisable.exc_value, Preempted):
        hook(unraisable)
        return
    signal.signal(signal.SIGTERM, _raise_preempted)
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def _ignore(number, frame) -> None:
    pass


def _prepare_process() -> None:
    """Make sure that the process can print and has a directory, and that it does not outlive its launcher."""
    streams: Any = (sys.stdout, sys.stderr)
    for stream in streams:
        if getattr(stream, "errors", None) == "strict":  # a name that the terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("the current directory no longer exists: change to another one") from error
    _watch_launcher()


# Variables that only torchrun and `accelerate launch` set, for the processes that they start.
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
LAUNCHER = re.compile(
    rb"(.*/)?(accelerate|accelerate-launch|torchrun)|accelerate\.commands\..*|torch\.distributed\..*"
)
# Names of processes that adopt the children of one that died, besides process 1. None of them starts ranks itself.
ADOPTERS = ("systemd", "slurmstepd", "containerd-shim", "conmon", "tini", "dumb-init", "catatonit", "supervisord")
PR_SET_PDEATHSIG = 1


def _watch_launcher() -> None:
    """Let Linux send SIGTERM to this process when the launcher that started it dies, however it dies.

    Any other parent, such as a shell under nohup or setsid, may end before the run.
    """
    if not (sys.platform == "linux" and any(name in os.environ for name in LAUNCHER_VARIABLES)):
        return
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")[:4]
        adopted = parent == 1 or Path(f"/proc/{parent}/comm").read_text().strip() in ADOPTERS
    except OSError:  # it died a moment ago
        words, adopted = [], False
    is_launcher = any(LAUNCHER.fullmatch(word) for word in words)
    if is_launcher:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or (adopted and not is_launcher):  # it died before it was watched
        os.kill(os.getpid(), signal.SIGTERM)


def _say(message: str) -> None:
    _drop_what_nobody_reads()
    print(message, file=sys.stderr, flush=True)


def _drop_what_nobody_reads() -> None:
    """Send a stream whose reader has gone to nowhere: the interpreter's end would complain of what is left in it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and _nobody_reads(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _nobody_reads(stream) -> bool:
    """Whether the stream is a pipe whose reader has gone, as in `| head -1`."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # closed, no file, or a system without poll
        return False


def _message_of(error: UserError) -> str:
    """Return the message of `error`.

    The text of an error that PyTorch re-raises from a loader worker is a whole traceback; the message is its end.
    """
    text = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback", text):
        return text
    *_, last_frame = re.finditer(r'^  File ".+", line \d+.*\n(?:    .*\n)*', text, re.MULTILINE)
    return text[last_frame.end() :].partition(": ")[2].strip()


FAILURES_OF_STORAGE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO, errno.ESTALE)


def _done_by_the_machine(error: Exception) -> str | None:
    text, again = str(error), "Start the same command again to resume from the last checkpoint"
    if os.strerror(errno.ENOSPC) in text:  # safetensors raises its own exception type
        return f"the disk is full ({text.splitlines()[0]}). Free some space. {again}"
    if isinstance(error, BrokenPipeError) and any(map(_nobody_reads, filter(None, (sys.stdout, sys.stderr)))):
        return f"nobody reads the output any more, as with `| head`: write it to a file instead. {again}"
    if isinstance(error, OSError) and error.errno in FAILURES_OF_STORAGE and error.filename is not None:
        return f"{str(error.filename)!r} cannot be used: {error.strerror}. {again}"
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
