"""Resuming: an unfinished run resumes by itself, exactly, from complete and verified checkpoints.

A checkpoint holds what Transformers saves (weights, optimizer, schedule, random states, history) and the moving
average. The data need no state: a view is a function of (seed, epoch, position), and the order can start anywhere.
What a checkpoint holds is checked before the run goes on: that it belongs to this run, and that all of it arrived.

Not here: how a checkpoint is written and verified (checkpoints.py) and SIGTERM (preemption.py).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..data.decoding import BadImages
from ..errors import Preempted, UserError, first_line, sigterm_raises
from ..files import flush, read_json
from ..options.distillation_config import DistillationConfig, settings_of
from ..processes import claim_directory, on_main_process, only_run_in
from . import checkpoints
from .checkpoints import UNFINISHED, CheckpointError
from .ema import ExponentialMovingAverage
from .preemption import Preemption, outlive_sigterm, sheltered_start


logger = logging.getLogger(__name__)


class ProgressOfTheRest(ProgressCallback):
    """Progress bar whose speed and remaining time count only the steps since resuming, unlike Transformers'."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = state.global_step


class ResumableTrainer(Trainer):
    """Transformers' Trainer with complete, verified checkpoints and exact resuming.

    Attributes:
        bad_images: damaged images found in training so far; empty when a run starts from the beginning.
        ema: moving average of the weights, or None.
        history: what taught the weights up to the checkpoint that the run resumed from: one entry of names for every
            teacher and training set, in order.
        preemption: callback that stops the run after SIGTERM.
    """

    # These types are narrower than in Transformers.
    args: DistillationConfig
    model: PreTrainedModel
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema: ExponentialMovingAverage | None = None
        self.set_up_average()
        self.preemption = Preemption()
        self.add_callback(self.preemption)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressOfTheRest())
        self._writes_aside = False
        self._resumed_step: int | None = None
        self.history: list[dict] = []

    def set_up_average(self) -> None:
        """Have the moving average that `args.ema_decay` asks for, in the place of an earlier one."""
        if self.ema is not None:
            self.remove_callback(self.ema)
        self.ema = None
        if self.args.ema_decay is not None:
            self.ema = ExponentialMovingAverage(self.args.ema_decay)
            self.add_callback(self.ema)

    @cached_property
    def bad_images(self) -> BadImages:
        """Damaged images found in training so far."""
        return BadImages(self.args.output_dir, len(self.train_dataset), self.args.max_bad_images)

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs) -> TrainOutput:
        """Train as in Transformers, resuming only from a verified checkpoint.

        Args:
            resume_from_checkpoint: directory of a checkpoint; True: the last complete checkpoint in `output_dir`;
                "auto": the same if `output_dir` holds an unfinished run, else start from the beginning; None: start
                from the beginning.
            trial: of a hyperparameter search; its checkpoints lie in a folder of its own inside `output_dir`.

        Raises:
            CheckpointError: a checkpoint cannot be written or is damaged; "auto" found a finished run.
            Preempted: the run received SIGTERM and is saved.
        """
        with self.only_run():
            checkpoint = self._begin_or_resume(str(resume_from_checkpoint or ""), self._get_output_dir(trial))
            try:
                output = super().train(resume_from_checkpoint=checkpoint, trial=trial, **kwargs)
            finally:
                self.preemption.end()
                self._resumed_step = None
            if self.state.global_step == self._initial_global_step:
                output.metrics.pop("train_loss", None)  # no step was left, so there is no loss to average
            self.stop_if_preempted()
        return output

    @contextmanager
    def only_run(self) -> Iterator[None]:
        """Have `output_dir` for this run alone inside the `with`; the main process holds the lock for all."""
        folder = self.args.output_dir
        on_main_process(lambda: bool(claim_directory(folder)))
        with only_run_in(folder) if self.is_world_process_zero() else nullcontext():
            yield

    def _begin_or_resume(self, wanted: str, folder: str) -> str | None:
        """Make the run's folder ready for it; return the checkpoint from which it resumes, if any."""
        step = -1
        on_main_process(lambda: checkpoints.remove_unfinished(folder))
        checkpoint = None
        if wanted:
            overwrite = self.args.overwrite_output_dir
            found = on_main_process(lambda: checkpoints.checkpoint_to_resume(folder, wanted, overwrite))
            checkpoint = None if found is None else str(found)
        if checkpoint is not None:
            step = on_main_process(lambda: self._check_and_report_resume(checkpoint))
            self._resumed_step, self.history = step, _history_of(checkpoint)
        on_main_process(lambda: self._clear_the_way(wanted, step, folder))
        if checkpoint is None:
            self.bad_images.forget()
            self.history = []
        return checkpoint

    def _clear_the_way(self, wanted: str, step: int, folder: str) -> None:
        """Leave in `folder` only the checkpoints up to `step`, and no mark of a finished run."""
        if step < 0 and wanted == "auto" and checkpoints.is_finished(folder):
            checkpoints.remove_finished(folder)
        moved = checkpoints.set_aside(folder, step)
        if moved:
            begins = f"resumes from step {step}" if step >= 0 else "starts from the beginning"
            names = ", ".join(path.name for path in moved)
            print(f"the run {begins}: {names} of its earlier course moved to {moved[0].parent}", flush=True)
        checkpoints.mark_unfinished(folder)

    def stop_if_preempted(self) -> None:
        """Save and raise [`Preempted`] if a rank received SIGTERM in training or since; every rank must call this."""
        if any(gather_object([self.preemption.received])):
            self._save_what_is_trained()
            raise self._preempted()

    @contextmanager
    def saved_on_sigterm(self) -> Iterator[None]:
        """Keep what is trained if SIGTERM comes inside the `with`, after the training.

        One process saves and stops at once. Several stop together, at the next [`stop_if_preempted`].
        """
        if self.args.world_size > 1:
            self.preemption.begin()
            try:
                yield
            finally:
                self.preemption.end()
            return
        with sigterm_raises():
            try:
                yield
            except Preempted:
                self._save_what_is_trained()
                raise self._preempted() from None

    def _preempted(self) -> Preempted:
        if self.hp_search_backend is not None:
            return Preempted(
                f"stopped by SIGTERM in step {self.state.global_step} of a trial, which is lost. A search with a "
                "storage, a study_name and load_if_exists=True goes on with the trials that are left"
            )
        return Preempted(
            f"stopped by SIGTERM after step {self.state.global_step}: the checkpoint is in "
            f"{self.args.output_dir}. Start the same command again to resume from it"
        )

    def _save_what_is_trained(self) -> None:
        """Write a checkpoint of the last step, unless there is one or the best model has taken its place in memory."""
        has_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        place = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.state.global_step and not has_best and not on_main_process(place.exists):
            self._save_checkpoint(self.model_wrapped or self.model, None)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """End training as Transformers does. A run that SIGTERM stops goes on later: it has no summary and no best."""
        if not self.preemption.agreed:
            # With a limit of 1 Transformers deletes the last checkpoint here, unless it is the best. A run that is
            # killed in its last evaluation or upload would do all steps since the best again; see `save_state`.
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                return super()._finalize_training(trial, num_train_samples, start_time)
            finally:
                self.args.save_total_limit = limit
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._finish_current_push()
        self.is_in_train = False
        raise self._preempted()

    def save_state(self) -> None:
        """Write trainer_state.json, whole or not at all, which marks the run as finished.

        With `save_total_limit` 1 and a best model its checkpoint alone is kept from now on.
        """
        if not self.args.should_save:
            return
        folder, best = Path(self.args.output_dir), self.state.best_model_checkpoint
        aside = folder / UNFINISHED / TRAINER_STATE_NAME
        aside.parent.mkdir(parents=True, exist_ok=True)
        self.state.save_to_json(str(aside))
        flush(aside)
        aside.replace(folder / TRAINER_STATE_NAME)
        flush(folder)
        checkpoints.remove_unfinished(folder)
        if best is not None and self.args.save_total_limit == 1:
            checkpoints.keep_only(folder, Path(best).name)

    def _check_and_report_resume(self, checkpoint: str) -> int:
        """Refuse a checkpoint of another run, print where the run resumes, and warn about each difference.

        Returns:
            The step of the checkpoint.
        """
        step = _step_of_state(checkpoint)
        _require_same_student(checkpoint, self.model)
        print(f"resuming from {checkpoint}, after step {step}", flush=True)
        before, now = checkpoints.facts_of(checkpoint), self._facts_of_run()
        for name, (old, new) in _differences(before, now).items():
            logger.warning("resuming with %s %s, which was %s until step %d", name, new, old, step)
        changed = before.get("settings") or {}
        same_batch = changed.get("batch size") in (None, now["settings"]["batch size"])
        if before.get("processes", now["processes"]) != now["processes"] and same_batch:
            logger.warning(
                "resuming on %s processes instead of %s: the views and their order are the same, but their split into "
                "batches and the random numbers of stochastic depth differ, so the weights will differ slightly",
                *(now["processes"], before["processes"]),
            )
        return step

    def _facts_of_run(self) -> dict:
        """Return what a checkpoint says of the run that wrote it; JSON."""
        args = self.args
        settings = settings_of(args) | {
            "learning rate": args.learning_rate,
            "batch size": args.effective_batch_size,
            "ema_decay": args.ema_decay,
        }
        return {"processes": args.world_size, "settings": json.loads(json.dumps(settings, default=str))}

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **kwargs) -> None:
        """Set the epoch of the sampler before the epoch runs, unless all steps are done.

        On several ranks, when an epoch is resumed, accelerate wraps the sampler in three others. Neither accelerate
        nor Transformers reaches through them, so the rest of the epoch would use the order of epoch 0.
        """
        if self.state.global_step >= self.state.max_steps:  # resumed after the last step, inside an epoch
            self.control.should_training_stop = True
            return
        batches: Any = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        batches.sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _get_output_dir(self, trial) -> str:
        directory = super()._get_output_dir(trial)
        return str(Path(directory, UNFINISHED)) if self._writes_aside else directory

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Write Transformers' checkpoint and the moving average to a temporary folder, then rename it."""
        folder, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writer = checkpoints.committed(folder, name, self._facts_of_run()) if self.args.should_save else nullcontext()
        with writer:
            failed = gather_object([self._write_aside(folder / UNFINISHED / name, model, trial)])
            if any(failed):
                raise CheckpointError(next(filter(None, failed)))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_aside(self, place: Path, model: nn.Module, trial) -> str | None:
        """Write this rank's files to the temporary folder; return an error as text for the other ranks, or None."""
        kept = self.args.push_to_hub, self.args.save_total_limit
        # The Trainer would upload from the temporary folder and delete old checkpoints before this one is complete.
        self.args.push_to_hub, self.args.save_total_limit = False, None
        self._writes_aside = True
        try:
            place.mkdir(parents=True, exist_ok=True)
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                if self.ema is not None:
                    self.ema.save(place)
                if self.state.best_model_checkpoint == str(place):
                    self.state.best_model_checkpoint = str(place.parents[1] / place.name)
                    self.state.save_to_json(str(place / TRAINER_STATE_NAME))
        except Exception as error:  # safetensors and PyTorch have types of their own for a full disk
            return f"{type(error).__name__}: {error}"
        finally:
            self.args.push_to_hub, self.args.save_total_limit = kept
            self._writes_aside = False
        return None

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Return whether to save with `save_strategy` 'best': for a new best model, and when SIGTERM stops the run."""
        return super()._determine_best_metric(metrics, trial) or self.preemption.agreed

    def _init_training_state(self, max_steps, *args) -> tuple[int, int]:
        """Take the history from the checkpoint, but the intervals of logging, evaluating and saving from this run."""
        epochs_and_steps = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        if self._resumed_step is not None and self.state.global_step != self._resumed_step:
            raise CheckpointError(
                f"the checkpoint of step {self._resumed_step} was replaced or removed while it was loaded (step "
                f"{self.state.global_step} arrived): make sure that no other run uses {self.args.output_dir}"
            )
        return epochs_and_steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both as Transformers does, which leaves out what is missing; then check what arrived.

        The options of the optimizer and the peak learning rate stay those of this run.
        """
        if checkpoint is None:
            return
        optimizer: Any = self.optimizer
        options = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
        peaks: list = list(getattr(self.lr_scheduler, "base_lrs", ()))
        with checkpoints.loading(checkpoint, "the state of the optimizer and its schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if not self.is_fsdp_enabled:
                _check_optimizer(self.optimizer, self.state.global_step)
            _check_schedule(self.lr_scheduler, self.state.global_step, may_lag=self.accelerator.scaler is not None)
            _keep_options(self.optimizer, self.lr_scheduler, options, peaks)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse weights that are not all of this model's, which Transformers warns of."""
        kept_out = set(self.model._keys_to_ignore_on_save or ())
        missing, unexpected = set(load_result.missing_keys) - kept_out, load_result.unexpected_keys
        if missing or unexpected:
            raise UserError(f"they lack {sorted(missing)[:3]} and have {sorted(unexpected)[:3]} besides")
        super()._issue_warnings_after_load(load_result)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint, "the random states"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint, "the gradient scaler"):
            super()._load_scaler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checkpoints.loading(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            with checkpoints.loading(resume_from_checkpoint, "the moving average"):
                self.ema.load(resume_from_checkpoint)

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        torch_loader = getattr(
            loader, "base_dataloader", loader
        )  # accelerate's wrapper passes reads of attributes on to it, but not writes
        torch_loader.worker_init_fn = outlive_sigterm(torch_loader.worker_init_fn)
        if torch_loader.num_workers and torch_loader.multiprocessing_context is None:
            torch_loader.multiprocessing_context = sheltered_start()
        # A loader draws a seed whenever it starts its workers, which in a resumed run happens at other moments than in
        # an uninterrupted one. Drawn from the global generator, the seed would shift all later random numbers.
        torch_loader.generator = torch.Generator()
        return loader


def _history_of(checkpoint: str) -> list[dict[str, str]]:
    entries = checkpoints.facts_of(checkpoint).get("history")
    entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [{str(name): str(value) for name, value in entry.items()} for entry in entries]


# What a trainer_state.json must hold for training to go on from it: the type, and the smallest value.
NUMBERS_OF_STATE = {
    **dict.fromkeys(("epoch", "total_flos", "num_input_tokens_seen"), (float, 0)),
    **dict.fromkeys(("global_step", "max_steps", "num_train_epochs"), (int, 0)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (float, 0)),
}


def _step_of_state(checkpoint: str) -> int:
    """Return the step of a checkpoint whose trainer_state.json is usable throughout.

    Raises:
        CheckpointError: it is missing, or one of its values is not what training needs.
    """
    try:
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"cannot resume from checkpoint {checkpoint!r}: {TRAINER_STATE_NAME} is missing or unreadable "
            f"({type(error).__name__}: {error}). To use only its weights, set model_name_or_path to the checkpoint"
        ) from error

    def wrong(name: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"cannot resume from checkpoint {checkpoint!r}: {name} in {TRAINER_STATE_NAME} is "
            f"{ascii(getattr(state, name))[:80]}, expected {expected}. To use only its weights, set "
            "model_name_or_path to the checkpoint"
        )

    for name, (kind, lowest) in NUMBERS_OF_STATE.items():
        value = getattr(state, name)
        if not _is_number(value, kind) or value < lowest:
            raise wrong(name, f"{'an integer' if kind is int else 'a number'} of {lowest} or more")
    if state.best_metric is not None and not _is_number(state.best_metric, float):
        raise wrong("best_metric", "a number")
    if state.best_global_step is not None and not _is_number(state.best_global_step, int):
        raise wrong("best_global_step", "an integer")
    if not isinstance(state.best_model_checkpoint, (str, type(None))):
        raise wrong("best_model_checkpoint", "a path")
    if not isinstance(state.log_history, list) or not all(isinstance(entry, dict) for entry in state.log_history):
        raise wrong("log_history", "a list of log lines")
    if not isinstance(state.stateful_callbacks, dict):
        raise wrong("stateful_callbacks", "a mapping")
    return state.global_step


