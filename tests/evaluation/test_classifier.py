"""Evaluation: heads and fusions against stock Transformers and timm, classes, sizes, crops, ReaL, run_eval.py."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, List
from PIL import Image as PillowImage
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.deit.configuration_deit import DeiTConfig as StockConfig
from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacher as StockDeiT

from hf_deit import (
    EvalViews,
    build_eval_transform,
    build_image_processor,
    exit_clearly,
    load_classifier,
    new_classifier,
    predict,
)


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
COLOURS = ["red", "green", "blue"]
ID2LABEL = dict(enumerate(COLOURS))
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"image_size": 16, "patch_size": 4}


def drawn(model, seed=0):
    """The model with weights whose decisions differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 2 * parameter.shape[1] ** -0.5, generator=generator)
        elif "patch" in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    return model.eval()


def save(model, path, crop_ratio=1.0, image_size=16):
    processor = build_image_processor(build_eval_transform(image_size, crop_ratio=crop_ratio))
    processor.image_mean, processor.image_std = list(MEAN), list(STD)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture
def stock(tmp_path):
    """Stock's two-head model, and the directory where it is saved."""
    model = drawn(StockDeiT(StockConfig(**SHAPE, id2label=ID2LABEL)))
    return model, save(model, tmp_path / "stock")


@pytest.fixture
def images(tiny_images):
    return tiny_images()["eval"]


def pixels_of(images, size=16, crop_ratio=1.0):
    """Shorter side to size / crop_ratio, central square, normalised: with Pillow and NumPy alone."""
    batch = []
    for image in images.cast_column("image", Image())["image"]:
        shorter = int(size / crop_ratio)
        image = image.convert("RGB").resize((shorter, shorter), PillowImage.Resampling.BICUBIC)
        start = (shorter - size) // 2
        batch.append(np.asarray(image.crop((start, start, start + size, start + size))) / 255)
    return torch.tensor((np.stack(batch) - MEAN) / STD).permute(0, 3, 1, 2).float()


def log_softmax(logits):
    logits = logits.double().numpy()
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def assert_predicts(predictions, head, log_probabilities, labels):
    """Best classes and losses of one head are those of the log-probabilities (samples, classes)."""
    best = np.argsort(-log_probabilities, axis=1)[:, :5]
    assert (predictions.best_classes[head] == best).all()
    assert len(set(best[:, 0])) > 1, "one class for all images shows nothing"
    losses = -log_probabilities[np.arange(len(labels)), labels]
    np.testing.assert_allclose(predictions.losses[head], losses, rtol=1e-4, atol=1e-5)
    measured = predictions.accuracy()[head]
    assert measured["top1"] == np.mean(best[:, 0] == labels)
    assert measured["loss"] == pytest.approx(losses.mean(), rel=1e-4)


def assert_predicts_heads(predictions, class_logits, distillation_logits, labels):
    one, other = log_softmax(class_logits), log_softmax(distillation_logits)
    expected = {"class": one, "distillation": other, "softmax": np.log((np.exp(one) + np.exp(other)) / 2)}
    expected["logits"] = log_softmax((class_logits + distillation_logits) / 2)
    assert list(predictions.best_classes) == list(expected)
    for head, log_probabilities in expected.items():
        assert_predicts(predictions, head, log_probabilities, labels)


# --- heads, sizes, crops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_ratio", [None, 0.5])
def test_heads_and_fusions_are_those_of_stock_transformers(stock, images, crop_ratio):
    model, path = stock
    classifier = load_classifier(path, id2label=ID2LABEL)
    predictions = predict(classifier, images, crop_ratio=crop_ratio, batch_size=7)
    with torch.no_grad():
        outputs = model(pixels_of(images, crop_ratio=crop_ratio or 1.0))
    labels = np.array(images["label"])
    assert_predicts_heads(predictions, outputs.cls_logits, outputs.distillation_logits, labels)
    assert predictions.crop_ratio == (crop_ratio or 1.0) and (predictions.labels == labels).all()
    assert (classifier.own_head, classifier.mean, classifier.std) == (
        "logits",
        pytest.approx(MEAN),
        pytest.approx(STD),
    )


def test_the_processors_crop_ratio_is_the_default(tmp_path, stock, images):
    model, _ = stock
    path = save(model, tmp_path / "cropped", crop_ratio=0.8)
    predictions = predict(load_classifier(path, id2label=ID2LABEL), images)
    assert predictions.crop_ratio == 0.8
    with torch.no_grad():
        logits = model(pixels_of(images, crop_ratio=0.8)).cls_logits
    assert_predicts(predictions, "class", log_softmax(logits), np.array(images["label"]))


