"""Top-k accuracy, disagreement and the trainer's three heads, against loops over the samples and scikit-learn."""

import os
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score, top_k_accuracy_score
from transformers import EvalPrediction

from hf_deit.evaluation.accuracy import (
    HEADS,
    accuracy_by_class,
    balanced_accuracy,
    class_sizes,
    names_of_metrics,
    three_head_accuracy,
    top_classes,
)
from hf_deit.evaluation.metrics import Disagreement, ReaLAccuracy, TopKAccuracy


def best_of(scores: np.ndarray, k: int = 5) -> np.ndarray:
    return np.argsort(-scores, axis=1)[:, :k]


@pytest.fixture
def scores_and_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 300)
    labels[:20] = np.arange(20)
    return rng.normal(size=(300, 20)) + 1.5 * np.eye(20)[labels], labels


@pytest.mark.parametrize("shape, kept", [((7, 20), 5), ((7, 3, 20), 5), ((7, 5), 1), ((7, 4), 1)])
def test_the_best_classes_are_the_first_of_a_sort(shape, kept):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert top_classes(logits).tolist() == np.argsort(-logits.numpy(), axis=-1)[..., :kept].tolist()


def test_top_k_equals_scikit_learn(scores_and_labels):
    scores, labels = scores_and_labels
    result = TopKAccuracy().compute(predictions=best_of(scores), references=labels, top_k=(1, 3, 5))
    assert result == {f"top{k}": pytest.approx(top_k_accuracy_score(labels, scores, k=k)) for k in (1, 3, 5)}
    assert 0 < result["top1"] < result["top3"] < result["top5"] < 1


def test_batches_give_what_the_whole_gives(scores_and_labels):
    scores, labels = scores_and_labels
    classes = best_of(scores)
    metric = TopKAccuracy()
    for start in range(0, 300, 70):
        metric.add_batch(predictions=classes[start : start + 70], references=labels[start : start + 70])
    assert metric.compute() == TopKAccuracy().compute(predictions=classes, references=labels)
    # A metric can be used again after `compute`, and starts empty.
    assert metric.compute(predictions=[[3, 1]], references=[1]) == {"top1": 0.0}


def test_of_five_classes_and_fewer_there_is_no_top5(scores_and_labels):
    scores, labels = scores_and_labels
    result = TopKAccuracy().compute(predictions=top_classes(torch.tensor(scores[:, :5])), references=labels % 5)
    assert result.keys() == {"top1"} and 0 < result["top1"] < 1


def test_real_accuracy_equals_a_hand_worked_example():
    classes = [[3, 1, 0], [2, 3, 1], [0, 1, 2], [1, 0, 2], [2, 0, 1]]
    labels = [[3], [0, 1], [], [0, 2], [3]]
    # Of four images with labels the first is right at once, the second at its third guess, the fourth at its second.
    result = ReaLAccuracy().compute(predictions=classes, references=labels, top_k=(1, 2, 3))
    assert result == {"top1": 1 / 4, "top2": 2 / 4, "top3": 3 / 4}

    metric = ReaLAccuracy()
    metric.add_batch(predictions=classes[:2], references=labels[:2])
    metric.add_batch(predictions=classes[2:], references=labels[2:])
    assert metric.compute() == {"top1": 1 / 4, "top5": 3 / 4}


def test_real_accuracy_with_one_label_each_is_top_k_accuracy(scores_and_labels):
    scores, labels = scores_and_labels
    classes = best_of(scores)
    result = ReaLAccuracy().compute(predictions=classes, references=[[label] for label in labels])
    assert result == TopKAccuracy().compute(predictions=classes, references=labels)


def test_disagreement_counts_different_decisions():
    one, other = [0, 1, 2, 3, 4], [0, 1, 2, 4, 3]
    assert Disagreement().compute(predictions=one, references=other) == {"disagreement": 0.4}
    assert Disagreement().compute(predictions=other, references=one) == {"disagreement": 0.4}
    assert Disagreement().compute(predictions=one, references=one) == {"disagreement": 0.0}


@pytest.mark.parametrize(
    ("metric", "predictions", "references"),
    [
        (TopKAccuracy, [1, 2, 3], [1, 2, 3]),
        (TopKAccuracy, [[1], [2]], [1]),
        (TopKAccuracy, np.zeros((0, 5), int), []),
        (ReaLAccuracy, [[1], [2]], [[1]]),
        (ReaLAccuracy, [[1], [2]], [[], []]),
        (Disagreement, [1, 2], [1]),
        (Disagreement, [], []),
    ],
)
def test_shapes_that_do_not_fit_are_refused(metric, predictions, references):
    with pytest.raises(ValueError, match="it needs"):
        metric().compute(predictions=predictions, references=references)


