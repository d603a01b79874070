"""One of two gloo processes works for both; one process at a time has a directory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_deit.errors import UserError
from hf_deit.processes import claim_directory, on_main_process, only_run_in
from hf_deit.training.checkpoints import CheckpointError


PROGRAM = """
import os
from hf_deit.training.checkpoints import CheckpointError
from hf_deit.processes import on_main_process
from accelerate import PartialState

rank, done = PartialState(cpu=True).process_index, []
found = on_main_process(lambda: done.append(rank) or {"from": rank})

def refuse():
    raise CheckpointError(f"no, says {rank}")

try:
    on_main_process(refuse)
except CheckpointError as refusal:
    told = str(refusal)
PartialState().destroy_process_group()
os.write(1, f"{rank}: did it {len(done)} times, {found}, {told}\\n".encode())
"""


def test_alone_it_is_the_call():
    assert on_main_process(lambda: 3) == 3

    def refuse():
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="^no$"):
        on_main_process(refuse)


def test_all_ranks_hear_the_result_and_the_refusal(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    done = subprocess.run(
        [*launch, "--rdzv_endpoint", "localhost:0", str(program)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == [
        "0: did it 1 times, {'from': 0}, no, says 0",
        "1: did it 0 times, {'from': 0}, no, says 0",
    ]


HOLDER = """
import os, sys, time
from hf_deit.processes import only_run_in
with only_run_in(sys.argv[1]), only_run_in(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
    if os.environ.get("CRASH"):
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def holder(tmp_path):
    """`holder(crash)`: a process that has locked `tmp_path / "run"` until a line comes."""

    def start(crash=""):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
        process = subprocess.Popen(words, env=os.environ | {"CRASH": crash}, **pipes)
        assert process.stdout.readline() == "held\n"
        return process

    return start


@pytest.mark.parametrize("crash", ["", "crash"])
def test_one_run_at_a_time_has_a_directory(tmp_path, holder, crash, caplog):
    folder = tmp_path / "run"
    process = holder(crash)
    with pytest.raises(UserError, match=rf"in use by another run \(process {process.pid} on host ") as refusal:
        claim_directory(folder)
    assert "\n" not in str(refusal.value)
    process.communicate("\n")
    assert bool(process.returncode) == bool(crash)
    with only_run_in(folder):  # a crash releases it as well
        assert (folder / "_lock").exists()
        assert claim_directory(folder).users == 1  # this process has it already
        again = subprocess.run([sys.executable, "-c", HOLDER, str(folder)], capture_output=True, text=True)
        assert again.returncode and "in use by another run" in again.stderr
    assert not (folder / "_lock").exists() and not caplog.messages
    (folder / "kept").mkdir(parents=True, exist_ok=True)
    with only_run_in(folder):
        pass
    assert (folder / "kept").is_dir()


def test_a_holder_on_another_host_that_never_released_is_named(tmp_path, caplog):
    """Its lock may not have reached this host; a crash leaves the same."""
    (tmp_path / "_lock").write_text('{"host": "elsewhere\\n\\u001b[2J", "pid": 7, "since": "2026-01-01 10:00:00"}')
    with only_run_in(tmp_path):
        (warning,) = caplog.messages
    assert "process 7 on host 'elsewhere" in warning and "[2J' since 2026-01-01 10:00:00" in warning
    assert warning.isprintable()
    for nonsense in (b"", b"{", b"[1]", b'{"host": 1}', b"\xff" * 2000):
        (tmp_path / "_lock").write_bytes(nonsense)
        with only_run_in(tmp_path):
            pass


def test_what_cannot_be_written_is_known_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "_lock").symlink_to(tmp_path / "target")
    for folder in (tmp_path / "file" / "run", tmp_path / "link", Path("/proc/run")):
        with pytest.raises(UserError, match="output_dir .* cannot be written: "):
            claim_directory(folder)
    assert not (tmp_path / "target").exists()


def test_a_loaders_worker_does_not_keep_the_lock(tmp_path, holder):
    """A forked process inherits the open file, and may live some seconds longer than a killed run."""
    program = HOLDER.replace(
        "    print(", "    worker = os.fork()\n    if not worker: time.sleep(60)\n    print(worker, "
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline().split()[0])
        process.kill()
        process.wait()
        with only_run_in(tmp_path):
            pass
        os.kill(worker, signal.SIGKILL)


def test_a_script_that_is_over_leaves_its_group(tmp_path):
    """A rank that is left in it at the end of the interpreter was once aborted (status -6) after all was done."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, torch.distributed as dist\n"
        "from hf_deit.errors import run_script\n"
        "atexit.register(lambda: print(dist.is_initialized(), flush=True))\n"
        f"meet = 'file://{tmp_path}/meet'\n"
        "run_script(lambda: dist.init_process_group('gloo', init_method=meet, rank=0, world_size=1))\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
