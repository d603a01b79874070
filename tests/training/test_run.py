"""run.py: what a run says at its start and at its end, and the files it leaves."""

import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.models import small_model
from support.runs import student, trainer
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

from hf_deit import (
    DataArguments,
    DeiTForImageClassificationWithTeacher,
    DistillationConfig,
    DistillationTrainer,
    UserError,
    decode_image,
    load_teacher,
    load_views,
)
from hf_deit.evaluation.accuracy import three_head_accuracy
from hf_deit.models.classifiers import load_pretrained
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


# --- parts by their names --------------------------------------------------------------------------------------------

SHORT = {
    **{"max_steps": 2, "per_device_train_batch_size": 8, "dataloader_num_workers": 0, "use_cpu": True},
    **{"disable_tqdm": True, "report_to": [], "learning_rate": 1e-3, "warmup_steps": 0},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, color in {"cat": 50, "dog": 120, "owl": 200}.items():
        (folder / name).mkdir()
        for number in range(8):
            pixels = np.clip(rng.normal(color, 30, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A student that was saved with other classes, and a teacher that stock Transformers saved with these."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    small_model(num_labels=7).save_pretrained(folder / "student")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = dict(enumerate(["owl", "cat", "dog"]))
    ViTForImageClassification(
        ViTConfig(**sizes, image_size=32, patch_size=8, id2label=names, label2id={v: k for k, v in names.items()})
    ).save_pretrained(folder / "teacher")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "teacher")
    return str(folder / "student"), str(folder / "teacher")


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_names_train_what_objects_train(photos, networks, tmp_path):
    student, teacher = networks
    args = DistillationConfig(output_dir=str(tmp_path / "names"), **SHORT)
    named = DistillationTrainer(student, args, teacher=teacher, train_dataset=photos)
    named.train()
    assert named.model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert len(named.train_dataset) + len(named.eval_dataset) == 24 and len(named.eval_dataset) == 3
    assert named.train_dataset.transform.image_size == named.model.config.image_size == 32

    args = DistillationConfig(output_dir=str(tmp_path / "objects"), **SHORT)
    views = load_views(
        DataArguments(dataset_name=photos, image_size=32), seed=args.view_seed, **args.transform_options()
    )
    set_seed(args.seed)
    model = load_pretrained(DeiTForImageClassificationWithTeacher, student, image_size=32, id2label=views.id2label)
    mean, std = views.processor.image_mean, views.processor.image_std
    objects = DistillationTrainer(
        model,
        args,
        load_teacher(teacher, id2label=views.id2label, mean=mean, std=std, student_size=32),
        train_dataset=views.train,
        eval_dataset=views.eval,
        processing_class=views.processor,
    )
    objects.train()
    for name, value in weights(objects).items():
        assert torch.equal(value, named.model.state_dict()[name]), name


@pytest.mark.parametrize("two", [False, True])
def test_a_dataset_in_memory_is_trained_on_like_its_folder(photos, networks, tmp_path, two):
    student, teacher = networks
    rows = datasets.load_dataset("imagefolder", data_dir=photos, split="train")
    parts = rows.train_test_split(0.25, seed=0, stratify_by_column="label") if two else {"train": rows}
    given = {"train_dataset": parts["train"]} | ({"eval_dataset": parts["test"]} if two else {})
    args = DistillationConfig(output_dir=str(tmp_path), **SHORT)
    run = DistillationTrainer(student, args, teacher, **given)
    assert len(run.eval_dataset) == (6 if two else 3)
    found = [decode_image(row["image"]) for row in run.train_dataset.images]
    wanted = {np.asarray(row["image"].convert("RGB")).tobytes() for row in rows}
    assert {np.asarray(image).tobytes() for image in found} <= wanted
    assert 0 <= run.train_and_save()["eval_top1"] <= 1
    assert "dataset" in (tmp_path / "README.md").read_text().lower()


def test_the_compute_metrics_of_the_tutorials_gets_the_fused_logits(photos, networks, tmp_path):
    student, teacher = networks

    def compute_metrics(prediction):
        logits, labels = prediction
        return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean()), "classes": logits.shape[1]}

    args = DistillationConfig(output_dir=str(tmp_path), metric_for_best_model="accuracy", **SHORT)
    run = DistillationTrainer(student, args, teacher, train_dataset=photos, compute_metrics=compute_metrics)
    own = run.evaluate()
    run.compute_metrics = three_head_accuracy
    ours = run.evaluate()
    assert own["eval_classes"] == 3 and own["eval_accuracy"] == ours["eval_top1"]
    assert own["eval_loss"] == pytest.approx(ours["eval_loss"], rel=1e-5)


def test_without_compute_metrics_the_loss_is_measured(photos, networks, tmp_path):
    args = DistillationConfig(output_dir=str(tmp_path), **SHORT)
    metrics = DistillationTrainer(
        *networks[:1], args, networks[1], train_dataset=photos, compute_metrics=None
    ).evaluate()
    assert metrics["eval_loss"] > 0 and "eval_top1" not in metrics


@pytest.mark.parametrize(
    "names, message",
    [
        ({0: "cat", 1: "owl", 2: "dog"}, r"3 classes, cat, owl.*3, cat, dog.*in this order"),
        ({0: "a", 1: "b"}, "2 classes"),
    ],
)
def test_a_model_of_other_classes_is_refused(photos, networks, tmp_path, names, message):
    args = DistillationConfig(output_dir=str(tmp_path), **SHORT)
    with pytest.raises(UserError, match=message):
        DistillationTrainer(
            small_model(num_labels=len(names), id2label=names), args, networks[1], train_dataset=photos
        )


def test_an_evaluation_set_beside_a_named_one_is_refused(photos, networks, tmp_path):
    args = DistillationConfig(output_dir=str(tmp_path), **SHORT)
    with pytest.raises(UserError, match="eval_split"):
        DistillationTrainer(networks[0], args, networks[1], train_dataset=photos, eval_dataset=photos)


def test_the_first_python_of_the_readme_runs(photos, networks, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    code = re.search(r"^## In Python\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 8
    names = {"facebook/deit-tiny-distilled-patch16-224": networks[0], "outputs/my_teacher": networks[1]}
    for name, path in (names | {'"my_photos"': f'"{photos}"', "num_train_epochs=30": "**SHORT"}).items():
        assert code.count(name) == 1
        code = code.replace(name, path)
    monkeypatch.chdir(tmp_path)
    exec(code, {"SHORT": SHORT})
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    assert (tmp_path / "outputs" / "my_photos" / "dataset.json").exists()
