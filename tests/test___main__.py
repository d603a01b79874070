"""`hf-deit` and `python -m hf_deit`: which command runs, what comes at once, and the wheel without the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import hf_deit.__main__ as program
from hf_deit.errors import run_script


ROOT = Path(__file__).resolve().parents[1]


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["hf-deit", *words])
    program.main()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(words, monkeypatch, capsys):
    call(monkeypatch, *words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")][: len(program.COMMANDS)] == [*program.COMMANDS]


def test_every_command_is_a_module_of_its_name():
    there = {path.stem for path in (ROOT / "src/hf_deit/commands").glob("*.py")} - {"__init__"}
    assert there - {"check"} == set(program.COMMANDS) - {"check"}


def test_a_wrong_command_is_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="^error: 'distil' is no command of hf-deit; did you mean 'distill'"):
        call(monkeypatch, "distil")
    with pytest.raises(SystemExit, match="^error: 'xyzzy' is no command of hf-deit; choose one of init, "):
        call(monkeypatch, "xyzzy")


def test_a_command_gets_its_words_and_its_errors_are_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="^error: the command line has '--epochs'.*num_train_epochs"):
        call(monkeypatch, "distill", "quickstart", "--epochs", "3")
    call(monkeypatch, "init", str(tmp_path / "x"))
    assert (tmp_path / "x" / "my_photos.yaml").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["init", "new"],
        ["distill", "--help"],
        ["teacher", "--help"],
        ["distill", "quickstart", "--epochs", "3"],
        ["distill", "quickstart", "--image_size", "big"],
        ["distill", "quikstart"],
        ["distill", "quickstart", "--dataset_name", "nowhere/at/all"],
        ["teacher", "quickstart_teacher", "--data_dir", "nowhere"],
    ],
    ids=" ".join,
)
def test_what_needs_no_pytorch_does_not_import_it(words, tmp_path):
    command = "import atexit, sys; sys.argv = ['hf-deit', *sys.argv[1:]]; from hf_deit.__main__ import main; "
    command += "atexit.register(lambda: print('\\n', 'torch' in sys.modules)); main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", command, *words], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split()[-1] == "False" and "Traceback" not in done.stderr
    assert bool(done.returncode) == bool(done.stderr)


def test_a_wrong_key_is_refused_before_a_dataclass_is_built(monkeypatch):
    from hf_deit import DistillationConfig
    from hf_deit.commands import distill

    monkeypatch.setattr(DistillationConfig, "__post_init__", lambda self: pytest.fail("was built"))
    with pytest.raises(SystemExit, match="num_train_epochs"):
        run_script(lambda: distill.main(["quickstart", "--epochs", "3"]))
    with pytest.raises(SystemExit) as end:
        distill.main(["quickstart", "--image_size", "big"])
    assert end.value.code == 2


@pytest.fixture
def says_nothing(monkeypatch):
    for name in program.WAITING:
        monkeypatch.setenv(name, "x")  # restored afterwards
        monkeypatch.delenv(name)


def test_threads_sleep_where_nobody_says_otherwise(says_nothing):
    program.let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", program.WAITING)
def test_what_the_user_says_stays(name, monkeypatch, says_nothing):
    monkeypatch.setenv(name, "7")
    program.let_threads_sleep()
    assert {each: os.environ[each] for each in program.WAITING if each in os.environ} == {name: "7"}


PROGRAM = """
import sys
sys.path.insert(0, {source!r})
from hf_deit import __main__ as program
sys.argv = ["hf-deit", "options"]
{call}
import torch
"""


@pytest.mark.parametrize("call", ["program.main()", "program.run_command('options')"])
@pytest.mark.parametrize(
    "given, policy", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "9"}, None)]
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads what GNU's OpenMP prints of itself")
def test_openmp_hears_of_it(call, given, policy, says_nothing):
    """Both ways to start a command; OpenMP itself says what it has read."""
    if call != "program.main()":
        call = "sys.argv = ['run_options.py']; " + call
    code = PROGRAM.format(source=str(ROOT / "src"), call=call)
    environment = os.environ | {"OMP_DISPLAY_ENV": "VERBOSE", "OMP_NUM_THREADS": "2"} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    said = dict(
        line.strip().removeprefix("[host] ").split(" = ") for line in done.stderr.splitlines() if " = " in line
    )
    assert said["OMP_NUM_THREADS"] == "'2'"
    assert said["OMP_WAIT_POLICY"] == f"'{policy or 'PASSIVE'}'"
    assert said["GOMP_SPINCOUNT"] == {"PASSIVE": "'0'", "ACTIVE": "'30000000000'", None: "'9'"}[policy]


@pytest.mark.slow
def test_the_wheel_is_enough(tmp_path):
    """A fresh environment that sees this one's dependencies, the package from the wheel alone, and no repository."""
    source = tmp_path / "source"  # building in the repository would leave files there
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    here = sysconfig.get_path("purelib")
    python = tmp_path / "venv" / "bin" / "python"
    (there,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # The wheel's package comes first; an editable install's .pth in the other folder is not read.
    (there / "dependencies.pth").write_text(f"{here}\n")
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--force-reinstall", wheel], check=True)

    work = tmp_path / "work"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words):
        command = [tmp_path / "venv" / "bin" / "hf-deit", *words]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "distill" in run("--help")
    run("init", "x")
    assert {path.name for path in (work / "x").iterdir()} == {
        "my_photos.yaml",
        "my_photos_teacher.yaml",
        "machine.yaml",
    }
    short = ["--max_train_samples", "256", "--num_train_epochs", "6", "--use_cpu", "true", "--disable_tqdm", "true"]
    text = run("distill", "quickstart", *short)
    results = json.loads((work / "outputs/quickstart/all_results.json").read_text())
    assert results["teacher_top1"] > 0.9 and f"{results['eval_top1']:.4f}" in text
    assert "-m hf_deit distill quickstart" in (work / "outputs/quickstart/README.md").read_text()
    assert (
        str(ROOT)
        not in subprocess.run(
            [python, "-c", "import hf_deit; print(hf_deit.__file__)"],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
