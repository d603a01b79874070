"""Help and hints for people who type keys: `--help` in groups, and which key a wrong one was meant to be."""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Collection
from dataclasses import fields
from typing import get_args

from ..arguments import Heading
from .stock_options import FORMER_OPTIONS, FirstOptions


# `--help` is short where a command has so many keys; its texts begin in this column.
MANY_KEYS, HELP_COLUMN = 60, 32
HEADINGS = {item.name: item.metadata["help"].heading for item in fields(FirstOptions)}  # of Transformers' own options

# What other trainers (timm, ultralytics, torchvision, lightly-train, Transformers' older versions) call our keys.
SYNONYMS = {
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs", "train_epochs"), "num_train_epochs"),
    **dict.fromkeys(("lr", "lr0", "peak_lr"), "learning_rate"),
    **dict.fromkeys(("batch_size", "batch", "bs", "train_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("eval_batch_size", "val_batch_size", "test_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("warmup", "num_warmup_epochs", "lr_warmup_epochs"), "warmup_epochs"),
    **dict.fromkeys(("num_warmup_steps",), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("opt", "optimizer"), "optim"),
    **dict.fromkeys(("sched", "scheduler", "lr_scheduler"), "lr_scheduler_type"),
    **dict.fromkeys(("clip_grad", "clip_grad_norm", "grad_clip", "gradient_clip_val"), "max_grad_norm"),
    **dict.fromkeys(("accum", "accumulate_grad_batches", "grad_accum_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("data", "dataset", "data_path", "train_dir", "root"), "dataset_name"),
    **dict.fromkeys(("val_split", "test_split", "validation_split"), "eval_split"),
    **dict.fromkeys(("img_size", "imgsz", "input_size", "resolution"), "image_size"),
    **dict.fromkeys(("model", "checkpoint", "pretrained", "model_id"), "model_name_or_path"),
    **dict.fromkeys(("teacher_model", "teacher_path", "teacher_name", "kd_model_name"), "teacher"),
    **dict.fromkeys(("distillation", "distill_type", "kd_distill_type"), "distillation_type"),
    **dict.fromkeys(("alpha", "distillation_weight", "distill_loss_weight"), "distillation_alpha"),
    **dict.fromkeys(("temperature", "tau", "distillation_tau", "kd_temperature"), "distillation_temperature"),
    **dict.fromkeys(("aa", "augment", "randaugment", "rand_augment"), "auto_augment"),
    **dict.fromkeys(("reprob", "random_erasing", "random_erase"), "random_erasing_prob"),
    **dict.fromkeys(("mixup",), "mixup_alpha"),
    **dict.fromkeys(("cutmix",), "cutmix_alpha"),
    **dict.fromkeys(("smoothing", "label_smoothing"), "label_smoothing_factor"),
    **dict.fromkeys(("drop_path", "stochastic_depth"), "drop_path_rate"),
    **dict.fromkeys(("repeated_aug", "aug_repeats", "repeats"), "num_repeats"),
    **dict.fromkeys(("hflip", "flip"), "horizontal_flip"),
    **dict.fromkeys(("model_ema", "ema", "model_ema_decay"), "ema_decay"),
    **dict.fromkeys(("workers", "num_workers"), "dataloader_num_workers"),
    **dict.fromkeys(("amp", "mixed_precision", "precision", "half"), "bf16"),
    **dict.fromkeys(("compile", "torchcompile"), "torch_compile"),
    **dict.fromkeys(("output", "out", "out_dir", "save_dir", "project_dir"), "output_dir"),
    **dict.fromkeys(("resume", "resume_from"), "resume_from_checkpoint"),
    **dict.fromkeys(("log_interval", "log_every", "print_freq"), "logging_steps"),
    **dict.fromkeys(("grad_checkpointing",), "gradient_checkpointing"),
    **dict.fromkeys(("device",), "use_cpu"),
}


class ShortHelp(argparse.Action):
    """`--help`: of many keys only those that people set first, under their headings; of few keys all."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        keys = {action.dest: action for action in parser._actions if f"--{action.dest}" in action.option_strings}
        if len(keys) < MANY_KEYS:
            parser.print_help()
            parser.exit()
        lines = [parser.format_usage().strip()]
        for heading in get_args(Heading):
            lines.append(f"\n{heading}:")
            for name, action in keys.items():
                if heading == getattr(action.help, "heading", HEADINGS.get(name)):
                    lines += _described(name, action)
        print(*lines, "\nIn a recipe: `key: value`, without the dashes. --help-all lists every key.", sep="\n")
        parser.exit()


def _described(name: str, action: argparse.Action) -> list[str]:
    """The lines of `--help` about one key; of Transformers' own help the first sentence."""
    help = (
        str(action.help) if hasattr(action.help, "heading") else f"{str(action.help).partition('. ')[0].rstrip('.')}."
    )
    default = "" if action.default in (None, "", False, -1) else f" [{action.default}]"
    width = min(119, shutil.get_terminal_size().columns)
    lines = textwrap.wrap(help + default, max(20, width - HELP_COLUMN), break_long_words=False)
    name = f"  --{name} "
    first = [name] if len(name) > HELP_COLUMN else [name.ljust(HELP_COLUMN) + lines.pop(0)]
    return first + [" " * HELP_COLUMN + line for line in lines]


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return the end of a message about the unknown key `word`: which of the `known` keys it may mean."""
    word = word.split("=")[0]
    if advice := FORMER_OPTIONS.get(word):
        return f", which Transformers no longer has: {advice}"
    meant = SYNONYMS.get(word.lower().replace("-", "_"))
    nearest = [meant] if meant in known else difflib.get_close_matches(word, known, n=1)
    if nearest:
        return f", which is no key; did you mean {nearest[0]!r}?"
    return ", which is no key; --help-all lists them"
