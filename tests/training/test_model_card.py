"""model_card.py: what a card says, and what it must never say; read with huggingface_hub's own parsers."""

import re
import shlex
from dataclasses import fields, replace

import pytest
from huggingface_hub import ModelCard
from support.cards import DISTILLED
from support.hub_server import card_errors

from hf_deit import DeiTConfig, DistillationConfig
from hf_deit.options.distillation_config import STATED_OTHERWISE
from hf_deit.training.model_card import build_model_card, hub_id, public_command, public_name
from hf_deit.training.publishing import _settings_that_differ


PLAIN = replace(
    DISTILLED,
    head_fusion=None,
    base_model=None,
    distillation_type="none",
    teacher=None,
    teacher_sha256=None,
    teacher_parameters=None,
    metrics={"eval_top1": 0.5, "eval_top5": 0.9},
    settings={},
)


def test_the_front_matter_is_what_the_hub_reads():
    card = ModelCard(str(build_model_card(DISTILLED)))  # parsed again
    data = card.data
    assert card_errors(str(card)) == []
    assert (data.library_name, data.pipeline_tag, data.license) == (
        *("transformers", "image-classification"),
        "apache-2.0",
    )
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.base_model == "facebook/deit-tiny-distilled-patch16-224"
    assert data.get("teacher") == ["timm/regnety_160.deit_in1k"]
    assert {"deit", "knowledge-distillation"} <= set(data.tags)
    results = [(result.metric_name, result.metric_value, result.dataset_type) for result in data.eval_results]
    assert results == [
        ("top-1 accuracy, both heads, fused", 0.8765, "uoft-cs/cifar10"),
        ("top-5 accuracy, both heads, fused", 0.9912, "uoft-cs/cifar10"),
        ("top-1 accuracy, class head", 0.8712, "uoft-cs/cifar10"),
        ("top-5 accuracy, class head", 0.9901, "uoft-cs/cifar10"),
        ("top-1 accuracy, distillation head", 0.8733, "uoft-cs/cifar10"),
        ("top-5 accuracy, distillation head", 0.9908, "uoft-cs/cifar10"),
    ]
    assert {result.dataset_split for result in data.eval_results} == {"test"} and data.model_name == "my-deit"


def test_a_distilled_model_names_its_teacher_heads_and_settings():
    text = build_model_card(DISTILLED).text
    for phrase in (
        *("| class head | 87.12 % | 99.01 % |", "| distillation head | 87.33 % | 99.08 % |"),
        *("| both heads, fused | 87.65 % | 99.12 % |", "10,000 held-out images (`test`)"),
        *("timm/regnety_160.deit_in1k, 83.59M parameters, weights 0123456789abcdef, top-1 91.23 %",),
        *("224 pixels, crop ratio 0.875", "Head fusion: `softmax`", "EMA): no", "torch 2.14.1"),
        *("| num_train_epochs | 100 | 300 |", "| random_crop | padded | unset |", "| mix_prob | 0.5 | 1 |"),
        *("[cifar10](https://huggingface.co/datasets/uoft-cs/cifar10)", "3 damaged ones replaced"),
        "accelerate launch --num_processes 1 recipes/run_distill.py recipes/my_run.yaml --seed 3",
    ):
        assert phrase in text
    assert "in progress" not in text


def test_replayed_teacher_outputs_are_stated():
    text = build_model_card(replace(DISTILLED, teacher_replayed="decisions")).text
    assert "weights 0123456789abcdef, its decisions replayed from the record of an earlier run, top-1 91.23 %" in text
    assert "replayed" not in build_model_card(DISTILLED).text


def test_a_plain_model_has_one_row_and_no_teacher():
    card = build_model_card(PLAIN)
    assert "Teacher: none" in card.text and "All settings are those of Table 9" in card.text
    assert "class head" not in card.text and "# import hf_deit" not in card.text
    assert "knowledge-distillation" not in card.data.tags
    assert [result.metric_name for result in card.data.eval_results] == ["top-1 accuracy", "top-5 accuracy"]
    assert "base_model" not in card.data.to_dict() and "teacher" not in card.data.to_dict()


def test_what_was_not_measured_is_not_claimed():
    card = build_model_card(replace(DISTILLED, metrics={}, steps=100, epochs=2.1, dataset=None, dataset_id=None))
    assert card_errors(str(card)) == []
    assert "These weights were not evaluated" in card.text and "in progress**: 100 of 4,800 steps" in card.text
    assert card.data.eval_results is None and "%" not in card.text


def test_the_moving_average_is_said_to_be_evaluated_and_not_saved():
    metrics = DISTILLED.metrics | {"eval_ema_top1": 0.881, "eval_ema_top5": 0.992}
    text = build_model_card(replace(DISTILLED, ema_decay=0.9999, metrics=metrics)).text
    assert "| moving average | 88.10 % | 99.20 % |" in text
    assert "yes, decay 0.9999, evaluated separately; the weights here are not averaged" in text


