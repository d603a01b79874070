"""SIGTERM ends a run in good order: a checkpoint, then an exit status that says "start me again".

Schedulers take a node back with SIGTERM and, some time later, SIGKILL. Not here: writing the checkpoint (the trainer),
and what was lost where SIGKILL came alone: the steps since the last checkpoint.
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


# EX_TEMPFAIL of sysexits.h: a temporary failure, "the user is invited to retry".
EXIT_STATUS = 75
# How long a loader's worker may be there after its loader was killed.
SECONDS_TO_OUTLIVE_THE_LOADER = 5


class Preempted(SystemExit):
    """Ends the process with status 75 after SIGTERM; a program that calls the trainer may catch it."""

    def __init__(self, message: str):
        super().__init__(EXIT_STATUS)
        self.message = message


class Preemption(TrainerCallback):
    """Has the Trainer save and stop after the step in which any rank got SIGTERM.

    Ranks agree on the step: each step's answers are added up while the next one runs, so no device waits for it.

    Attributes:
        agreed: the run is stopping, or has stopped, because of SIGTERM.
    """

    def __init__(self):
        self.agreed = False
        self._received = False
        self._votes: tuple[torch.Tensor, dist.Work] | None = None
        self._handler_before: Callable | int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.agreed = self._received = False
        self._votes = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
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
    """A loader's `worker_init_fn` whose workers obey SIGTERM only where their own loader sends it.

    Slurm sends it to every process of a step, and a worker that dies takes the run with it before it can save.
    """
    return partial(_start_worker, worker_init_fn)


def _start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    if worker_init_fn is not None:
        worker_init_fn(worker_id)
    if hasattr(signal, "sigtimedwait"):  # macOS has it not, nor Slurm
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """Ends the worker when its loader says so or is gone.

    PyTorch's own watch begins after this: a loader that is killed before leaves it watching whoever adopted the
    worker, and the worker there for ever.
    """
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        sent = signal.sigtimedwait({signal.SIGTERM}, SECONDS_TO_OUTLIVE_THE_LOADER)
        if sent is not None and sent.si_pid == parent.pid:
            break
    os._exit(0)
