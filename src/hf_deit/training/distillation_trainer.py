"""DistillationTrainer: Transformers' Trainer with what DeiT changes and nothing else.

The order of the views, the batch's way on the device, the loss with the teacher's answer in it, the parameter groups,
the accuracy of the three heads. The numbers come from distillation_config.py, the mathematics from losses.py and
mixing.py; the card and the Hub are in publishing.py, checkpoints in resuming.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_parameter_names

from ..augmentation.mixing import Mixing, normalize
from ..data.labels import CheckedLabels, check_labels
from ..data.repeated_augmentation import RepeatedAugmentationSampler
from ..data.views import collate_views
from ..errors import UserError, refusals_of_libraries
from ..evaluation.metrics import TopKAccuracy, three_head_accuracy, top_classes
from ..losses import distillation_loss
from ..models.configuration_deit import DeiTConfig
from ..teachers.fingerprint import fingerprint_of_views
from ..teachers.recording import RecordingTeacher
from ..teachers.replaying import ReplayedTeacher
from ..teachers.teacher import Teacher, TeacherOutputs
from . import run
from .distillation_config import DistillationConfig
from .health import Health
from .publishing import PublishingTrainer, UnwrittenToken, hub_failures_told


logger = logging.getLogger(__name__)

# Where each process has every gradient as a plain tensor.
WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
# "No decay on biases, norms, class token and positions"; the authors do decay the distillation token
# (facebookresearch/deit, no_weight_decay of its models).
NOT_DECAYED = (r"bias", r"(^|\.)[a-z_]*norm[a-z_]*(\.|$)", r"cls_token", r"position_embeddings|pos_embed")


class DistillationTrainer(PublishingTrainer):
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
        **kwargs: `data_args` and `command`, see [`PublishingTrainer`]; the rest as for `Trainer`.

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
        **kwargs,
    ):
        if args.hub_token is not None:
            args.hub_token = UnwrittenToken(args.hub_token)
        num_labels = model.config.num_labels
        data_collator = CheckedLabels(data_collator, num_labels)
        with refusals_of_libraries(), hub_failures_told(args, lambda: "Training has not begun: mend it first"):
            super().__init__(model, args, data_collator=data_collator, compute_metrics=compute_metrics, **kwargs)
        self._check_heads_and_teacher(teacher)
        self._check_best_metric(compute_metrics)
        for part, dataset in (("training", self.train_dataset), ("evaluation", self.eval_dataset)):
            check_labels(getattr(dataset, "images", ()), num_labels, part)
        if mean is None or std is None:
            if self.processing_class is None:
                raise UserError("how pixels are normalised is not known: pass processing_class, or mean and std")
            mean, std = self.processing_class.image_mean, self.processing_class.image_std
        self.teacher = self._recorded_or_replayed(teacher.to(args.device) if teacher is not None else None, mean, std)
        if isinstance(self.teacher, TrainerCallback):
            self.add_callback(self.teacher)
        self.health = Health(
            num_labels,
            teacher=self.teacher.name if self.teacher is not None else None,
            id2label=model.config.id2label,
            quiet=not self.is_world_process_zero(),
        )
        self.mixing = Mixing(num_labels, mean, std, **args.mixing_options())
        self._loss_sums: dict[str, Tensor] = {}
        self._batches_summed = 0

    def _recorded_or_replayed(
        self, teacher: Teacher | None, mean: Sequence[float], std: Sequence[float]
    ) -> TeacherOutputs | None:
        args, names = self.args, [*self.model.config.id2label.values()]
        fingerprint = partial(fingerprint_of_views, self.train_dataset, args.view_settings(), mean, std, names)
        kind, batch_size = args.distillation_type, args.train_batch_size
        if args.teacher_replay is not None:
            return ReplayedTeacher(
                fingerprint, directory=args.teacher_replay, kind=kind, batch_size=batch_size, teacher=teacher
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
            )
        return teacher

    def _check_heads_and_teacher(self, teacher: nn.Module | None) -> None:
        kind = self.args.distillation_type
        if kind in ("hard", "soft") and teacher is None and self.args.teacher_replay is None:
            raise UserError(
                f"distillation_type is {kind!r} and there is no teacher: name one with teacher, or the record of one "
                "with teacher_replay, or set distillation_type to 'none' (labels only) or 'label' (both heads learn "
                "the labels)"
            )
        if kind == "none" and hasattr(self.model, "distillation_classifier"):
            raise UserError(
                "distillation_type is 'none' and the model has a distillation head, which would stay untrained: use "
                "DeiTForImageClassification (use_distillation_token: false), or distillation_type 'label'"
            )

    def _check_best_metric(self, compute_metrics: Callable) -> None:
        metric = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        known = ["loss", "top1", "top5"]
        if hasattr(self.model, "distillation_classifier"):
            known += [f"{head}_{rate}" for head in ("class", "distillation") for rate in ("top1", "top5")]
        if self.ema is not None:
            known += [f"ema_{name}" for name in known]
        if compute_metrics is three_head_accuracy and metric not in known:
            raise UserError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}; an evaluation reports "
                f"{', '.join(known)}" + (". Accuracy is 'top1'" if metric == "accuracy" else "")
            )

    # The order of the views

    def _get_train_sampler(self, train_dataset=None) -> RepeatedAugmentationSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.get_total_train_batch_size(self.args)
        if len(dataset) < batch_size:
            raise UserError(
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

    def create_optimizer(self, *args, **kwargs):
        """As in Transformers; what an optimizer's library refuses, or its absence, is one line."""
        with refusals_of_libraries():
            return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that AdamW decays: the matrices and the distillation token."""
        return get_parameter_names(model, [nn.LayerNorm], list(NOT_DECAYED))

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor | tuple[Tensor, object]:
        """The paper's loss of one batch of views; its parts are logged by name. `num_items_in_batch` is not used."""
        self.accuracy = {}  # of the weights before this step, so no longer the model's
        if "bad_images" in inputs:
            self.bad_images.record(inputs.pop("bad_images"))
        view_seeds = inputs.get("view_seeds")
        if view_seeds is None:  # a set that is not ours: its views have no seeds of their own
            view_seeds = torch.randint(2**63 - 1, (len(inputs["labels"]),)).numpy()
        pixel_values, labels = self.mixing(inputs["pixel_values"], inputs["labels"], view_seeds)
        teacher_logits = self.teacher(pixel_values, inputs.get("view_ids")) if self.teacher is not None else None
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

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """After what was recorded up to it, so that a run that resumes from there misses no output of the teacher."""
        if self.teacher is not None:
            self.teacher.commit(self.state.global_step)
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
        return 6 * len(inputs["pixel_values"]) * config.num_tokens * self.num_model_parameters

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each part of the loss since the last line, over all ranks."""
        if "loss" in logs and self._batches_summed:
            for name, value in self._loss_sums.items():
                logs[name] = self.accelerator.reduce(value / self._batches_summed, reduction="mean").item()
            self._loss_sums, self._batches_summed = {}, 0
        super().log(logs, start_time)

    # The whole run

    def train_and_save(self) -> dict[str, float]:
        """Train, evaluate, and leave everything a run leaves in `output_dir`; see [`hf_deit.training.run`]."""
        return run.train_and_save(self)

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
            self.accuracy = metrics
        return metrics

    @torch.no_grad()
    def evaluate_teacher(self) -> dict[str, float]:
        """The teacher's `teacher_top1` and `teacher_top5` on the evaluation set, as fractions."""
        teacher = self.teacher.classifier
        best_classes, labels = [], []
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            logits = teacher(normalize(batch["pixel_values"], self.mixing.mean, self.mixing.std))
            gathered = self.accelerator.gather_for_metrics((top_classes(logits), batch["labels"]))
            best_classes.append(gathered[0].cpu())
            labels.append(gathered[1].cpu())
        accuracy = TopKAccuracy().compute(predictions=torch.cat(best_classes), references=torch.cat(labels))
        self.teacher_accuracy = {f"teacher_{name}": value for name, value in accuracy.items()}
        return self.teacher_accuracy

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.accuracy = {}