@pytest.mark.parametrize("kind", ["deit", "vit"])
def test_positions_are_resized_to_another_image_size(tmp_path, stock, images, kind):
    model, path = stock
    if kind == "vit":
        model = drawn(ViTForImageClassification(ViTConfig(**SHAPE, id2label=ID2LABEL)))
        path = save(model, tmp_path / "vit")
    classifier = load_classifier(path, id2label=ID2LABEL, image_size=32)
    predictions = predict(classifier, images)
    with torch.no_grad():
        outputs = model(pixels_of(images, 32), interpolate_pos_encoding=True)
    logits = outputs.cls_logits if kind == "deit" else outputs.logits
    assert_predicts(predictions, "class", log_softmax(logits), np.array(images["label"]))
    assert predictions.image_size == 32
    assert classifier.heads == (("class",) if kind == "vit" else ("class", "distillation", "softmax", "logits"))


def test_a_timm_checkpoint_answers_as_in_timm(tmp_path, images):
    name, size = "deit_tiny_distilled_patch16_224", 32
    model = drawn(timm.create_model(name, num_classes=3))
    weights = model.state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    classifier = load_classifier(
        f"timm:{name}?checkpoint={tmp_path}/w.safetensors", id2label=ID2LABEL, image_size=size
    )
    pretrained = timm.data.resolve_model_data_config(model)
    assert classifier.crop_ratio == pretrained["crop_pct"] and classifier.mean == pretrained["mean"]
    assert classifier.classes_matched == "by position: the model has no class names"

    views = EvalViews(images, build_eval_transform(size, crop_ratio=pretrained["crop_pct"]))
    pixels = np.stack([views[index]["pixel_values"] for index in range(len(views))]) / 255
    pixels = torch.tensor((pixels - pretrained["mean"]) / pretrained["std"]).permute(0, 3, 1, 2).float()
    reference = timm.create_model(name, num_classes=3, img_size=size)
    reference.load_state_dict(checkpoint_filter_fn(dict(weights), reference))
    reference.eval().set_distilled_training(True)
    reference.training = True  # it alone: the answer is then that of both heads
    with torch.no_grad():
        heads = reference(pixels)
    assert_predicts_heads(predict(classifier, images), *heads, np.array(images["label"]))


def test_a_timm_teacher_of_ours_is_evaluated_as_it_was_trained(tmp_path):
    arguments = {"id2label": ID2LABEL, "mean": MEAN, "std": STD, "image_size": 24}
    model = new_classifier("timm:resnet10t", model_args={"channels": (8, 8, 8, 8), "stem_width": 8}, **arguments)
    own = model.timm_model.pretrained_cfg["crop_pct"]
    model.save_pretrained(tmp_path / "bare")
    assert load_classifier(tmp_path / "bare", id2label=ID2LABEL).crop_ratio == own != 0.75
    classifier = load_classifier(save(model, tmp_path / "ours", 0.75, image_size=24), id2label=ID2LABEL)
    assert (classifier.crop_ratio, classifier.image_size, classifier.heads) == (0.75, 24, ("class",))


@pytest.mark.parametrize(("size", "shorter"), [(384, 438), (224, 256), (224, 248), (160, 182), (320, 365)])
def test_a_crop_ratio_read_from_whole_pixels_gives_them_back(size, shorter):
    from hf_deit.evaluation.classifier import _without_rounding

    assert int(size / _without_rounding(size / shorter, size)) == shorter


# --- classes -----------------------------------------------------------------------------------------------------


def test_the_same_classes_in_another_order_are_reordered(tmp_path, stock, images):
    model, path = stock
    labels = np.array(images["label"])
    expected = predict(load_classifier(path, id2label=ID2LABEL), images).accuracy()
    order = [2, 0, 1]
    for head in (model.cls_classifier, model.distillation_classifier):
        head.weight.data, head.bias.data = head.weight[order], head.bias[order]
    model.config.id2label = {new: COLOURS[old] for new, old in enumerate(order)}
    classifier = load_classifier(save(model, tmp_path / "other"), id2label=ID2LABEL)
    assert classifier.classes_matched == "by name, re-ordered"
    predictions = predict(classifier, images)
    for head, measured in predictions.accuracy().items():
        assert measured == pytest.approx(expected[head])
    trusting = load_classifier(str(tmp_path / "other"), id2label=ID2LABEL, trust_class_order=True)
    assert trusting.classes_matched == "by position, as told"
    assert (
        np.array(order)[predict(trusting, images).best_classes["class"]] == predictions.best_classes["class"]
    ).all()
    assert (labels == predictions.labels).all()


