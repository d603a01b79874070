"""The recipes: each parses, the scripts run shrunk, and bad input ends in one line that names the fix."""

import gc
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from hf_deit import (
    DataArguments,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DistillationConfig,
    DistillationTrainer,
    ModelArguments,
    load_teacher,
    parse_recipe,
)
from hf_deit.arguments import ClassifierArguments
from hf_deit.commands import distill, table, teacher
from hf_deit.data.registry import REGISTRY
from hf_deit.errors import run_script
from hf_deit.models.classifiers import new_classifier
from hf_deit.paper.sweep import Sweep
from hf_deit.teachers.teacher import Teacher


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NO_RECIPES = ("accelerate", "tables", "scales")  # the machine; what run_table.py makes of the recipes
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name not in NO_RECIPES)
OF_THE_PAPER = [path for path in FILES if path.parent.name in ("imagenet", "ablations", "transfer")]
SHRUNK = ["--max_steps", "2", "--max_eval_samples", "20", "--use_cpu", "true", "--disable_tqdm", "true"]
SHRUNK += ["--dataloader_num_workers", "0", "--save_strategy", "no", "--eval_strategy", "no"]


def name_of(path):
    return str(path.relative_to(RECIPES))


def is_of_a_teacher(path):
    return path.stem.endswith("teacher")


