"""policies.py: which operations a view gets, and how strong, beside timm."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from support.augmentation import DRAWS, FILL, PAPER, same_distribution
from timm.data import auto_augment as timm_auto_augment
from torchvision import transforms

from hf_deit.augmentation.policies import ColorJitter, parse_auto_augment
from hf_deit.augmentation.transforms import (
    build_train_transform,
)


TIMM_PARAMETERS = {"translate_const": 100, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}


def same_rate(ours: int, theirs: int, trials: int, what: str) -> None:
    pooled = (ours + theirs) / (2 * trials)
    assert abs(ours - theirs) <= 4.5 * math.sqrt(2 * trials * pooled * (1 - pooled)) + 1e-9, (what, ours, theirs)


def record_timm(operations: list) -> list[tuple[str, float | None]]:
    """Replace the pixel functions of timm's operations by one that writes down their arguments."""
    calls: list[tuple[str, float | None]] = []
    for operation in operations:

        def write_down(image, *arguments, name=operation.name, **_):
            calls.append((name, arguments[0] if arguments else None))
            return image

        operation.aug_fn = write_down
    return calls


@pytest.mark.parametrize("config", [PAPER, "rand-m7-mstd101-inc0", "rand-m6-n3-p0.8-mstd2-mmax8-t3aw"])
def test_parameters_of_every_operation_are_distributed_as_timms(config):
    ours = parse_auto_augment(config)
    theirs = timm_auto_augment.rand_augment_transform(config, dict(TIMM_PARAMETERS))
    assert [step.name for step in ours.steps] == [operation.name for operation in theirs.ops]
    random.seed(1)
    rng = np.random.default_rng(1)
    for step, operation in zip(ours.steps, theirs.ops, strict=True):
        calls = record_timm([operation])
        for _ in range(DRAWS):
            operation(None)
        alone = dataclasses.replace(ours, steps=(step,), weights=None, num_layers=1)
        drawn = [operation for _ in range(DRAWS) for operation in alone.sample(rng)]
        same_rate(len(drawn), len(calls), DRAWS, f"{step.name}: how often it happens")
        values, expected = [value for _, value in drawn], [value for _, value in calls]
        if expected[0] is None:
            assert set(values) == {None}
            continue
        same_distribution(values, expected, step.name)
        assert type(values[0]) is type(expected[0])
        if len(set(expected)) <= 8:  # whole numbers, some of them rare
            for value in set(values) | set(expected):
                same_rate(values.count(value), expected.count(value), DRAWS, f"{step.name} {value}")
            continue
        spread = np.std(expected)
        assert np.mean(values) == pytest.approx(np.mean(expected), abs=0.08 * spread + 1e-9), step.name
        assert np.std(values) == pytest.approx(spread, rel=0.05, abs=1e-9), step.name


@pytest.mark.parametrize("config", [PAPER, "rand-m9-n3-tweights"])
def test_operations_are_chosen_as_often_and_in_as_many_layers_as_timms(config):
    theirs = timm_auto_augment.rand_augment_transform(config, dict(TIMM_PARAMETERS))
    calls = record_timm(theirs.ops)
    random.seed(2)
    np.random.seed(2)
    their_counts = []
    for _ in range(DRAWS):
        before = len(calls)
        theirs(None)
        their_counts.append(len(calls) - before)
    ours, rng = parse_auto_augment(config), np.random.default_rng(2)
    views = [ours.sample(rng) for _ in range(DRAWS)]
    for count in range(4):
        same_rate(sum(len(view) == count for view in views), their_counts.count(count), DRAWS, f"{count} operations")
    for step in ours.steps:
        drawn = sum(operation.name == step.name for view in views for operation in view)
        same_rate(drawn, sum(name == step.name for name, _ in calls), 3 * DRAWS, step.name)


@pytest.mark.parametrize("name", ["original", "originalr", "v0", "v0r", "3a"])
def test_autoaugment_policies_are_timms(name):
    theirs = timm_auto_augment.auto_augment_transform(f"{name}-mstd0.5", dict(TIMM_PARAMETERS))
    ours = parse_auto_augment(f"{name}-mstd0.5")
    assert [[tuple(step) for step in sub] for sub in ours.policy] == [
        [(operation.name, operation.prob, operation.magnitude) for operation in sub] for sub in theirs.policy
    ]
    calls = record_timm([operation for sub in theirs.policy for operation in sub])
    random.seed(4)
    for _ in range(DRAWS):
        theirs(None)
    rng = np.random.default_rng(4)
    drawn = [operation for _ in range(DRAWS) for operation in ours.sample(rng)]
    for operation in {name for name, _ in calls} | {operation.name for operation in drawn}:
        mine = [o.value for o in drawn if o.name == operation]
        expected = [value for called, value in calls if called == operation]
        same_rate(len(mine), len(expected), 2 * DRAWS, operation)
        if operation == "GaussianBlurRand":  # timm draws the radius only while it blurs
            expected = [random.uniform(0.1, 2.0 * factor) for factor in expected]
        if expected[0] is not None:
            same_distribution(mine, expected, operation)


def test_flip_and_colour_jitter_rates():
    transform = build_train_transform(auto_augment=None, color_jitter=0.3, horizontal_flip=0.25)
    rng = np.random.default_rng(5)
    views = [transform.sample(300, 400, rng) for _ in range(DRAWS)]
    assert np.mean([view.flip for view in views]) == pytest.approx(0.25, abs=0.02)
    torch.manual_seed(5)
    expected = [transforms.ColorJitter.get_params([0.7, 1.3], [0.7, 1.3], [0.7, 1.3], None) for _ in range(DRAWS)]
    for column, name in enumerate(("Brightness", "Contrast", "Color"), start=1):
        values = [operation.value for view in views for operation in view.operations if operation.name == name]
        assert len(values) == DRAWS
        same_distribution(values, [parameters[column] for parameters in expected], name)
    orders = [tuple(operation.name for operation in view.operations) for view in views]
    assert len(set(orders)) == 6
    assert all(abs(orders.count(order) - DRAWS / 6) < 200 for order in set(orders))


def test_colour_jitter_is_idle_with_autoaugment_except_3a():
    def samplers(**arguments):
        return [type(policy) for policy in build_train_transform(**arguments).policies]

    assert ColorJitter not in samplers()
    assert ColorJitter not in samplers(auto_augment="original")
    assert samplers(auto_augment=None) == [ColorJitter]
    assert ColorJitter in samplers(auto_augment="3a")
    assert samplers(auto_augment=None, color_jitter=0) == samplers(auto_augment=None, color_jitter=None) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("randaugment", "'rand' or one of"),
        ("", "'rand' or one of"),
        ("augmix-m5", "'rand' or one of"),
        ("rand-m9-mstd", "'mstd'"),
        ("rand-x3", "'x3'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-m9-m8", "'m8'"),
        ("rand-m9-", "section ''"),
        ("rand-w0", "tweights"),
        ("rand-tfoo", "'tfoo'"),
        ("rand-p1.5", "probability"),
        ("rand-inc2", "inc0 or inc1"),
        ("rand-n99-tweights", "15"),
        ("original-m9", "'m9'"),
        (9, "string"),
    ],
)
def test_unknown_policies_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        build_train_transform(auto_augment=config)
