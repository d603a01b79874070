"""A run that is interrupted in any way ends with the weights, bit for bit, of one that was not."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from support.runs import ConvTeacher, student, trainer
from transformers import ProgressCallback, Trainer, TrainerCallback

from hf_deit import load_teacher
from hf_deit.training.checkpoints import CheckpointError, verify_checkpoint
from hf_deit.training.preemption import Preempted


class At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


class PowerCutError(Exception):
    pass


def cut():
    raise PowerCutError


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


FIELDS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "ema_decay": 0.9}


@pytest.fixture
def start(tiny_images, tmp_path):
    """`start(folder, *callbacks, **fields)`: the same run of 12 steps, in epochs of 6, in whatever folder."""
    images = tiny_images()

    def build(folder, *callbacks, **fields):
        return trainer(
            images,
            tmp_path / folder,
            student(drop_path_rate=0.2),
            None,
            list(callbacks),
            **(FIELDS | {"distillation_type": "label"} | fields),
        )

    return build


def equal(one, other):
    same = [torch.equal(value, other.model.state_dict()[name]) for name, value in one.model.state_dict().items()]
    same += [torch.equal(value, other.ema.average[name]) for name, value in one.ema.average.items()]
    return all(same)


@pytest.fixture
def whole(start):
    run = start("whole")
    run.train_and_save()
    return run


@pytest.mark.parametrize("steps", [[1], [5], [6], [11], [4, 5, 10]], ids=str)
def test_the_same_command_goes_on_after_power_cuts(start, whole, steps, capsys):
    for step in steps:
        with pytest.raises(PowerCutError):
            start("cut", At(step, cut)).train_and_save()
    resumed = start("cut")
    resumed.train_and_save()
    assert equal(whole, resumed)
    last = steps[-1] // 3 * 3
    assert last == 0 or f"checkpoint-{last}, after step {last}" in capsys.readouterr().out
    logged = [[entry["step"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert logged[0] == logged[1] == list(range(1, 13))


def test_a_rank_of_several_goes_on_in_its_epoch(start, whole, monkeypatch):
    """Of several ranks accelerate wraps the order once more, and no longer finds it when it skips what is done."""
    one_process = Trainer.get_train_dataloader

    def as_of_several(self):
        loader = one_process(self)
        batches = BatchSamplerShard(loader.batch_sampler, num_processes=1, process_index=0)
        options = {"collate_fn": loader.collate_fn, "generator": loader.generator}
        return DataLoaderShard(loader.dataset, batch_sampler=batches, **options)

    monkeypatch.setattr(Trainer, "get_train_dataloader", as_of_several)
    with pytest.raises(PowerCutError):
        start("cut", At(11, cut)).train_and_save()  # in epoch 1, after the checkpoint of step 9
    resumed = start("cut")
    resumed.train_and_save()
    assert equal(whole, resumed)


def test_workers_and_evaluations_do_not_shift_the_random_numbers(start):
    """Loaders start their workers, and draw seeds for them, at other moments in a resumed run."""
    fields = {"dataloader_num_workers": 1, "eval_strategy": "steps", "eval_steps": 2}
    whole, resumed = start("whole", **fields), start("cut", **fields)
    whole.train_and_save()
    with pytest.raises(PowerCutError):
        start("cut", At(5, cut), **fields).train_and_save()
    resumed.train_and_save()
    assert equal(whole, resumed)


def test_after_sigterm_nothing_is_lost(start, whole, tmp_path):
    with pytest.raises(Preempted, match="75") as end:
        start("cut", At(4, terminate)).train_and_save()
    assert "after step 5" in end.value.message and verify_checkpoint(tmp_path / "cut" / "checkpoint-5") is None
    resumed = start("cut")
    resumed.train_and_save()
    assert equal(whole, resumed)


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(start, whole, tmp_path, caplog):
    with pytest.raises(PowerCutError):
        start("cut", At(11, cut)).train_and_save()
    with (tmp_path / "cut" / "checkpoint-9" / "optimizer.pt").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    resumed = start("cut")
    resumed.train_and_save()
    assert "checkpoint-9: optimizer.pt has changed since it was written" in caplog.text
    assert equal(whole, resumed)


@pytest.mark.parametrize("content", [None, "[1, 2]", "{", '{"unheard_of": 1}'])
def test_what_is_no_trainers_checkpoint_is_refused(start, tmp_path, content):
    """Stock's have no manifest, so any directory could be named."""
    (tmp_path / "weights").mkdir()
    if content is not None:
        (tmp_path / "weights" / "trainer_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trainer_state.json is missing or unreadable .* set model_name"):
        start("run").train(resume_from_checkpoint=str(tmp_path / "weights"))


