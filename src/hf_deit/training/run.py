"""A complete run: its parts by their names, the banner, the training, the evaluation, all files, the last table.

Each part may be given as an object or by name: a directory, a Hub id or a registered name, as a recipe would say it.
`DistillationTrainer` calls `load_parts` for both, so that a few lines of Python and a recipe train the same network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, SchedulerType, set_seed

from ..arguments import DataArguments, ModelArguments
from ..augmentation.transforms import TrainTransform, build_train_transform
from ..data.labels import labels_of
from ..data.sources import is_image_dataset
from ..data.summary import summarize
from ..data.views import TrainViews, load_views
from ..errors import UserError, printable, refusals_of_libraries, some_of
from ..evaluation.accuracy import names_of_metrics, three_head_accuracy
from ..models.class_names import class_names
from ..models.classifiers import load_pretrained
from ..models.configuration_deit import SIZES, DeiTConfig
from ..models.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTPreTrainedModel,
)
from ..models.weight_files import check_attention
from ..options.distillation_config import LONGEST_WARMUP, PAPER_WARMUP_EPOCHS, DistillationConfig
from ..teachers.recording import RecordingTeacher
from ..teachers.replaying import ReplayedTeacher
from ..teachers.teacher import Teacher, load_teacher


if TYPE_CHECKING:
    from .distillation_trainer import DistillationTrainer


# What a training view depends on before it reaches the device.
VIEW_OPTIONS = (
    *("auto_augment", "color_jitter", "horizontal_flip", "random_crop", "min_crop_scale"),
    *("seed", "data_seed"),
)


def load_parts(model: Any, args: DistillationConfig, teacher: Any, options: Mapping[str, Any]) -> tuple:
    """Build or load the parts of a run that are given by name.

    Args:
        model, args, teacher: as for [`DistillationTrainer`].
        options: its other arguments, of which train_dataset, eval_dataset, data_args, summary and processing_class
            count here.

    Returns:
        The model, the teacher and the options, as objects.

    Raises:
        ValueError: a name leads nowhere, or the model's classes are not those of the images.
    """
    options = _with_views(model, args, dict(options))
    train: Any = options.get("train_dataset")
    if isinstance(model, (str, ModelArguments)):
        model = student_of(model, train, args.seed)
    if teacher is not None and not isinstance(teacher, Teacher):
        teacher = _teacher_of(teacher, model, args, options) if args.needs_teacher else None
    check_heads_and_teacher(model, args, teacher)
    return model, teacher, options


def student_of(name: ModelArguments | str, train: TrainViews, seed: int, **changes: Any) -> DeiTPreTrainedModel:
    """Build the student that a name or [`ModelArguments`] stands for, for the classes and the size of the images.

    Args:
        seed: of new weights.
        changes: fields of `ModelArguments` in the place of what `name` says; others are left out.
    """
    if isinstance(name, str):
        name = ModelArguments(model_size=name) if _is_size(name) else ModelArguments(model_name_or_path=name)
    known = {item.name for item in fields(ModelArguments)}
    name = replace(name, **{field: value for field, value in changes.items() if field in known})
    set_seed(seed)
    with refusals_of_libraries():  # a missing attention backend, say
        return build_student(name, train.transform.image_size, dict(enumerate(train.images.features["label"].names)))


def recorded_or_replayed(
    teacher: Any,
    args: DistillationConfig,
    fingerprint: Callable[[], dict[str, Any]],
    *,
    data: dict[str, object],
    commit: Callable[[str], str | None],
) -> Any:
    """Return what answers for the teacher: itself, itself with its outputs recorded, or a record of them.

    Args:
        fingerprint: see [`RecordingTeacher`].
        data: keys of a recipe that name the images, for the record.
        commit: returns the commit of a record on the Hub from which this run began; None at its start.
    """
    kind, batch_size = args.distillation_type, args.train_batch_size
    if args.teacher_replay is not None:
        return ReplayedTeacher(
            fingerprint, record=args.teacher_replay, kind=kind, batch_size=batch_size, teacher=teacher, commit=commit
        )
    if args.teacher_record is not None:
        return RecordingTeacher(
            teacher,
            fingerprint,
            directory=args.teacher_record,
            kind=kind,
            top_k=args.teacher_top_k,
            batch_size=batch_size,
            device=args.device,
            data=data,
        )
    return teacher


def check_best_metric(trainer: DistillationTrainer, num_classes: int) -> None:
    """Raise a [`UserError`] for a `metric_for_best_model` that no evaluation of the three heads gives."""
    heads = 3 if hasattr(trainer.model, "distillation_classifier") else 1
    known = names_of_metrics(heads, num_classes, labels_of(getattr(trainer.eval_dataset, "images", ())))
    if trainer.ema is not None:
        known += [f"ema_{name}" for name in known]
    chosen = trainer.args.metric_for_best_model
    if (chosen or "loss").removeprefix("eval_") not in known:
        raise UserError(
            f"metric_for_best_model is {chosen!r}; it must be one of {', '.join(known)}"
            + (". Accuracy is called 'top1'" if chosen in ("accuracy", "eval_accuracy") else "")
        )


def mean_and_std(mean: Any, std: Any, processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Return what normalises uint8 pixels: as given, else that of the image processor, which is then needed."""
    if mean is not None and std is not None:
        return mean, std
    if processor is None:
        raise UserError("mean and std of the pixels are unknown: pass processing_class, or mean and std")
    return processor.image_mean, processor.image_std


