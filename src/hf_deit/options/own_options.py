"""The options of a run's training that this package declares itself. The defaults are Table 9 of the paper.

Nothing here needs PyTorch, so that `--help` and the refusal of a wrong key need not wait for it.

Not here: what the other options of Transformers' TrainingArguments mean (stock_options.py), and what follows from the
values (distillation_config.py).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from ..arguments import available_cores, option


PAPER_SCHEDULE = "cosine_warmup_with_min_lr"


def _workers_per_process() -> int:
    """Available CPU cores divided by the processes on this machine; at most 10, as in the authors' code."""
    return min(10, max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _has_gpu() -> bool:
    """Whether there is a GPU; False where nobody has imported PyTorch, as in `--help`, which asks for each default."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


@dataclass
class OwnOptions:
    """The fields of [`DistillationConfig`] that are not Transformers' alone. Each is described by its help."""

    # Distillation
    distillation_type: str = option(
        "hard",
        "What the distillation head learns: 'hard' (teacher decisions, eq. 3), 'soft' (teacher probabilities, eq. 2), "
        "'label' (the true label: the control of section 4), or 'none' (labels only).",
        heading="teacher",
    )
    distillation_alpha: float | None = option(
        None, "Weight of the distillation loss, in [0, 1]. Default: 0.5, or 0.1 for 'soft' (section 6)."
    )
    distillation_temperature: float = option(3.0, "Temperature tau of eq. 2, above 0. Used by 'soft' only.")
    kl_reduction: str = option(
        "batchmean",
        "Reduction of the KL divergence, used by 'soft' only: 'batchmean', or 'numel', which divides by batch x "
        "classes as the authors' code does.",
    )
    teacher_image_size: int | None = option(
        None,
        "Side in pixels to which the student's views are resized for the teacher (bicubic, antialiased). Default: the "
        "student's size, or the teacher's own if the teacher reads no other.",
        affects="views",
    )
    teacher_record: str | None = option(
        None,
        "Record the teacher outputs for every training view in this directory.",
        affects="machine",
    )
    teacher_replay: str | None = option(
        None,
        "Train from recorded teacher outputs: a directory, or a dataset on the Hub that `hf-deit record` has "
        "published, owner/name, perhaps with @ and a branch, tag or commit. Set `teacher` as well only to report "
        "its accuracy.",
        affects="machine",
    )
    teacher_top_k: int = option(
        100,
        "Number of largest logits that teacher_record keeps per view for 'soft', 6 bytes each. If there are no more "
        "classes than this, all logits are kept.",
        affects="machine",
    )

    # Classes of unequal size
    class_weighting: str = option(
        "none",
        "Weights of the classes in the loss of the true labels: 'none', or 'inverse': images / (classes x images of "
        "the class). The teacher's part of the loss and the evaluation are not weighted.",
    )
    balanced_sampling: bool = option(
        False,
        "Show every class equally often: an epoch has as many views as before, and repeats the images of small "
        "classes, each time in another view.",
        affects="views",
    )

    # Augmentation of each view
    num_repeats: int = option(
        3, "Repeated augmentation: views of each image in a batch. 1 turns it off.", affects="views", heading="data"
    )
    auto_augment: str = option(
        "rand-m9-mstd0.5-inc1",
        "Augmentation policy in timm's notation: RandAugment, 'original' or 'v0' (AutoAugment), or 'none'.",
        affects="views",
    )
    color_jitter: float = option(
        0.3, "Strength of the colour jitter, used only when auto_augment is 'none'.", affects="views"
    )
    horizontal_flip: float = option(
        0.5, "Probability of a left-right flip. Set 0 when left and right differ (digits).", affects="views"
    )
    random_crop: str | None = option(
        None,
        "Crop: 'random_resized', or 'padded' (shifted by up to 4 pixels). Default: 'padded' for image sizes up to 32 "
        "pixels, else 'random_resized', as in the authors' code.",
        affects="views",
    )
    min_crop_scale: float = option(
        0.08, "Smallest fraction of the image area that a 'random_resized' crop keeps, in (0, 1].", affects="views"
    )
    shuffle_buffer_size: int = option(
        16_384,
        "Streaming: encoded images in the shuffle buffer, summed over all processes. 0 keeps the stored order.",
        affects="views",
    )

    max_bad_images: float = option(
        0.001,
        "Fraction of the training images, in [0, 1], that may be damaged before the run stops. 0 allows none.",
        affects="machine",
    )

    # Regularisation of the batch, on the device
    random_erasing_prob: float = option(
        0.25, "Probability that a rectangle of a view is replaced by noise.", affects="views"
    )
    mixup_alpha: float = option(0.8, "Parameter of Mixup's beta distribution. 0 turns Mixup off.", affects="views")
    cutmix_alpha: float = option(1.0, "Parameter of CutMix's beta distribution. 0 turns CutMix off.", affects="views")
    mix_prob: float = option(
        1.0, "Probability that a batch is mixed by Mixup or CutMix.", affects="views", heading="data"
    )
    mix_switch_prob: float = option(
        0.5, "Probability of CutMix, rather than Mixup, when both are on.", affects="views"
    )
    label_smoothing_factor: float = option(0.1, "Label smoothing of the true labels, in [0, 1).")

    # Optimisation
    num_train_epochs: float = option(
        300, "Number of epochs. One epoch has as many views as the dataset has images.", heading="training"
    )
    per_device_train_batch_size: int = option(
        128,
        "Views per device and forward pass. The default makes 1024 on the paper's 8 GPUs.",
        affects="views",
        heading="training",
    )
    per_device_eval_batch_size: int = option(
        256, "Images per device and forward pass in evaluation.", affects="machine"
    )
    learning_rate: float | None = option(
        None, "Peak learning rate, used as is. Mutually exclusive with base_learning_rate.", heading="training"
    )
    base_learning_rate: float | None = option(
        None,
        "Peak learning rate for a global batch of 512, scaled linearly with the global batch. Default: 5e-4, unless "
        "learning_rate is set.",
    )
    min_lr: float = option(1e-5, "Learning rate at the end of the cosine schedule.")
    warmup_lr: float = option(1e-6, "Learning rate at the first step of the warm-up.")
    warmup_epochs: float | None = option(
        None,
        "Epochs of linear warm-up. Used only if warmup_steps is unset. Default: the paper's 5, in a run of less than "
        "25 epochs a fifth of it.",
        heading="training",
    )
    warmup_steps: float | None = option(
        None, "Steps of linear warm-up; below 1, a fraction of all steps; 0: no warm-up. Default: warmup_epochs."
    )
    weight_decay: float = option(
        0.05, "Weight decay of AdamW. Biases, norms, class token and positions are not decayed."
    )
    max_grad_norm: float = option(0.0, "Gradient clipping. 0 turns it off, as in the paper.")
    lr_scheduler_type: str = option(
        PAPER_SCHEDULE, "Any schedule of Transformers. The default is the paper's: warm-up, then cosine."
    )
    ema_decay: float | None = option(
        None,
        "Decay of a moving average of the weights, in (0, 1), evaluated in addition to the weights. Authors: 0.99996. "
        "Default: no moving average.",
    )

    # The run
    overwrite_output_dir: bool = option(
        False,
        "Replace a finished run in output_dir. An unfinished one is resumed all the same. Default: refuse.",
        affects="machine",
        heading="output",
    )
    eval_strategy: str = option(
        "epoch", "When to evaluate: 'epoch', 'steps' or 'no'.", affects="machine", heading="output"
    )
    save_strategy: str = option(
        "epoch", "When to write a checkpoint: 'epoch', 'steps' or 'no'.", affects="machine", heading="output"
    )
    save_total_limit: int | None = option(2, "Number of checkpoints to keep.", affects="machine")
    logging_steps: float | None = option(
        None,
        "Steps between two log lines. Default: 50, in a run of less than 500 steps a tenth of it.",
        affects="machine",
        heading="output",
    )
    logging_nan_inf_filter: bool = option(
        False, "Hide NaN and infinite losses from the log. Off: a non-finite loss stops the run.", affects="machine"
    )
    remove_unused_columns: bool = option(
        False, "Not supported: batches also carry the views' seeds, which are no model inputs.", affects="machine"
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "Let DDP search for parameters without a gradient. Off: every parameter is trained.", affects="machine"
    )
    dataloader_num_workers: int = option(
        _workers_per_process,
        "Data loader workers per process. Default: the available cores, at most 10.",
        affects="machine",
    )
    dataloader_persistent_workers: bool = option(
        True, "Keep the data loader workers alive between epochs.", affects="machine"
    )
    dataloader_pin_memory: bool = option(
        _has_gpu,
        "Copy batches into page-locked memory. Default: on if there is a GPU.",
        affects="machine",
    )