def test_a_full_disk_stops_the_run_and_keeps_what_there_was(start, whole, tmp_path, monkeypatch):
    save = Trainer._save_optimizer_and_scheduler

    def full_at_nine(self, output_dir):
        if self.state.global_step == 9:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full_at_nine)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-9 could not be written .*No space left.*checkpoint-6 is complete"
    ):
        start("cut").train_and_save()
    assert not (tmp_path / "cut" / "_unfinished").exists()
    monkeypatch.undo()
    resumed = start("cut")
    resumed.train_and_save()
    assert equal(whole, resumed)


def test_old_checkpoints_go_only_when_the_new_one_is_whole(start, tmp_path, monkeypatch):
    seen = []
    rename = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda path, to: seen.append(sorted(p.name for p in to.parent.glob("check*"))) or rename(path, to),
    )
    start("run", save_total_limit=1).train_and_save()
    assert seen == [[], ["checkpoint-3"], ["checkpoint-6"], ["checkpoint-9"]]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-12"]


def test_the_best_model_is_tracked_across_a_resume(start, tmp_path):
    fields = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 1}
    fields |= {"metric_for_best_model": "eval_loss", "ema_decay": None}
    runs = start("whole", **fields), start("cut", **fields)
    runs[0].train()
    with pytest.raises(PowerCutError):
        start("cut", At(8, cut), **fields).train()
    runs[1].train(resume_from_checkpoint=True)
    bests = [Path(run.state.best_model_checkpoint) for run in runs]
    assert bests[0].name == bests[1].name and bests[1].parent == tmp_path / "cut" and bests[1].is_dir()
    for name, value in runs[0].model.state_dict().items():
        assert torch.equal(value, runs[1].model.state_dict()[name])
    state = json.loads((bests[1] / "trainer_state.json").read_text())
    assert "_unfinished" not in json.dumps(state)


def test_speed_and_loss_of_a_resumed_run_are_of_what_it_did(start, whole):
    with pytest.raises(PowerCutError):
        start("cut", At(11, cut)).train_and_save()
    resumed = start("cut")
    metrics = resumed.train_and_save()
    done = (12 - 9) * 8
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(done, rel=0.05)
    losses = [entry["loss"] for entry in resumed.state.log_history if entry.get("step", 0) > 9 and "loss" in entry]
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-3)


def test_a_changed_setting_is_reported_on_resuming(start, caplog):
    with pytest.raises(PowerCutError):
        start("cut", At(5, cut)).train_and_save()
    start("cut", learning_rate=5e-4, num_repeats=1).train_and_save()
    assert "resuming with learning rate 0.0005, which was 0.001 until step 3" in caplog.text
    assert "resuming with num_repeats 1, which was 3" in caplog.text
    assert caplog.text.count("resuming with ") == 2


@pytest.mark.parametrize(
    "signal_at, fields",
    [
        (None, {"max_steps": 4, "save_steps": 4}),
        (None, {"num_train_epochs": 1.5}),
        (3, {"max_steps": 4, "save_strategy": "no"}),
        (3, {"max_steps": 4, "save_strategy": "epoch"}),
    ],
    ids=str,
)
def test_no_step_is_done_after_the_last(start, monkeypatch, signal_at, fields):
    """Runs that end inside an epoch, stopped in the final evaluation or by SIGTERM in their last step."""
    whole, resumed = start("whole", **fields), start("cut", **fields)
    whole.train_and_save()
    with monkeypatch.context() as patch:
        callbacks = [At(signal_at, terminate)] if signal_at is not None else []
        first = start("cut", *callbacks, **fields)
        if signal_at is None:
            patch.setattr(first, "evaluate", cut)
        with pytest.raises(PowerCutError if signal_at is None else Preempted):
            first.train_and_save()
    resumed.train_and_save()
    assert resumed.state.global_step == whole.state.global_step == resumed.state.max_steps
    assert equal(whole, resumed)


def counted(run, name):
    """Count the calls of a method of the run."""
    calls, method = [], getattr(run, name)
    setattr(run, name, lambda *args, **kwargs: calls.append(run.state.global_step) or method(*args, **kwargs))
    return calls


