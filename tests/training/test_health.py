"""health.py: numbers that go wrong are seen at once, with the step and the cause, and healthy ones are left alone."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from support.runs import NO_CHANCE, student, trainer
from torch import nn
from torch.nn import functional as F

from hf_deit import load_teacher
from hf_deit.training.health import Health, Pace, duration


CLASSES = 10
NAMES = {number: f"name {number}" for number in range(CLASSES)}
EVERY = torch.arange(256) % CLASSES  # a batch's labels
MIXED = F.one_hot(EVERY, CLASSES) * 0.7 + F.one_hot(EVERY.flip(0), CLASSES) * 0.3


def answers(seed=0, scale=3.0):
    return scale * torch.randn(len(EVERY), CLASSES, generator=torch.Generator().manual_seed(seed))


def step(health, number, *, student=None, teacher=None, loss=1.5, norm=2.0, labels=EVERY, **kwargs):
    """One step of one batch as a trainer sees it. Each loss differs a little from the one before, as real ones do."""
    student = answers(number) if student is None else student
    loss = torch.tensor(loss + 1e-4 * (number % 3))
    health.see_batch({"loss": loss, "class_loss": loss}, {"class head": student}, teacher, labels)
    return health.see_step(number, torch.tensor(norm), 0.25, **kwargs)


# --- healthy numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [EVERY, MIXED], ids=["labels", "mixed"])
def test_ordinary_training_is_left_alone(caplog, labels):
    health = Health(CLASSES, teacher="good", id2label=NAMES)
    for number in range(1, 251):
        loss = 2.5 - number / 200  # from above a guess, which is 2.30
        norm = 5.0 + 4 * math.sin(number)
        assert step(
            health, number, teacher=answers(-number), loss=loss, norm=norm, labels=labels, warmed_up=number > 5
        ) == pytest.approx(norm)
    assert not caplog.records


def test_what_is_read_of_a_step_is_read_at_once(monkeypatch):
    """On a GPU each read waits for the device: the gradient norm's is the only one."""
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, o=original, n=name: reads.append(n) or o(self, *args)
        )
    health = Health(CLASSES, teacher="good")
    logits, loss, norm = answers(), torch.tensor(1.0), torch.tensor(2.0)
    for number in range(1, 11):  # some of them end a window
        for _ in range(2):  # gradient accumulation
            health.see_batch({"loss": loss, "class_loss": loss}, {"class head": logits}, logits, EVERY)
        assert reads == ["tolist"] * (number - 1)
        health.see_step(number, norm, 0.1)
        assert reads == ["tolist"] * number


