"""run.py: what a run says at its start and at its end, and the files it leaves."""

import re

import pytest
from support.runs import student, trainer

from hf_deit.training.run import accuracy_table, banner


def test_the_banner_holds_the_numbers_of_the_run(tiny_images, tmp_path):
    run = trainer(
        tiny_images(), tmp_path, num_train_epochs=3, warmup_epochs=1, gradient_accumulation_steps=2, learning_rate=2e-3
    )
    said = dict(re.findall(r"^(\w+) +(.+)$", banner(run), re.MULTILINE))
    assert said["images"] == "48 to train, 20 to evaluate"
    assert said["batch"] == "16 views = 8 x 1 processes x 2 accumulation; 3 views of each image"
    assert said["steps"] == "9 = 3 epochs of 3, of which 3 are warm-up"  # 48 images in steps of 16
    assert said["lr"].startswith("0.002 at the peak") and said["loss"] == "hard"
    parameters = sum(parameter.numel() for parameter in student().parameters())
    assert said["model"] == f"DeiTForImageClassificationWithTeacher, {parameters / 1e6:.2f}M parameters"
    assert said["teacher"].startswith("ConvTeacher, 0.00M parameters")


def test_a_run_without_a_teacher_says_so(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path, student(two_heads=False), teacher=None, distillation_type="none")
    assert re.search(r"^teacher +none$", banner(run), re.MULTILINE)


@pytest.mark.parametrize("heads", [True, False])
def test_the_table_has_a_row_for_what_was_measured(heads):
    metrics = {"eval_top1": 0.5, "eval_top5": 0.75}
    if heads:
        metrics |= {"eval_class_top1": 0.25, "eval_class_top5": 0.5, "teacher_top1": 1.0, "teacher_top5": 1.0}
    rows = [line.rsplit(maxsplit=2) for line in accuracy_table(metrics).splitlines()[1:]]
    expected = [["class head", "0.2500", "0.5000"], ["fused", "0.5000", "0.7500"], ["teacher", "1.0000", "1.0000"]]
    assert rows == (expected if heads else [["model", "0.5000", "0.7500"]])


def test_accuracy_is_called_held_out_only_where_that_is_known():
    metrics = {"eval_top1": 0.5, "eval_top5": 0.75}
    assert accuracy_table(metrics, held_out=True).startswith("held-out accuracy ")
    assert "held" not in accuracy_table(metrics)


def test_of_five_classes_and_fewer_the_table_has_no_top5():
    lines = accuracy_table({"eval_top1": 0.5, "teacher_top1": 0.75}).splitlines()
    assert [line.split()[-1] for line in lines] == ["top-1", "0.7500", "0.5000"]


@pytest.mark.parametrize("words, said", [({}, True), ({"warmup_epochs": 1}, False)])
def test_the_banner_says_that_the_warm_up_is_short(tiny_images, tmp_path, words, said):
    run = trainer(tiny_images(), tmp_path, num_train_epochs=3, **({"warmup_epochs": None} | words))
    assert ("20% of a short run" in banner(run)) == said
    assert run.args.get_warmup_steps(100) == (33 if words == {"warmup_epochs": 1} else 20)


def test_a_short_run_has_ten_log_lines_unless_asked_otherwise(tiny_images, tmp_path):
    run = trainer(tiny_images(), tmp_path, num_train_epochs=4, logging_steps=None)
    run.train()
    assert run.state.max_steps == 24 and len([line for line in run.state.log_history if "loss" in line]) >= 10
    asked = trainer(tiny_images(), tmp_path / "asked", num_train_epochs=4, logging_steps=8)
    asked.train()
    assert len([line for line in asked.state.log_history if "loss" in line]) == 3


def test_the_accuracies_of_three_classes_have_no_top5(tiny_images, tmp_path):
    assert not [name for name in trainer(tiny_images(), tmp_path).evaluate() if "top5" in name]
