"""Several processes and several hosts, as torchrun, accelerate and Slurm start them: the model of one process.

What is compared are the weights after six steps of recipes/run_distill.py on handwritten digits, Mixup and CutMix on:
every way cuts the same views into the same batches of eight, and accumulates what it has no ranks for.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacher as StockDeiT

from hf_deit import DeiTForImageClassificationWithTeacher
from hf_deit.models.modeling_deit import DeiTLayer


ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
SETTINGS = {
    "max_train_samples": 128,
    "max_eval_samples": 30,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "mix_prob": 1,
    "max_steps": STEPS,
    "num_train_epochs": 2,
    "warmup_epochs": 0,
    "per_device_train_batch_size": 8,
    "eval_strategy": "no",
    "logging_steps": 1,
    "dataloader_num_workers": 0,
    "teacher": "python:watched_teacher:ConvTeacher",
}

# A teacher that says when something was done to it, and that can take a rank down.
WATCHED_TEACHER = """
import os, pathlib, torch
from torch import nn

class ConvTeacher(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Linear(8, 10)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, pixels):
        assert not self.training and all(type(weight) is nn.Parameter for weight in self.parameters())
        assert type(self) is ConvTeacher and sum(weight.numel() for weight in self.parameters()) == 330
        self.calls += 1
        if self.calls == 3 and "FAULT" in os.environ and os.environ["RANK"] == "1":
            pathlib.Path(os.environ["FAULT"]).touch()
            if os.environ["FAULT"].endswith("exit"):
                os._exit(9)
            raise RuntimeError("the fault of rank 1")
        return self.head(self.norm(self.conv(pixels)).relu().mean((2, 3)))
"""

# accelerate shards over GPUs only. This answers the one question it asks about them, and runs what follows.
AS_ON_GPUS = """
import runpy, sys
import accelerate.accelerator, torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))

shard = accelerate.accelerator.fsdp2_prepare_model

def shard_and_tell(*args):
    model = shard(*args)
    print("whole parameters:", [name for name, p in model.named_parameters() if not isinstance(p, DTensor)])
    return model

