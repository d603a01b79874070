"""The recipes: each parses, the scripts run shrunk, and bad input ends in one line that names the fix."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from hf_deit import (
    ClassifierArguments,
    DataArguments,
    DistillationConfig,
    ModelArguments,
    exit_clearly,
    load_teacher,
    parse_recipe,
)


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate")
SHRUNK = ["--max_steps", "2", "--max_eval_samples", "20", "--use_cpu", "true", "--disable_tqdm", "true"]
SHRUNK += ["--dataloader_num_workers", "0", "--save_strategy", "no", "--eval_strategy", "no"]


@pytest.fixture(scope="module")
def scripts():
    """The two scripts as modules, as `python recipes/run_distill.py` sees them."""
    sys.path.insert(0, str(RECIPES))
    import run_distill
    import run_teacher

    yield run_distill, run_teacher
    sys.path.remove(str(RECIPES))


@pytest.fixture(scope="module")
def digits_teacher(scripts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    scripts[1].main([str(RECIPES / "quickstart_teacher.yaml"), *SHRUNK, "--output_dir", str(directory)])
    return directory


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_recipe_parses_and_says_only_what_differs(path, tmp_path):
    of_a_teacher = path.stem.endswith("teacher")
    kinds = (ClassifierArguments if of_a_teacher else ModelArguments, DataArguments, DistillationConfig)
    parsed = parse_recipe(kinds, [str(path), "--use_cpu", "true"])
    defaults = parse_recipe(kinds, ["--use_cpu", "true", "--output_dir", str(tmp_path)])
    for key in yaml.safe_load(path.read_text()):
        values = [getattr(item, key) for group in (parsed, defaults) for item in group if hasattr(item, key)]
        assert values[0] != values[1], f"{key} is the default already"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_recipe_names_its_command(path):
    header = path.read_text().split("\n\n")[0]
    script = "run_teacher.py" if path.stem.endswith("teacher") else "run_distill.py"
    assert f"recipes/{script}" in header and "Hardware:" in header


def test_the_quickstart_runs(scripts, digits_teacher, tmp_path, capsys):
    arguments = [*SHRUNK, "--teacher", str(digits_teacher), "--output_dir", str(tmp_path)]
    metrics = scripts[0].main(arguments)
    assert metrics == json.loads((tmp_path / "all_results.json").read_text())
    last = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split()[0] for line in last] == [
        "held-out",
        "class",
        "distillation",
        "fused",
        "teacher",
        "everything",
    ]


def test_a_missing_teacher_is_trained_on_the_students_data_and_found_the_next_time(
    scripts, digits_teacher, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    trained_on = []

    def train(model_args, data_args, training_args):
        trained_on.append(data_args.max_train_samples)
        shutil.copytree(digits_teacher, training_args.output_dir, dirs_exist_ok=True)

    monkeypatch.setattr(scripts[1], "train", train)
    Path("outputs/quickstart-teacher").mkdir(parents=True)  # a run that was cut off leaves its directory
    for _ in range(2):
        assert "teacher_top1" in scripts[0].main([*SHRUNK, "--output_dir", "run", "--max_train_samples", "500"])
        assert trained_on == [500]


def test_the_plain_student_needs_no_teacher(scripts, tmp_path):
    arguments = ["--distillation_type", "none", "--use_distillation_token", "false", "--output_dir", str(tmp_path)]
    metrics = scripts[0].main([*SHRUNK, *arguments])
    assert "eval_top1" in metrics and "teacher_top1" not in metrics


def test_a_student_goes_on_from_a_checkpoint_at_another_size(scripts, digits_teacher, tmp_path):
    """The 224 -> 384 path: distillation goes on during fine-tuning (section 4)."""
    arguments = [*SHRUNK, "--teacher", str(digits_teacher)]
    scripts[0].main([*arguments, "--output_dir", str(tmp_path / "small")])
    start = ["--model_name_or_path", str(tmp_path / "small"), "--image_size", "48"]
    metrics = scripts[0].main([*arguments, *start, "--output_dir", str(tmp_path / "large")])
    assert metrics["teacher_top1"] >= 0
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    assert config["image_size"] == 48 and config["hidden_size"] == 64


def test_a_trained_teacher_is_one_that_load_teacher_reads(digits_teacher):
    names = {number: str(number) for number in range(10)}
    teacher = load_teacher(str(digits_teacher), id2label=names, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert teacher.num_labels == 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["--base_learning_rate", "1e-3"], "learning_rate 0.002 and base_learning_rate 0.001 are both given"),
        (["--min_lr", "1"], "min_lr 1 is above the learning rate 0.002"),
        (["--dataset_name", "{empty}"], "no images found in .*expected parquet files"),
        (["--image_column", "picture"], "no column 'picture'.*set image_column"),
        (["--per_device_train_batch_size", "4000"], "one step takes 4000 views and the training set has 1437"),
        (["--image_size", "25"], "image_size 25 is not a multiple of patch_size 4"),
        (["--teacher", "{empty}"], "{empty}"),
        (["--max_train_samples", "0"], "max_train_samples is 0"),
        (["--auto_augment", "rand-m9-x1"], "rand-m9-x1"),
    ],
)
def test_bad_input_ends_in_one_line(scripts, digits_teacher, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    fill = {"empty": str(tmp_path / "empty")}
    arguments = [argument.format(**fill) for argument in arguments]
    base = [*SHRUNK, "--teacher", str(digits_teacher), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="^error: .*" + message.format(**fill)) as end:
        exit_clearly(lambda: scripts[0].main([*base, *arguments]))
    assert "\n" not in str(end.value)


def test_a_teacher_with_other_classes_is_refused(scripts, tmp_path, tiny_images, digits_teacher):
    for split, rows in tiny_images().items():
        rows.to_parquet(str(tmp_path / f"{'test' if split == 'eval' else split}.parquet"))
    arguments = [
        *SHRUNK,
        "--teacher",
        str(digits_teacher),
        "--dataset_name",
        str(tmp_path),
        "--output_dir",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit, match="^error: .*10 .*3 .*run_teacher.py"):
        exit_clearly(lambda: scripts[0].main(arguments))