def test_three_heads_are_told_apart(scores_and_labels):
    scores, labels = scores_and_labels
    rng = np.random.default_rng(1)
    heads = {head: scores + noise * rng.normal(size=scores.shape) for head, noise in zip(HEADS, (0.0, 1.0, 2.0))}
    losses = rng.random(300).astype(np.float32)
    metrics = three_head_accuracy(
        EvalPrediction((np.stack([best_of(heads[head]) for head in HEADS], axis=1), losses), labels)
    )

    expected = {"loss": losses.astype(float).mean()}
    for head, prefix in {"fused": "", "class": "class_", "distillation": "distillation_"}.items():
        for k in (1, 5):
            expected[f"{prefix}top{k}"] = top_k_accuracy_score(labels, heads[head], k=k)
    expected["balanced_accuracy"] = balanced_accuracy_score(labels, heads["fused"].argmax(axis=1))
    assert metrics == pytest.approx(expected)
    assert metrics["top1"] > metrics["class_top1"] > metrics["distillation_top1"]


def test_one_head_has_no_head_names(scores_and_labels):
    scores, labels = scores_and_labels
    metrics = three_head_accuracy(EvalPrediction((best_of(scores)[:, None], np.ones(300, np.float32)), labels))
    top1, top5 = (top_k_accuracy_score(labels, scores, k=k) for k in (1, 5))
    balanced = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert metrics == pytest.approx({"loss": 1.0, "top1": top1, "top5": top5, "balanced_accuracy": balanced})


def test_other_numbers_of_heads_are_refused():
    with pytest.raises(ValueError, match="1 or 3 heads"):
        three_head_accuracy(EvalPrediction((np.zeros((4, 2, 5), int), np.zeros(4)), np.zeros(4, int)))


def test_a_loss_that_is_not_finite_stays_visible():
    losses = np.array([0.5, np.nan], dtype=np.float32)
    assert np.isnan(three_head_accuracy(EvalPrediction((np.zeros((2, 1, 5), int), losses), np.zeros(2, int)))["loss"])


def test_imagenet_validation_takes_no_time():
    rng = np.random.default_rng(0)
    classes, labels = rng.integers(0, 1000, (50_000, 3, 5)), rng.integers(0, 1000, 50_000)
    start = time.perf_counter()
    three_head_accuracy(EvalPrediction((classes, np.zeros(50_000, np.float32)), labels))
    assert time.perf_counter() - start < 0.5


def test_metrics_leave_numpys_random_state_alone():
    before = np.random.get_state()[1].copy(), np.random.get_state()[2]
    metric = TopKAccuracy()
    metric.add_batch(predictions=[[0, 1]], references=[1])
    metric.compute()
    after = np.random.get_state()[1], np.random.get_state()[2]
    assert (before[0] == after[0]).all() and before[1] == after[1]


def test_no_cache_folder_is_needed(monkeypatch):
    # A file where the cache folder should be: nothing can be created below it.
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", f"{os.devnull}/cache")
    metric = TopKAccuracy()
    metric.add_batch(predictions=[[0, 1], [1, 0]], references=[0, 0])
    assert metric.compute() == {"top1": 0.5}
    monkeypatch.delattr("hf_deit.evaluation.metrics._LocalMetric._build_data_dir")
    with pytest.raises(NotADirectoryError):
        TopKAccuracy()  # a metric of evaluate's own


# --- uneven classes ----------------------------------------------------------------------------------------------


def test_balanced_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 2, 3], [60, 9, 20])
    decisions = np.where(rng.random(89) < 0.6, labels, rng.integers(0, 5, 89))
    assert balanced_accuracy(decisions, labels) == pytest.approx(balanced_accuracy_score(labels, decisions))
    by_class = accuracy_by_class(decisions, labels)
    recalls = recall_score(labels, decisions, labels=[0, 2, 3], average=None, zero_division=0)
    assert by_class == pytest.approx(dict(zip([0, 2, 3], recalls, strict=True)))


@pytest.mark.parametrize(
    ("sizes", "uneven"), [([7, 7, 6], False), ([6, 0, 9], True), ([10, 0, 0], False), ([], False)]
)
def test_balanced_accuracy_is_measured_where_classes_are_uneven(sizes, uneven):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert (class_sizes(labels) is not None) == uneven
    assert ("balanced_accuracy" in names_of_metrics(3, 3, labels)) == uneven
    if not len(labels):
        return
    best = np.tile(np.arange(3), (len(labels), 3, 1))
    metrics = three_head_accuracy(EvalPrediction((best, np.ones(len(labels))), labels))
    assert set(metrics) == set(names_of_metrics(3, 3, labels))
    assert metrics.get("balanced_accuracy", 0.5) == 0.5
