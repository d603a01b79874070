"""Resuming: an unfinished run resumes by itself, exactly, from complete and verified checkpoints.

A checkpoint holds what Transformers saves (weights, optimizer, schedule, random states, history) and the moving
average. The data need no state: a view is a function of (seed, epoch, position), and the order can start anywhere.

Not here: how a checkpoint is written and verified (checkpoints.py) and SIGTERM (preemption.py).
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
from ..processes import on_main_process
from . import checkpoints
from .checkpoints import UNFINISHED, CheckpointError
from .distillation_config import DistillationConfig, settings_of
from .ema import ExponentialMovingAverage
from .preemption import Preempted, Preemption, outlive_sigterm


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
        preemption: callback that stops the run after SIGTERM.
    """

    # These types are narrower than in Transformers.
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
        """Damaged images found in training so far."""
        return BadImages(self.args.output_dir, len(self.train_dataset), self.args.max_bad_images)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Train as in Transformers, resuming only from a verified checkpoint.

        Args:
            resume_from_checkpoint: directory of a checkpoint; True: the last complete checkpoint in `output_dir`;
                "auto": the same if `output_dir` holds an unfinished run, else start from the beginning; None: start
                from the beginning.

        Raises:
            CheckpointError: a checkpoint cannot be written or is damaged; "auto" found a finished run.
            Preempted: the run received SIGTERM and is saved.
        """
        checkpoint = None
        if wanted := str(resume_from_checkpoint or ""):
            found = on_main_process(lambda: checkpoints.checkpoint_to_resume(self.args.output_dir, wanted))
            checkpoint = None if found is None else str(found)
        if self.is_world_process_zero():
            checkpoints.remove_unfinished(self.args.output_dir)
            checkpoints.mark_unfinished(self.args.output_dir)
        if checkpoint is None:
            self.bad_images.forget()
        else:
            self._report_resume(checkpoint)
        output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.preemption.agreed:
            raise Preempted(
                f"stopped by SIGTERM after step {self.state.global_step}: the checkpoint is in "
                f"{self.args.output_dir}. Start the same command again to resume from it"
            )
        return output

    def _report_resume(self, checkpoint: str) -> None:
        """Print where the run resumes, and warn about each setting that differs from those of the checkpoint."""
        if not self.is_world_process_zero():
            return
        try:
            step = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"cannot resume from checkpoint {checkpoint!r}: {TRAINER_STATE_NAME} is missing or unreadable "
                f"({type(error).__name__}: {error}). To use only its weights, set model_name_or_path to the checkpoint"
            ) from error
        print(f"resuming from {checkpoint}, after step {step}", flush=True)
        before, now = checkpoints.facts_of(checkpoint), self._facts_of_run()
        changed = {
            name: (old, now["settings"][name])
            for name, old in before.get("settings", {}).items()
            if name in now["settings"] and old != now["settings"][name]
        }
        for name, (old, new) in changed.items():
            logger.warning("resuming with %s %s, which was %s until step %d", name, new, old, step)
        if before.get("processes", now["processes"]) != now["processes"] and "batch size" not in changed:
            logger.warning(
                "resuming on %d processes instead of %d: the views and their order are the same, but their split into "
                "batches and the random numbers of stochastic depth differ, so the weights will differ slightly",
                *(now["processes"], before["processes"]),
            )

    def _facts_of_run(self) -> dict:
        args = self.args
        settings = settings_of(args) | {"learning rate": args.learning_rate, "batch size": args.effective_batch_size}
        return {"processes": args.world_size, "settings": json.loads(json.dumps(settings, default=str))}

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **kwargs) -> None:
        """Set the epoch of the sampler before the epoch runs.

        On several ranks, when an epoch is resumed, accelerate wraps the sampler in three others. Neither accelerate
        nor Transformers reaches through them, so the rest of the epoch would use the order of epoch 0.
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
        torch_loader = getattr(
            loader, "base_dataloader", loader
        )  # accelerate's wrapper passes reads of attributes on to it, but not writes
        torch_loader.worker_init_fn = outlive_sigterm(torch_loader.worker_init_fn)
        # A loader draws a seed whenever it starts its workers, which in a resumed run happens at other moments than in
        # an uninterrupted one. Drawn from the global generator, the seed would shift all later random numbers.
        torch_loader.generator = torch.Generator()
        return loader