@pytest.mark.parametrize("strategy", ["epoch", "steps", "no", "best"])
@pytest.mark.parametrize("step", [1, 4, 5], ids=lambda step: f"in step {step + 1} of 6 in an epoch")
def test_sigterm_saves_once_and_evaluates_nothing_more(start, strategy, step):
    evaluates = "steps" if strategy == "steps" else "epoch"
    fields = {"save_strategy": strategy, "eval_strategy": evaluates, "eval_steps": 3, "save_steps": 3}
    fields |= {"ema_decay": None, "metric_for_best_model": "eval_loss"}
    run = start("cut", At(step, terminate), **fields)
    saves, evaluations = counted(run, "_save_checkpoint"), counted(run, "evaluate")
    with pytest.raises(Preempted):
        run.train_and_save()
    regular = [3] if evaluates == "steps" else []
    before = [3] if strategy == "steps" and step > 2 else []
    assert saves == [*before, step + 1]
    assert evaluations == [at for at in [*regular, 6] if at <= step + 1]


def test_the_best_model_is_that_of_the_regular_evaluations(start):
    fields = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "ema_decay": None}
    fields |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "save_total_limit": 1}
    whole, resumed = start("whole", **fields), start("cut", **fields)
    whole.train_and_save()
    with pytest.raises(Preempted):
        start("cut", At(8, terminate), **fields).train_and_save()
    resumed.train_and_save()
    assert resumed.state.best_global_step == whole.state.best_global_step
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


@pytest.mark.parametrize("stage", ["save_metrics", "evaluate", "create_model_card"])
def test_sigterm_after_the_last_step_keeps_the_training(start, whole, monkeypatch, tmp_path, stage):
    """Also without a checkpoint, which `save_strategy: no` never writes."""
    run = start("cut", save_strategy="no")
    monkeypatch.setattr(run, stage, lambda *args, **kwargs: terminate())
    with pytest.raises(Preempted, match="75"):
        run.train_and_save()
    assert verify_checkpoint(tmp_path / "cut" / "checkpoint-12") is None
    resumed = start("cut", save_strategy="no")
    monkeypatch.setattr(resumed, "training_step", cut)
    resumed.train_and_save()
    assert equal(whole, resumed)


