"""DistillationConfig: how a DeiT is trained. The defaults are Table 9 of the paper.

What the network *is* stands in configuration_deit.py; which data, model and teacher to load, in recipe.py.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..arguments import names_affecting, option
from ..errors import UserError
from ..losses import DISTILLATION_TYPES, KL_REDUCTIONS
from ..stock_options import STOCK_OPTIONS


logger = logging.getLogger(__name__)

# "lr = 0.0005 x batchsize / 512" (Table 9).
PAPER_BASE_LEARNING_RATE = 5e-4
BASE_BATCH_SIZE = 512


def _workers_per_process() -> int:
    """Every core this process may use, shared by the processes of the machine; at most the 10 of the authors' code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(10, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


@dataclass
class DistillationConfig(TrainingArguments):
    """[`TrainingArguments`] with the paper's defaults and the fields of its method; each field's help says the rest.

    Fields of TrainingArguments whose default differs: the optimisation of Table 9 (epochs, batch, weight decay, label
    smoothing, no clipping, cosine schedule), evaluation and a checkpoint every epoch, two checkpoints kept, no filter
    that hides NaN losses, all columns kept, as many loader workers as the machine has cores for.

    Raises:
        ValueError: unknown `distillation_type` or `kl_reduction`, a number outside its range, both learning rates
            given, `min_lr` above the learning rate, a warm-up as long as the run; `teacher_record` and
            `teacher_replay` together, or where no teacher is asked.
    """

    if TYPE_CHECKING:  # narrower than Transformers declares them, once __post_init__ has run
        output_dir: str

    # Distillation
    distillation_type: str = option(
        "hard",
        "'hard' (eq. 3), 'soft' (eq. 2), 'label' (the second token learns the true label: the control of section 4) "
        "or 'none'.",
    )
    distillation_alpha: float | None = option(
        None, "Weight of the teacher's term, in [0, 1]. Unset: 0.5, and 0.1 for 'soft' (section 6)."
    )
    distillation_temperature: float = option(3.0, "Temperature tau of eq. 2; 'soft' only.")
    kl_reduction: str = option(
        "batchmean", "'batchmean', or 'numel' to divide by batch x classes as the authors' code does; 'soft' only."
    )
    teacher_record: str | None = option(
        None, "Directory to write the teacher's answer to every view into.", affects="machine"
    )
    teacher_replay: str | None = option(
        None,
        "Directory of recorded answers: trains without asking a teacher; name it too only for its accuracy.",
        affects="machine",
    )
    teacher_top_k: int = option(
        100,
        "Logits of a view that teacher_record keeps for 'soft', at 6 bytes each; all of up to so many classes.",
        affects="machine",
    )

    # Augmentation of each view
    num_repeats: int = option(
        3, "Repeated augmentation: views of an image in a batch; 1 turns it off.", affects="views"
    )
    auto_augment: str = option(
        "rand-m9-mstd0.5-inc1",
        "Policy in timm's notation: RandAugment, 'original' or 'v0' (AutoAugment), or 'none'.",
        affects="views",
    )
    color_jitter: float = option(
        0.3, "Strength of the colour jitter, used only where auto_augment is 'none'.", affects="views"
    )
    horizontal_flip: float = option(
        0.5, "Probability of a left-right flip; 0 where left and right differ (digits).", affects="views"
    )
    random_crop: str | None = option(
        None,
        "'random_resized', or 'padded': shifted by up to 4 pixels. Unset: padded up to 32 pixels, as the authors.",
        affects="views",
    )
    min_crop_scale: float = option(
        0.08, "Smallest share of the image that a random_resized crop keeps, in (0, 1].", affects="views"
    )
    shuffle_buffer_size: int = option(
        16_384,
        "Streaming: encoded images of all processes that are mixed at a time. 0: no shuffling, the stored order.",
        affects="views",
    )

    max_bad_images: float = option(
        0.001,
        "Share of the training images, in [0, 1], that may be damaged before the run stops; 0 allows none.",
        affects="machine",
    )

    # Regularisation of the batch, on the device
    random_erasing_prob: float = option(0.25, "Probability that a view loses a rectangle to noise.", affects="views")
    mixup_alpha: float = option(0.8, "Beta parameter of Mixup; 0 turns it off.", affects="views")
    cutmix_alpha: float = option(1.0, "Beta parameter of CutMix; 0 turns it off.", affects="views")
    mix_prob: float = option(1.0, "Probability that a batch is mixed.", affects="views")
    mix_switch_prob: float = option(0.5, "Probability of CutMix where Mixup is on too.", affects="views")
    label_smoothing_factor: float = option(0.1, "Smoothing of the true labels, in [0, 1).")

    # Optimisation
    num_train_epochs: float = option(300, "Epochs; one epoch is as many views as the set has images.")
    per_device_train_batch_size: int = option(128, "Views per device and forward pass; 1024 on the paper's 8 GPUs.")
    per_device_eval_batch_size: int = option(
        256, "Images per device and forward pass in evaluation.", affects="machine"
    )
    learning_rate: float | None = option(None, "Peak learning rate, final: it is not scaled. Excludes the next.")
    base_learning_rate: float | None = option(
        None, "Peak learning rate at a global batch of 512, scaled linearly. Unset with learning_rate unset: 5e-4."
    )
    min_lr: float = option(1e-5, "Learning rate at the end of the cosine.")
    warmup_lr: float = option(1e-6, "Learning rate at the first step.")
    warmup_epochs: float = option(5, "Epochs of linear warm-up; warmup_steps, if given, comes first.")
    weight_decay: float = option(0.05, "Decay of AdamW; not on biases, norms, class token and positions.")
    max_grad_norm: float = option(0.0, "Clipping; 0 is none, as in the paper.")
    lr_scheduler_type: str = option("cosine_warmup_with_min_lr", "Any of Transformers'; the paper's is a cosine.")
    ema_decay: float | None = option(None, "Moving average of the weights, evaluated beside them; authors: 0.99996.")

    # The run
    eval_strategy: str = option("epoch", "When to evaluate: 'epoch', 'steps' or 'no'.", affects="machine")
    save_strategy: str = option("epoch", "When to write a checkpoint: 'epoch', 'steps' or 'no'.", affects="machine")
    save_total_limit: int | None = option(2, "Checkpoints kept.", affects="machine")
    logging_steps: float = option(50, "Steps between two lines of the log.", affects="machine")
    logging_nan_inf_filter: bool = option(
        False, "A non-finite loss stops the run; it is never averaged away.", affects="machine"
    )
    remove_unused_columns: bool = option(
        False, "Views carry their seeds beside the model's inputs.", affects="machine"
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "Every parameter learns, so DDP need not search.", affects="machine"
    )
    dataloader_num_workers: int = option(
        _workers_per_process, "Loader processes. Unset: the cores, at most 10.", affects="machine"
    )
    dataloader_persistent_workers: bool = option(True, "Keep the loader processes between epochs.", affects="machine")
    dataloader_pin_memory: bool = option(
        torch.cuda.is_available, "Page-locked batches. Unset: where there is a GPU.", affects="machine"
    )

    def __post_init__(self):
        without_effect = self._check_stock_options()
        if self.auto_augment in (None, ""):
            self.auto_augment = "none"
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False
        if self.label_names is None:
            self.label_names = ["labels"]
        super().__post_init__()
        if self.process_index == 0:
            for name in without_effect:
                logger.warning("%s has no effect: %s", name, STOCK_OPTIONS[name].why)
        self._check_ranges()
        self._resolve_learning_rate()
        if self.lr_scheduler_type == "cosine_warmup_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {
                "min_lr": self.min_lr,
                "warmup_lr_rate": min(self.warmup_lr / self.learning_rate, 1.0),
            }

    def _check_stock_options(self) -> list[str]:
        """Refuse what TrainingArguments offers and this run could not keep; return what was set in vain."""
        # What TrainingArguments itself makes of the defaults, so that a config can be copied.
        resolved = {"label_names": ["labels"], "do_eval": True, "accelerator_config": AcceleratorConfig()}
        resolved["include_num_input_tokens_seen"] = False
        set_here = {
            item.name: getattr(self, item.name)
            for item in fields(TrainingArguments)
            if item.name in STOCK_OPTIONS
            and getattr(self, item.name) not in (item.default, resolved.get(item.name, item.default))
        }
        for name, value in set_here.items():
            if STOCK_OPTIONS[name].status == "refused":
                raise UserError(
                    f"{name} is {value!r}, which is not supported: {STOCK_OPTIONS[name].why}. Leave it out"
                )
        if self.remove_unused_columns:
            raise UserError(
                "remove_unused_columns is True, which is not supported: each batch would lose its views' seeds and "
                "the list of damaged images. Leave it out"
            )
        if str(getattr(self.optim, "value", self.optim)).startswith("schedule_free"):
            raise UserError(
                f"optim is {str(getattr(self.optim, 'value', self.optim))!r}, which is not supported: its weights for "
                "training and for evaluation differ, and the former would be saved. Use 'adamw_torch_fused' or another"
            )
        return [name for name in set_here if STOCK_OPTIONS[name].status == "no effect"]

    def _check_ranges(self) -> None:
        for name, choices in (("distillation_type", DISTILLATION_TYPES), ("kl_reduction", KL_REDUCTIONS)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.dataloader_num_workers < 0:
            raise UserError(f"dataloader_num_workers is {self.dataloader_num_workers}; it must be 0 or more")
        occupied = next(path for path in (Path(self.output_dir), *Path(self.output_dir).parents) if path.exists())
        if not self.output_dir or not occupied.is_dir():
            raise UserError(f"output_dir {self.output_dir!r} cannot be a directory: {str(occupied)!r} is no directory")
        for name in ("teacher_record", "teacher_replay"):
            if getattr(self, name) is not None and self.distillation_type not in ("hard", "soft"):
                raise UserError(
                    f"{name} is {getattr(self, name)!r} and distillation_type {self.distillation_type!r}, which asks "
                    f"no teacher: leave out {name}, or use 'hard' or 'soft'"
                )
        if self.teacher_record is not None and self.teacher_replay is not None:
            raise UserError(
                f"teacher_record is {self.teacher_record!r} and teacher_replay {self.teacher_replay!r}: answers that "
                "are replayed are recorded already, so give one of the two"
            )
        if self.teacher_top_k < 1:
            raise UserError(f"teacher_top_k is {self.teacher_top_k}; it must be 1 or more")
        if self.distillation_alpha is not None and not 0 <= self.distillation_alpha <= 1:
            raise UserError(f"distillation_alpha is {self.distillation_alpha}; it is a weight in [0, 1]")
        if self.distillation_temperature <= 0:
            raise UserError(f"distillation_temperature is {self.distillation_temperature}; it must be above 0")
        if not 0 <= self.label_smoothing_factor < 1:
            raise UserError(f"label_smoothing_factor is {self.label_smoothing_factor}; it lies in [0, 1)")
        if not 0 <= self.max_bad_images <= 1:
            raise UserError(f"max_bad_images is {self.max_bad_images}; it is a share of the training set, in [0, 1]")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}; it lies in (0, 1), leave it out for no moving average")
        if self.max_steps <= 0 and not self.warmup_steps and self.warmup_epochs >= self.num_train_epochs:
            raise UserError(
                f"warmup_epochs is {self.warmup_epochs:g} of num_train_epochs {self.num_train_epochs:g}: nothing is "
                "left to train; shorten the warm-up or lengthen the run"
            )

    def _resolve_learning_rate(self) -> None:
        scaled = (self.base_learning_rate or PAPER_BASE_LEARNING_RATE) * self.effective_batch_size / BASE_BATCH_SIZE
        if self.learning_rate is None:
            self.learning_rate = scaled
        elif self.base_learning_rate is not None and self.learning_rate != scaled:
            raise UserError(
                f"learning_rate {self.learning_rate:g} and base_learning_rate {self.base_learning_rate:g} are both "
                "given: keep learning_rate for a final value, or base_learning_rate for one scaled by batch / 512"
            )
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate is {self.learning_rate:g}; it must be a positive number")
        if self.lr_scheduler_type == "cosine_warmup_with_min_lr" and self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr {self.min_lr:g} is above the learning rate {self.learning_rate:g} (batch "
                f"{self.effective_batch_size}): the cosine would rise; lower min_lr or raise the learning rate"
            )

    def transform_options(self) -> dict:
        """The keyword arguments of [`build_train_transform`]."""
        return {
            "auto_augment": None if self.auto_augment == "none" else self.auto_augment,
            "color_jitter": self.color_jitter,
            "horizontal_flip": self.horizontal_flip,
            "crop": self.random_crop,
            "scale": (self.min_crop_scale, 1.0),
        }

    def mixing_options(self) -> dict:
        """The keyword arguments of [`Mixing`]."""
        names = ("mixup_alpha", "cutmix_alpha", "mix_prob", "mix_switch_prob", "random_erasing_prob")
        return {name: getattr(self, name) for name in names}

    def view_settings(self) -> dict[str, object]:
        """Everything of this config that decides which pixels are shown at which position, by name; values are JSON.

        The layout of a batch is its views per device and per step: how many ranks and accumulated batches make up a
        step changes no view.
        """
        return {
            **{name: getattr(self, name) for name in ("view_seed", *names_affecting(type(self), "views"))},
            "views of a device's batch": self.train_batch_size,
            "views of a step": self.effective_batch_size,
            # Rectangles are filled by the device's own generator.
            "noise of erasing": self.device.type if self.random_erasing_prob else None,
        }

    def loss_options(self) -> dict:
        """The keyword arguments of [`distillation_loss`]."""
        return {
            "distillation_type": self.distillation_type,
            "alpha": self.distillation_alpha,
            "temperature": self.distillation_temperature,
            "label_smoothing": self.label_smoothing_factor,
            "kl_reduction": self.kl_reduction,
        }

    @property
    def view_seed(self) -> int:
        """Fixes the order of the images and every view: `data_seed`, or `seed` where it is unset."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def effective_batch_size(self) -> int:
        """Views per optimiser step: per device x devices x gradient accumulation."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """`warmup_steps` if given, else the share of the run that `warmup_epochs` is of `num_train_epochs`."""
        if self.warmup_steps:
            return super().get_warmup_steps(num_training_steps)
        return min(round(num_training_steps * self.warmup_epochs / self.num_train_epochs), num_training_steps)


# Settings that weights depend on and that the card states in another way: batch size, learning rates, EMA.
STATED_OTHERWISE = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "base_learning_rate"),
    *("lr_scheduler_kwargs", "ema_decay"),
}


def settings_of(args: DistillationConfig) -> dict[str, object]:
    """What the weights depend on, by name; the learning rate and the batch stand apart (see [`CardFacts`])."""
    own = names_affecting(DistillationConfig, "views", "weights")
    inherited = [name for name, option in STOCK_OPTIONS.items() if option.affects != "machine"]
    return {name: getattr(args, name) for name in (*own, *inherited) if name not in STATED_OTHERWISE}
