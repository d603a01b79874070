"""Runs to disturb: short distillations of handwritten digits on the command line of recipes/run_distill.py.

survival.py kills them and faults.py does other things to them; both compare what comes out with an undisturbed run.
Importing this module starts a local Hub, on which the digits are too, and imports what a run needs: a run is a
process forked from this one, which costs little, or with `fresh` a real new one. This process adopts what the runs
leave behind (`PR_SET_CHILD_SUBREAPER`), so that nothing can hide from it. Linux only.
"""

import atexit
import ctypes
import faulthandler
import functools
import io
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace


ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from support.hub_server import HubServer  # noqa: E402


HUB = HubServer().__enter__()
FOLDER = Path(HUB.home.name)  # of everything, removed at the end
TEMPORARY = FOLDER / "tmp"  # of the runs: what they leave there is seen
TEMPORARY.mkdir()
# What is imported next reads these, once and for all.
os.environ.update(HUB.environment, HF_TOKEN=HUB.token, OMP_NUM_THREADS="1", TMPDIR=str(TEMPORARY))
os.environ["ACCELERATE_USE_CPU"] = "true"

import datasets  # noqa: E402
import psutil  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

from hf_deit.commands import distill, teacher  # noqa: E402, F401
from hf_deit.data import summary, views  # noqa: E402, F401  (a run imports them late)
from hf_deit.errors import run_script  # noqa: E402
from hf_deit.training import run as whole_run  # noqa: E402
from hf_deit.training.distillation_trainer import DistillationTrainer  # noqa: E402


DIGITS, TEACHER = FOLDER / "digits", FOLDER / "teacher"
SHARD = "train-00003-of-00006.parquet"
SHORT = {
    "image_size": 16,
    "num_train_epochs": 3,
    "warmup_epochs": 1,
    "logging_steps": 1,
    "dataloader_num_workers": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}
STUDENT = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "no", "ema_decay": 0.9, "drop_path_rate": 0.1}
STUDENT["overwrite_output_dir"] = False  # as the quickstart's recipe would
ON_HUB = {"dataset_name": "user/digits", "streaming": True, "shuffle_buffer_size": 60}
PR_SET_CHILD_SUBREAPER, PR_SET_NAME = 36, 15


def words(**keys) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def prepare() -> None:
    """The digits, on disk and on our Hub, and a teacher. This process becomes the one that adopts orphans."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ctypes.CDLL(None).prctl(PR_SET_NAME, b"slurmstepd", 0, 0, 0)  # whom a run knows to adopt orphans
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)  # of the runs, too: what they said before they were killed counts
    datasets.disable_progress_bars()
    DIGITS.mkdir()
    digits = load_digits()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    for split, part in {"train": slice(0, 600), "test": slice(600, 700)}.items():
        images = [Image.fromarray((pixels * 15.9).astype("uint8")) for pixels in digits.images[part]]
        content = datasets.Dataset.from_dict({"image": images, "label": digits.target[part]}, features=features)
        content.to_parquet(DIGITS / f"{split}.parquet", batch_size=100)
    rows, shards = pq.read_table(DIGITS / "train.parquet"), {}
    for number in range(6):
        file = io.BytesIO()
        pq.write_table(rows.slice(100 * number, 100), file, row_group_size=10)
        shards[SHARD.replace("3", str(number))] = file.getvalue()
    HUB.add_repo("dataset", "user/digits", {"test.parquet": (DIGITS / "test.parquet").read_bytes(), **shards})
    arguments = [str(ROOT / "recipes/quickstart_teacher.yaml"), *words(**SHORT, dataset_name=DIGITS)]
    finish(teacher.main, [*arguments, *words(output_dir=TEACHER)], FOLDER / "teacher.log")


# Where a run is, for who wants to disturb it there: one byte that a forked run shares with this process

PHASES = ("before training", "between saves", "while saving", "evaluating", "at the end", "uploading")
_phase = mmap.mmap(-1, 1)


def phase() -> str:
    return PHASES[_phase[0]]


def _noted(owner, name: str, phase: str) -> None:
    """Let the function say that the run is in this phase while it runs."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def function(*args, **kwargs):
        if os.environ.get("RANK", "0") != "0":
            return original(*args, **kwargs)
        before, _phase[0] = _phase[0], PHASES.index(phase)
        try:
            return original(*args, **kwargs)
        finally:
            _phase[0] = before

    setattr(owner, name, function)


for _owner, _name, _where in (
    (DistillationTrainer, "_run_epoch", "between saves"),
    (DistillationTrainer, "_save_checkpoint", "while saving"),
    (DistillationTrainer, "evaluate", "evaluating"),
    (DistillationTrainer, "evaluate_teacher", "evaluating"),
    (whole_run, "_evaluate_and_save", "at the end"),
    (DistillationTrainer, "push_to_hub", "uploading"),
    (DistillationTrainer, "_push_from_checkpoint", "uploading"),
):
    _noted(_owner, _name, _where)