def check_functions(model: Any, model_init: Any, compute_metrics: Any, options: dict[str, Any]) -> None:
    """Raise for a function that would be ignored, or fed with what it does not expect."""
    if (model is None) == (model_init is None):
        raise UserError(f"{'neither' if model is None else 'both'} of model and model_init given: give one of them")
    if options.get("compute_loss_func") is not None:
        raise UserError(
            "compute_loss_func is not supported: it gets neither the teacher's outputs nor the paper's two terms. "
            "Override compute_loss in a subclass of DistillationTrainer"
        )
    if options.get("preprocess_logits_for_metrics") is not None and compute_metrics is three_head_accuracy:
        raise UserError(
            "preprocess_logits_for_metrics is given without compute_metrics: the default metrics keep no logits. Pass "
            "compute_metrics too"
        )


def check_heads_and_teacher(model: nn.Module, args: DistillationConfig, teacher: Teacher | None) -> None:
    """Raise a [`UserError`] where the kind of distillation does not fit the student's heads or the teacher."""
    kind = args.distillation_type
    if kind in ("hard", "soft") and teacher is None and args.teacher_replay is None:
        raise UserError(
            f"distillation_type is {kind!r} and there is no teacher: set teacher, or teacher_replay to use "
            "recorded teacher outputs, or set distillation_type to 'none' (labels only) or 'label' (both "
            "heads learn the labels)"
        )
    if (size := args.teacher_image_size) and teacher is not None and teacher.image_size != (size, size):
        raise UserError(
            f"teacher_image_size is {size}, but the teacher was loaded for {teacher.image_size or 'any size'}: "
            "pass load_teacher the same image_size"
        )
    if kind == "none" and hasattr(model, "distillation_classifier"):
        raise UserError(
            "distillation_type is 'none' and the model has a distillation head, which would stay untrained: set "
            "use_distillation_token to false (DeiTForImageClassification), or distillation_type to 'label'"
        )


def views_with(dataset: Any, before: DistillationConfig, now: DistillationConfig, asked: Collection[str]) -> Any:
    """Return the training set with the transform and the seed of other settings; its images stay.

    Args:
        before: settings with which the training set was made.
        now: the other settings.
        asked: names of those that must have an effect.

    Raises:
        ValueError: the training set was not made from these settings, or a setting has no effect.
    """
    old, new = before.transform_options(), now.transform_options()
    if (old, before.view_seed) == (new, now.view_seed):
        return dataset
    names = [name for name in VIEW_OPTIONS if getattr(before, name) != getattr(now, name)]
    size: Any = getattr(getattr(dataset, "transform", None), "image_size", None)
    if type(dataset) is not TrainViews or dataset.transform != build_train_transform(size, **old):
        raise UserError(
            f"{', '.join(names)} has no effect: train_dataset was made with a transform of its own. Give the images "
            "by name, or TrainViews with build_train_transform(image_size, **args.transform_options())"
        )
    if now.view_seed != before.view_seed != dataset.seed:
        raise UserError(f"{names[-1]} has no effect: train_dataset was made with another seed than args.view_seed")
    transform = build_train_transform(size, **new)
    for name, deciding in (("color_jitter", "auto_augment"), ("min_crop_scale", "random_crop")):
        if name in names and name in asked and deciding not in asked:
            other = copy(now)
            setattr(other, name, getattr(before, name))
            without = build_train_transform(size, **other.transform_options())
            if _what_it_does(without) == _what_it_does(transform):
                value = getattr(now, deciding) or transform.crop
                raise UserError(f"{name} has no effect: {deciding} is {value!r}. Leave {name} out, or set {deciding}")
    return TrainViews(dataset.images, transform, now.view_seed if now.view_seed != before.view_seed else dataset.seed)


def _what_it_does(transform: TrainTransform) -> TrainTransform:
    return replace(transform, scale=(1.0, 1.0)) if transform.crop == "padded" else transform


