"""Preemption: after SIGTERM the run saves a checkpoint and exits with a status that asks for a restart.

Schedulers take a node back with SIGTERM and, some time later, SIGKILL. Not here: writing the checkpoint (the trainer).
A SIGKILL without SIGTERM loses the steps since the last checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from transformers import TrainerCallback


# EX_TEMPFAIL of sysexits.h: temporary failure, "the user is invited to retry".
EXIT_STATUS = 75
# Seconds that a data loader worker may outlive its loader when the loader is killed.
SECONDS_TO_OUTLIVE_THE_LOADER = 5


class Preempted(SystemExit):
    """Exit with status 75, raised after SIGTERM; a program that calls the trainer may catch this exception."""

    def __init__(self, message: str):
        super().__init__(EXIT_STATUS)
        self.message = message


class Preemption(TrainerCallback):
    """Callback that makes the Trainer save and stop after any rank received SIGTERM.

    All ranks stop at the same step: the votes of each step are reduced while the next step runs, so no device waits.

    Attributes:
        agreed: True if the run is stopping, or has stopped, because of SIGTERM.
    """

    def __init__(self):
        self.agreed = False
        self._received = False
        self._votes: tuple[torch.Tensor, dist.Work] | None = None
        self._handler_before: Callable | int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.agreed = self._received = False
        self._votes = None
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows signal handlers in the main thread only
            self._handler_before = signal.signal(signal.SIGTERM, self._receive)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            self.agreed = self._previous_vote()
            votes = torch.tensor(float(self._received), device=args.device)
            self._votes = votes, dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True)
        else:
            self.agreed = self._received
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self._votes is not None:
            self._votes[1].wait()
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)
            self._handler_before = None

    def _receive(self, number, frame) -> None:
        self._received = True

    def _previous_vote(self) -> bool:
        if self._votes is None:
            return False
        votes, work = self._votes
        work.wait()
        return bool(votes.item())


def outlive_sigterm(worker_init_fn: Callable[[int], None] | None) -> Callable[[int], None]:
    """Wrap a data loader's `worker_init_fn` so that workers obey SIGTERM only from their own loader.

    Slurm sends SIGTERM to every process of a job step, and a worker that dies ends the run before it can save.
    """
    return partial(_start_worker, worker_init_fn)


def _start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    if worker_init_fn is not None:
        worker_init_fn(worker_id)
    if hasattr(signal, "sigtimedwait"):  # macOS has neither sigtimedwait nor Slurm
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """End the worker when its loader sends SIGTERM or is gone.

    PyTorch's own check starts later: if the loader is killed before, PyTorch watches the process that adopted the
    worker, and the worker never ends.
    """
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        sent = signal.sigtimedwait({signal.SIGTERM}, SECONDS_TO_OUTLIVE_THE_LOADER)
        if sent is not None and sent.si_pid == parent.pid:
            break
    os._exit(0)
