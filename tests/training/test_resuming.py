"""A run that is interrupted in any way ends with the weights, bit for bit, of one that was not."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from support.runs import student, trainer
from transformers import ProgressCallback, Trainer, TrainerCallback

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