def test_no_card_shows_where_things_lie_on_this_machine(tmp_path):
    for name in ("my teacher", "data", "start"):
        (tmp_path / name).mkdir()
    teacher = f"{tmp_path}/my teacher + timm:resnet50?checkpoint={tmp_path}/deep/r50.pth"
    facts = replace(
        DISTILLED,
        base_model=f"{tmp_path}/start/",
        dataset=f"{tmp_path}/data",
        dataset_id=None,
        teacher=teacher,
        command=["/home/me/run_distill.py", "--teacher", teacher, f"--data_dir={tmp_path}/data"],
    )
    card = build_model_card(facts)
    assert str(tmp_path) not in str(card) and "/home" not in str(card) and "deep/" not in str(card)
    assert "my teacher + timm:resnet50?checkpoint=r50.pth" in card.text and "on data" in card.text
    assert card_errors(str(card)) == [] and not {"base_model", "datasets", "teacher"} & card.data.to_dict().keys()


@pytest.mark.parametrize(
    "word, shown",
    [
        ("/home/me/data", "data"),
        ("/home/me/data/", "data"),
        ("~/data", "data"),
        ("C:\\Users\\me\\data", "data"),
        ("/home/Jane Doe/my data", "my data"),
        ("--output_dir=/scratch/me/run", "--output_dir=run"),
        ("/a/one,/b/two", "one,two"),
        ("timm:resnet50?checkpoint=/a/b.pth", "timm:resnet50?checkpoint=b.pth"),
        ('{"file": "/a/b/c.json"}', '{"file": "c.json"}'),
        *[(same, same) for same in ("recipes/x.yaml", "user/name", "https://x.org/a/b", "1e-3", "python:mod:make")],
    ],
)
def test_a_command_keeps_the_last_part_of_an_absolute_path(word, shown):
    assert shlex.split(public_command(["run.py", word]))[-1] == shown


def test_a_command_keeps_no_token():
    words = [
        "run.py",
        "--hub_token",
        "hf_secret",
        "--seed",
        "1",
        "--push_to_hub_token=hf_secret",
        "--push_to_hub",
        "1",
    ]
    command = public_command(words, processes=2)
    assert command == "accelerate launch --num_processes 2 run.py --seed 1 --push_to_hub 1"


def test_a_directory_that_looks_like_a_hub_id_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("outputs/teacher") == "outputs/teacher" == public_name("outputs/teacher")
    (tmp_path / "outputs" / "teacher").mkdir(parents=True)
    assert hub_id("outputs/teacher") is None and public_name("outputs/teacher") == "teacher"


def test_the_usage_code_is_python_and_names_the_model():
    (code,) = re.findall(r"```python\n(.*?)```", build_model_card(DISTILLED).text, re.DOTALL)
    compile(code, "card", "exec")
    assert 'model="user/my-deit"' in code


def test_the_settings_of_a_card_are_those_that_differ_and_none_of_the_machine(tmp_path):
    own = {"mixup_alpha": 0.1, "warmup_epochs": 2, "kl_reduction": "numel", "seed": 7}
    machine = {"output_dir": str(tmp_path), "hub_token": "hf_secret", "logging_steps": 3, "dataloader_num_workers": 0}
    args = DistillationConfig(use_cpu=True, **own, **machine)
    paper = {"mixup_alpha": 0.8, "warmup_epochs": 5, "kl_reduction": "batchmean", "seed": 42, "batch size": 1024}
    expected = {name: (own.get(name, 128), value) for name, value in paper.items()}
    assert _settings_that_differ(args, DeiTConfig()) == expected
    named = _settings_that_differ(args, DeiTConfig(drop_path_rate=0.3))
    assert named == expected | {"drop_path_rate": (0.3, 0.1)}
    known = {item.name for item in fields(DistillationConfig)}
    assert known >= STATED_OTHERWISE


def test_the_images_have_a_section_whose_names_are_plain_text():
    text = build_model_card(DISTILLED).text
    section = text.partition("## Dataset\n")[2].partition("## Training")[0].strip().splitlines()
    assert section == ["- Trained on 50,000 images of the split 'train'", r"- Evaluated on \[link\](x) \<b\>"]
    assert "## Dataset" not in build_model_card(replace(DISTILLED, data=())).text


def test_images_that_are_trained_on_are_not_called_held_out():
    text = build_model_card(replace(DISTILLED, held_out=False, trained_on=1_200)).text
    assert "held-out" not in text.lower()
    assert "10,000 images (`test`), each counted once; 1,200 of them are training images too" in text
