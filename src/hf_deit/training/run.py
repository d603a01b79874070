"""A complete run: prints the banner, trains, evaluates, writes all files and prints the table of accuracies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import SchedulerType

from ..errors import UserError, printable
from ..plots.run import plot_run
from .distillation_config import LONGEST_WARMUP, PAPER_WARMUP_EPOCHS, DistillationConfig


if TYPE_CHECKING:
    from .distillation_trainer import DistillationTrainer


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
        plot_run(
            trainer.state.log_history,
            Path(trainer.args.output_dir, "report.png"),
            teacher_top1=metrics.get("teacher_top1"),
            held_out=held_out,
        )
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
