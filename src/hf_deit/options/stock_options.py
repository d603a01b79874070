"""What each option that `DistillationConfig` inherits from Transformers' TrainingArguments means here.

The options that [`DistillationConfig`] declares itself say so in their own declaration (see `arguments.option`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from ..arguments import Affects, option


Status = Literal["honoured", "no effect", "refused"]


class StockOption(NamedTuple):
    """One option of TrainingArguments.

    Attributes:
        status: "honoured"; "no effect": setting it is warned of; "refused": setting it is an error.
        affects: what another value changes; see `arguments.option`.
        why: for the user, where it is not honoured: why, and what to use instead.
    """

    status: Status
    affects: Affects = "machine"
    why: str = ""


def _honoured(affects: Affects, names: str) -> dict[str, StockOption]:
    return {name: StockOption("honoured", affects) for name in names.split()}


STOCK_OPTIONS: dict[str, StockOption] = {
    **_honoured("views", "seed data_seed gradient_accumulation_steps"),
    **_honoured(
        "weights",
        "max_steps bf16 lr_scheduler_kwargs optim optim_args optim_target_modules adam_beta1 adam_beta2 "
        "adam_epsilon fp16 tf32 load_best_model_at_end metric_for_best_model "
        "greater_is_better full_determinism",
    ),
    **_honoured(
        "machine",
        # where it runs
        "use_cpu ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph fsdp fsdp_config debug "
        # speed and memory
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
        "gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps "
        "eval_accumulation_steps dataloader_prefetch_factor dataloader_multiprocessing_context skip_memory_metrics "
        # what is logged, evaluated and saved, and when
        "output_dir logging_strategy logging_first_step log_on_each_node log_level log_level_replica disable_tqdm "
        "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_on_start "
        "eval_steps eval_delay save_steps save_on_each_node resume_from_checkpoint "
        "restore_callback_states_from_checkpoint "
        # the Hub
        "push_to_hub hub_model_id hub_token hub_private_repo hub_strategy hub_always_push hub_revision",
    ),
    **{
        name: StockOption("no effect", why=why)
        for name, why in {
            "average_tokens_across_devices": "the loss is a mean over views, not over tokens",
            "include_num_input_tokens_seen": "images have no tokens to count",
            "use_cache": "a DeiT has no cache of keys and values",
            "length_column_name": "images are not grouped by length",
            "prediction_loss_only": "an evaluation keeps five classes and a loss of each image, which costs nothing",
            "local_rank": "the launcher's environment says which process this is",
            "do_train": "a run always trains",
            "do_eval": "eval_strategy says when to evaluate",
            "do_predict": "run_eval.py predicts",
        }.items()
    },
    **{
        name: StockOption("refused", why=why)
        for name, why in {
            "dataloader_drop_last": "the sampler already cuts an epoch to whole batches, and the evaluation would "
            "lose its last images",
            "dataloader_in_order": "the order of the views would depend on which loader worker is quicker",
            "train_sampling_strategy": "repeated augmentation orders the views",
            "ignore_data_skip": "a resumed run would be shown views again; resuming in mid-epoch reads nothing twice",
            "save_only_model": "a run could not resume from such a checkpoint; hub_strategy: every_save uploads "
            "weights alone",
            "enable_jit_checkpoint": "SIGTERM already saves a checkpoint, on all ranks at the same step",
            "auto_find_batch_size": "another batch size is another run; recipes/run_throughput.py finds the largest",
            "bf16_full_eval": "the model would stay in bfloat16 and be saved so; bf16: true evaluates in bfloat16",
            "fp16_full_eval": "the model would stay in float16 and be saved so; fp16: true evaluates in float16",
            "batch_eval_metrics": "accuracies are counted over whole evaluations, which cost no memory here",
            "include_for_metrics": "compute_metrics already gets the loss of each image, and no inputs",
            "eval_use_gather_object": "what an evaluation gathers are tensors",
            "eval_do_concat_batches": "accuracies are counted over whole evaluations",
            "label_names": "batches hold their labels as 'labels'",
            "neftune_noise_alpha": "NEFTune adds noise to the embeddings of words",
            "use_liger_kernel": "Liger has no kernels for a DeiT; use torch_compile: true",
            "liger_kernel_config": "Liger has no kernels for a DeiT; use torch_compile: true",
            "parallelism_config": "a DeiT fits one device; several are used by DDP, or by fsdp",
            "deepspeed": "its checkpoints are not verified here; use fsdp",
            "accelerator_config": "accelerate's loaders are set so that views and their order are exact",
        }.items()
    },
}

# Options of earlier Transformers that recipes of other makers still have, and what says the same today.
FORMER_OPTIONS = {
    "warmup_ratio": "set warmup_steps to that fraction",
    "evaluation_strategy": "set eval_strategy",
    "no_cuda": "set use_cpu",
    "use_mps_device": "leave it out: an available device is used",
    "half_precision_backend": "leave it out",
    "per_gpu_train_batch_size": "set per_device_train_batch_size",
    "per_gpu_eval_batch_size": "set per_device_eval_batch_size",
    "adafactor": "set optim: adafactor",
    "group_by_length": "leave it out: images have no length",
    "past_index": "leave it out: a DeiT has no states of earlier inputs",
    "save_safetensors": "leave it out: weights are always saved as safetensors",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "push_to_hub_model_id": "set hub_model_id",
    "push_to_hub_token": "set hub_token",
    "include_inputs_for_metrics": "leave it out",
    "torchdynamo": "set torch_compile_backend",
}


@dataclass
class FirstOptions:
    """The inherited options that people set first, in Transformers' words, for a `--help` that imports none of it."""

    max_steps: int = option(-1, "Overrides `num_train_epochs`.", heading="training")
    bf16: bool = option(False, "Enable bfloat16 (BF16) mixed precision training.", heading="training")
    seed: int = option(42, "Random seed that will be set at the beginning of training.", heading="training")
    output_dir: str | None = option(
        None,
        "The output directory where the model predictions and checkpoints will be written.",
        heading="output",
    )
    push_to_hub: bool = option(
        False,
        "Whether or not to push the model to the Hub every time the model is saved.",
        heading="output",
    )
    hub_model_id: str | None = option(
        None,
        "The name of the repository to keep in sync with the local `output_dir`.",
        heading="output",
    )


def names_in_transformers() -> set[str]:
    """Return the names of the options of the installed Transformers, read from its source instead of imported."""
    spec = find_spec("transformers")  # which runs nothing of it
    folders = (spec and spec.submodule_search_locations) or ()
    sources = [path.read_text("utf-8") for folder in folders if (path := Path(folder, "training_args.py")).is_file()]
    return {name for source in sources for name in re.findall(r"^    (\w+): .*=", source, re.MULTILINE)}
