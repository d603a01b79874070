"""What the processes of a run do together: one of them works for all, and one run at a time has a directory."""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from .errors import UserError


logger = logging.getLogger(__name__)

T = TypeVar("T")

# File in output_dir that is locked while a run uses the directory. Uploads leave out names that begin with "_".
LOCK = "_lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def on_main_process(action: Callable[[], T]) -> T:
    """Run `action` on the main process; every rank gets its result or its [`UserError`], so no rank waits for ever.

    Every rank must call this function.

    Raises:
        UserError: the error (or subclass) that `action` raised, on every rank.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        error.said_by_main_process = not PartialState().is_main_process  # one line is enough
        raise error
    return result


def current_process() -> PartialState:
    """The rank of this process and the number of processes. Without a GPU, accelerate needs `cpu=True` for several."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


class _Lock:
    """A directory that this process has locked.

    Attributes:
        folder: its real path.
        descriptor: of the locked file. Closing any other descriptor of that file would release the lock.
        made: whether the directory was made for the lock.
        pid: of the process; a forked process inherits the object, but not the lock.
        users: number of `with` blocks that need the lock.
    """

    def __init__(self, folder: str, descriptor: int, made: bool):
        self.folder, self.descriptor, self.made = folder, descriptor, made
        self.pid, self.users = os.getpid(), 0


_locks: dict[str, _Lock] = {}


@contextmanager
def only_run_in(folder: str | os.PathLike) -> Iterator[None]:
    """Lock a directory for this process inside the `with`, as [`claim_directory`] does; blocks may be nested.

    The end of the outermost block releases the lock, also one that was claimed before.
    """
    lock = claim_directory(folder)
    lock.users += 1
    try:
        yield
    finally:
        lock.users -= 1
        if not lock.users:
            _release(lock)


def claim_directory(folder: str | os.PathLike) -> _Lock:
    """Lock a directory, which is made if it is not there, until `only_run_in` or the process ends, however it ends.

    The lock is the kernel's (`lockf`): it needs no cleaning up after a crash, network file systems with a lock service
    know it, and loader workers do not inherit it. The file's text says who holds it.

    Raises:
        UserError: another process holds the lock, or the directory cannot be written.
    """
    folder = Path(folder)
    lock = _locks.get(os.path.realpath(folder))
    if lock is not None and lock.pid == os.getpid():
        return lock
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, has_locks = _open_and_lock(folder)
        _look_at_last_holder(folder, os.pread(descriptor, 1000, 0), has_locks)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        os.fsync(descriptor)
    except OSError as error:
        raise UserError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror}. Choose another output_dir, or make this "
            "one writable"
        ) from error
    lock = _Lock(os.path.realpath(folder), descriptor, made)
    _locks[lock.folder] = lock
    atexit.register(_release, lock)
    return lock


def _open_and_lock(folder: Path) -> tuple[int, bool]:
    """Return the descriptor of the locked file, and whether the file system has locks."""
    path, has_locks = folder / LOCK, True
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = _holder(os.pread(descriptor, 1000, 0))
                os.close(descriptor)
                raise _in_use(folder, holder) from None
            if error.errno not in NO_LOCKS:
                raise
            has_locks = False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor, has_locks
        os.close(descriptor)  # the last holder has removed the file between open and lock


def _look_at_last_holder(folder: Path, text: bytes, has_locks: bool) -> None:
    """Warn of a holder that never released the lock, where the kernel's lock alone does not prove that it is gone."""
    holder = _holder(text)
    if holder is None:
        return
    here = holder["host"] == socket.gethostname()
    if here and not has_locks and _is_alive(holder["pid"]):
        raise _in_use(folder, holder)
    if not here:
        logger.warning(
            "output_dir %r was last used by process %d on host %r since %s, which has not released it. If that run "
            "still goes on (file locks do not reach every network file system), stop one of the two",
            *(str(folder), holder["pid"], holder["host"], holder["since"]),
        )


def _in_use(folder: Path, holder: dict | None) -> UserError:
    who = (
        f"process {holder['pid']} on host {holder['host']!r} since {holder['since']}" if holder else "another process"
    )
    return UserError(
        f"output_dir {str(folder)!r} is in use by another run ({who}): wait for it or stop it, or choose another "
        "output_dir"
    )


def _holder(text: bytes) -> dict | None:
    try:
        holder = json.loads(text)
        return {"host": str(holder["host"]), "pid": int(holder["pid"]), "since": ascii(holder["since"])[1:-1]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _release(lock: _Lock) -> None:
    """Release a lock that this process holds, and leave no trace of it."""
    if lock.pid != os.getpid() or _locks.get(lock.folder) is not lock:
        return
    del _locks[lock.folder]
    with suppress(OSError):
        os.unlink(os.path.join(lock.folder, LOCK))
    os.close(lock.descriptor)
    if lock.made:
        with suppress(OSError):  # a run that wrote anything keeps its directory
            os.rmdir(lock.folder)