# --- not finite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken, part",
    [
        (("student",), "the logits of the class head"),
        (("student", "distillation"), "the logits of the class head and the logits of the distillation head"),
        (("distillation",), "the logits of the distillation head"),
        (("class_loss",), "class_loss"),
        (("distillation_loss",), "distillation_loss"),
        ((), "the gradient alone"),
    ],
    ids=str,
)
def test_a_non_finite_step_names_its_first_part(broken, part):
    nan = {name: torch.tensor(math.nan if name in broken else 1.0) for name in ("class_loss", "distillation_loss")}
    heads = {"class head": answers(), "distillation head": answers()}
    if "student" in broken:
        heads["class head"][3, 4] = math.inf
    if "distillation" in broken:
        heads["distillation head"][0, 0] = math.nan
    health = Health(CLASSES, teacher="good")
    health.see_batch(nan | {"loss": sum(nan.values())}, heads, answers(), EVERY)
    with pytest.raises(
        FloatingPointError, match=f"step 7: gradient norm nan, learning rate 0.1, .*finite: {part}[.( ]"
    ):
        health.see_step(7, torch.tensor(math.nan), 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_that_answers_nan_is_named_though_the_gradient_is_finite(value):
    """The argmax of NaN is a class like any other, so eq. 3 would go on."""
    teacher = answers()
    teacher[5, 5] = value
    with pytest.raises(FloatingPointError, match="step 3: the outputs of teacher 'bad' contain NaN or infinity"):
        step(Health(CLASSES, teacher="bad"), 3, teacher=teacher)


def test_any_batch_of_an_accumulated_step_counts():
    health, bad = Health(CLASSES, teacher="bad"), answers()
    bad[0] = math.nan
    for teacher in (bad, answers()):
        health.see_batch({"loss": torch.ones(()), "class_loss": torch.ones(())}, {"class head": bad}, teacher, EVERY)
    with pytest.raises(FloatingPointError, match="teacher 'bad'"):
        health.see_step(1, 1.0, 0.1)


class Scaler:
    """fp16's loss scale, halved by every overflow."""

    scale = 65536.0

    def get_scale(self):
        return self.scale

    def overflow(self):
        self.scale /= 2


def test_fp16_may_look_for_its_scale_is_warned_of_and_then_stopped(caplog):
    health, scaler = Health(CLASSES), Scaler()
    for number in range(1, 12):
        step(health, number, norm=math.inf, scaler=scaler)
        scaler.overflow()
    assert not caplog.records
    step(health, 12, norm=1.0, scaler=scaler)
    with pytest.raises(FloatingPointError, match="step 37: 25 steps in a row overflowed in fp16.*alone.*bf16: true"):
        for number in range(13, 99):
            step(health, number, norm=math.nan, scaler=scaler)
            scaler.overflow()
    assert len(caplog.records) == 1 and "step 19: 7 steps in a row overflowed" in caplog.text  # below a scale of 1


# --- the teacher ---------------------------------------------------------------------------------------------------


def test_a_teacher_of_one_class_is_one_warning(caplog):
    health = Health(CLASSES, teacher="lazy", id2label=NAMES)
    for number in range(1, 20):
        lazy = answers(number, scale=0.1)
        lazy[:, 3] += 5
        step(health, number, teacher=lazy, labels=MIXED)
    assert len(caplog.records) == 1
    assert re.search(
        r"step 4: teacher 'lazy' predicted class 3 \('name 3'\) for all of 1,024 views, .*0 to 9", caplog.text
    )


def test_decisions_without_logits_are_judged_by_the_classes_they_are_for(caplog):
    """As they are replayed: one class for all of them may come of a teacher that looks."""
    health = Health(CLASSES, teacher="replayed", id2label=NAMES)
    for number in range(1, 11):
        step(health, number, teacher=EVERY.flip(0))
    assert not caplog.records
    for number in range(11, 20):
        step(health, number, teacher=torch.full((256,), 3))
    assert len(caplog.records) == 1 and "'replayed' predicted class 3 ('name 3') for all of 1,024" in caplog.text


def test_a_teacher_that_becomes_lazy_is_seen_too(caplog):
    health = Health(CLASSES, teacher="lazy", id2label=NAMES)
    for number in range(1, 20):
        teacher = answers(number, scale=0.1)
        teacher[:, 3] += 5 * (number > 10)
        step(health, number, teacher=teacher)
    assert "step 16: teacher 'lazy'" in caplog.text


def test_one_answer_to_images_of_one_class_is_right(caplog):
    health = Health(CLASSES, teacher="good")
    sure = answers(scale=0.1)
    sure[:, 3] += 5
    for number in range(1, 20):
        step(health, number, teacher=sure, labels=torch.full((256,), 3))
    assert not caplog.records


def test_a_teacher_that_does_not_look_is_refused():
    health = Health(CLASSES, teacher="dead")
    with pytest.raises(ValueError, match="step 4: the logits of teacher 'dead' are the same for each of 1,024 views"):
        for number in range(1, 20):
            step(health, number, teacher=answers(0)[:1].expand(256, -1))


# --- the student ---------------------------------------------------------------------------------------------------


def test_a_loss_above_a_guess_is_one_warning_after_the_warm_up(caplog):
    health = Health(CLASSES)
    for number in range(1, 400):
        step(health, number, loss=2.6, warmed_up=number > 50)
    assert len(caplog.records) == 1
    assert re.search(
        r"step 150: gradient norm 2, learning rate 0.25, .*class loss of .* is 2.6, above the 2.303 of a uniform guess.*rate far",  # noqa: E501
        caplog.text,
    )


def test_a_collapse_to_one_class_is_a_warning_and_a_slow_start_is_none(caplog):
    slow, collapsed = Health(CLASSES), Health(CLASSES, id2label=NAMES)
    for number in range(1, 101):
        step(slow, number, loss=2.30)
    assert not caplog.records
    one = answers()
    one[:, 7] += 50
    for number in range(1, 101):
        step(collapsed, number, loss=2.30, student=one)
    assert re.search(
        r"step 100: .*predicted class 7 \('name 7'\) for every view, .* 2.3, that of a uniform guess", caplog.text
    )


def test_a_frequent_class_may_be_decided_for_every_time(caplog):
    health, one = Health(CLASSES), answers()
    one[:, 7] += 50
    for number in range(1, 101):
        step(health, number, loss=0.3, student=one)
    assert not caplog.records


def test_an_exploding_gradient_is_one_warning(caplog):
    health = Health(CLASSES)
    for number in range(1, 60):
        step(health, number, norm=3e4 if number > 50 else 5.0 + number % 7)
    assert len(caplog.records) == 1
    assert re.search(
        r"step 51: gradient norm 3e\+04, .* times the mean of .*lower learning rate.*max_grad_norm: 1",
        caplog.text,
    )


@pytest.mark.parametrize("still", ["gradient", "loss"])
def test_a_model_that_learns_nothing_is_one_warning(caplog, still):
    health = Health(CLASSES)
    for number in range(1, 40):
        norm = 0.0 if still == "gradient" else 2.0
        step(health, number, norm=norm, loss=1.5 if still == "gradient" else 1.5 - 1e-4 * (number % 3))
    assert len(caplog.records) == 1 and "so the student learns nothing" in caplog.text
    assert re.search(r"step 1[01]: .*for 10 steps the gradient has been exactly 0 or the loss", caplog.text)


def test_other_ranks_do_not_repeat_a_warning(caplog):
    health = Health(CLASSES, quiet=True)
    for number in range(1, 40):
        step(health, number, norm=0.0)
    assert not caplog.records


# --- labels --------------------------------------------------------------------------------------------------------


# --- in a run ------------------------------------------------------------------------------------------------------


class Told(nn.Module):
    """A teacher whose answer is a function of the pixels."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, pixels):
        return self.answer(pixels)


def told(answer):
    return load_teacher(
        Told(answer), id2label=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), image_size=16
    )


def nan_for_images(pixels):  # blank pixels are what load_teacher tries it with
    return pixels.mean((2, 3)) + (math.nan if pixels.any() else 0)


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (nan_for_images, FloatingPointError, "step 1: the outputs of teacher 'Told' contain NaN"),
        (lambda pixels: torch.ones(len(pixels), 3), ValueError, "step 16: the logits of teacher 'Told' are the same"),
    ],
)
def test_a_bad_teacher_stops_a_run(tiny_images, tmp_path, answer, error, message):
    run = trainer(
        tiny_images(1024), tmp_path, teacher=told(answer), per_device_train_batch_size=64, num_train_epochs=2
    )
    with pytest.raises(error, match=message):
        run.train()


def test_a_learning_rate_far_too_high_is_seen_in_a_run(tiny_images, tmp_path, caplog):
    run = trainer(
        *(tiny_images(64), tmp_path, student(two_heads=False), None),
        distillation_type="none",
        learning_rate=3.0,
        num_train_epochs=15,
        logging_steps=50,
        **NO_CHANCE,
    )
    run.train()
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_deit.training.health"]
    assert any("a learning rate far too high" in message for message in messages), messages


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (29, "29 s"), (300, "5 min"), (3600 * 5.5, "5 h 30 min"), (3600 * 51, "2 days 3 h")],
)
def test_a_duration_is_said_in_two_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "steps, device, warned", [(1_000_000, "cpu", True), (1_000_000, "cuda", False), (60, "cpu", False)]
)
def test_the_first_steps_say_how_long_a_run_takes(steps, device, warned, monkeypatch, capsys, caplog):
    clock = iter([100.0, 104.0])  # after the first step and after the third: two seconds a step
    monkeypatch.setattr("hf_deit.training.health.time.perf_counter", lambda: next(clock))
    args = SimpleNamespace(logs_by_default=True, device=torch.device(device))
    state = SimpleNamespace(logging_steps=50, max_steps=steps, global_step=0, is_world_process_zero=True)
    pace = Pace()
    pace.on_train_begin(args, state, None)
    for state.global_step in range(1, 6):
        pace.on_step_end(args, state, None)
    assert "2 s a step, about " in capsys.readouterr().out
    assert ("on this CPU the run takes about 23 days" in caplog.text) == warned
    assert state.logging_steps == (50 if steps > 500 else 6)