@pytest.mark.parametrize("action", [cut, terminate])
def test_a_run_cut_in_its_final_evaluation_has_its_last_checkpoint(start, monkeypatch, tmp_path, action):
    """With a limit of 1, where Transformers keeps the best alone once training ends: here the first of the two."""
    fields = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "ema_decay": None}
    fields |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "save_total_limit": 1}
    whole = start("whole", **fields)
    whole.train_and_save()
    run = start("cut", **fields)  # which sets the seed
    assert whole.state.best_global_step == 6  # else the test shows nothing
    assert [path.name for path in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-6"]
    monkeypatch.setattr(run, "save_metrics", lambda *_: action())
    with pytest.raises(PowerCutError if action is cut else Preempted):
        run.train_and_save()
    resumed = start("cut", **fields)
    monkeypatch.setattr(resumed, "training_step", cut)
    resumed.train_and_save()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-6"]


def test_the_mark_of_a_finished_run_is_whole_or_not_there(start, monkeypatch, tmp_path):
    """A run killed while it writes trainer_state.json would be taken for finished, with half a history."""
    run = start("cut")
    run.train()
    write = run.state.save_to_json

    def half(path):
        write(path)
        os.truncate(path, 100)
        cut()

    monkeypatch.setattr(run.state, "save_to_json", half)
    with pytest.raises(PowerCutError):
        run.save_state()
    assert not (tmp_path / "cut" / "trainer_state.json").exists()
    monkeypatch.undo()
    run.save_state()
    assert json.loads((tmp_path / "cut" / "trainer_state.json").read_text())["global_step"] == 12
    assert not list((tmp_path / "cut").glob("_*"))


def test_going_back_to_an_earlier_checkpoint(start, whole, tmp_path, capsys):
    fields = {"save_total_limit": 3}
    with pytest.raises(PowerCutError):
        start("cut", At(11, cut), **fields).train_and_save()
    back = {"resume_from_checkpoint": str(tmp_path / "cut" / "checkpoint-3")}
    with pytest.raises(PowerCutError):
        start("cut", At(8, cut), **fields, **back).train_and_save()
    there = sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*"))
    assert there == ["checkpoint-3", "checkpoint-6"]
    aside = sorted(path.name for path in (tmp_path / "cut" / "_set_aside").iterdir())
    assert aside == ["checkpoint-6", "checkpoint-9"] and "checkpoint-6, checkpoint-9" in capsys.readouterr().out
    resumed = start("cut", **fields)
    resumed.train_and_save()
    assert equal(whole, resumed)


def rewritten(checkpoint, name, change):
    """Change a file of a checkpoint as somebody who can also rewrite the manifest."""
    path = checkpoint / name
    content = torch.load(path, weights_only=False)  # the random states of NumPy
    change(content)
    torch.save(content, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def first_state(content):
    return next(state for state in content["state"].values() if state["exp_avg"].dim() == 2)


@pytest.mark.parametrize(
    "name, change, problem",
    [
        ("optimizer.pt", lambda all: first_state(all).update(exp_avg=torch.zeros(1)), "exp_avg has the shape"),
        ("optimizer.pt", lambda all: first_state(all).update(exp_avg_sq=torch.tensor(0.0)), "is one number"),
        ("optimizer.pt", lambda all: first_state(all).pop("exp_avg_sq"), "instead of"),
        ("optimizer.pt", lambda all: first_state(all)["exp_avg"].fill_(float("nan")), "not finite"),
        ("optimizer.pt", lambda all: first_state(all).update(step=torch.zeros(0)), "counts"),
        ("optimizer.pt", lambda all: all["state"].clear(), "no state after step 9"),
        ("optimizer.pt", lambda all: all.pop("param_groups"), "cannot be loaded"),
        ("scheduler.pt", lambda all: all.update(last_epoch=3), "the schedule is at step 3, and the run at step 9"),
        ("scheduler.pt", lambda all: all.update(last_epoch="x"), "the schedule is at step 'x'"),
        ("rng_state.pth", lambda all: all.pop("cpu"), "the random states cannot be loaded"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_kernel_touches_it(start, tmp_path, name, change, problem):
    with pytest.raises(PowerCutError):
        start("cut", At(11, cut)).train_and_save()
    rewritten(tmp_path / "cut" / "checkpoint-9", name, change)
    with pytest.raises(CheckpointError, match=problem) as refusal:
        start("cut").train_and_save()
    assert "\n" not in str(refusal.value)


def test_a_state_with_other_strides_is_laid_out_like_its_parameter(start, whole, tmp_path):
    """A transposed copy has the shape, but kernels would read it in the order of the memory."""
    with pytest.raises(PowerCutError):
        start("cut", At(11, cut)).train_and_save()

    def transpose(content):
        state = first_state(content)
        state["exp_avg"] = state["exp_avg"].t().contiguous().t()

    rewritten(tmp_path / "cut" / "checkpoint-9", "optimizer.pt", transpose)
    resumed = start("cut")
    resumed.train_and_save()
    assert equal(whole, resumed)


@pytest.mark.parametrize(
    "changes",
    [{"global_step": -3}, {"global_step": "nine"}, {"epoch": float("nan")}, {"save_steps": "x"}, {"log_history": 3}],
    ids=str,
)
def test_a_history_that_makes_no_sense_is_one_line(start, tmp_path, changes):
    with pytest.raises(PowerCutError):
        start("cut", At(5, cut)).train_and_save()
    path = tmp_path / "cut" / "checkpoint-3" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    manifest = path.with_name("manifest.json")
    listed = json.loads(manifest.read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=rf"{next(iter(changes))} in trainer_state.json is "):
        start("cut").train_and_save()


def test_options_that_changed_apply_after_resuming(start):
    """The checkpoint holds the old ones as well, in the states of optimizer and schedule."""
    with pytest.raises(PowerCutError):
        start("cut", At(5, cut)).train_and_save()
    fields = {"learning_rate": 5e-4, "weight_decay": 0.3, "adam_beta2": 0.9, "save_steps": 5}
    resumed = start("cut", **fields)
    resumed.train_and_save()
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.3, 0.0}
    assert {group["betas"] for group in resumed.optimizer.param_groups} == {(0.9, 0.9)}
    rates = {entry["step"]: entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry}
    fresh = start("fresh", **fields)
    fresh.train()
    expected = {entry["step"]: entry["learning_rate"] for entry in fresh.state.log_history if "learning_rate" in entry}
    assert {step: rates[step] for step in range(4, 13)} == {step: expected[step] for step in range(4, 13)}
    assert resumed.state.save_steps == 5


def test_another_teacher_and_other_images_are_named(tiny_images, tmp_path, caplog):
    images = tiny_images()
    fields = FIELDS | {"ema_decay": None}

    def run(images, teacher, *callbacks):
        return trainer(images, tmp_path / "run", student(), teacher, list(callbacks), **fields)

    def teacher(seed):
        network = ConvTeacher()
        torch.manual_seed(seed)
        torch.nn.init.normal_(network.head.weight)
        return load_teacher(network, id2label=None, mean=[0.5] * 3, std=[0.5] * 3, image_size=16)

    with pytest.raises(PowerCutError):
        run(images, teacher(1), At(5, cut)).train_and_save()
    other = images["train"].add_column("new", list(range(48))).remove_columns("new")
    labels = [2, *other["label"][1:]]
    changed = dict(images) | {
        "train": other.remove_columns("label").add_column("label", labels, feature=images["train"].features["label"])
    }
    run(changed, teacher(2)).train_and_save()
    warned = [line for line in caplog.messages if line.startswith("resuming with ")]
    assert len(warned) == 2 and "training images 48 images" in warned[0] and "teacher ConvTeacher" in warned[1]
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    assert card.count("ConvTeacher") >= 2 and "Earlier in this training" in card


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers is 2 there and 1 here"),
        ({"hidden_size": 16}, "hidden_size is 32 there and 16 here"),
        ({"id2label": {0: "red", 1: "green"}}, "it has 3 classes and this run 2"),
        ({"id2label": {0: "red", 1: "blue", 2: "green"}}, "class 1 is 'green' there and 'blue' here"),
    ],
)
def test_another_student_cannot_resume(start, tiny_images, tmp_path, fields, problem):
    with pytest.raises(PowerCutError):
        start("cut", At(5, cut)).train_and_save()
    other = student(**({"drop_path_rate": 0.2} | fields))
    images = tiny_images()
    if len(other.config.id2label) == 2:
        images = images.filter(lambda row: row["label"] < 2)
    run = trainer(images, tmp_path / "cut", other, None, **(FIELDS | {"distillation_type": "label"}))
    with pytest.raises(CheckpointError, match=problem):
        run.train_and_save()


def test_a_student_with_another_option_warns(start, tiny_images, tmp_path, caplog):
    with pytest.raises(PowerCutError):
        start("cut", At(5, cut)).train_and_save()
    fields = FIELDS | {"distillation_type": "label"}
    trainer(tiny_images(), tmp_path / "cut", student(drop_path_rate=0.1), None, **fields).train_and_save()
    assert "resuming a student with drop_path_rate 0.1, which was 0.2" in caplog.text


def test_a_finished_run_without_checkpoints_is_kept_too(start, tmp_path):
    start("run", save_strategy="no").train_and_save()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="holds a finished run.*--overwrite_output_dir true"):
        start("run", save_strategy="no", learning_rate=5e-4).train_and_save()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    start("run", learning_rate=5e-4, overwrite_output_dir=True).train_and_save()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before
    with pytest.raises(PowerCutError):  # it begins anew, and an unfinished run is resumed all the same
        start("run", At(5, cut), overwrite_output_dir=True).train_and_save()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    again = start("run", overwrite_output_dir=True)
    again.train_and_save()
    assert again._initial_global_step == 3


def test_a_finished_run_is_not_mixed_with_a_new_one(start, whole):
    with pytest.raises(CheckpointError, match="holds a finished run"):
        start("whole").train_and_save()
    assert whole.state.global_step == 12


def test_train_alone_starts_anew_as_in_transformers(start, whole):
    again = start("whole")
    assert again.train().global_step == 12 and again.state.log_history[0]["step"] == 1


def test_the_progress_bar_counts_what_is_done_now(start):
    with pytest.raises(PowerCutError):
        start("cut", At(11, cut)).train_and_save()
    bars = []

    resumed = start("cut", disable_tqdm=False)
    shown = next(item for item in resumed.callback_handler.callbacks if isinstance(item, ProgressCallback))
    resumed.add_callback(At(10, lambda: bars.append((shown.training_bar.initial, shown.training_bar.n))))
    resumed.train_and_save()
    assert bars == [(9, 10)]