accelerate.accelerator.fsdp2_prepare_model = shard_and_tell
del sys.argv[0]
sys.path.insert(0, {recipes!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of every process: no GPU, one thread, and the teacher on the path."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "watched_teacher.py").write_text(WATCHED_TEACHER)
    (folder / "as_on_gpus.py").write_text(AS_ON_GPUS.format(recipes=str(ROOT / "recipes")))
    paths = [str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_"))}
    return others | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def run_distill(output_dir, accumulation, **settings):
    settings = SETTINGS | {"save_strategy": "no", "output_dir": output_dir} | settings
    settings["gradient_accumulation_steps"] = accumulation
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [str(ROOT / "recipes" / "run_distill.py"), *words]


def torchrun(ranks):
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *rendezvous]


def finish(*processes, timeout=400):
    """What they printed; those that are left when one takes too long are ended."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return outputs


def start(command, environment, **others):
    return subprocess.Popen(
        command, env=environment | others, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def succeed(*processes):
    outputs = finish(*processes)
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-4000:] for output in outputs)
    return outputs


@pytest.fixture(scope="module")
def weights_of_one(environment, tmp_path_factory):
    """Of one process, no launcher: four batches of eight a step, accumulated."""
    folder = tmp_path_factory.mktemp("one")
    succeed(start([sys.executable, *run_distill(folder, 4)], environment, ACCELERATE_USE_CPU="true"))
    return load_file(folder / "model.safetensors")


def largest_difference(folder, expected):
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    return max((weights[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_the_batches_of_one(environment, weights_of_one, tmp_path, ranks):
    command = [*torchrun(ranks), *run_distill(tmp_path, 4 // ranks)]
    (output,) = succeed(start(command, environment, ACCELERATE_USE_CPU="true"))
    assert largest_difference(tmp_path, weights_of_one) < 1e-4
    batch = f"32 views = 8 x {ranks} processes x {4 // ranks} accumulation"
    assert output.count(batch) == 1 and output.count("lr         0.002 at the peak") == 1


# Hosts


@pytest.fixture
def hosts():
    """What to put before a command to run it on each of two hosts, the first one's address and the network device.

    Network namespaces, where they are allowed; else both are this machine.
    """
    names = [f"hf{os.getpid()}{letter}" for letter in "ab"]
    address, script = "10.77.0.1", "set -e\n"
    for name in names:
        script += f"ip netns add {name}\n"
    script += f"ip link add host0 netns {names[0]} type veth peer name host0 netns {names[1]}\n"
    for number, name in enumerate(names, 1):
        script += f"ip -n {name} address add 10.77.0.{number}/24 dev host0\n"
        script += f"ip -n {name} link set host0 up\nip -n {name} link set lo up\n"
    try:
        if subprocess.run(["bash", "-c", script], capture_output=True).returncode == 0:
            yield [["ip", "netns", "exec", name] for name in names], address, "host0"
        else:
            yield [[], []], "127.0.0.1", "lo"
    finally:
        for name in names:
            subprocess.run(["bash", "-c", f"ip netns delete {name}"], capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_the_batches_of_one(environment, hosts, weights_of_one, tmp_path):
    """One rank on each, through recipes/accelerate/multi_node.yaml; they share a file system, and nothing else."""
    prefixes, address, device = hosts
    machine = ["--config_file", str(ROOT / "recipes/accelerate/multi_node.yaml"), "--mixed_precision", "no"]
    machine += ["--num_processes", "2", "--main_process_ip", address, "--main_process_port", str(free_port())]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *machine, "--machine_rank"]
    succeed(
        *(
            start(
                [*prefix, *launch, str(rank), *run_distill(tmp_path, 2)],
                environment,
                ACCELERATE_USE_CPU="true",
                GLOO_SOCKET_IFNAME=device,
            )
            for rank, prefix in enumerate(prefixes)
        )
    )
    assert largest_difference(tmp_path, weights_of_one) < 1e-4


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# Sharded


def test_the_layer_that_fsdp_wraps_is_ours():
    layer = load_config_from_file(str(ROOT / "recipes/accelerate/fsdp.yaml")).fsdp_config[
        "fsdp_transformer_layer_cls_to_wrap"
    ]
    assert layer == DeiTLayer.__name__


@pytest.mark.slow
def test_a_sharded_run_trains_saves_for_stock_and_resumes(environment, weights_of_one, tmp_path):
    """FSDP2 on two ranks through recipes/accelerate/fsdp.yaml. The teacher itself watches that it stays whole."""

    def launch(folder, **settings):
        machine = ["--config_file", str(ROOT / "recipes/accelerate/fsdp.yaml"), "--mixed_precision", "no"]
        machine += ["--num_processes", "2", "--main_process_port", str(free_port())]
        shim = environment["PYTHONPATH"].split(os.pathsep)[0] + "/as_on_gpus.py"
        command = [sys.executable, "-m", "accelerate.commands.launch", *machine, shim]
        return start(command + run_distill(folder, 2, **settings), environment)

    (output,) = succeed(launch(tmp_path / "run", save_strategy="steps", save_steps=3))
    assert output.count("whole parameters: []") == 2
    assert largest_difference(tmp_path / "run", weights_of_one) < 1e-4

    checkpoint = tmp_path / "run" / "checkpoint-3"
    stock, report = StockDeiT.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values())
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = DeiTForImageClassificationWithTeacher.from_pretrained(checkpoint)
    with torch.no_grad():
        outputs, expected = stock(pixels), ours(pixels)
    for head in ("cls_logits", "distillation_logits"):
        assert (outputs[head] - expected[head]).abs().max() < 1e-5

    succeed(launch(tmp_path / "resumed", resume_from_checkpoint=checkpoint))
    assert largest_difference(tmp_path / "resumed", load_file(tmp_path / "run" / "model.safetensors")) < 1e-6

    averaged = launch(tmp_path / "averaged", ema_decay=0.99)
    (output,) = finish(averaged)
    assert averaged.returncode != 0 and "the moving average needs whole weights, but FSDP shards them" in output


# A rank that dies


@pytest.mark.slow
@pytest.mark.parametrize("fault, trace", [("raise", "RuntimeError: the fault of rank 1"), ("exit", "exitcode  : 9")])
def test_a_rank_that_dies_takes_the_others_with_it(environment, tmp_path, fault, trace):
    died = tmp_path / fault
    command = [*torchrun(2), *run_distill(tmp_path / "run", 1, max_steps=100_000)]
    process = start(command, environment, ACCELERATE_USE_CPU="true", FAULT=str(died))
    (output,) = finish(process)
    assert time.time() - died.stat().st_mtime < 60
    assert process.returncode == 1 and trace in output


# Slurm

SRUN = """#!/bin/bash
echo "$MASTER_ADDR $WORLD_SIZE $LOCAL_WORLD_SIZE $ACCELERATE_MIXED_PRECISION" > srun.txt
while [[ $1 == --* ]]; do shift; done
for rank in 0 1 2 3; do SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" & done
wait
exit $STATUS
"""
SCONTROL = """#!/bin/bash
if [ "$1" == show ]; then printf "first\\nsecond\\n"; else echo "$@" > scontrol.txt; fi
"""
PYTHON = """#!/bin/bash
echo "$RANK $LOCAL_RANK $*" > rank-$RANK.txt
"""


@pytest.mark.parametrize("status", [0, 1, 75])
def test_slurm_gives_each_rank_its_place_and_starts_only_a_preempted_job_again(tmp_path, status):
    """With Slurm's two commands played: two hosts of two ranks."""
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "all", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}
    job |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status)}
    script = [str(ROOT / "recipes" / "slurm.sh"), "recipes/run_distill.py", "a recipe.yaml", "--seed", "1"]
    done = subprocess.run(script, env=job, cwd=tmp_path, timeout=60)

    assert done.returncode == status
    assert (tmp_path / "scontrol.txt").exists() == (status == 75)
    if status == 75:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 12345\n"
    assert (tmp_path / "srun.txt").read_text() == "first 4 2 bf16\n"
    for rank in range(4):
        expected = f"{rank} {rank % 2} recipes/run_distill.py a recipe.yaml --seed 1\n"
        assert (tmp_path / f"rank-{rank}.txt").read_text() == expected
