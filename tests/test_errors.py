"""errors.py: an error that the user can fix becomes one line; every other error keeps its traceback."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from support.recipes import KINDS, SHORT
from torch.utils.data import DataLoader

from hf_deit import TrainViews, build_train_transform, parse_recipe
from hf_deit.errors import UserError, printable, refusals_of_libraries, run_script


def test_our_errors_are_one_line_and_bugs_keep_their_traceback(recipe):
    def refused():
        parse_recipe(KINDS, [recipe("xyzzy: 1")])

    def broken():
        int("a bug")

    with pytest.raises(SystemExit, match="^error: recipe .*xyzzy"):
        run_script(refused)
    with pytest.raises(ValueError, match="invalid literal"):
        run_script(broken)


def test_a_refusal_ends_the_process_with_a_status(recipe):
    program = (
        "import sys; from hf_deit import *; from hf_deit.errors import UserError, refusals_of_libraries, run_script\n"
        "run_script(lambda: parse_recipe((ModelArguments, DataArguments, DistillationConfig)))"
    )
    done = subprocess.run([sys.executable, "-c", program, recipe("xyzzy: 1")], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "xyzzy" in done.stderr


class DamagedSet(torch.utils.data.Dataset):
    """Views that only fail: in hf_deit, or in what it calls."""

    def __init__(self, fails_in_hf_deit):
        rows = [{"image": {"bytes": b"", "path": f"{index}.jpg"}, "label": 0} for index in range(4)]
        self.views = TrainViews(rows, build_train_transform(16)) if fails_in_hf_deit else None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.views[index] if self.views else int("no number")


def test_a_refusal_in_a_loaders_worker_is_one_line_too():
    with pytest.raises(SystemExit) as refusal:
        run_script(lambda: list(DataLoader(DamagedSet(True), num_workers=1)))
    assert re.fullmatch(r"error: 4 training images in a row are damaged, [^\n]*", str(refusal.value.code))
    with pytest.raises(ValueError, match="(?s)Original Traceback.*invalid literal"):
        run_script(lambda: list(DataLoader(DamagedSet(False), num_workers=1)))


class KilledSet(torch.utils.data.Dataset):
    """Its worker is killed, as by a machine without memory."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_the_machine_does_to_a_run_is_one_line_too():
    def full():
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")

    with pytest.raises(SystemExit, match=r"error: the disk is full \(Error .*\)\. Free some space\. Start the same"):
        run_script(full)
    with pytest.raises(SystemExit, match=r"error: a loader worker died \(.*\)\. Usual causes: .* Start the same"):
        run_script(lambda: list(DataLoader(KilledSet(), num_workers=1)))
    with pytest.raises(FileNotFoundError):
        run_script(lambda: Path("not there").read_text())


def test_what_a_library_rejects_is_the_users_and_what_ours_breaks_is_not(tmp_path):
    from accelerate.utils import TorchDynamoPlugin

    def rejected():
        TorchDynamoPlugin(backend="foo")  # the standard library's enum raises, for accelerate

    def ours():
        int("a bug")

    with pytest.raises(UserError, match="rejected: 'FOO' is not a valid DynamoBackend"), refusals_of_libraries():
        rejected()
    with pytest.raises(UserError, match="rejected: No module named 'no_such_package'"), refusals_of_libraries():
        import no_such_package  # noqa: F401
    for broken in (ours, lambda: torch.zeros(2).view(3)):
        with pytest.raises((ValueError, RuntimeError)) as error, refusals_of_libraries():
            broken()
        assert not isinstance(error.value, UserError)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--torch_compile_backend", "foo"], "'FOO' is not a valid DynamoBackend"),
        (["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"foo": 1}'], "unexpected keyword .*'foo'"),
        (["--attn_implementation", "flash_attention_2"], "FlashAttention2"),
        (["--report_to", "wandb"], "requires wandb"),
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--fsdp", "full_shard"], "fsdp only works in distributed training"),
    ],
)
def test_an_option_that_cannot_work_here_is_one_line(tmp_path, words, message):
    from hf_deit.commands import distill as script

    short = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
    words = [*short, "--distillation_type", "label", "--output_dir", str(tmp_path), *words]
    with pytest.raises(SystemExit, match=f"^error: an option of this run was rejected: .*{message}") as end:
        run_script(lambda: script.main(words))
    assert "\n" not in end.value.code


HOSTILE = "a\x1b[2J\x07\nerror: forged \u202e"


def test_nothing_that_is_printed_carries_control_characters(capsys):
    def main():
        logging.getLogger("hf_deit.training").warning("resuming with %s %r, was %s", HOSTILE, HOSTILE, 1)
        logging.getLogger("transformers").warning("a table\nof two lines: %s", ValueError(HOSTILE))
        raise UserError(f"teacher {HOSTILE} is unknown")

    factory = logging.getLogRecordFactory()
    try:
        with pytest.raises(SystemExit) as end:
            run_script(main)
        records = [
            logging.getLogRecordFactory()("x", 1, "f", 1, message, values, None).getMessage()
            for message, values in (("resuming with %s %r", (HOSTILE, HOSTILE)), ("two\nlines: %s", (HOSTILE,)))
        ]
    finally:
        logging.setLogRecordFactory(factory)
    assert end.value.code == "error: teacher a\\x1b[2J\\x07 error: forged \\u202e is unknown"
    for text in (*records, capsys.readouterr().err):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text) and "\nerror: forged" not in text
    assert records[1].startswith("two\nlines: a")


