"""distillation_config.py: Table 9's numbers, the learning-rate rule, the schedule's shape, and what is refused."""

import math

import pytest
import torch
from transformers import get_scheduler

from hf_deit import DistillationConfig
from hf_deit.options.own_options import OwnOptions


def config(tmp_path, **fields):
    return DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **fields)


def test_defaults_are_table_9(tmp_path):
    args = config(tmp_path)
    assert (args.num_train_epochs, args.weight_decay, args.warmup_epochs) == (300, 0.05, 5)
    assert (args.label_smoothing_factor, args.mixup_alpha, args.cutmix_alpha) == (0.1, 0.8, 1.0)
    assert (args.random_erasing_prob, args.num_repeats, args.auto_augment) == (0.25, 3, "rand-m9-mstd0.5-inc1")
    assert args.max_grad_norm == 0 and args.optim.value.startswith("adamw")
    assert args.per_device_train_batch_size * 8 == 1024
    assert (args.distillation_type, args.distillation_temperature) == ("hard", 3.0)


@pytest.mark.parametrize("batch, accumulation", [(1024, 1), (128, 8)])
def test_learning_rate_is_scaled_by_the_effective_batch(tmp_path, batch, accumulation):
    args = config(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert args.learning_rate == pytest.approx(5e-4 * 1024 / 512)
    scaled = config(
        tmp_path, base_learning_rate=3e-4, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    assert scaled.learning_rate == pytest.approx(6e-4)


def test_a_learning_rate_is_final(tmp_path):
    assert config(tmp_path, learning_rate=7.5e-5, per_device_train_batch_size=768).learning_rate == 7.5e-5


def test_the_schedule_warms_up_from_1e_6_and_ends_at_min_lr(tmp_path):
    args = config(tmp_path, num_train_epochs=20, warmup_epochs=5, learning_rate=1e-3)
    steps = 400
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(1e-3, rel=1e-3) and rates.index(max(rates)) in (99, 100)
    assert rates[-1] == pytest.approx(1e-5)
    half_way = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert rates[250] == pytest.approx(half_way, rel=0.02)


def test_zero_workers_do_not_persist(tmp_path):
    assert not config(tmp_path, dataloader_num_workers=0).dataloader_persistent_workers


def test_every_field_of_ours_says_what_it_is():
    ours = set(OwnOptions.__annotations__)
    helps = {name: DistillationConfig.__dataclass_fields__[name].metadata.get("help") for name in ours}
    assert all(helps.values()), [name for name, text in helps.items() if not text]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"learning_rate": 1e-3, "base_learning_rate": 1e-3},
            "learning_rate 0.001 and base_learning_rate 0.001 are both",
        ),
        ({"learning_rate": 5e-6}, "min_lr 1e-05 is above the learning rate 5e-06"),
        ({"distillation_type": "soft-ish"}, "distillation_type is 'soft-ish'; choose one of"),
        ({"kl_reduction": "sum"}, "kl_reduction is 'sum'"),
        ({"distillation_alpha": 2}, "distillation_alpha is 2"),
        ({"distillation_temperature": 0}, "distillation_temperature is 0"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor is 1.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"max_bad_images": 1.5}, "max_bad_images is 1.5"),
        ({"teacher_record": "a", "teacher_replay": "b"}, "teacher_record is 'a' and teacher_replay is 'b': replayed"),
        (
            {"teacher_record": "a", "distillation_type": "label"},
            "teacher_record is 'a' and distillation_type is 'label'",
        ),
        (
            {"teacher_replay": "a", "distillation_type": "none"},
            "teacher_replay is 'a' and distillation_type is 'none'",
        ),
        ({"teacher_top_k": 0}, "teacher_top_k is 0"),
        ({"num_train_epochs": 5, "warmup_epochs": 5}, "warmup_epochs is 5 and num_train_epochs is 5"),
    ],
)
def test_bad_values_are_refused_with_the_fix(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


@pytest.mark.parametrize("words", [{"warmup_steps": 0}, {"logging_strategy": "epoch"}])
def test_a_default_that_is_computed_is_no_option_that_was_set(tmp_path, caplog, words):
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, num_train_epochs=3, **words)
    DistillationConfig(
        **{name: getattr(args, name) for name in ("warmup_epochs", "logging_steps", "num_train_epochs")},
        output_dir=str(tmp_path),
        use_cpu=True,
        **words,
    )
    assert "no effect" not in caplog.text
