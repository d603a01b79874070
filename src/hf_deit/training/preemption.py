"""Preemption: after SIGTERM the run saves a checkpoint and exits with a status that asks for a restart.

Schedulers take a node back with SIGTERM and, some time later, SIGKILL. Not here: writing the checkpoint (the trainer).
A SIGKILL without SIGTERM loses the steps since the last checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..errors import EXIT_STATUS as EXIT_STATUS
from ..errors import Preempted as Preempted


# Seconds that a data loader worker may outlive its loader when the loader is killed.
SECONDS_TO_OUTLIVE_THE_LOADER = 5
# Seconds in which a worker ends that its loader has asked to.
SECONDS_TO_END = 10


class Preemption(TrainerCallback):
    """Callback that makes the Trainer save and stop after any rank received SIGTERM.

    All ranks stop at the same step: the votes of each step are reduced while the next step runs, so no device waits.
    The run evaluates, logs and saves no more than it would at that step without SIGTERM, except for one checkpoint.

    Attributes:
        agreed: True if the run is stopping, or has stopped, because of SIGTERM.
        received: True if this rank received SIGTERM in training.
    """

    def __init__(self):
        self.agreed = False
        self.received = False
        self._saved_step = -1
        self._votes: tuple[torch.Tensor, dist.Work] | None = None
        self._handler_before: Callable | int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.agreed = self.received = False
        self._votes = None
        self._saved_step = -1
        self.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            self.agreed = self._previous_vote()
            votes = torch.tensor(float(self.received), device=args.device)
            self._votes = votes, dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True)
        else:
            self.agreed = self.received
        if self.agreed:
            control.should_training_stop = True
            # At the end of an epoch its evaluation comes first, so that a resumed run need not make it.
            control.should_save = not _ends_an_epoch(state)

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        # Transformers comes here whenever training stops, as if the epoch were over.
        if self.agreed:
            if not _ends_an_epoch(state):
                control.should_evaluate = control.should_log = False
            control.should_save = self._saved_step != state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        if self._votes is not None:
            self._votes[1].wait()
        self.end()

    def begin(self) -> None:
        """Note SIGTERM from now on, instead of what it did before."""
        in_main_thread = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
        if in_main_thread and self._handler_before is None:
            self._handler_before = signal.signal(signal.SIGTERM, self._receive)

    def end(self) -> None:
        """Give SIGTERM back to the handler before; also after an exception, when Transformers ends no training."""
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)
            self._handler_before = None

    def _receive(self, number, frame) -> None:
        self.received = True

    def _previous_vote(self) -> bool:
        if self._votes is None:
            return False
        votes, work = self._votes
        work.wait()
        return bool(votes.item())


def _ends_an_epoch(state) -> bool:
    """Whether an undisturbed run would end its epoch with this step: the epoch, or the whole run, is over."""
    return state.epoch > 0 and (float(state.epoch).is_integer() or state.global_step >= state.max_steps)


def sheltered_start() -> BaseContext | None:
    """Return a context for a data loader whose workers are born with SIGTERM blocked.

    They keep it so until [`outlive_sigterm`] looks at who sent it; without, a signal to all could end one before.
    None where workers are not forked: those import Python anew, and a signal to all ends them meanwhile.
    """
    if multiprocessing.get_start_method() != "fork":
        return None
    forked = multiprocessing.get_context("fork")

    class Sheltered(forked.Process):
        def start(self) -> None:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    context: Any = type(forked)()
    context.Process = Sheltered
    return context


def outlive_sigterm(worker_init_fn: Callable[[int], None] | None) -> Callable[[int], None]:
    """Wrap a data loader's `worker_init_fn` so that workers obey SIGTERM only from their own loader.

    Slurm sends SIGTERM to every process of a job step, and a worker that dies ends the run before it can save.
    To be called in the loader's process.
    """
    global _finalizes
    if _finalizes != os.getpid():
        Finalize(None, _end_workers, exitpriority=0)
        _finalizes = os.getpid()
    return partial(_start_worker, worker_init_fn)


_finalizes = -1  # the process that ends its workers at its exit; a forked one has to see to its own


def _end_workers() -> None:
    """End the workers that are left when their process exits, before multiprocessing waits for them.

    Multiprocessing sends SIGTERM once. Where a stranger's SIGTERM, sent to all, is still pending, the kernel drops the
    second one, the worker outlives the first, and this process would wait for it for ever.
    """
    end = time.monotonic() + SECONDS_TO_END
    while children := [child for child in multiprocessing.active_children() if child.daemon]:
        for child in children:
            child.terminate() if time.monotonic() < end else child.kill()
        children[0].join(0.05)


def _start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the loader ends its workers
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
