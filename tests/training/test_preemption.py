"""SIGTERM saves and stops; loader workers outlive the one that is meant for the run."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_deit.training.preemption import EXIT_STATUS, Preempted, Preemption, outlive_sigterm


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(tmp_path, use_cpu=True)


def test_the_run_stops_after_the_step_in_which_the_signal_came(args):
    before = signal.getsignal(signal.SIGTERM)
    watch, state, control = Preemption(), TrainerState(), TrainerControl()
    watch.on_train_begin(args, state, control)
    watch.on_step_end(args, state, control)
    assert not control.should_save and not control.should_training_stop and not watch.agreed
    os.kill(os.getpid(), signal.SIGTERM)
    watch.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop and watch.agreed
    watch.on_train_end(args, state, control)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_run_of_the_process_starts_without_it(args):
    watch = Preemption()
    for expected in (True, False):
        control = TrainerControl()
        watch.on_train_begin(args, TrainerState(), control)
        if expected:
            os.kill(os.getpid(), signal.SIGTERM)
        watch.on_step_end(args, TrainerState(), control)
        watch.on_train_end(args, TrainerState(), control)
        assert control.should_training_stop is expected


def test_in_a_thread_no_handler_is_set(args):
    watch, before = Preemption(), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=watch.on_train_begin, args=(args, TrainerState(), TrainerControl()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_exit_status_says_try_again():
    program = "from hf_deit.errors import run_script\nfrom hf_deit.training.preemption import Preempted\n"
    program += "def main():\n    raise Preempted('stopped by SIGTERM after step 3')\nrun_script(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == EXIT_STATUS == os.EX_TEMPFAIL and Preempted("x").code == EXIT_STATUS
    assert done.stderr.splitlines()[-1] == "stopped by SIGTERM after step 3"


class Slow:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.02)
        return index, os.getpid()


def terminated_by_a_stranger(pid: int) -> None:
    subprocess.run(["kill", "-TERM", str(pid)], check=True)


def read(worker_init_fn) -> list[int]:
    """What a loader gives of whose workers one gets SIGTERM after the first batch."""
    seen = []
    for numbers, pids in DataLoader(Slow(), batch_size=4, num_workers=2, worker_init_fn=worker_init_fn):
        if not seen:
            terminated_by_a_stranger(int(pids[0]))
        seen += numbers.tolist()
    return seen


def test_a_worker_outlives_the_signal_that_everyone_gets():
    assert read(outlive_sigterm(None)) == list(range(40))
    assert read(outlive_sigterm(os.nice)) == list(range(40))  # with a `worker_init_fn` of the user's


def test_without_it_the_run_would_die_with_its_worker():
    with pytest.raises(RuntimeError, match="killed by signal|exited unexpectedly"):
        read(None)


def test_a_worker_obeys_its_own_process():
    loader = DataLoader(
        Slow(), batch_size=4, num_workers=2, persistent_workers=True, worker_init_fn=outlive_sigterm(None)
    )
    pids = {int(pid) for _, pids in loader for pid in pids}
    assert len(pids) == 2
    workers = loader._iterator._workers
    for worker in workers:
        worker.terminate()
        worker.join(10)
        assert not worker.is_alive()


KILLED_WHILE_ITS_WORKER_STARTS = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from hf_deit.training import preemption

preemption.SECONDS_TO_OUTLIVE_THE_LOADER = 0.2
loader = os.getpid()

def start_late(worker_id):
    print(os.getpid(), flush=True)
    os.kill(loader, signal.SIGKILL)
    while os.getppid() == loader:
        time.sleep(0.01)

init = preemption.outlive_sigterm(start_late) if sys.argv[1] == "ours" else start_late
next(iter(DataLoader(range(8), num_workers=1, worker_init_fn=init)))
"""


@pytest.mark.parametrize("whose, stays", [("ours", False), ("torch's", True)])
def test_a_worker_goes_whose_loader_is_killed_while_it_starts(whose, stays):
    program = [sys.executable, "-c", KILLED_WHILE_ITS_WORKER_STARTS, whose]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        assert process.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + (8 if stays else 60)  # torch looks every 5 seconds
    while (there := Path(f"/proc/{worker}").exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if there:
        os.kill(worker, signal.SIGKILL)
    assert there == stays


STRUCK_AT_BIRTH = """
import os, subprocess, sys, time
from torch.utils.data import DataLoader
from hf_deit.training.preemption import outlive_sigterm, sheltered_start

def struck_by_a_stranger():
    subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)
    time.sleep(0.2)

context = sheltered_start() if sys.argv[1] == "sheltered" else "fork"
loader = DataLoader(
    range(8), num_workers=1, worker_init_fn=outlive_sigterm(None), multiprocessing_context=context
)
os.register_at_fork(after_in_child=struck_by_a_stranger)
print(sum(batch.item() for batch in loader))
"""


@pytest.mark.parametrize("start, outlives", [("sheltered", True), ("plain", False)])
def test_a_worker_outlives_a_signal_that_comes_before_its_first_line(start, outlives):
    """A kill of everything in an evaluation met a worker that had only just been forked."""
    program = [sys.executable, "-c", STRUCK_AT_BIRTH, start]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0 and done.stdout == "28\n") == outlives


STOPPED_WHILE_TWO_SIGNALS_COME = """
import os, signal, subprocess, sys, time
from torch.utils.data import DataLoader
from hf_deit.training.preemption import outlive_sigterm

init = outlive_sigterm(None)
batches = iter(DataLoader(range(8), num_workers=1, worker_init_fn=init, multiprocessing_context="fork"))
next(batches)
worker = batches._workers[0].pid
time.sleep(0.5)  # its thread waits for signals
os.kill(worker, signal.SIGSTOP)
subprocess.run(["kill", "-TERM", str(worker)], check=True)
subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {worker}"], stdout=subprocess.DEVNULL)
print(worker, flush=True)
sys.unraisablehook = lambda _: None
sys.modules["kept"] = batches
"""


def test_a_run_ends_whose_workers_got_two_signals_at_once():
    """The kernel keeps one pending SIGTERM, here the stranger's, and drops that of the worker's own process."""
    program = [sys.executable, "-c", STOPPED_WHILE_TWO_SIGNALS_COME]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert not Path(f"/proc/{worker}").exists()
