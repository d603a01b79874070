"""What a trial of a hyperparameter search may change, and the settings that were changed since a run was set up.

Not here: the search (Transformers' and optuna's) and how a run is set up anew (distillation_trainer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ..arguments import names_affecting
from ..errors import UserError, some_of
from .stock_options import STOCK_OPTIONS


# Options of the weights that are set once for a process, or with the teacher.
FIXED = {
    **dict.fromkeys(("bf16", "fp16", "tf32", "full_determinism"), "a process has one number format throughout"),
    "teacher_image_size": "the teacher is loaded once",
}
# What makes an option idle: the options that decide it, whether they do, and the reason.
IDLE: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("mixup_alpha", "cutmix_alpha"),
        ("mix_prob", lambda args: not args.mix_prob, "mix_prob is 0"),
    ),
    "mix_switch_prob": (
        "mix_prob mixup_alpha cutmix_alpha",
        lambda args: not (args.mix_prob and args.mixup_alpha and args.cutmix_alpha),
        "it chooses between Mixup and CutMix, and not both are on",
    ),
    **dict.fromkeys(
        ("distillation_temperature", "kl_reduction"),
        ("distillation_type", lambda args: args.distillation_type != "soft", "distillation_type is not 'soft'"),
    ),
    "distillation_alpha": (
        "distillation_type",
        lambda args: args.distillation_type == "none",
        "distillation_type is 'none'",
    ),
    **dict.fromkeys(
        ("min_lr", "warmup_lr"),
        (
            "lr_scheduler_type",
            lambda args: args.lr_scheduler_type != "cosine_warmup_with_min_lr",
            "only the schedule 'cosine_warmup_with_min_lr' reads it",
        ),
    ),
}


def changes_since(before: Any, args: Any) -> dict[str, Any]:
    """Return what was set on `args` since `before`, a copy of it, was made, by name.

    These are settings that affect the weights, and names that the class does not know.
    """
    known, searchable = {item.name for item in fields(args)}, names_of_settings(type(args))
    return {
        name: value
        for name, value in vars(args).items()
        if (name in searchable and value != getattr(before, name))
        or not (name in known or name.startswith("_") or hasattr(before, name))
    }


def names_of_settings(kind: type) -> set[str]:
    """Return the names of the options of a config class that affect the views or the weights."""
    inherited = {name for name, stock in STOCK_OPTIONS.items() if stock.affects != "machine"}
    return inherited | set(names_affecting(kind, "views", "weights"))


def check_trial(values: Any, kind: type) -> dict[str, Any]:
    """Check the names of a trial's values, before one of them is used.

    Args:
        values: what `hp_space` returned.
        kind: class of the config.

    Returns:
        The values, by name; those that the class does not know are for the student.

    Raises:
        ValueError: it is no mapping, or an option in it does not affect the weights or cannot change within a process.
    """
    if not isinstance(values, Mapping) or not values:
        raise UserError(
            f"hp_space returned {values!r}; expected a dict from names to values, such as {{'learning_rate': "
            "trial.suggest_float('learning_rate', 1e-4, 1e-2, log=True)}"
        )
    known, searchable = {item.name for item in fields(kind)}, names_of_settings(kind)
    for name in values:
        if name in FIXED:
            raise UserError(f"a trial cannot set {name}: {FIXED[name]}. Set it for the whole search")
        if name in known and name not in searchable:
            raise UserError(
                f"a trial cannot set {name}, which changes speed, files or the evaluation, and not what is learnt. "
                "Set it for the whole search"
            )
    return dict(values)


def refuse_idle(args: Any, changes: Mapping[str, Any]) -> None:
    """Raise for a changed setting that another one, which is not changed, makes idle."""
    for name in sorted(changes.keys() & IDLE.keys()):
        deciding, is_idle, why = IDLE[name]
        if is_idle(args) and not changes.keys() & set(deciding.split()):
            raise UserError(f"{name} has no effect: {why}. Leave {name} out, or set {deciding.split()[0]}")


def refuse_ineffective(values: Mapping[str, Any], config: Any) -> None:
    """Raise for a value that is for the student, and that its config does not have.

    Args:
        values: values by name.
        config: config of the student that was made.
    """
    lost = [name for name, value in values.items() if getattr(config, name, None) != value]
    if lost:
        raise UserError(
            f"{some_of(lost)} has no effect: no option of DistillationConfig is called so, and the student's config "
            "does not have the value. For a field of the student give the model by name, or a model_init that reads "
            f"it from its trial: model_init(trial), trial.params[{lost[0]!r}]"
        )


def check_search(args: Any, options: Mapping[str, Any], evaluates: bool) -> None:
    """Refuse a search whose trials would not be what separate runs are.

    Args:
        args: the config.
        options: further arguments of `hyperparameter_search`.
        evaluates: whether there is an evaluation set.
    """
    refused = {
        "teacher_record": "each trial would write over the record of the one before",
        "teacher_replay": "a record belongs to one order of the views and one length; give the teacher itself",
        "resume_from_checkpoint": "a trial starts from the beginning",
        "push_to_hub": "each trial would upload over the one before; train with the best values, and upload that",
    }
    for name, why in refused.items():
        if getattr(args, name):
            raise UserError(f"{name} is {getattr(args, name)!r}, which a search does not support: {why}")
    if args.world_size > 1:
        raise UserError(
            f"a search on {args.world_size} processes is not supported: start one process for each device, each "
            "with an output_dir of its own, all with the same storage, study_name and load_if_exists=True: optuna "
            "shares the trials among them"
        )
    if options.get("n_jobs", 1) != 1:
        raise UserError(f"n_jobs is {options['n_jobs']}, and the trials share one trainer: leave n_jobs out")
    if not evaluates:
        raise UserError(
            "a search compares evaluations, and there is no evaluation set: give eval_dataset or eval_split"
        )