# Processes


def start(main: Callable, arguments: list[str], log: Path, ranks: int = 1, prepare: Callable = lambda: None):
    """`main(arguments)` in a process forked from this one, or in several under one that is torchrun's, in a session
    of their own. `prepare` is called first."""

    def process():
        atexit._clear()  # this process's own; and multiprocessing, other than a script's end, would call none
        try:
            begin()
        finally:
            atexit._run_exitfuncs()

    def begin():
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_NAME, b"python", 0, 0, 0)
        faulthandler.register(signal.SIGUSR1)  # says where a hung run is
        signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup and in the background, these two are
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored by this process
        HUB.http.server_close()  # this process's share of it, which would keep the port open
        with log.open("a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            prepare()
            if ranks == 1:
                run_script(lambda: main(arguments))
                return
            config = LaunchConfig(
                *(1, 1, ranks),
                run_id=uuid.uuid4().hex,
                start_method="fork",
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                monitor_interval=0.1,
                max_restarts=0,
            )
            elastic_launch(config, _rank)(main, arguments)

    _phase[0] = 0
    process = get_context("fork").Process(target=process)
    process.start()
    return process


def _rank(main: Callable, arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's own handler came along
    run_script(lambda: main(arguments))


class Fresh:
    """A new process, with the attributes of those that `start` returns that are used here."""

    def __init__(self, command: list[str], log: Path):
        _phase[0] = 0
        with log.open("a") as file:
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT / "src")},
            )
        self.pid = self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)


def fresh(arguments: list[str], log: Path, ranks: int = 1, launcher: bool = False) -> Fresh:
    """The command as a user types it; several ranks always have a launcher, torchrun."""
    script = str(ROOT / "recipes/run_distill.py")
    command = [sys.executable, script]
    if ranks > 1:
        rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *rendezvous, script]
    elif launcher:
        machine = str(ROOT / "recipes/accelerate/cpu.yaml")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", machine, script]
    return Fresh([*command, *arguments], log)


def finish(main: Callable, arguments: list[str], log: Path, ranks: int = 1) -> float:
    """A run that nobody disturbs. Returns the seconds it took."""
    begin, process = time.perf_counter(), start(main, arguments, log, ranks)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"an undisturbed run ended with status {process.exitcode}:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - begin


def family() -> list[psutil.Process]:
    """What runs because of this process, be it an orphan. What has ended is buried first."""
    me, alive = psutil.Process(), []
    for process in me.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def bury(pid: int) -> int | None:
    """The status with which an adopted process has ended; None if it has not, or was not adopted."""
    with suppress(ChildProcessError):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
    return None


def all_gone(seconds: float) -> list[psutil.Process]:
    """What is still there after so many seconds; returns as soon as nothing is."""
    end = time.monotonic() + seconds
    while (alive := family()) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


# What must be equal


def outcome(output: Path, record: Path | None = None, uploaded: str | None = None) -> dict[str, dict]:
    """Every tensor, the loss of each step, each evaluation, the rows of a record, and the names of the files left."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second")
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    names = [path.relative_to(output) for path in output.rglob("*") if path.is_file()]
    names = [name for name in names if not re.match("checkpoint-|_set_aside", name.parts[0])]
    result = {
        "weights": load_file(output / "model.safetensors"),
        "average": load_file(last / "ema.safetensors"),
        "losses": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        "evaluations": {
            (entry["step"], name): value
            for entry in history
            for name, value in entry.items()
            if name.startswith("eval_") and not name.endswith(timed)
        },
        "files": dict.fromkeys(map(str, names)),
    }
    if record is not None:
        result["record"] = {path.name: path.read_bytes() for path in record.iterdir()}
    if uploaded is not None:
        result["uploaded"] = {"model.safetensors": HUB.files("model", uploaded)["model.safetensors"]}
    return result


def differences(one: dict[str, dict], other: dict[str, dict]) -> list[str]:
    """The names of what is not equal bit for bit."""
    found = []
    for kind, values in one.items():
        for name in sorted(values.keys() | other[kind].keys(), key=str):
            mine, its = values.get(name, SimpleNamespace()), other[kind].get(name, SimpleNamespace())
            equal = torch.equal(mine, its) if torch.is_tensor(mine) and torch.is_tensor(its) else mine == its
            if not equal:
                found.append(f"{kind} {name}")
    return found


def mount(folder: Path, options: str) -> bool:
    """A small file system in memory. Returns whether this process has the right to mount it."""
    return not subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=True)


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
