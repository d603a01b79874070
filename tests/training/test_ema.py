"""The moving average against numpy, inside a real Trainer, and over an interruption."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_deit.training.ema import EMA_NAME, ExponentialMovingAverage


class Line(nn.Module):
    """Two weights, a frozen one, and a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.slope = nn.Linear(3, 1, bias=False)
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)

    def forward(self, x, labels=None):
        return {"loss": (self.slope(x).squeeze(1) - labels).square().mean(), "y": self.slope(x)}


class Recorder(TrainerCallback):
    """The weights before training and after every step."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights.append(model.slope.weight.detach().numpy().copy())

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(model.slope.weight.detach().numpy().copy())


def build_trainer(folder, average, *others, steps=12, **arguments) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, generator=generator)
    rows = [{"x": row, "labels": row.sum()} for row in x]
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", **arguments},
    )
    return Trainer(Line(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[average, *others])


def averaged_by_numpy(weights: list[np.ndarray], decay: float) -> np.ndarray:
    average = weights[0].astype(np.float64)
    for updates, weight in enumerate(weights[1:]):
        d = min(decay, (1 + updates) / (10 + updates))
        average = d * average + (1 - d) * weight
    return average


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99996])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_optimizer_step_is_averaged(tmp_path, decay, accumulation):
    average, recorder = ExponentialMovingAverage(decay), Recorder()
    build_trainer(tmp_path, average, recorder, gradient_accumulation_steps=accumulation).train()
    assert average.num_updates == 12
    expected = averaged_by_numpy(recorder.weights, decay)
    np.testing.assert_allclose(average.average["slope.weight"].numpy(), expected, rtol=1e-5)
    assert not np.allclose(expected, recorder.weights[0])


def test_a_short_run_is_not_its_random_start(tmp_path):
    average, recorder = ExponentialMovingAverage(0.99996), Recorder()
    build_trainer(tmp_path, average, recorder, steps=60).train()
    start, end, mean = recorder.weights[0], recorder.weights[-1], average.average["slope.weight"].numpy()
    assert np.abs(mean - end).max() < 0.2 * np.abs(mean - start).max()


def test_frozen_weights_stay_exact(tmp_path):
    average = ExponentialMovingAverage(0.9)
    trainer = build_trainer(tmp_path, average)
    trainer.train()
    assert torch.equal(average.average["frozen"], trainer.model.frozen)


def test_the_average_is_swapped_in_and_the_weights_come_back_bit_for_bit(tmp_path):
    average = ExponentialMovingAverage(0.9)
    trainer = build_trainer(tmp_path, average)
    trainer.train()
    model = trainer.model
    own, pointer = model.slope.weight.detach().clone(), model.slope.weight.data_ptr()
    with pytest.raises(KeyboardInterrupt), average.averaged_weights(model):
        assert torch.equal(model.slope.weight, average.average["slope.weight"])
        assert not torch.equal(model.slope.weight, own)
        assert model.slope.weight.data_ptr() == pointer
        raise KeyboardInterrupt  # also when the evaluation inside is interrupted
    assert torch.equal(model.slope.weight, own)


def test_the_trainer_evaluates_inside_the_swap(tmp_path):
    average = ExponentialMovingAverage(0.9)
    trainer = build_trainer(tmp_path, average)
    trainer.train()
    own = trainer.evaluate()["eval_loss"]
    with average.averaged_weights(trainer.model_wrapped):
        averaged = trainer.evaluate(metric_key_prefix="eval_ema")["eval_ema_loss"]
    weight = average.average["slope.weight"][0]
    x = torch.stack([row["x"] for row in trainer.eval_dataset])
    assert averaged == pytest.approx((x @ weight - x.sum(1)).square().mean().item(), rel=1e-4)
    assert averaged != own == pytest.approx(trainer.evaluate()["eval_loss"])


def test_bfloat16_weights_have_a_float32_average():
    model = nn.Linear(2, 2).bfloat16()
    average = ExponentialMovingAverage(0.999)
    average.on_train_begin(None, None, None, model)
    start = model.weight.float().clone()
    average.num_updates = 100_000
    with torch.no_grad():
        model.weight.add_(1)
    average.on_optimizer_step(None, None, None, model)
    # A step of 0.001 is below bfloat16's resolution at 1.
    torch.testing.assert_close(average.average["weight"], start + 0.001 * (model.weight.float() - start))
    own = model.weight.detach().clone()
    with average.averaged_weights(model):
        assert torch.equal(model.weight, average.average["weight"].bfloat16())
    assert torch.equal(model.weight, own)


def test_wrappers_do_not_change_the_names():
    model = torch.compile(nn.Linear(2, 2), backend="eager")
    average = ExponentialMovingAverage()
    average.on_train_begin(None, None, None, model)
    assert set(average.average) == {"weight", "bias"}


def test_a_resumed_run_has_the_average_of_an_uninterrupted_one(tmp_path):
    whole = ExponentialMovingAverage(0.5)
    build_trainer(tmp_path / "whole", whole).train()

    cut, checkpoint = ExponentialMovingAverage(0.5), tmp_path / "cut" / "checkpoint-7"

    class Save(TrainerCallback):  # DistillationTrainer does
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 7:
                cut.save(checkpoint)

    build_trainer(tmp_path / "cut", cut, Save(), save_strategy="steps", save_steps=7).train()
    saved = load_file(checkpoint / EMA_NAME)
    assert set(saved) == set(load_file(checkpoint / "model.safetensors"))

    resumed = ExponentialMovingAverage(0.5)
    resumed.load(checkpoint)
    build_trainer(tmp_path / "cut", resumed).train(resume_from_checkpoint=str(checkpoint))
    assert resumed.num_updates == whole.num_updates == 12
    for name, weight in whole.average.items():
        assert torch.equal(resumed.average[name], weight)


def test_what_is_saved_is_restored_bit_for_bit(tmp_path):
    model = nn.Linear(5, 7)
    average = ExponentialMovingAverage()
    average.on_train_begin(None, None, None, model)
    with torch.no_grad():
        model.weight.normal_()
    for _ in range(3):
        average.on_optimizer_step(None, None, None, model)
    average.save(tmp_path)
    assert os.listdir(tmp_path) == [EMA_NAME]

    restored = ExponentialMovingAverage()
    restored.load(tmp_path)
    restored.on_train_begin(None, None, None, nn.Linear(5, 7))
    assert restored.num_updates == 3
    assert all(torch.equal(restored.average[name], average.average[name]) for name in ("weight", "bias"))


def test_a_second_training_starts_a_new_average(tmp_path):
    average = ExponentialMovingAverage(0.9)
    build_trainer(tmp_path, average).train()
    build_trainer(tmp_path, average, steps=2).train()
    assert average.num_updates == 2


def test_a_checkpoint_without_average_is_accepted_with_a_warning(tmp_path, caplog):
    average = ExponentialMovingAverage()
    average.load(tmp_path)
    assert "starts anew" in caplog.text
    model = nn.Linear(2, 2)
    average.on_train_begin(None, None, None, model)
    assert torch.equal(average.average["weight"], model.weight)


def test_an_average_of_another_model_is_refused(tmp_path):
    average = ExponentialMovingAverage()
    average.on_train_begin(None, None, None, nn.Linear(2, 2))
    average.save(tmp_path)
    average.load(tmp_path)
    with pytest.raises(ValueError, match="weight.*resume with the model of that checkpoint"):
        average.on_train_begin(None, None, None, nn.Linear(3, 2))


@pytest.mark.parametrize("decay", [1.0, -0.1, 99.996])
def test_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        ExponentialMovingAverage(decay)


def test_no_average_before_training():
    with pytest.raises(ValueError, match="starts with training"), ExponentialMovingAverage().averaged_weights(Line()):
        pass
