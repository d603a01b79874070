"""Resuming: the trainer's checkpoints are whole, verified and exact, and an unfinished run goes on by itself.

What a checkpoint holds is Transformers' (weights, optimizer, schedule, random states, history) and the moving average.
Data need no state: a view is a function of (seed, epoch, position), and the order can be entered anywhere.

Not here: how a checkpoint is written and checked (checkpoints.py) and SIGTERM (preemption.py).
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..data.bad_images import BadImages
from ..processes import by_one_process
from . import checkpoints
from .checkpoints import UNFINISHED, CheckpointError
from .distillation_config import DistillationConfig, settings_of
from .ema import ExponentialMovingAverage
from .preemption import Preempted, Preemption, outlive_sigterm


logger = logging.getLogger(__name__)


class ProgressOfTheRest(ProgressCallback):
    """Transformers' bar takes the steps before the checkpoint for work of its first second, and promises too much."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = state.global_step


class ResumableTrainer(Trainer):
    """Transformers' Trainer whose checkpoints are whole, verified and exact.

    Attributes:
        bad_images: the damaged images that the training views have met; a new start forgets them.
        ema: the moving average of the weights, or None.
        preemption: whether SIGTERM has come.
    """

    # Narrower than Transformers declares them.
    args: DistillationConfig
    model: PreTrainedModel
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema = None
        if self.args.ema_decay is not None:
            self.ema = ExponentialMovingAverage(self.args.ema_decay)
            self.add_callback(self.ema)
        self.preemption = Preemption()
        self.add_callback(self.preemption)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressOfTheRest())
        self._writes_aside = False

    @cached_property
    def bad_images(self) -> BadImages:
        """The damaged images that the training views have met."""
        return BadImages(self.args.output_dir, len(self.train_dataset), self.args.max_bad_images)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """As in Transformers, with checkpoints that are verified before they are opened.

        Args:
            resume_from_checkpoint: a checkpoint's directory; True: the last whole one in `output_dir`; "auto": the
                same where there is an unfinished run, else a new start. None: a new start.

        Raises:
            CheckpointError: a checkpoint cannot be written, or is damaged; "auto" met a finished run.
            Preempted: SIGTERM came, and the run is saved.
        """
        checkpoint = None
        if wanted := str(resume_from_checkpoint or ""):
            found = by_one_process(lambda: checkpoints.checkpoint_to_resume(self.args.output_dir, wanted))
            checkpoint = None if found is None else str(found)
        if self.is_world_process_zero():
            checkpoints.remove_unfinished(self.args.output_dir)
            checkpoints.mark_unfinished(self.args.output_dir)
        if checkpoint is None:
            self.bad_images.forget()
        else:
            self._tell_of_resuming(checkpoint)
        output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.preemption.agreed:
            raise Preempted(
                f"stopped by SIGTERM after step {self.state.global_step}: the checkpoint is in {self.args.output_dir}"
                ", and the same command goes on from it"
            )
        return output

    def _tell_of_resuming(self, checkpoint: str) -> None:
        """One line that the run goes on, and a warning for each thing that makes it another run."""
        if not self.is_world_process_zero():
            return
        try:
            step = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint!r} cannot be gone on from: its {TRAINER_STATE_NAME} is missing or is not a "
                f"trainer's ({type(error).__name__}: {error}). For its weights alone, name it as model_name_or_path"
            ) from error
        print(f"going on from {checkpoint}, after step {step}", flush=True)
        before, now = checkpoints.facts_of(checkpoint), self._facts_of_run()
        changed = {
            name: (old, now["settings"][name])
            for name, old in before.get("settings", {}).items()
            if name in now["settings"] and old != now["settings"][name]
        }
        for name, (old, new) in changed.items():
            logger.warning("resuming with another %s: %s; it was %s until step %d", name, new, old, step)
        if before.get("processes", now["processes"]) != now["processes"] and "batch size" not in changed:
            logger.warning(
                "resuming on %d processes, there were %d: the order of the views is the same, their cut into batches "
                "and the random numbers of stochastic depth are not, so weights agree but for those",
                *(now["processes"], before["processes"]),
            )

    def _facts_of_run(self) -> dict:
        args = self.args
        settings = settings_of(args) | {"learning rate": args.learning_rate, "batch size": args.effective_batch_size}
        return {"processes": args.world_size, "settings": json.loads(json.dumps(settings, default=str))}

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **kwargs) -> None:
        """Tells the order of the views its epoch.

        On several ranks, in an epoch that is gone on with, accelerate's samplers are three deep around ours. Neither
        it nor Transformers reaches through them, and the rest of the epoch would be that of epoch 0.
        """
        batches: Any = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        batches.sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _get_output_dir(self, trial) -> str:
        directory = super()._get_output_dir(trial)
        return str(Path(directory, UNFINISHED)) if self._writes_aside else directory

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Transformers' checkpoint and the moving average, written aside; see checkpoints.py."""
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
        """Writes this rank's files. Returns what went wrong, for the others to hear."""
        kept = self.args.push_to_hub, self.args.save_total_limit
        # The Trainer would upload from the place it writes to, and delete old checkpoints before this one is whole.
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.pickles_refused(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.pickles_refused(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checkpoints.pickles_refused(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            self.ema.load(resume_from_checkpoint)

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        torchs = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper reads, but does not set, through it
        torchs.worker_init_fn = outlive_sigterm(torchs.worker_init_fn)
        # A loader draws a seed for its workers whenever it starts them: in a resumed run at other moments than in an
        # uninterrupted one. From the global generator, that would shift every random number that follows.
        torchs.generator = torch.Generator()
        return loader
