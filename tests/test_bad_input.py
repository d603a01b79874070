"""Bad input ends a script in one line that says what is wrong and how to fix it, with exit status 1.

Through the scripts' own `main`, so that nothing on the way swallows or rewords it. What a single module refuses is
tested with that module; hostile input is in test_security.py, numbers that go wrong while training in test_health.py.
"""

import importlib
import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from support.recipes import SHORT, TINY

from hf_deit import DeiTConfig, DeiTForImageClassificationWithTeacher
from hf_deit.errors import run_script
from hf_deit.models.classifiers import new_classifier


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("hf_deit.commands.distill")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of good and bad things by name, each of which a message may quote."""
    folder = tmp_path_factory.mktemp("inputs")
    pixels = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "image_size": 32}
    for name, classes in {"teacher": 10, "other_teacher": 3}.items():
        convnet = new_classifier(
            "timm:resnet10t",
            id2label={number: str(number) for number in range(classes)},
            model_args={"channels": [8, 8, 8, 8]},
            **pixels,
        )
        convnet.save_pretrained(folder / name)
    (folder / "empty").mkdir()
    (folder / "file").write_text("text")
    for name, text in {
        "list": "- 1",
        "unknown_key": "lerning_rate: 1",
        "broken": "a: [1",
        "binary": "a: \x00",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    write_images(folder / "no_labels", [0, 1, -1, 2], datasets.ClassLabel(num_classes=3))
    write_images(folder / "float_labels", [0.5, 1.5, 2.0, 1.0], datasets.Value("float32"))
    write_images(folder / "no_label_column", [0, 1, 0, 1], datasets.Value("int64"), label_column="colour")
    for split in ("train", "val"):
        (folder / "flat" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "flat" / split / "1.png")
    student = DeiTForImageClassificationWithTeacher(DeiTConfig(image_size=32, patch_size=4, num_labels=10, **TINY))
    student.save_pretrained(folder / "student")
    (folder / "no_weights").mkdir()
    student.config.save_pretrained(folder / "no_weights")
    student.save_pretrained(folder / "truncated")
    with open(folder / "truncated" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    student.save_pretrained(folder / "torch")
    (folder / "torch" / "model.safetensors").unlink()
    torch.save(student.state_dict(), folder / "torch" / "pytorch_model.bin")
    return folder


def write_images(folder, labels, feature, label_column="label"):
    folder.mkdir()
    images = [Image.new("RGB", (8, 8), (40 * number, 0, 0)) for number in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), label_column: feature})
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": images, label_column: labels}, features)
        rows.to_parquet(str(folder / f"{split}.parquet"))


def end_of(script, inputs, output_dir, arguments, first=()):
    """Run the script on the embedded digits with these arguments and return its last message."""
    options = SHORT | {"teacher": inputs / "teacher", "output_dir": output_dir}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with pytest.raises(SystemExit) as end:
        run_script(lambda: script.main([*first, *words, *arguments]))
    return str(end.value.code)


def bad(arguments, message):
    return pytest.param(arguments, message, id=arguments[2:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        # words
        bad(
            "--lerning_rate 1", "the command line has '--lerning_rate', which is no key; did you mean 'learning_rate'?"
        ),
        bad("--xyzzy 1", "the command line has '--xyzzy', which is no key; --help-all lists them"),
        # the learning rate and its schedule
        bad(
            "--base_learning_rate 1e-3",
            "learning_rate 0.0015 and base_learning_rate 0.001 are both given: keep learning_rate to use it as is",
        ),
        bad("--min_lr 1", "min_lr 1 is above the learning rate 0.0015 (batch 8): the cosine would rise; lower min_lr"),
        bad("--learning_rate nan", "learning_rate is nan; it must be a positive number"),
        bad("--learning_rate inf", "learning_rate is inf; it must be a positive number"),
        bad("--learning_rate 0 --min_lr 0", "learning_rate is 0; it must be a positive number"),
        bad("--learning_rate -1 --min_lr -2", "learning_rate is -1; it must be a positive number"),
        bad("--lr_scheduler_type nope", "nope is not a valid SchedulerType, please select one of"),
        bad(
            "--max_steps -1 --warmup_epochs 9 --num_train_epochs 3",
            "warmup_epochs is 9 and num_train_epochs is 3: the run would end within its warm-up; lower",
        ),
        bad("--max_steps -1 --num_train_epochs -3", "num_train_epochs is -3: the run would end within its warm-up"),
        # numbers out of range
        bad("--per_device_train_batch_size 0", "per_device_train_batch_size is 0; it must be 1 or more"),
        bad("--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0; it must be 1 or more"),
        bad("--dataloader_num_workers -1", "dataloader_num_workers is -1; it must be 0 or more"),
        bad("--num_repeats 0", "num_repeats is 0; use 3 as in the paper, or 1 for no repeated augmentation"),
        bad("--mixup_alpha -1", "mixup_alpha is -1.0; use a positive number, or 0 to turn it off"),
        bad("--random_erasing_prob 2", "random_erasing_prob is 2.0; it must be a probability in [0, 1]"),
        bad("--label_smoothing_factor 1", "label_smoothing_factor is 1.0; it must be in [0, 1)"),
        bad("--distillation_alpha 2", "distillation_alpha is 2.0; it must be in [0, 1]"),
        bad("--distillation_temperature 0", "distillation_temperature is 0.0; it must be above 0"),
        bad("--ema_decay 1", "ema_decay is 1.0; it must be in (0, 1), or left out for no moving average"),
        bad("--max_bad_images 2", "max_bad_images is 2.0; it must be a fraction in [0, 1]"),
        bad("--crop_ratio 0", "crop_ratio must be above 0 and at most 1, got 0.0"),
        bad("--max_train_samples 0", "max_train_samples is 0; use a positive number, or leave it unset"),
        # names out of a list
        bad("--distillation_type firm", "distillation_type is 'firm'; choose one of none, soft, hard, label"),
        bad("--kl_reduction sum", "kl_reduction is 'sum'; choose one of batchmean, numel"),
        bad("--auto_augment rand-m9-x1", "rand-m9-x1"),
        bad("--save_strategy sometimes", "sometimes is not a valid SaveStrategy, please select one of"),
        bad("--fp16 true --bf16 true", "At most one of fp16 and bf16 can be True"),
        # the images
        bad("--dataset_name {empty}", "no images found in '{empty}': expected parquet files such as train.parquet"),
        bad("--dataset_name {nowhere}", "dataset '{nowhere}' could not be loaded: it is no local directory"),
        bad("--dataset_name {flat}", "'{flat}/train' holds images but no folder per class; expected"),
        bad("--image_column picture", "no column 'picture': 'digits' has the columns image, label; set image_column"),
        bad("--label_column colour", "no column 'colour': 'digits' has the columns image, label; set label_column"),
        bad("--dataset_name {no_label_column}", "none of them is recognised as the label column: set label_column"),
        bad("--train_split nope", "'digits' has no split 'nope'; it has train, test: choose one with train_split"),
        bad(
            "--per_device_train_batch_size 4000", "one step takes 4000 views and the training set has 64 images: lower"
        ),
        bad("--dataset_name {float_labels}", "of the type float32; expected whole numbers or words"),
        bad(
            "--dataset_name {no_labels} --distillation_type label --per_device_train_batch_size 4",
            "image number 2 of the training images has the label -1, but the 3 classes are 0 to 2 (1 of 4",
        ),
        # the student
        bad("--model_size huge", "model size is 'huge'; choose one of tiny, small, base"),
        bad("--image_size 25", "image_size 25 is not a multiple of patch_size 4"),
        bad("--image_size 0", "image_size must be a whole number of pixels, got 0"),
        bad("--num_attention_heads 3", "hidden_size 32 is not a multiple of num_attention_heads 3"),
        bad("--drop_path_rate 1.5", "drop_path_rate is 1.5; it must be in [0, 1)"),
        bad("--head_fusion mean", "head_fusion is 'mean'; choose one of softmax, logits, class, distillation"),
        bad("--model_name_or_path {nowhere}", "model '{nowhere}' does not exist"),
        bad("--model_name_or_path {no_weights}", "cannot load model '{no_weights}': "),
        bad("--model_name_or_path {truncated}", "cannot load model '{truncated}': "),
        bad("--model_name_or_path {torch}", "cannot load model '{torch}': "),
        # the teacher
        bad("--teacher {nowhere}", "model '{nowhere}' does not exist: there is no such directory"),
        bad("--teacher {empty}", "model directory '{empty}' has no config.json. Give a directory"),
        bad("--teacher {no_weights}", "cannot load model '{no_weights}': Error no file named model.safetensors"),
        bad("--teacher timm:resnet5000", "timm has no model 'resnet5000'; close ones are"),
        bad("--teacher python:json", "model 'python:json': expected python:<module>:<factory>"),
        bad(
            "--teacher {other_teacher}",
            "teacher '{other_teacher}' has 3 classes (0, 1, 2), the student has 10 (0, 1, 2, ...). Fine-tu",
        ),
        bad(
            "--distillation_type none",
            "the model has a distillation head, which would stay untrained: set use_distillation_token",
        ),
        # where it goes
        bad("--output_dir {file}", "output_dir '{file}' "),
        bad("--output_dir {file}/below", "output_dir '{file}/below' "),
        bad(
            "--resume_from_checkpoint {nowhere}",
            "resume_from_checkpoint is '{nowhere}', which is not a directory: name a checkpoint",
        ),
        bad("--resume_from_checkpoint true", "cannot resume: output_dir '{output_dir}' holds no checkpoint"),
        bad(
            "--push_to_hub true --hub_model_id a/b/c",
            "cannot push to 'a/b/c' on the Hub: Repo id must be in the form 'repo_name' or 'namespace/repo_name'",
        ),
    ],
)
def test_bad_input_ends_in_one_line(script, inputs, tmp_path, arguments, message):
    fill = {path.stem: str(path) for path in inputs.iterdir()} | {"output_dir": str(tmp_path / "run")}
    fill["nowhere"] = str(inputs / "nowhere")
    end = end_of(script, inputs, tmp_path / "run", [word.format(**fill) for word in arguments.split()])
    assert end.startswith("error: ") and message.format(**fill) in end, end
    assert "\n" not in end


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("unknown_key", "has the key 'lerning_rate', which is no key; did you mean 'learning_rate'?"),
        ("list", "is a list; expected lines of the form 'key: value'"),
        ("broken", "cannot be read: while parsing a flow sequence"),
        ("binary", "special characters are not allowed"),
        ("nowhere", "cannot be read: there is no such file"),
    ],
)
def test_a_bad_recipe_is_named(script, inputs, tmp_path, recipe, message):
    path = inputs / f"{recipe}.yaml"
    end = end_of(script, inputs, tmp_path, [], first=[str(path)])
    assert end.startswith(f"error: recipe {str(path)!r} ") and message in end


@pytest.mark.parametrize("arguments", [["--image_size", "large"], ["--bf16", "maybe"], ["--seed", "1.5"]])
def test_a_value_of_the_wrong_type_ends_with_its_option_and_status_2(script, inputs, tmp_path, arguments, capsys):
    assert end_of(script, inputs, tmp_path, arguments) == "2"
    assert f"argument {arguments[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_the_good_input_that_all_these_spoil_is_good(script, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_deit.plots.run.plot_run", lambda *args, **kwargs: None)
    options = SHORT | {"teacher": inputs / "teacher", "output_dir": tmp_path, "model_name_or_path": inputs / "student"}
    script.main([str(word) for name, value in options.items() for word in (f"--{name}", value)])
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_loss"] > 0