@pytest.mark.parametrize("text", ["plain", "模型 é", "a\u200db", "x\u3000y\xa0z"])
def test_words_of_any_language_are_printed_as_they_are(text):
    assert printable(text) == text


SCRIPT = """
import os, signal, sys, time
from hf_deit.errors import run_script

def main():
    print("begun", flush=True)
    {body}

run_script(main)
print("unreachable" if {ends} else "over")
"""


def started(body, ends=True, **options):
    program = [sys.executable, "-c", SCRIPT.format(body=body, ends=ends)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run in the background of a shell, SIGINT is ignored, and children inherit that.
    return subprocess.Popen(
        program, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL), **(pipes | options)
    )


@pytest.mark.parametrize(
    "number, status, line",
    [
        (signal.SIGTERM, 75, "stopped by SIGTERM. Start the same command again"),
        (
            signal.SIGINT,
            130,
            "interrupted by Ctrl-C; the same command resumes a training run from its last checkpoint",
        ),
    ],
)
def test_a_signal_at_any_moment_is_one_line(number, status, line):
    with started("time.sleep(60)") as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.wait(60) == status and process.stderr.read() == line + "\n" and not process.stdout.read()


def test_a_second_sigterm_does_not_interrupt_what_saves():
    body = "try: os.kill(os.getpid(), 15)\n    finally: os.kill(os.getpid(), 15); print('saved', flush=True)"
    with started(body) as process:
        assert process.wait(60) == 75 and process.stdout.read() == "begun\nsaved\n"


def test_output_that_nobody_reads_is_one_line():
    with started("while True: print('line', flush=True)") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 1
        assert re.fullmatch(
            r"error: nobody reads the output any more, as with `\| head`: [^\n]*\n", process.stderr.read()
        )


def test_a_directory_that_is_gone_is_one_line(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    program = f"import os; os.rmdir({str(folder)!r}); " + "from hf_deit.errors import run_script; run_script(print)"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        "error: the current directory no longer exists: change to another one\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_is_escaped(encoding):
    body = "print('caf\\xe9 \\u2713 \\udcff')"
    with started(body, ends=False, env=os.environ | {"PYTHONIOENCODING": encoding}, text=False) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err and b"\\udcff" in out and b"over" in out


def test_places_that_cannot_be_written_are_one_line():
    with started("raise OSError(30, 'Read-only file system', '/media/cache')") as process:
        assert process.wait(60) == 1
        assert re.fullmatch(r"error: '/media/cache' cannot be used: Read-only [^\n]*\n", process.stderr.read())


LAUNCHER = """
import os, subprocess, sys
words = [sys.executable, "-c", sys.argv[2], *sys.argv[3:]]
subprocess.Popen(words, env=os.environ | {sys.argv[1]: "1"}).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a process that its parent died")
@pytest.mark.parametrize("name, ends", [("accelerate", True), ("torchrun", True), ("shell", False)])
def test_no_run_outlives_its_launcher(tmp_path, name, ends):
    """Nohup and setsid leave a run without its shell on purpose, also with a launcher's variables around."""
    program = SCRIPT.format(body="print(os.getpid(), flush=True); time.sleep(60)", ends=True)
    (tmp_path / name).write_text(LAUNCHER)
    words = [sys.executable, str(tmp_path / name), "TORCHELASTIC_RUN_ID", program]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "begun\n"
        run = int(launcher.stdout.readline())
        launcher.kill()
        launcher.wait()
        if ends:
            assert launcher.stderr.read() == "stopped by SIGTERM. Start the same command again\n"  # to its end
        else:
            time.sleep(1)
            os.kill(run, signal.SIGKILL)  # it is there


ADOPTER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)  # PR_SET_NAME
if os.fork() == 0:  # the launcher, which dies before its run looks for it
    run = "import os, time\\nwhile os.getppid() != int(os.environ['ADOPTER']): time.sleep(0.01)\\n" + sys.argv[2]
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1", "ADOPTER": str(os.getppid())}
    subprocess.Popen([sys.executable, "-c", run], env=environment)
    os._exit(0)
os.wait()
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the names of processes are in /proc")
@pytest.mark.parametrize("name, status", [("slurmstepd", 75), ("systemd", 75), ("bash", 0)])
def test_a_run_notices_a_launcher_that_died_while_it_started(name, status):
    """Its parent is then whoever adopts orphans, which need not be process 1."""
    program = SCRIPT.format(body="time.sleep(1)", ends=False)
    done = subprocess.run([sys.executable, "-c", ADOPTER, name, program], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr


def test_sigterm_is_not_lost_in_a_callback_that_must_not_raise():
    """Python drops what a callback of a weak reference raises; an import has some for each module."""
    body = "import weakref; thing = type('Thing', (), {})()\n    "
    body += "kept = weakref.ref(thing, lambda _: (os.kill(os.getpid(), 15), time.sleep(0.1)))\n    "
    body += "del thing; time.sleep(20)"
    with started(body) as process:
        begin = time.monotonic()
        assert process.wait(60) == 75 and time.monotonic() - begin < 15
        assert process.stderr.read() == "stopped by SIGTERM. Start the same command again\n"
