"""DistillationConfig: how a DeiT is trained. The defaults are Table 9 of the paper.

Not here: the architecture (configuration_deit.py), nor which data, model and teacher to load (arguments.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import SchedulerType, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from ..arguments import names_affecting
from ..errors import UserError
from ..losses import CLASS_WEIGHTINGS, DISTILLATION_TYPES, KL_REDUCTIONS
from .own_options import PAPER_SCHEDULE, OwnOptions
from .stock_options import STOCK_OPTIONS


logger = logging.getLogger(__name__)

# "lr = 0.0005 x batchsize / 512" (Table 9).
PAPER_BASE_LEARNING_RATE = 5e-4
BASE_BATCH_SIZE = 512
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
CHOICES = {
    "distillation_type": DISTILLATION_TYPES,
    "kl_reduction": KL_REDUCTIONS,
    "class_weighting": CLASS_WEIGHTINGS,
}
# What is computed where it is not given, from other options among others.
COMPUTED = (
    *("learning_rate", "lr_scheduler_kwargs", "warmup_epochs", "logging_steps", "eval_steps"),
    *("metric_for_best_model", "greater_is_better"),
)
# What makes an option idle, or is refused beside it: the other option, and the value at which it does not.
IN_THE_WAY = {
    "learning_rate": ("base_learning_rate", None),
    "base_learning_rate": ("learning_rate", None),
    "warmup_epochs": ("warmup_steps", None),
    "num_train_epochs": ("max_steps", -1),
}
# Of Table 9's 300 epochs; and the largest share of a shorter run that is warm-up unless the user asks for more.
PAPER_WARMUP_EPOCHS, LONGEST_WARMUP = 5, 0.2


@dataclass
class DistillationConfig(OwnOptions, TrainingArguments):
    """[`TrainingArguments`] with the paper's defaults and fields for its method. Each field is described by its help.

    Fields of TrainingArguments whose default differs: the optimisation of Table 9 (epochs, batch size, weight decay,
    label smoothing, no clipping, cosine schedule), evaluation and a checkpoint every epoch, two checkpoints kept, no
    filter that hides NaN losses, all columns kept, one loader worker per available core (at most 10).

    Raises:
        ValueError: `distillation_type`, `kl_reduction` or `class_weighting` is unknown, a number is outside its range,
            two options exclude each other, the warm-up is as long as the run, or an option of `TrainingArguments`
            cannot be kept (see `stock_options`).
    """

    if TYPE_CHECKING:  # narrower than Transformers declares them, once __post_init__ has run
        output_dir: str = ""

    def __post_init__(self):
        as_given = {name: getattr(self, name) for name in COMPUTED}
        without_effect = self._check_stock_options()
        warmup_steps = self.warmup_steps
        if self.auto_augment in (None, ""):
            self.auto_augment = "none"
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False
        if self.label_names is None:
            self.label_names = ["labels"]
        if warmup_steps is None:
            self.warmup_steps = 0  # None means warmup_epochs, which Transformers does not know
        self.logs_by_default = self.logging_steps is None
        for name, value in self._computed_defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        self.warmup_steps = warmup_steps
        if self.process_index == 0:
            for name, why in (without_effect | self._idle_options()).items():
                logger.warning("%s has no effect: %s", name, why)
        self._check_ranges()
        self._resolve_learning_rate()
        if self.lr_scheduler_type == PAPER_SCHEDULE:
            given: Any = self.lr_scheduler_kwargs or {}  # a text has been parsed by now
            peak = float(self.learning_rate or 0)
            lowest = {} if "min_lr_rate" in given else {"min_lr": self.min_lr}
            self.lr_scheduler_kwargs = {**lowest, "warmup_lr_rate": min(self.warmup_lr / peak, 1.0), **given}
        self._computed = {name: (value, getattr(self, name)) for name, value in as_given.items()}

    def with_changes(self, changes: Mapping[str, Any]) -> DistillationConfig:
        """Return the config that these values would have made, had they been given in the place of this config's.

        What follows from an option follows from the new value: the warm-up from `num_train_epochs`, say. What would
        make a new value idle gives way to it: `max_steps` to `num_train_epochs`.

        Raises:
            ValueError: as for the class.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        for name, (given, computed) in self._computed.items():
            if values[name] == computed:  # else it was set since
                values[name] = given
        values |= dict(IN_THE_WAY[name] for name in changes if name in IN_THE_WAY)
        return type(self)(**values | dict(changes))

    def _check_stock_options(self) -> dict[str, str]:
        """Raise for unsupported options of TrainingArguments.

        Returns:
            Why each option that is set, and has no effect, has none. Those that would have one are back at the
            default, except `do_train` and its like, which scripts of other makers read.
        """
        # Values that TrainingArguments itself puts in place of the defaults; accepting them lets a config be copied.
        resolved = {"label_names": ["labels"], "do_eval": True, "accelerator_config": AcceleratorConfig()}
        resolved |= {"include_num_input_tokens_seen": False, "include_for_metrics": []}
        set_here = {
            item.name: getattr(self, item.name)
            for item in fields(TrainingArguments)
            if item.name in STOCK_OPTIONS
            and getattr(self, item.name) not in (item.default, resolved.get(item.name, item.default))
        }
        for name, value in set_here.items():
            if STOCK_OPTIONS[name].status == "refused":
                raise UserError(
                    f"{name} is {value!r}, which is not supported: {STOCK_OPTIONS[name].why}. Leave {name} out"
                )
        if self.remove_unused_columns:
            raise UserError(
                "remove_unused_columns is True, which is not supported: each batch would lose its views' seeds and "
                "the list of damaged images. Leave remove_unused_columns out"
            )
        if str(getattr(self.optim, "value", self.optim)).startswith("schedule_free"):
            raise UserError(
                f"optim is {str(getattr(self.optim, 'value', self.optim))!r}, which is not supported: schedule-free "
                "optimizers train and evaluate with different weights, and the training weights would be saved. Use "
                "'adamw_torch_fused' or another optimizer"
            )
        without_effect = {name: STOCK_OPTIONS[name].why for name in set_here if STOCK_OPTIONS[name].why}
        for name in without_effect:
            if not name.startswith("do_"):
                setattr(self, name, TrainingArguments.__dataclass_fields__[name].default)
        return without_effect

    def _computed_defaults(self) -> dict[str, float]:
        warmup_epochs = min(PAPER_WARMUP_EPOCHS, LONGEST_WARMUP * self.num_train_epochs)
        return {"logging_steps": 50, "warmup_epochs": warmup_epochs}  # `Pace` lowers logging_steps in a short run

    def _idle_options(self) -> dict[str, str]:
        """Return, for each option that is set and that another option makes idle, why it has no effect."""
        defaults = {item.name: item.default for item in fields(self)} | self._computed_defaults()
        schedule, optimizer = SchedulerType(self.lr_scheduler_type).value, OptimizerNames(self.optim).value
        idle = {}
        for name in ("eval", "save", "logging"):
            strategy: Any = getattr(self, f"{name}_strategy")
            if strategy != "steps":
                idle[f"{name}_steps"] = f"{name}_strategy is {strategy.value!r}; set {name}_strategy: steps"
        if self.warmup_steps is not None:
            idle["warmup_epochs"] = "warmup_steps is set"
        if schedule in WITHOUT_WARMUP:
            idle |= dict.fromkeys(("warmup_epochs", "warmup_steps"), f"the schedule {schedule!r} has no warm-up")
        if schedule != PAPER_SCHEDULE:
            idle |= dict.fromkeys(("min_lr", "warmup_lr"), f"lr_scheduler_type is {schedule!r}")
        for name, needed in (("fsdp_config", "fsdp"), ("activation_checkpointing_kwargs", "activation_checkpointing")):
            if not getattr(self, needed):
                idle[name] = f"{needed} is not set"
        if self.use_cpu:
            idle["ddp_timeout"] = "Transformers sets it for processes on accelerators only"
        idle = {name: why for name, why in idle.items() if getattr(self, name) != defaults[name]}
        read = {name: defaults[name] for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")}
        for name, default in read.items():
            if getattr(self, name) != default and self._optimizer_ignores(name, default):
                idle[name] = f"the optimizer {optimizer!r} does not read it"
        pairs = (self.optim_args or "").split(",")
        for pair in filter(None, pairs):
            if self._optimizer_ignores("optim_args", ",".join(other for other in pairs if other != pair) or None):
                idle[f"{pair.strip()!r} of optim_args"] = f"the optimizer {optimizer!r} does not read it"
        return idle

    def _optimizer_ignores(self, name: str, other_value: object) -> bool:
        """Compare the optimizer's class and arguments with those that it would have with another value of `name`."""
        from transformers import Trainer  # slow to import, and hardly ever needed here

        changed = copy(self)
        setattr(changed, name, other_value)
        try:
            return Trainer.get_optimizer_cls_and_kwargs(self) == Trainer.get_optimizer_cls_and_kwargs(changed)
        except Exception:  # a missing package or model: the optimizer itself says so when it is made
            return False

    def _check_ranges(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.dataloader_num_workers < 0:
            raise UserError(f"dataloader_num_workers is {self.dataloader_num_workers}; it must be 0 or more")
        occupied = next(path for path in (Path(self.output_dir), *Path(self.output_dir).parents) if path.exists())
        if not self.output_dir or not occupied.is_dir():
            raise UserError(
                f"output_dir {self.output_dir!r} cannot be a directory: {str(occupied)!r} is not a directory"
            )
        for name in ("teacher_record", "teacher_replay"):
            if getattr(self, name) is not None and self.distillation_type not in ("hard", "soft"):
                raise UserError(
                    f"{name} is {getattr(self, name)!r} and distillation_type is {self.distillation_type!r}, which "
                    f"uses no teacher: leave out {name}, or set distillation_type to 'hard' or 'soft'"
                )
        if self.teacher_record is not None and self.teacher_replay is not None:
            raise UserError(
                f"teacher_record is {self.teacher_record!r} and teacher_replay is {self.teacher_replay!r}: replayed "
                "teacher outputs are already recorded, so set only one of the two"
            )
        if self.teacher_image_size is not None and self.teacher_image_size < 1:
            raise UserError(f"teacher_image_size is {self.teacher_image_size}; it must be 1 or more")
        if self.balanced_sampling and (self.class_weighting != "none" or self.shuffle_buffer_size == 0):
            other = "class_weighting" if self.class_weighting != "none" else "shuffle_buffer_size"
            why = (
                "small classes would count twice over"
                if other == "class_weighting"
                else "the stored order cannot show every class equally often"
            )
            raise UserError(
                f"balanced_sampling is True and {other} is {getattr(self, other)!r}: {why}. Leave out one of the two"
            )
        if self.teacher_top_k < 1:
            raise UserError(f"teacher_top_k is {self.teacher_top_k}; it must be 1 or more")
        if self.distillation_alpha is not None and not 0 <= self.distillation_alpha <= 1:
            raise UserError(f"distillation_alpha is {self.distillation_alpha}; it must be in [0, 1]")
        if self.distillation_temperature <= 0:
            raise UserError(f"distillation_temperature is {self.distillation_temperature}; it must be above 0")
        if not 0 <= self.label_smoothing_factor < 1:
            raise UserError(f"label_smoothing_factor is {self.label_smoothing_factor}; it must be in [0, 1)")
        if not 0 <= self.max_bad_images <= 1:
            raise UserError(f"max_bad_images is {self.max_bad_images}; it must be a fraction in [0, 1]")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; it must be in (0, 1), or left out for no moving average")
        if self.warmup_steps is not None and self.warmup_steps >= 1 and self.warmup_steps % 1:
            raise UserError(
                f"warmup_steps is {self.warmup_steps}; it must be a whole number of steps, or a fraction below 1"
            )
        warms_up_by_epochs = self.warmup_steps is None and self.lr_scheduler_type not in WITHOUT_WARMUP
        warmup_epochs = self.warmup_epochs or 0
        if self.max_steps <= 0 and warms_up_by_epochs and warmup_epochs >= self.num_train_epochs:
            raise UserError(
                f"warmup_epochs is {warmup_epochs:g} and num_train_epochs is {self.num_train_epochs:g}: the run "
                "would end within its warm-up; lower warmup_epochs or raise num_train_epochs"
            )

    def _resolve_learning_rate(self) -> None:
        scaled = (self.base_learning_rate or PAPER_BASE_LEARNING_RATE) * self.effective_batch_size / BASE_BATCH_SIZE
        if self.learning_rate is None:
            self.learning_rate = scaled
        elif self.base_learning_rate is not None and self.learning_rate != scaled:
            raise UserError(
                f"learning_rate {self.learning_rate:g} and base_learning_rate {self.base_learning_rate:g} are both "
                "given: keep learning_rate to use it as is, or base_learning_rate to scale it by batch / 512"
            )
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate is {self.learning_rate:g}; it must be a positive number")
        if self.lr_scheduler_type == PAPER_SCHEDULE and self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr {self.min_lr:g} is above the learning rate {self.learning_rate:g} (batch "
                f"{self.effective_batch_size}): the cosine would rise; lower min_lr or raise the learning rate"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a term for the teacher's outputs."""
        return self.distillation_type in ("hard", "soft")

    def transform_options(self) -> dict:
        """Return the keyword arguments of [`build_train_transform`]."""
        return {
            "auto_augment": None if self.auto_augment == "none" else self.auto_augment,
            "color_jitter": self.color_jitter,
            "horizontal_flip": self.horizontal_flip,
            "crop": self.random_crop,
            "scale": (self.min_crop_scale, 1.0),
        }

    def mixing_options(self) -> dict:
        """Return the keyword arguments of [`Mixing`]."""
        names = ("mixup_alpha", "cutmix_alpha", "mix_prob", "mix_switch_prob", "random_erasing_prob")
        return {name: getattr(self, name) for name in names}

    def view_settings(self) -> dict[str, object]:
        """Return every setting that decides which pixels appear at which position, by name; values are JSON.

        The batch layout counts views per device and per step. The split of a step into ranks and accumulated batches
        is left out because it changes no view.
        """
        # The number of views per device stands below, as the trainer counts it.
        names = {"view_seed", *names_affecting(type(self), "views")} - {"per_device_train_batch_size"}
        return {
            **{name: getattr(self, name) for name in sorted(names)},
            "views of a device's batch": self.train_batch_size,
            "views of a step": self.effective_batch_size,
            # The device's own random generator fills the erased rectangles.
            "noise of erasing": self.device.type if self.random_erasing_prob else None,
            # None is what a record lacks that is older than the option.
            "balanced_sampling": self.balanced_sampling or None,
        }

    def loss_options(self) -> dict:
        """Return the keyword arguments of [`distillation_loss`]."""
        return {
            "distillation_type": self.distillation_type,
            "alpha": self.distillation_alpha,
            "temperature": self.distillation_temperature,
            "label_smoothing": self.label_smoothing_factor,
            "kl_reduction": self.kl_reduction,
        }

    @property
    def view_seed(self) -> int:
        """Seed of the image order and of every view: `data_seed`, or `seed` if `data_seed` is unset."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def effective_batch_size(self) -> int:
        """Views per optimizer step: per-device batch x devices x gradient accumulation."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return `warmup_steps` if set, else `num_training_steps` x `warmup_epochs` / `num_train_epochs`.

        0 for a schedule without a warm-up.
        """
        if SchedulerType(self.lr_scheduler_type).value in WITHOUT_WARMUP:
            return 0
        if self.warmup_steps is not None:
            return super().get_warmup_steps(num_training_steps)
        return min(round(num_training_steps * (self.warmup_epochs or 0) / self.num_train_epochs), num_training_steps)


# Settings that affect the weights and that the model card states in another form: batch size, learning rates, EMA.
STATED_OTHERWISE = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "base_learning_rate"),
    *("lr_scheduler_kwargs", "ema_decay"),
}


def settings_of(args: DistillationConfig) -> dict[str, object]:
    """Return the settings that affect the weights, by name, except `STATED_OTHERWISE` (see [`CardFacts`])."""
    own = names_affecting(DistillationConfig, "views", "weights")
    inherited = [name for name, option in STOCK_OPTIONS.items() if option.affects != "machine"]
    return {name: getattr(args, name) for name in (*own, *inherited) if name not in STATED_OTHERWISE}