def _with_views(model: Any, args: DistillationConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Put views in the place of a dataset that is named, or is one of the datasets library."""
    data, rows = options.get("train_dataset"), None
    if is_image_dataset(data):
        rows = dict(data) if isinstance(data, Mapping) else {"train": data}
        if is_image_dataset(options.get("eval_dataset")):
            rows["validation"] = options.pop("eval_dataset")
        data = options.get("data_args") or "a dataset in memory"
    if isinstance(data, str):
        data = DataArguments(dataset_name=data, **_size_of(model))
    if not isinstance(data, DataArguments):
        return options
    if options.get("eval_dataset") is not None:
        raise UserError(
            "eval_dataset is given beside the name of the training data: leave it out (eval_split of DataArguments "
            "names another split), or give both as datasets"
        )
    views = load_views(data, seed=args.view_seed, rows=rows, **args.transform_options())
    if args.process_index == 0:
        options["summary"] = summarize(views.images)
        print(options["summary"], flush=True)
    if isinstance(model, PreTrainedModel):
        name_classes(model, views.id2label)
    return options | {
        "train_dataset": views.train,
        "eval_dataset": views.eval,
        "data_args": data,
        "processing_class": options.get("processing_class") or views.processor,
    }


def _is_size(model: str) -> bool:
    return model in SIZES and not Path(model).is_dir()


def _size_of(model: Any) -> dict[str, Any]:
    """The model's own image size, for data that come without one; empty where the model has none, or not one side."""
    if isinstance(model, str) and not _is_size(model):
        with refusals_of_libraries():
            model = DeiTConfig.from_pretrained(model)
    size = getattr(getattr(model, "config", model), "image_size", None)
    return {"image_size": size} if isinstance(size, int) else {}


def name_classes(model: PreTrainedModel, id2label: dict[int, str]) -> None:
    """Give a model whose classes have no names those of the images; refuse one that has other classes."""
    config: Any = model.config
    own, names = class_names(config.id2label), list(id2label.values())
    if config.num_labels == len(names) and own in (None, names):
        config.id2label, config.label2id = id2label, {name: number for number, name in id2label.items()}
        return
    raise UserError(
        f"the model has {config.num_labels} classes, {some_of(own or ['without names'])}, and the images "
        f"{len(names)}, {some_of(names)}, in this order: give the model by name, and it gets a new head for them"
    )


def _teacher_of(spec: Any, model: Any, args: DistillationConfig, options: Mapping[str, Any]) -> Teacher:
    processor = options.get("processing_class")
    if processor is None:
        raise UserError(
            "the teacher is given by name, and mean and std of the pixels are unknown: pass processing_class"
        )
    return load_teacher(
        spec,
        id2label=model.config.id2label,
        mean=processor.image_mean,
        std=processor.image_std,
        image_size=args.teacher_image_size,
        student_size=getattr(getattr(options.get("train_dataset"), "transform", None), "image_size", None),
        compile=args.torch_compile,
    )


def build_student(model_args: ModelArguments, image_size: int, id2label: dict[int, str]) -> DeiTPreTrainedModel:
    """Load `model_name_or_path`, or build a model of `model_size` with random weights."""
    model_class = DeiTForImageClassification
    if model_args.use_distillation_token:
        model_class = DeiTForImageClassificationWithTeacher
    fields = model_args.config_overrides() | {"image_size": image_size, "id2label": id2label}
    fields["use_distillation_token"] = model_args.use_distillation_token
    backend = model_args.attn_implementation
    if model_args.model_name_or_path is not None:
        return load_pretrained(model_class, model_args.model_name_or_path, attn_implementation=backend, **fields)
    check_attention(backend, "attn_implementation")
    config = DeiTConfig.from_size(model_args.model_size or "base", **fields)
    return model_class._from_config(config, attn_implementation=backend)


def train_and_save(trainer: DistillationTrainer) -> dict[str, float]:
    """Train, evaluate the student and the teacher, and write all files of the run to `output_dir`.

    The files are model.safetensors, config.json, preprocessor_config.json, README.md (the model card),
    all_results.json, trainer_state.json and report.png. An unfinished run in `output_dir` resumes from its last
    complete checkpoint. With `push_to_hub` the files are uploaded to the Hub at the end. After SIGTERM the run can be
    resumed at any moment until then.

    Returns:
        The content of all_results.json: Trainer's names; `eval_top1` and so on are fractions in [0, 1].

    Raises:
        ValueError: `output_dir` holds a finished run or is in use by another; the upload failed, and all other work is
            done.
        Preempted: the run received SIGTERM and is saved.
    """
    trainer.follow_settings()  # the banner states them
    with trainer.only_run():
        if trainer.is_world_process_zero():
            print(banner(trainer), flush=True)
        train_metrics = trainer.train(trainer.args.resume_from_checkpoint or "auto").metrics
        with trainer.saved_on_sigterm():
            return _evaluate_and_save(trainer, train_metrics)


def _evaluate_and_save(trainer: DistillationTrainer, train_metrics: dict[str, float]) -> dict[str, float]:
    trainer.save_model(_internal_call=True)  # _internal_call: no upload before there are results
    if trainer.bad_images:
        train_metrics["bad_images"] = len(trainer.bad_images)
    trainer.save_metrics("train", train_metrics)
    evaluates = trainer.eval_dataset is not None
    trainer.stop_if_preempted()
    metrics = trainer.evaluate() if evaluates else {}
    trainer.stop_if_preempted()
    if evaluates and trainer.teacher is not None and trainer.teacher.classifier is not None:
        metrics |= trainer.evaluate_teacher()
    if evaluates:
        trainer.save_metrics("eval", metrics)
    held_out = trainer.summary is not None and trainer.summary.evaluates_on_new_images
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        trainer.report()
    trainer.stop_if_preempted()
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub()
        except UserError:  # all other work is done, and the message says how to upload it
            trainer.save_state()
            raise
    trainer.save_state()  # last: trainer_state.json marks the run as finished
    if trainer.is_world_process_zero():
        table = accuracy_table(metrics, held_out) if metrics else "nothing was evaluated"
        print(table, f"All files of the run are in {trainer.args.output_dir}", sep="\n", flush=True)
    trainer.accelerator.wait_for_everyone()  # a launcher ends all processes soon after the first one ends
    return train_metrics | metrics


def banner(trainer: DistillationTrainer) -> str:
    """Return the facts of the run that are most often set wrongly, one line each, printed before training."""
    args = trainer.args
    batch_size = trainer.get_total_train_batch_size(args)
    steps_per_epoch = len(trainer.train_dataset) // batch_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    teacher = trainer.teacher.describe() if trainer.teacher is not None else "none"
    return "\n".join(
        f"{name:<11}{printable(str(value))}"
        for name, value in {
            "model": f"{type(trainer.model).__name__}, {trainer.num_model_parameters / 1e6:.2f}M parameters",
            "teacher": teacher,
            "loss": args.distillation_type,
            "images": f"{len(trainer.train_dataset):,} to train, {len(trainer.eval_dataset or ()):,} to evaluate",
            "batch": f"{batch_size} views = {args.per_device_train_batch_size} x {args.world_size} processes x "
            f"{args.gradient_accumulation_steps} accumulation; {args.num_repeats} views of each image",
            "steps": f"{steps:,} = {args.num_train_epochs:g} epochs of {steps_per_epoch:,}, "
            f"of which {args.get_warmup_steps(steps):,} are warm-up{_why_the_warm_up_is_short(args)}",
            "lr": f"{args.learning_rate:.4g} at the peak, {SchedulerType(args.lr_scheduler_type).value}",
            "precision": f"{trainer.accelerator.mixed_precision} on {args.device}",
        }.items()
    )


def _why_the_warm_up_is_short(args: DistillationConfig) -> str:
    capped = args.max_steps <= 0 and args.warmup_steps is None and (args.warmup_epochs or 0) < PAPER_WARMUP_EPOCHS
    if not capped or args.warmup_epochs != LONGEST_WARMUP * args.num_train_epochs:
        return ""
    return f" ({LONGEST_WARMUP:.0%} of a short run; the paper has {PAPER_WARMUP_EPOCHS} epochs: set warmup_epochs)"


def accuracy_table(metrics: dict[str, float], held_out: bool = False) -> str:
    """Return a table of the accuracy of each head and, if there is one, of the teacher.

    Args:
        held_out: whether none of the evaluation images is known to be a training image.
    """
    rows = {
        "class head": "eval_class",
        "distillation head": "eval_distillation",
        "fused": "eval",
        "teacher": "teacher",
    }
    if "eval_class_top1" not in metrics:
        rows["model"] = rows.pop("fused")
    title = "held-out accuracy" if held_out else "accuracy"
    rates = [rate for rate in ("top1", "top5") if f"eval_{rate}" in metrics]  # of few classes there is no top-5
    lines = [f"{title:<18}" + "".join(f"{rate[:3]}-{rate[3:]}".rjust(8) for rate in rates)]
    for title, prefix in rows.items():
        if f"{prefix}_top1" in metrics:
            lines.append(f"{title:<18}" + "".join(f"{metrics[f'{prefix}_{rate}']:>8.4f}" for rate in rates))
    if "eval_balanced_accuracy" in metrics:
        lines.append(f"the classes are uneven: the mean of their top-1 is {metrics['eval_balanced_accuracy']:.4f}")
    return "\n".join(lines)