@pytest.mark.parametrize(
    ("own", "wanted", "how"),
    [
        (["LABEL_0", "LABEL_1", "LABEL_2"], COLOURS, "by position: the model has no class names"),
        (["0", "1", "2"], COLOURS, "by position: the model has no class names"),
        (COLOURS, ["0", "1", "2"], "by position: the data set has no class names"),  # ImageNet V2 and ReaL
        (["2", "1", "0"], ["0", "1", "2"], "by name, re-ordered"),
        (["0", "1", "2"], ["0", "1", "2"], "by name"),
    ],
)
def test_classes_without_names_are_taken_by_position(tmp_path, stock, own, wanted, how):
    model, _ = stock
    model.config.id2label = dict(enumerate(own))
    classifier = load_classifier(save(model, tmp_path / "named"), id2label=dict(enumerate(wanted)))
    assert classifier.classes_matched == how


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["red", "green", "cyan"], r"other classes \(blue\) than the data set \(cyan\).*trust_class_order"),
        (["red", "green"], r"knows 3 classes \(red, green, blue\), the data set has 2 \(red, green\)"),
    ],
)
def test_other_classes_are_refused(stock, wanted, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(stock[1], id2label=dict(enumerate(wanted)))


# --- ReaL --------------------------------------------------------------------------------------------------------


def test_labels_in_lists_count_once_each_and_images_without_any_do_not(stock, images):
    model, path = stock
    labels = [[0], [1, 2], [], [2], [0, 1, 2], [1]]
    features = Features({"image": Image(decode=False), "label": List(ClassLabel(names=COLOURS))})
    real = Dataset.from_dict({"image": list(images.select(range(6))["image"]), "label": labels}, features)
    predictions = predict(load_classifier(path, id2label=ID2LABEL), real, batch_size=4)
    assert predictions.labels == labels and predictions.labelled().tolist() == [True, True, False, True, True, True]

    with torch.no_grad():
        probabilities = model(pixels_of(real)).cls_logits.softmax(dim=1).numpy()
    best = probabilities.argmax(axis=1)
    measured = predictions.accuracy()["class"]
    assert measured["top1"] == sum(best[i] in labels[i] for i in (0, 1, 3, 4, 5)) / 5
    expected = [-np.log(probabilities[i, labels[i]].sum()) for i in (0, 1, 3, 4, 5)]
    assert measured["loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert np.isnan(predictions.losses["class"][2])


# --- run_eval.py -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("run_eval")


@pytest.fixture
def dataset(tmp_path, tiny_images):
    """A directory as `dataset_name`, with 19 images to evaluate on."""
    (tmp_path / "set").mkdir()
    for split, rows in tiny_images(6, 19).items():
        rows.to_parquet(str(tmp_path / "set" / f"{'test' if split == 'eval' else split}.parquet"))
    return str(tmp_path / "set")


def test_the_table_and_the_json_say_the_same(script, stock, dataset, tmp_path, capsys):
    vit = save(drawn(ViTForImageClassification(ViTConfig(**SHAPE, id2label=ID2LABEL))), tmp_path / "vit")
    arguments = ["--models", f"{stock[1]},{vit}", "--dataset_name", dataset, "--image_size", "16", "32"]
    arguments += ["--num_workers", "0", "--heads", "class, softmax", "--output", str(tmp_path / "new" / "report")]
    report = script.main(arguments)
    assert report == json.loads((tmp_path / "new" / "report.json").read_text())
    table = (tmp_path / "new" / "report.md").read_text()
    assert table.strip() in capsys.readouterr().out

    results = report["results"]
    sizes = [(result["model"], result["image_size"]) for result in results]
    assert sizes == [(stock[1], 16), (stock[1], 32), (vit, 16), (vit, 32)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    expected = [(result, head) for result in results for head in result["heads"] if head in ("class", "softmax")]
    assert [row[3] for row in rows[1:]] == ["class", "softmax", "class", "softmax", "class", "class"]
    for row, (result, head) in zip(rows[1:], expected, strict=True):
        measured = result["heads"][head]
        assert row[4:7] == [
            f"{100 * measured['top1']:.2f}",
            f"{100 * measured['top5']:.2f}",
            f"{measured['loss']:.4f}",
        ]
        assert result["images"] == 19 and result["parameters"] > 0
    assert rows[1][:3] == [stock[1], "16", "1"] and "19 images" in table
    assert {"torch", "transformers", "timm", "hf_deit"} <= report["versions"].keys()
    assert "--dataset_name" in report["command"] and report["dataset"]["classes"] == 3


def test_the_table_says_what_was_not_counted_and_how_classes_were_matched(script):
    heads = {"class": {"top1": 0.5, "top5": 1.0, "loss": 1.0}}
    result = {"model": "m", "image_size": 224, "crop_ratio": 0.875, "images": 50_000, "images_without_label": 3_163}
    result |= {"images_per_second": 1234.5, "own_head": "class", "heads": heads, "classes_matched": "by position: why"}
    table = script.evaluation_table({"dataset": {"name": "imagenet-real"}, "results": [result]}, ["softmax"])
    assert "50,000 images of imagenet-real, 3,163 of them without a label and not counted" in table
    assert "| m | 224 | 0.875 | class | 50.00 | 100.00 | 1.0000 | 1,234 |" in table
    assert "classes of m: by position: why" in table and "softmax" not in table


def test_imagenet_real_is_read_from_its_official_files(script, tmp_path):
    (tmp_path / "real" / "val").mkdir(parents=True)
    for number, colour in enumerate(COLOURS + ["white"], start=1):
        image = PillowImage.new("RGB", (16, 16), colour)
        image.save(tmp_path / "real" / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "real" / "real.json").write_text(json.dumps([list(range(1000)), [], [], [7]]))
    names = {number: f"thing {number}" for number in range(1000)}
    model = drawn(ViTForImageClassification(ViTConfig(**SHAPE, id2label=names)))
    model.classifier.bias.data[3] = 1e3  # whatever it sees
    arguments = ["--models", save(model, tmp_path / "vit"), "--dataset_name", "imagenet-real", "--num_workers", "0"]
    arguments += ["--data_dir", str(tmp_path / "real"), "--output", str(tmp_path / "report")]
    result = script.main(arguments)["results"][0]
    assert (result["images"], result["images_without_label"]) == (4, 2)
    assert result["classes_matched"] == "by position: the data set has no class names"
    assert result["heads"]["class"]["top1"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "models is not set"),
        (["--models", "{none}"], "'.*/nowhere' does not exist"),
        (["--models", "timm:deit_tinny"], "timm has no model 'deit_tinny'"),
        (["--models", "{stock}", "--heads", "fused"], "heads has 'fused'; the heads are class, distillation"),
        (["--models", "{stock}", "--image_size", "large"], "image_size has 'large'"),
        (["--models", "{stock}", "--image_size", "18"], "could not read a blank 18 x 18 image: .*multiple of patch"),
        (["--models", "{stock}", "--crop_ratio", "2"], "crop_ratio must be above 0 and at most 1, got 2"),
        (["--models", "{stock}", "--dataset_name", "digits"], r"knows 3 classes \(red.*the data set has 10 \(0, 1"),
        (["--models", "{stock}", "--modles", "x"], "did you mean 'models'"),
    ],
)
def test_bad_input_ends_in_one_line(script, stock, dataset, tmp_path, arguments, message):
    fill = {"stock": stock[1], "none": str(tmp_path / "nowhere")}
    base = ["--dataset_name", dataset, "--num_workers", "0", "--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match="^error: .*" + message) as end:
        exit_clearly(lambda: script.main([*base, *(argument.format(**fill) for argument in arguments)]))
    assert "\n" not in str(end.value) and not (tmp_path / "report.json").exists()


def test_a_recipe_may_write_its_lists_as_yaml_does(script, stock, dataset, tmp_path):
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(f"models: [{stock[1]}]\ndataset_name: {dataset}\nimage_size: 16\ncrop_ratio: [1, 0.5]\n")
    report = script.main([str(recipe), "--num_workers", "0", "--output", str(tmp_path / "report")])
    assert [(result["image_size"], result["crop_ratio"]) for result in report["results"]] == [(16, 1.0), (16, 0.5)]


@pytest.mark.slow
def test_two_processes_count_every_image_once(script, stock, dataset, tmp_path):
    arguments = ["--models", stock[1], "--dataset_name", dataset, "--num_workers", "0", "--batch_size", "4"]
    alone = script.main([*arguments, "--output", str(tmp_path / "alone")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(RECIPES / "run_eval.py"), *arguments]
    command += ["--output", str(tmp_path / "two")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=300)
        finally:
            with suppress(ProcessLookupError):  # torchrun's children outlive it
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, stderr[-3000:]
    together = json.loads((tmp_path / "two.json").read_text())
    assert together["processes"] == 2 and together["results"][0]["images"] == 19
    for head, measured in together["results"][0]["heads"].items():
        assert measured == pytest.approx(alone["results"][0]["heads"][head])
    assert stdout.count("| model |") == 1
