"""DistillationTrainer: Transformers' Trainer with what DeiT changes and nothing else.

The order of the views, the batch's way on the device, the loss with the teacher's answer in it, the parameter groups,
the accuracy of the three heads. The numbers come from distillation_config.py, the mathematics from losses.py and
mixing.py; the card and the Hub are in publishing.py, checkpoints in resuming.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import get_parameter_names

from ..augmentation.mixing import Mixing, normalize
from ..data.bad_images import BadImages
from ..data.repeated_augmentation import RepeatedAugmentationSampler
from ..data.views import collate_views
from ..evaluation.metrics import TopKAccuracy, three_head_accuracy, top_classes
from ..losses import distillation_loss
from ..models.configuration_deit import DeiTConfig
from ..plots.style import plot_run
from ..recipe import DataArguments
from ..teachers.record import RecordingTeacher, ReplayedTeacher, fingerprint_of_run
from .distillation_config import DistillationConfig
from .ema import ExponentialMovingAverage
from .health import CheckedLabels, Health, check_labels
from .publishing import Publishing, UnwrittenToken, hub_failures_told
from .resuming import Resuming


logger = logging.getLogger(__name__)

# Where each process has every gradient as a plain tensor.
WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
# "No decay on biases, norms, class token and positions"; the authors do decay the distillation token
# (facebookresearch/deit, no_weight_decay of its models).
NOT_DECAYED = (r"bias", r"(^|\.)[a-z_]*norm[a-z_]*(\.|$)", r"cls_token", r"position_embeddings|pos_embed")


class DistillationTrainer(Publishing, Resuming, Trainer):
    """Trains an image classifier, with or without a teacher.

    Args:
        model: [`DeiTForImageClassificationWithTeacher`], or any classifier of Transformers that returns `logits`.
        args: [`DistillationConfig`].
        teacher: a [`Teacher`] from [`load_teacher`]. It is no part of the model: not trained, wrapped, gathered or
            saved. With `teacher_replay` it is not asked while training, and may be left out.
        train_dataset: [`TrainViews`], or any map-style set with a data_collator of its own that returns `pixel_values`
            `(batch, 3, height, width)`, uint8 or normalised float32, and `labels` `(batch,)` int64.
        eval_dataset: [`EvalViews`], or the like.
        mean, std: per channel, to normalise uint8 pixels with; by default the processing_class's.
        data_args: what the images are called, for the model card.
        command: words of the command line that started the run, for the model card.
        **kwargs: as for `Trainer`.

    Raises:
        ValueError: the distillation type needs a teacher and there is none; the model's distillation head would learn
            nothing; the batch is larger than the training set; with `push_to_hub`, the Hub does not let us write; a
            record of the teacher's answers is of something else (see [`ReplayedTeacher`], [`RecordingTeacher`]).
        FloatingPointError: the loss or a gradient is not finite.
    """

    # Each batch's loss is a mean over views, so accumulation must divide it; never scaled by a count of labels, which
    # for mixed targets would be batch x classes.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: DistillationConfig,
        teacher: nn.Module | None = None,
        *,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        data_collator: Callable = collate_views,
        compute_metrics: Callable = three_head_accuracy,
        data_args: DataArguments | None = None,
        command: Sequence[str] = (),
        **kwargs,
    ):
        if args.hub_token is not None:
            args.hub_token = UnwrittenToken(args.hub_token)
        num_labels = model.config.num_labels
        data_collator = CheckedLabels(data_collator, num_labels)
        with hub_failures_told(args, lambda: "Training has not begun: mend it first"):
            super().__init__(model, args, data_collator=data_collator, compute_metrics=compute_metrics, **kwargs)
        self._check_heads_and_teacher(teacher)
        for part, dataset in (("training", self.train_dataset), ("evaluation", self.eval_dataset)):
            check_labels(getattr(dataset, "images", ()), num_labels, part)
        self.teacher = teacher.to(args.device) if teacher is not None else None
        if mean is None or std is None:
            if self.processing_class is None:
                raise ValueError("how pixels are normalised is not known: pass processing_class, or mean and std")
            mean, std = self.processing_class.image_mean, self.processing_class.image_std
        self.record = self.replay = None
        fingerprint = partial(
            fingerprint_of_run, args, self.train_dataset, mean, std, [*model.config.id2label.values()]
        )
        if args.teacher_record is not None:
            self.record = RecordingTeacher(self.teacher, args, fingerprint)
            self.add_callback(self.record)
        if args.teacher_replay is not None:
            self.replay = ReplayedTeacher(args, fingerprint, self.teacher)
            self.add_callback(self.replay)
        taught_by = self.replay or teacher
        self.health = Health(
            num_labels,
            teacher=taught_by.name if taught_by is not None else None,
            id2label=model.config.id2label,
            quiet=not self.is_world_process_zero(),
        )
        self.mixing = Mixing(num_labels, mean, std, **args.mixing_options())
        self.ema = None
        if args.ema_decay is not None:
            self.ema = ExponentialMovingAverage(args.ema_decay)
            self.add_callback(self.ema)
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())  # later they may be sharded
        self._loss_sums: dict[str, Tensor] = {}
        self._batches_summed = 0
        self.data_args = data_args or DataArguments(dataset_name=None)
        self.command = command
        self._accuracy: dict[str, float] = {}
        self._teacher_accuracy: dict[str, float] = {}

    def _check_heads_and_teacher(self, teacher: nn.Module | None) -> None:
        kind = self.args.distillation_type
        if kind in ("hard", "soft") and teacher is None and self.args.teacher_replay is None:
            raise ValueError(
                f"distillation_type is {kind!r} and there is no teacher: name one with teacher, or the record of one "
                "with teacher_replay, or set distillation_type to 'none' (labels only) or 'label' (both heads learn "
                "the labels)"
            )
        if kind == "none" and hasattr(self.model, "distillation_classifier"):
            raise ValueError(
                "distillation_type is 'none' and the model has a distillation head, which would stay untrained: use "
                "DeiTForImageClassification (use_distillation_token: false), or distillation_type 'label'"
            )

    # The order of the views

    def _get_train_sampler(self, train_dataset=None) -> RepeatedAugmentationSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.get_total_train_batch_size(self.args)
        if len(dataset) < batch_size:
            raise ValueError(
                f"one step takes {batch_size} views and the training set has {len(dataset)} images: lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        sampler = RepeatedAugmentationSampler(
            len(dataset),
            self.args.num_repeats,
            self.args.view_seed,
            batch_size,
            block_sizes=getattr(dataset, "block_sizes", None),
            shuffle_buffer_size=self.args.shuffle_buffer_size,
        )
        if sampler.block_sizes is not None and self.is_world_process_zero():
            self._warn_of_repeated_reading(sampler)
        return sampler

    def _warn_of_repeated_reading(self, sampler: RepeatedAugmentationSampler) -> None:
        args = self.args
        readers = sampler.readers_of_a_block(
            args.world_size, args.dataloader_num_workers, args.gradient_accumulation_steps
        )
        if readers > 1:
            logger.warning(
                "streaming: each block of %d images on average will be read by %d loader workers, as the %d blocks of "
                "the training set make %d lanes for %d processes x %d workers. Nothing is shown twice for it; 1, 2, 4 "
                "or 8 workers, a larger shuffle_buffer_size or smaller row groups let fewer of them read the same",
                sampler.num_images // len(sampler.block_sizes),
                readers,
                len(sampler.block_sizes),
                sampler.slices * sampler.turns,
                args.world_size,
                max(1, args.dataloader_num_workers),
            )

    # Optimisation

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that AdamW decays: the matrices and the distillation token."""
        return get_parameter_names(model, [nn.LayerNorm], list(NOT_DECAYED))

    # The loss

    @cached_property
    def bad_images(self) -> BadImages:
        """The damaged images that the training views have met."""
        return BadImages(self.args.output_dir, len(self.train_dataset), self.args.max_bad_images)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor | tuple[Tensor, object]:
        """The paper's loss of one batch of views; its parts are logged by name. `num_items_in_batch` is not used."""
        self._accuracy = {}  # of the weights before this step, so no longer the model's
        if "bad_images" in inputs:
            self.bad_images.record(inputs.pop("bad_images"))
        view_seeds = inputs.get("view_seeds")
        if view_seeds is None:  # a set that is not ours: its views have no seeds of their own
            view_seeds = torch.randint(2**63 - 1, (len(inputs["labels"]),)).numpy()
        pixel_values, labels = self.mixing(inputs["pixel_values"], inputs["labels"], view_seeds)
        teacher_logits = self._ask_teacher(pixel_values, inputs.get("view_ids"))
        outputs = model(pixel_values=pixel_values)
        class_logits = outputs.get("cls_logits", outputs["logits"])
        distillation_logits = outputs.get("distillation_logits")
        losses = distillation_loss(
            class_logits, distillation_logits, labels, teacher_logits, **self.args.loss_options()
        )
        heads = {"class head": class_logits, "distillation head": distillation_logits}
        self.health.see_batch(losses, heads, teacher_logits, labels)
        for name, value in losses.items():
            if name != "loss":
                self._loss_sums[name] = self._loss_sums.get(name, 0) + value.detach()
        self._batches_summed += 1
        return (losses["loss"], outputs) if return_outputs else losses["loss"]

    def _ask_teacher(self, pixel_values: Tensor, view_ids: np.ndarray | None) -> Tensor | None:
        """Its logits `(batch, classes)`; replayed, for "hard", its decisions `(batch,)`; None where there is none."""
        recorded = self.replay or self.record
        if recorded is not None:
            return recorded(pixel_values, view_ids)
        return self.teacher(pixel_values) if self.teacher is not None else None

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """After what was recorded up to it: a run that goes on from there misses no answer."""
        if self.record is not None:
            self.record.commit(self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None) -> float:
        """Called once per step between backward and the optimizer: the place to stop before the weights are hurt."""
        if grad_norm is None and self.accelerator.distributed_type in WHOLE_GRADIENTS:
            # Transformers gets it from clipping to infinity, which writes every gradient anew.
            self.accelerator.unscale_gradients()
            parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
            grad_norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        return self.health.see_step(
            self.state.global_step + 1,
            super()._get_grad_norm(model, grad_norm),
            self._get_learning_rate(),
            warmed_up=self.state.global_step >= self.args.get_warmup_steps(self.state.max_steps),
            scaler=self.accelerator.scaler,
        )

    def floating_point_ops(self, inputs: dict) -> int:
        """For `total_flos`, of one forward and backward pass: 6 a parameter and token, as Transformers counts.

        Where it would take a pixel of a DeiT for a token, this takes a patch. Attention's own products (2 to 10 %) are
        not counted, nor the teacher.
        """
        config = self.model.config
        if not isinstance(config, DeiTConfig):
            return super().floating_point_ops(inputs)
        return 6 * len(inputs["pixel_values"]) * config.num_tokens * self._num_parameters

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each part of the loss since the last line, over all ranks."""
        if "loss" in logs and self._batches_summed:
            for name, value in self._loss_sums.items():
                logs[name] = self.accelerator.reduce(value / self._batches_summed, reduction="mean").item()
            self._loss_sums, self._batches_summed = {}, 0
        super().log(logs, start_time)

    # The whole run

    def train_and_save(self) -> dict[str, float]:
        """Trains, evaluates the student and its teacher, and leaves everything a run leaves in `output_dir`.

        That is model.safetensors, config.json, preprocessor_config.json, README.md (the card), all_results.json,
        trainer_state.json and report.png. An unfinished run in `output_dir` goes on from its last whole checkpoint.
        With `push_to_hub` all this goes to the Hub last of all.

        Returns:
            What all_results.json holds: Trainer's names, `eval_top1` and so on as fractions in [0, 1].

        Raises:
            ValueError: the upload failed; everything else is done.
        """
        if self.is_world_process_zero():
            print(self.banner(), flush=True)
        train_metrics = self.train(self.args.resume_from_checkpoint or "auto").metrics
        self.save_model(_internal_call=True)  # else it would be uploaded here, before there are results
        if self.bad_images:
            train_metrics["bad_images"] = len(self.bad_images)
        self.save_metrics("train", train_metrics)
        metrics = self.evaluate()
        if self.teacher is not None:
            metrics |= self.evaluate_teacher()
        self.save_metrics("eval", metrics)
        if self.is_world_process_zero():
            self.create_model_card()
            plot_run(
                self.state.log_history,
                Path(self.args.output_dir, "report.png"),
                teacher_top1=metrics.get("teacher_top1"),
            )
        self.save_state()  # last: it is what tells a finished run from one that was cut off
        if self.is_world_process_zero():
            print(accuracy_table(metrics), f"everything is in {self.args.output_dir}", sep="\n", flush=True)
        if self.args.push_to_hub:
            self.push_to_hub()
        self.accelerator.wait_for_everyone()  # launchers end the others soon after the first that ends
        return train_metrics | metrics

    def banner(self) -> str:
        """What is about to happen, in the numbers that most often turn out to be wrong afterwards."""
        args = self.args
        batch_size = self.get_total_train_batch_size(args)
        steps_per_epoch = len(self.train_dataset) // batch_size
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        teacher = "none"
        if self.teacher is not None:
            teacher = f"{self.teacher.name}, {self.teacher.num_parameters / 1e6:.2f}M parameters"
        if self.record is not None:
            teacher += f", its {self.record.header.what} recorded in {args.teacher_record}"
        if self.replay is not None:
            asked = "not in memory" if self.teacher is None else "asked in the evaluation only"
            teacher = f"{self.replay.name}, its {self.replay.what} replayed from {args.teacher_replay}; {asked}"
        return "\n".join(
            f"{name:<11}{value}"
            for name, value in {
                "model": f"{type(self.model).__name__}, {self._num_parameters / 1e6:.2f}M parameters",
                "teacher": teacher,
                "loss": args.distillation_type,
                "images": f"{len(self.train_dataset):,} to train, {len(self.eval_dataset or ()):,} to evaluate",
                "batch": f"{batch_size} views = {args.per_device_train_batch_size} x {args.world_size} processes x "
                f"{args.gradient_accumulation_steps} accumulation; {args.num_repeats} views of an image",
                "steps": f"{steps:,} = {args.num_train_epochs:g} epochs of {steps_per_epoch:,}, "
                f"{args.get_warmup_steps(steps):,} of them warm-up",
                "lr": f"{args.learning_rate:.4g} at the peak, {args.lr_scheduler_type.value}",
                "precision": f"{self.accelerator.mixed_precision} on {args.device}",
            }.items()
        )

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, tuple[Tensor, Tensor] | None, Tensor | None]:
        """What evaluation needs of a batch, small enough to gather from every rank.

        Returns:
            None; the best classes of each head `(batch, heads, 5)` int64, fused first, then class and distillation,
            and the fused prediction's cross-entropy `(batch,)` float32, nats; the labels `(batch,)`.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=normalize(inputs["pixel_values"], self.mixing.mean, self.mixing.std))
        heads = [outputs["logits"]]
        if "distillation_logits" in outputs:
            heads += [outputs["cls_logits"], outputs["distillation_logits"]]
        labels = inputs["labels"]
        cross_entropy = F.cross_entropy(outputs["logits"].float(), labels, reduction="none")
        return None, (top_classes(torch.stack(heads, dim=1)), cross_entropy), labels

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Accuracy of the three heads; with `ema_decay`, of the averaged weights too (`eval_ema_...`)."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.ema is not None and self.ema.average:
            with self.ema.averaged_weights(self.model):
                metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema")
        if eval_dataset is None and metric_key_prefix == "eval":
            self._accuracy = metrics
        return metrics

    @torch.no_grad()
    def evaluate_teacher(self) -> dict[str, float]:
        """The teacher's `teacher_top1` and `teacher_top5` on the evaluation set, as fractions."""
        best_classes, labels = [], []
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            logits = self.teacher(normalize(batch["pixel_values"], self.mixing.mean, self.mixing.std))
            gathered = self.accelerator.gather_for_metrics((top_classes(logits), batch["labels"]))
            best_classes.append(gathered[0].cpu())
            labels.append(gathered[1].cpu())
        accuracy = TopKAccuracy().compute(predictions=torch.cat(best_classes), references=torch.cat(labels))
        self._teacher_accuracy = {f"teacher_{name}": value for name, value in accuracy.items()}
        return self._teacher_accuracy

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._accuracy = {}


def accuracy_table(metrics: dict[str, float]) -> str:
    """The last lines of a run: held-out accuracy of each head, and of the teacher where there is one."""
    rows = {
        "class head": "eval_class",
        "distillation head": "eval_distillation",
        "fused": "eval",
        "teacher": "teacher",
    }
    if "eval_class_top1" not in metrics:
        rows["model"] = rows.pop("fused")
    lines = [f"{'held-out accuracy':<18}{'top-1':>8}{'top-5':>8}"]
    for title, prefix in rows.items():
        if f"{prefix}_top1" in metrics:
            lines.append(f"{title:<18}{metrics[f'{prefix}_top1']:>8.4f}{metrics[f'{prefix}_top5']:>8.4f}")
    return "\n".join(lines)