def _is_number(value: object, kind: type) -> bool:
    kinds = int if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _require_same_student(checkpoint: str, model: PreTrainedModel) -> None:
    """Refuse the checkpoint of a student with other classes or tensors; warn about other differences.

    Raises:
        CheckpointError: the checkpoint cannot be one of this run.
    """
    path, advice = Path(checkpoint, CONFIG_NAME), "use that student, or another output_dir for this one"
    if not path.is_file():  # PEFT saves the adapter alone
        return
    try:
        before = read_json(path)
        names = {int(index): str(name) for index, name in (before.get("id2label") or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot resume from checkpoint {checkpoint!r}: {CONFIG_NAME} is not a model's configuration "
            f"({first_line(error)})"
        ) from error
    now = json.loads(json.dumps(model.config.to_dict(), default=str))
    with suppress(Exception):  # config.json leaves out what is the default, which not every class can tell
        before = json.loads(json.dumps(type(model.config)().to_dict(), default=str)) | before
    classes = {int(index): str(name) for index, name in (now.get("id2label") or {}).items()}
    if names and names != classes:
        changed = [index for index in sorted({*names, *classes}) if names.get(index) != classes.get(index)]
        raise CheckpointError(
            f"cannot resume from checkpoint {checkpoint!r}: it has {len(names)} classes and this run {len(classes)}; "
            f"class {changed[0]} is {names.get(changed[0])!r} there and {classes.get(changed[0])!r} here: train on "
            "the same classes, or use another output_dir"
        )
    ignored = {"id2label", "label2id", "architectures", "transformers_version", "dtype", "torch_dtype"}
    different = sorted(
        name
        for name in (before.keys() & now.keys()) - ignored
        if not name.startswith("_") and before[name] != now[name]
    )
    problem = _first_wrong_tensor(Path(checkpoint, SAFE_WEIGHTS_NAME), model)
    if problem or (before.get("architectures") or [type(model).__name__]) != [type(model).__name__]:
        parts = [f"{name} is {ascii(before[name])[:80]} there and {ascii(now[name])[:80]} here" for name in different]
        kind = problem or f"a {before.get('architectures')}"
        raise CheckpointError(
            f"cannot resume from checkpoint {checkpoint!r}, which is of another student ({'; '.join(parts) or kind}): "
            f"{advice}"
        )
    for name in different:
        logger.warning("resuming a student with %s %s, which was %s", name, now[name], before[name])


def _first_wrong_tensor(weights: Path, model: PreTrainedModel) -> str | None:
    """Compare the shapes and number formats in the header of a safetensors file with those of the model's tensors."""
    if not weights.is_file():  # sharded
        return None
    mine = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    with checkpoints.loading(str(weights.parent), "the weights"), safe_open(weights, framework="pt") as file:
        names = set(file.keys())
        if mine.keys() < names:  # where fewer are stored, some are tied; loading sees whether others are missing
            return f"it has {len(names - mine.keys())} tensors more"
        for name in sorted(names & mine.keys()):
            stored = file.get_slice(name)
            if list(stored.get_shape()) != list(mine[name].shape):
                return f"{name} has the shape {stored.get_shape()} there and {list(mine[name].shape)} here"
            if stored.get_dtype() != STORED_AS.get(mine[name].dtype, stored.get_dtype()):
                return f"{name} is stored as {stored.get_dtype()} there and is {mine[name].dtype} here"
    return None


STORED_AS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _differences(before: dict, now: dict) -> dict[str, tuple[object, object]]:
    """Return what both runs state and state differently, by name: the old value and the new one."""
    different = {}
    for part in ("settings", "data", "teacher"):
        old, new = before.get(part), now.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            different |= {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}
    return different


def _check_optimizer(optimizer, step: int) -> None:
    """Refuse a state that does not fit the parameters: fused kernels read and write it without looking.

    Raises:
        UserError: a tensor is missing, or has another shape or number format than its parameter, or is not finite.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    expected = None
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        expected = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if optimizer.defaults["amsgrad"] else set())
    elif not type(optimizer).__module__.startswith("torch.optim") or isinstance(optimizer, torch.optim.Adafactor):
        return  # their states have shapes of their own
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    if step and not any(optimizer.state.get(parameter) for parameter in parameters):
        raise UserError(f"the optimizer has no state after step {step}")
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if expected is not None and state and state.keys() != expected:
            raise UserError(
                f"a parameter of shape {tuple(parameter.shape)} has {sorted(map(str, state))} instead of "
                f"{sorted(expected)}"
            )
        for name, value in state.items():
            if name == "step":
                if not torch.is_tensor(value) or value.numel() != 1 or not 0 <= value.item() <= step:
                    raise UserError(f"the optimizer counts {ascii(value)[:80]} steps after step {step}")
            elif torch.is_tensor(value) and value.dim():
                if value.shape != parameter.shape or value.dtype != parameter.dtype:
                    raise UserError(
                        f"{name} has the shape {tuple(value.shape)} and is {value.dtype}, for a parameter of shape "
                        f"{tuple(parameter.shape)}, {parameter.dtype}"
                    )
                if not value.isfinite().all():
                    raise UserError(f"{name} of a parameter of shape {tuple(parameter.shape)} is not finite")
                if value.stride() != parameter.stride():  # kernels take both for equal in memory
                    state[name] = torch.empty_like(parameter).copy_(value)
            elif torch.is_tensor(value) and parameter.dim():
                raise UserError(f"{name} is one number, for a parameter of shape {tuple(parameter.shape)}")


def _check_schedule(scheduler, step: int, *, may_lag: bool) -> None:
    """Refuse a schedule at another step; it may lag where a gradient scaler has skipped steps."""
    at = getattr(scheduler, "last_epoch", None)
    stepped_by_metric = not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) or isinstance(
        scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau
    )
    if stepped_by_metric:
        return
    if not isinstance(at, int) or not 0 <= at <= step or (at != step and not may_lag):
        raise UserError(f"the schedule is at step {ascii(at)[:80]}, and the run at step {step}")


def _keep_options(optimizer, scheduler, options: list[dict], peaks: list) -> None:
    """Put this run's options in place of those that were loaded with the state, which would replace them silently."""
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update({name: value for name, value in own.items() if name != "lr"})
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) and list(scheduler.base_lrs) != peaks:
        scheduler.base_lrs = peaks
        for group, peak, factor in zip(optimizer.param_groups, peaks, scheduler.lr_lambdas, strict=True):
            group["lr"] = peak * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged
