"""Two gloo processes: one does it, both hear of it."""

import subprocess
import sys

import pytest

from hf_deit.processes import on_main_process
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