def read(path):
    return yaml.safe_load(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def scripts():
    """The two that train."""
    return distill, teacher


@pytest.fixture(scope="module")
def digits_teacher(scripts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    scripts[1].main([str(RECIPES / "quickstart_teacher.yaml"), *SHRUNK, "--output_dir", str(directory)])
    return directory


@pytest.fixture
def quick(monkeypatch):
    """Without what makes many runs slow and says nothing about a recipe: the picture, and a look for garbage in
    all that was ever imported, which accelerate takes in each run."""
    monkeypatch.setattr("hf_deit.plots.run.plot_run", lambda *args, **kwargs: None)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_recipe_parses_and_says_only_what_differs(path, tmp_path):
    kinds = (ClassifierArguments if is_of_a_teacher(path) else ModelArguments, DataArguments, DistillationConfig)
    parsed = parse_recipe(kinds, [str(path), "--use_cpu", "true"])
    # The default warm-up depends on the length.
    length = ["--num_train_epochs", str(read(path)["num_train_epochs"])] if "warmup_epochs" in read(path) else []
    defaults = parse_recipe(kinds, ["--use_cpu", "true", "--output_dir", str(tmp_path), *length])
    for key in read(path).keys() - ({"num_train_epochs"} if length else set()):
        values = [getattr(item, key) for group in (parsed, defaults) for item in group if hasattr(item, key)]
        assert values[0] != values[1], f"{key} is the default already"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_recipe_names_its_command_and_where_its_number_is_from(path):
    header = path.read_text("utf-8").split("\n\n")[0]
    script = "run_teacher.py" if is_of_a_teacher(path) else "run_distill.py"
    assert f"recipes/{script}" in header and "Hardware:" in header
    expected = header.partition("Expected:")[2]
    assert "measured here" in expected or "not run here" in expected
    assert path.parent == RECIPES or f"recipes/{name_of(path)}" in header


@pytest.mark.parametrize("path", OF_THE_PAPER, ids=name_of)
def test_what_a_recipe_of_the_paper_names_is_there(path):
    keys = read(path)
    assert keys["output_dir"] == f"outputs/{name_of(path).removesuffix('.yaml')}"
    assert keys.get("dataset_name", "imagenet-1k") in REGISTRY
    if "teacher_recipe" in keys:
        assert RECIPES / keys["teacher_recipe"] in FILES and is_of_a_teacher(RECIPES / keys["teacher_recipe"])
    for spec in (keys.get("teacher"), keys.get("model_name_or_path")):
        if spec is None or spec.startswith("facebook/"):
            continue
        if spec.startswith("outputs/"):
            made_by = RECIPES / spec.replace("outputs/", "", 1)
            assert made_by.with_suffix(".yaml") in FILES
        elif path.stem.endswith("_teacher") and spec.startswith("timm:"):
            assert timm.is_model(spec.removeprefix("timm:"))  # fresh weights
        else:
            assert timm.is_model_pretrained(spec.removeprefix("timm:").removeprefix("timm/"))


def test_the_quickstart_runs(scripts, digits_teacher, tmp_path, capsys):
    arguments = [*SHRUNK, "--teacher", str(digits_teacher), "--output_dir", str(tmp_path)]
    metrics = scripts[0].main(arguments)
    assert metrics == json.loads((tmp_path / "all_results.json").read_text())
    last = [line.split()[0] for line in capsys.readouterr().out.splitlines()[-7:]]
    # The few images are uneven by class, which has a line of its own.
    assert last == ["held-out", "class", "distillation", "fused", "teacher", "the", "All"]


def test_a_missing_teacher_is_trained_on_the_students_data_and_found_the_next_time(
    scripts, digits_teacher, tmp_path, monkeypatch, quick
):
    monkeypatch.chdir(tmp_path)
    trained_on = []

    def train(model_args, data_args, training_args, command, summary):
        trained_on.append(data_args.max_train_samples)
        shutil.copytree(digits_teacher, training_args.output_dir, dirs_exist_ok=True)

    monkeypatch.setattr("hf_deit.commands.teacher.train_teacher", train)
    Path("outputs/quickstart-teacher").mkdir(parents=True)  # a run that was cut off leaves its directory
    for _ in range(2):
        words = ["--output_dir", "run", "--overwrite_output_dir", "true", "--max_train_samples", "500"]
        assert "teacher_top1" in scripts[0].main([*SHRUNK, *words])
        assert trained_on == [500]


def test_the_plain_student_needs_no_teacher(scripts, tmp_path, quick):
    arguments = ["--distillation_type", "none", "--use_distillation_token", "false", "--output_dir", str(tmp_path)]
    metrics = scripts[0].main([*SHRUNK, *arguments])
    assert "eval_top1" in metrics and "teacher_top1" not in metrics


def test_a_student_goes_on_from_a_checkpoint_at_another_size(scripts, digits_teacher, tmp_path, quick):
    """The 224 -> 384 path: distillation goes on during fine-tuning (section 4)."""
    arguments = [*SHRUNK, "--teacher", str(digits_teacher)]
    scripts[0].main([*arguments, "--output_dir", str(tmp_path / "small")])
    start = ["--model_name_or_path", str(tmp_path / "small"), "--image_size", "48"]
    metrics = scripts[0].main([*arguments, *start, "--output_dir", str(tmp_path / "large")])
    assert metrics["teacher_top1"] >= 0
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    assert config["image_size"] == 48 and config["hidden_size"] == 64


@pytest.fixture(scope="module")
def seven_digits(tmp_path_factory):
    """scikit-learn's digits from 0 to 6 as a directory of parquet files: 980 to train, 280 to evaluate."""
    folder = tmp_path_factory.mktemp("seven")
    digits = load_digits()
    chosen = np.flatnonzero(digits.target < 7)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456"))})
    for split, rows in (("train", chosen[280:]), ("test", chosen[:280])):
        images = [Image.fromarray((15.9 * digits.images[row]).astype(np.uint8)) for row in rows]
        columns = {"image": images, "label": digits.target[rows]}
        datasets.Dataset.from_dict(columns, features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_fine_tuning_with_labels_and_teacher_from_32_to_48_pixels_and_from_ten_classes_to_seven(
    scripts, digits_teacher, seven_digits, tmp_path, monkeypatch, quick
):
    start, teacher, end = (tmp_path / name for name in ("start", "teacher", "end"))
    words = ["--patch_size", "8", "--teacher", str(digits_teacher), "--output_dir", str(start)]
    scripts[0].main([*SHRUNK, "--image_size", "32", *words])
    target = [*SHRUNK, "--dataset_name", str(seven_digits), "--image_size", "48"]
    recipe = str(RECIPES / "quickstart_teacher.yaml")
    scripts[1].main([recipe, *target, "--output_dir", str(teacher)])

    seen = set()
    answer = Teacher.forward
    monkeypatch.setattr(
        Teacher, "forward", lambda self, pixels, *ids: seen.add(tuple(pixels.shape[1:])) or answer(self, pixels)
    )
    words = ["--patch_size", "8", "--teacher", str(teacher), "--output_dir", str(end)]
    metrics = scripts[0].main([*target, *words, "--model_name_or_path", str(start), "--logging_steps", "1"])

    assert seen == {(3, 48, 48)} and "teacher_top1" in metrics
    config = json.loads((end / "config.json").read_text("utf-8"))
    assert config["image_size"] == 48 and list(config["id2label"].values()) == list("0123456")
    first = json.loads((end / "trainer_state.json").read_text("utf-8"))["log_history"][0]
    assert first["class_loss"] > 0 and first["distillation_loss"] > 0
    assert first["loss"] == pytest.approx((first["class_loss"] + first["distillation_loss"]) / 2, rel=1e-3)
    # The start's weights, its positions resized, and two steps of at most the learning rate, 0.0015, away.
    begun = DeiTForImageClassificationWithTeacher.from_pretrained(start, image_size=48, num_labels=7).state_dict()
    ended = DeiTForImageClassificationWithTeacher.from_pretrained(end).state_dict()
    assert ended["deit.embeddings.position_embeddings"].shape == (1, 36 + 2, 64)
    for name, weights in ended.items():
        if name.startswith("deit."):
            assert 0 < (weights - begun[name]).abs().max() < 5e-3, name


def test_a_trained_teacher_is_one_that_load_teacher_reads(digits_teacher):
    names = {number: str(number) for number in range(10)}
    teacher = load_teacher(str(digits_teacher), id2label=names, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert teacher.num_labels == 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["--base_learning_rate", "1e-3"], "learning_rate 0.0015 and base_learning_rate 0.001 are both given"),
        (["--min_lr", "1"], "min_lr 1 is above the learning rate 0.0015"),
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
        run_script(lambda: scripts[0].main([*base, *arguments]))
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
        run_script(lambda: scripts[0].main(arguments))


# --- every recipe, shrunk: data and sizes are replaced, all else stays as it is ---

TINY_CONVNET = {"channels": [8, 8, 16, 16], "stem_width": 8}
TINY_DEIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_images):
    """A folder: `images` of three classes, and a convnet and both kinds of DeiT for three classes and for five."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "images").mkdir()
    for split, rows in tiny_images(train=48, eval=12).items():
        rows.to_parquet(str(folder / "images" / f"{'test' if split == 'eval' else split}.parquet"))
    pixels = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "image_size": 56}
    for id2label in (dict(enumerate(["red", "green", "blue"])), dict(enumerate("abcde"))):
        convnet = new_classifier("timm:resnet10t", id2label=id2label, model_args=TINY_CONVNET, **pixels)
        convnet.save_pretrained(folder / f"convnet-{len(id2label)}")
        for two_heads, kind in enumerate((DeiTForImageClassification, DeiTForImageClassificationWithTeacher)):
            fields = {"use_distillation_token": bool(two_heads), "id2label": id2label, "image_size": 56}
            if len(id2label) == 5:  # as in stock's checkpoints, which the transfer recipes start from
                fields |= {"head_fusion": "logits", "drop_path_rate": 0.0}
            config = DeiTConfig(**fields, **TINY_DEIT)
            kind(config).save_pretrained(folder / f"deit-{len(id2label)}-{bool(two_heads)}")
    return folder


def shrunk(path, tiny, output_dir):
    """What replaces values of a recipe: pictures of a quarter of the side, batches of 12, tiny networks."""
    keys = read(path)
    image_size = keys.get("image_size", 224)
    options = {"dataset_name": tiny / "images", "output_dir": output_dir, "per_device_train_batch_size": 12}
    options["image_size"] = image_size // 4 if image_size >= 160 else image_size
    classes = 5 if path.parent.name == "transfer" else 3  # of the checkpoint it starts from
    if is_of_a_teacher(path):
        if keys.get("model_name_or_path", "timm:").startswith("timm:"):
            options |= {"model_name_or_path": "timm:resnet10t", "model_args": json.dumps(TINY_CONVNET)}
        else:
            options["model_name_or_path"] = tiny / f"convnet-{classes}"
    elif "model_name_or_path" in keys:
        two_heads = keys.get("use_distillation_token", True)
        options["model_name_or_path"] = tiny / f"deit-{classes}-{two_heads}"
    else:
        options |= TINY_DEIT
    if "teacher" in keys or "teacher_recipe" in keys:
        options["teacher"] = tiny / "convnet-3"
    return options


REPLACED = (
    "model_size",
    "model_name_or_path",
    "model_args",
    "dataset_name",
    "teacher",
    "teacher_recipe",
    "output_dir",
)


def one_of_each():
    """Every recipe; slow where it differs from one before it only in what is replaced, or cut off after two steps."""
    known = set()
    for path in FILES:
        keys = read(path)
        kept = {name: value for name, value in keys.items() if name not in (*REPLACED, "num_train_epochs")}
        taught, started = not {"teacher", "teacher_recipe"}.isdisjoint(keys), "model_name_or_path" in keys
        kind = repr((path.parent.name == "transfer", is_of_a_teacher(path), taught, started, sorted(kept.items())))
        yield pytest.param(path, marks=[pytest.mark.slow] * (kind in known), id=name_of(path))
        known.add(kind)


@pytest.mark.parametrize("path", one_of_each())
def test_a_recipe_runs_shrunk(scripts, tiny, quick, path, tmp_path):
    keys, options = read(path), shrunk(path, tiny, tmp_path)
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    metrics = scripts[is_of_a_teacher(path)].main([str(path), *SHRUNK, *words])
    of_a_student = not is_of_a_teacher(path)
    taught = keys.get("distillation_type", "hard") in ("hard", "soft")
    assert ("teacher_top1" in metrics) == (of_a_student and taught)
    assert ("eval_distillation_top1" in metrics) == (of_a_student and keys.get("use_distillation_token", True))
    assert ("eval_ema_top1" in metrics) == ("ema_decay" in keys)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    if of_a_student:
        assert list(config["id2label"].values()) == ["red", "green", "blue"]
        assert config["image_size"] == options["image_size"]
        assert config["drop_path_rate"] == keys.get("drop_path_rate", 0.1)
        assert config["hidden_dropout_prob"] == keys.get("hidden_dropout_prob", 0)
        assert config["head_fusion"] == "softmax"
    else:
        assert config["pretrained_cfg"]["input_size"] == [3, options["image_size"], options["image_size"]]


@pytest.mark.parametrize("path", [path for path in FILES if "optim" in read(path)], ids=name_of)
def test_sgd_is_the_authors_with_nesterov_momentum(path):
    """`--opt sgd` of timm 0.3.2 is Nesterov's with momentum 0.9; Transformers' own has no momentum."""
    *_, args = parse_recipe((ModelArguments, DataArguments, DistillationConfig), [str(path), "--use_cpu", "true"])
    optimizer, options = DistillationTrainer.get_optimizer_cls_and_kwargs(args)
    assert optimizer is torch.optim.SGD
    assert options == {"lr": args.learning_rate, "momentum": 0.9, "nesterov": True}


def commands_of_the_paper():
    """First cell and command of each row of the table that maps the paper's tables and figures to commands."""
    text = (RECIPES / "README.md").read_text("utf-8")
    return re.findall(r"^\| ((?:Table|Figure|Section) [\d.]+) \|[^|]+\| `([^`]+)`", text, re.MULTILINE)


def test_every_table_and_figure_has_a_command():
    wanted = {f"Table {number}" for number in range(1, 11)} | {f"Figure {number}" for number in range(1, 4)}
    assert wanted <= {what for what, _ in commands_of_the_paper()}


@pytest.mark.parametrize("what, command", commands_of_the_paper())
def test_the_command_of_a_table_parses(scripts, what, command, tmp_path, capsys):
    words = shlex.split(command.removeprefix("accelerate launch ").removeprefix("python "))
    if words[0] == "-m":
        assert words[1] == "pytest" and (RECIPES.parent / words[2]).exists()
        return
    (name,) = re.findall(r'run_command\("(\w+)"\)', (RECIPES.parent / words[0]).read_text("utf-8"))
    command = importlib.import_module(f"hf_deit.commands.{name}")
    arguments = words[1:]
    if command is table:
        args = table.parse(arguments)
        assert [Sweep(table, args.scale, args.seeds, recipes=RECIPES, results=tmp_path).runs for table in args.tables]
    elif arguments == ["--help-all"]:
        with pytest.raises(SystemExit) as end:
            command.main(arguments)
        assert end.value.code == 0 and "0.05" in capsys.readouterr().out
    else:
        assert parse_recipe(command.KINDS, [*arguments], RECIPES / "quickstart.yaml" if not arguments else None)
