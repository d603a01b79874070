"""recipe.py: YAML and command line meet, and what is refused."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from hf_deit import (
    DataArguments,
    DistillationConfig,
    ModelArguments,
    TrainViews,
    build_train_transform,
    exit_clearly,
    parse_recipe,
)


KINDS = (ModelArguments, DataArguments, DistillationConfig)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text + f"\nuse_cpu: true\noutput_dir: {tmp_path}\n")
        return str(path)

    return write


def test_numbers_have_the_type_of_their_field(recipe):
    """PyYAML alone reads 5e-4 as a string and 20 as an int."""
    _, data, training = parse_recipe(KINDS, [recipe("learning_rate: 5e-4\nnum_train_epochs: 20\nimage_size: 32")])
    assert training.learning_rate == 5e-4
    assert isinstance(training.num_train_epochs, float) and isinstance(data.image_size, int)


def test_the_command_line_wins(recipe):
    path = recipe("num_train_epochs: 20\ndataset_name: digits")
    _, data, training = parse_recipe(KINDS, [path, "--num_train_epochs", "30"])
    assert (training.num_train_epochs, data.dataset_name) == (30, "digits")


def test_booleans_and_nothing(recipe):
    model, _, training = parse_recipe(
        KINDS, [recipe("use_distillation_token: false\nbf16: false\nteacher: null\nsave_strategy: 'no'")]
    )
    assert (model.use_distillation_token, training.bf16, model.teacher) == (False, False, None)
    assert training.save_strategy.value == "no"


def test_without_a_word_the_default_recipe_is_read(recipe):
    path = recipe("dataset_name: digits")
    assert parse_recipe(KINDS, [], path)[1].dataset_name == "digits"
    assert parse_recipe(KINDS, ["--image_size", "64"], path)[1].image_size == 64


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate: 1", "key 'lerning_rate', which is no key; did you mean 'learning_rate'"),
        ("xyzzy: 1", "key 'xyzzy', which is no key; --help"),
    ],
)
def test_an_unknown_key_is_refused(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(KINDS, [recipe(text)])


def test_an_unknown_option_is_refused(recipe):
    with pytest.raises(ValueError, match="'--imagesize'.*did you mean 'image_size'"):
        parse_recipe(KINDS, [recipe(""), "--imagesize", "3"])


def test_an_unreadable_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml' cannot be read"):
        parse_recipe(KINDS, [str(tmp_path / "nowhere.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="holds a list"):
        parse_recipe(KINDS, [str(tmp_path / "list.yaml")])


def test_a_recipe_cannot_run_code(tmp_path):
    target = tmp_path / "ran"
    (tmp_path / "evil.yaml").write_text(f"dataset_name: !!python/object/apply:pathlib.Path.touch ['{target}']\n")
    with pytest.raises(ValueError, match="cannot be read"):
        parse_recipe(KINDS, [str(tmp_path / "evil.yaml")])
    assert not target.exists()


def test_a_value_of_the_wrong_type_names_its_option(recipe, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(KINDS, [recipe("image_size: big")])
    assert "--image_size" in capsys.readouterr().err


def test_our_errors_are_one_line_and_bugs_keep_their_traceback(recipe):
    def refused():
        parse_recipe(KINDS, [recipe("xyzzy: 1")])

    def broken():
        int("a bug")

    with pytest.raises(SystemExit, match="^error: recipe .*xyzzy"):
        exit_clearly(refused)
    with pytest.raises(ValueError, match="invalid literal"):
        exit_clearly(broken)


def test_what_transformers_refuses_is_one_line_too(recipe):
    path = recipe("eval_strategy: sometimes")
    with pytest.raises(SystemExit, match="^error: sometimes is not a valid IntervalStrategy"):
        exit_clearly(lambda: parse_recipe(KINDS, [path]))


def test_a_refusal_ends_the_process_with_a_status(recipe):
    program = (
        "import sys; from hf_deit import *\n"
        "exit_clearly(lambda: parse_recipe((ModelArguments, DataArguments, DistillationConfig)))"
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
        exit_clearly(lambda: list(DataLoader(DamagedSet(True), num_workers=1)))
    assert re.fullmatch(r"error: 4 training images in a row are damaged, [^\n]*", str(refusal.value.code))
    with pytest.raises(ValueError, match="(?s)Original Traceback.*invalid literal"):
        exit_clearly(lambda: list(DataLoader(DamagedSet(False), num_workers=1)))


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
        exit_clearly(full)
    with pytest.raises(SystemExit, match=r"error: a loader worker died \(.*\)\. Usual causes: .* Start the same"):
        exit_clearly(lambda: list(DataLoader(KilledSet(), num_workers=1)))
    with pytest.raises(FileNotFoundError):
        exit_clearly(lambda: open("not there"))
