"""Predictions: heads and fusions against stock Transformers, crops, ReaL, several processes."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List
from support.evaluation import (
    COLOURS,
    ID2LABEL,
    MEAN,
    STD,
    assert_predicts,
    assert_predicts_heads,
    log_softmax,
    pixels_of,
    save,
)

import hf_deit.evaluation.predict as predict_module
from hf_deit import load_classifier
from hf_deit.evaluation.predict import predict


RECIPES = Path(__file__).resolve().parents[2] / "recipes"


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


@pytest.mark.parametrize("labels", [[1], [[0, 2]]])
def test_a_process_without_an_image_returns_the_predictions_of_the_others(stock, images, monkeypatch, labels):
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=COLOURS)})
    if isinstance(labels[0], list):
        features["label"] = List(features["label"])
    one = Dataset.from_dict({"image": list(images.select([0])["image"]), "label": labels}, features)
    classifier, gathered = load_classifier(stock[1], id2label=ID2LABEL), []
    monkeypatch.setattr(predict_module, "gather_object", lambda batches: gathered.extend(batches) or batches)
    alone = predict(classifier, one)
    rank_1_of_2 = SimpleNamespace(process_index=1, num_processes=2, device="cpu")
    monkeypatch.setattr(predict_module, "current_process", lambda: rank_1_of_2)
    monkeypatch.setattr(predict_module, "gather_object", lambda batches: gathered + batches)
    together = predict(classifier, one)
    assert list(together.best_classes) == list(together.losses) == list(alone.losses) == list(classifier.heads)
    for head, losses in alone.losses.items():
        assert np.array_equal(together.losses[head], losses)
        assert np.array_equal(together.best_classes[head], alone.best_classes[head])
    assert np.array_equal(together.labels, alone.labels) and together.accuracy() == alone.accuracy()


@pytest.mark.slow
@pytest.mark.parametrize("count", [19, 1])
def test_two_processes_count_every_image_once(script, stock, dataset, tmp_path, count):
    arguments = ["--models", stock[1], "--dataset_name", dataset, "--num_workers", "0", "--batch_size", "4"]
    arguments += ["--max_eval_samples", str(count)]
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
    assert together["processes"] == 2 and together["results"][0]["images"] == count
    for head, measured in together["results"][0]["heads"].items():
        assert measured == pytest.approx(alone["results"][0]["heads"][head])
    assert stdout.count("| model |") == 1
