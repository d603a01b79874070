"""DistillationTrainer: Transformers' Trainer with the changes that DeiT needs.

The changes are the order of the views, mixing on the device, the loss with teacher outputs, the parameter groups and
the accuracy of the three heads. The numbers come from distillation_config.py, the mathematics from losses.py and
mixing.py; the model card and the Hub are in publishing.py, checkpoints in resuming.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import number_of_arguments

from ..arguments import ModelArguments
from ..augmentation.mixing import MixedViews, Mixing, normalize
from ..augmentation.repeated_augmentation import RepeatedAugmentationSampler
from ..data.labels import CheckedLabels, all_labels_of, check_labels
from ..data.views import collate_views
from ..errors import UserError, clear_hub_errors, refusals_of_libraries
from ..evaluation.accuracy import three_head_accuracy, top_classes, top_k_accuracy
from ..losses import distillation_loss, inverse_class_weights
from ..models.classifiers import Spec
from ..models.configuration_deit import DeiTConfig
from ..options.distillation_config import DistillationConfig
from ..teachers.fingerprint import fingerprint_of_views
from ..teachers.teacher import Teacher
from . import run
from .health import Health, Pace
from .publishing import NAME_IT_YOURS, keys_of_images, name_on_hub
from .searching import SearchingTrainer


logger = logging.getLogger(__name__)

# Setups in which each process has every gradient as a plain tensor.
WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
# "No decay on biases, norms, class token and positions"; the authors do decay the distillation token
# (facebookresearch/deit, no_weight_decay of its models).
NOT_DECAYED = (r"bias", r"(^|\.)[a-z_]*norm[a-z_]*(\.|$)", r"cls_token", r"position_embeddings|pos_embed")


class DistillationTrainer(SearchingTrainer):
    """Trainer of an image classifier, with or without a teacher.

    Args:
        model: [`DeiTForImageClassificationWithTeacher`], any classifier of Transformers that returns `logits`, or what
            a student is built from: a directory, a Hub id, "tiny", "small" or "base", or [`ModelArguments`].
        model_init: in the place of model, a function that returns what model may be; it may take the trial of a
            hyperparameter search (None outside of one). `train` then begins with a new student each time.
        args: [`DistillationConfig`].
        teacher: a [`Teacher`], or what [`load_teacher`] makes one of. The teacher is not part of the model: it is not
            trained, wrapped, gathered or saved. With `teacher_replay` it is not run in training and may be left out.
        train_dataset: a directory, a Hub id, [`DataArguments`] or a `datasets.Dataset` with a column of images and one
            of labels, which also give the evaluation images; or [`TrainViews`]; or any map-style dataset whose
            data_collator returns `pixel_values` `(batch, 3, height, width)`, uint8 or normalised float32, and `labels`
            `(batch,)` int64.
        eval_dataset: [`EvalViews`], or a dataset that returns the same; beside a `datasets.Dataset` another one.
        compute_metrics: of Transformers' kind: it gets fused logits `(samples, classes)` and labels. By default the
            accuracy of every head, for which no logits are kept. None: only the loss is measured.
        preprocess_logits_for_metrics: as for `Trainer`; it gets the fused logits, and needs a compute_metrics.
        mean, std: per channel, to normalise uint8 pixels with; by default those of processing_class.
        **kwargs: `data_args` and `command`, see [`PublishingTrainer`]; the rest as for `Trainer`, except
            compute_loss_func, which is refused: a subclass may override [`compute_loss`].

    Raises:
        ValueError: the distillation type needs a teacher and there is none; the model's distillation head would stay
            untrained; the batch is larger than the training set; with `push_to_hub`, the token may not write to the
            repository; recorded teacher outputs belong to another run (see [`ReplayedTeacher`],
            [`RecordingTeacher`]).
        FloatingPointError: the loss or a gradient is not finite.
    """

    # Each batch's loss is a mean over views, so gradient accumulation must divide the loss. Scaling by the number of
    # labels would be wrong: for mixed targets that number is batch x classes.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | ModelArguments | str | None = None,
        args: DistillationConfig | None = None,
        teacher: Teacher | Spec | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        data_collator: Callable = collate_views,
        model_init: Callable | None = None,
        compute_metrics: Callable | None = three_head_accuracy,
        **kwargs,
    ):
        if args is None:
            raise UserError("args is missing: pass a DistillationConfig")
        run.check_functions(model, model_init, compute_metrics, kwargs)
        if model_init is not None:
            set_seed(args.seed)
            model = model_init(None) if number_of_arguments(model_init) else model_init()
        student = model if isinstance(model, (str, ModelArguments)) else None
        model, teacher, kwargs = run.load_parts(model, args, teacher, kwargs)
        num_labels = int(model.config.num_labels or 0)
        data_collator = CheckedLabels(data_collator, num_labels)
        advice = "Training has not begun: fix this first"
        with refusals_of_libraries(), clear_hub_errors(name_on_hub(args), lambda: advice, NAME_IT_YOURS):
            super().__init__(
                model,
                args,
                student=student,
                model_init=model_init,
                data_collator=data_collator,
                compute_metrics=compute_metrics,
                **kwargs,
            )
        for part, dataset in (("training", self.train_dataset), ("evaluation", self.eval_dataset)):
            check_labels(getattr(dataset, "images", ()), num_labels, part)
        self._pixels = mean, std = run.mean_and_std(mean, std, self.processing_class)
        fingerprint = partial(
            *(fingerprint_of_views, self.train_dataset, args.view_settings(), mean, std, list(self.id2label.values()))
        )
        self.teacher = run.recorded_or_replayed(
            teacher.to(args.device) if teacher is not None else None,
            args,
            fingerprint,
            data=keys_of_images(self.data_args),
            commit=self._commit_before,
        )
        self.add_callback(Pace())
        if isinstance(self.teacher, TrainerCallback):
            self.add_callback(self.teacher)
        self.set_up()

    def set_up(self) -> None:
        """Make what depends on the settings and lasts for a run."""
        args, num_labels = self.args, len(self.id2label)
        if self.compute_metrics is three_head_accuracy:
            run.check_best_metric(self, num_labels)
        self.health = Health(
            num_labels,
            teacher=self.teacher.name if self.teacher is not None else None,
            id2label=self.id2label,
            quiet=not self.is_world_process_zero(),
        )
        self.class_weights = None
        if args.class_weighting == "inverse":
            labels = all_labels_of(self.train_dataset, "class_weighting")
            weights = inverse_class_weights(np.bincount(labels, minlength=num_labels))
            self.class_weights = weights.to(args.device)
            # The uniform part of smoothed labels weighs all classes, however few their images.
            self.health.guess *= 1 + args.label_smoothing_factor * (weights.mean().item() - 1)
        self.mixing = Mixing(num_labels, *self._pixels, **args.mixing_options())
        self._loss_sums: dict[str, Tensor] = {}
        self._batches_summed = 0

    # The order of the views

    def _get_train_sampler(self, train_dataset=None) -> RepeatedAugmentationSampler:
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        sampler = RepeatedAugmentationSampler(
            len(dataset),
            args.num_repeats,
            args.view_seed,
            self.get_total_train_batch_size(args),
            block_sizes=getattr(dataset, "block_sizes", None),
            shuffle_buffer_size=args.shuffle_buffer_size,
            labels=all_labels_of(dataset, "balanced_sampling") if args.balanced_sampling else None,
        )
        if self.is_world_process_zero():
            sampler.warn_of_repeated_reading(
                args.world_size, args.dataloader_num_workers, args.gradient_accumulation_steps
            )
        return sampler

    # Optimisation

    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer; a library that is missing or refuses its options becomes a one-line UserError."""
        with refusals_of_libraries():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """Create the schedule as Transformers does; arguments that it does not take are a one-line UserError."""
        with refusals_of_libraries():
            return super().create_scheduler(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that AdamW decays: the matrices and the distillation token."""
        return get_parameter_names(model, [nn.LayerNorm], list(NOT_DECAYED))

    # The loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Bring a batch to the device; in training also normalise, erase and mix it."""
        inputs = super()._prepare_inputs(inputs)
        return self._mixed(inputs) if self.model.training else inputs

    def _mixed(self, inputs: dict) -> MixedViews:
        self.accuracy = {}  # an accuracy measured before this step no longer describes the weights
        if "bad_images" in inputs:
            self.bad_images.record(inputs.pop("bad_images"))
        return self.mixing.mix_batch(inputs)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor | tuple[Tensor, object]:
        """Compute the paper's loss of one batch of views and log its parts by name.

        A subclass may override this method. Without a call of this one, no teacher is asked and no part is logged.

        Args:
            inputs: [`MixedViews`], on the device; `model(**inputs)` is possible. A batch of the loader is mixed first.
            num_items_in_batch: unused: the loss is a mean over the views.

        Returns:
            The loss, a scalar in nats, the mean over the batch, and with `return_outputs` what the model returned.
        """
        views = inputs if isinstance(inputs, MixedViews) else self._mixed(inputs)
        pixel_values, labels = views["pixel_values"], views["labels"]
        teacher_logits = self.teacher(pixel_values, views.view_ids) if self.teacher is not None else None
        outputs = model(pixel_values=pixel_values)
        class_logits = outputs.get("cls_logits", outputs["logits"])
        distillation_logits = outputs.get("distillation_logits")
        losses = distillation_loss(
            *(class_logits, distillation_logits, labels, teacher_logits),
            **self.args.loss_options(),
            class_weights=self.class_weights,
        )
        heads = {"class head": class_logits, "distillation head": distillation_logits}
        self.health.see_batch(losses, heads, teacher_logits, labels)
        for name, value in losses.items():
            if name != "loss":
                self._loss_sums[name] = self._loss_sums.get(name, 0) + value.detach()
        self._batches_summed += 1
        return (losses["loss"], outputs) if return_outputs else losses["loss"]

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Save the checkpoint after the teacher outputs up to it, so that a run resumed from it misses none."""
        if self.teacher is not None:
            self.teacher.commit(self.state.global_step)
        super()._save_checkpoint(model, trial)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None) -> float:
        """Return the gradient norm before the optimizer step; a failed health check stops the run before it."""
        if grad_norm is None and self.accelerator.distributed_type in WHOLE_GRADIENTS:
            # Transformers computes the norm by clipping to infinity, which rewrites every gradient.
            self.accelerator.unscale_gradients()
            parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
            grad_norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if self.args.teacher_record is not None and not self.health.has_seen_a_batch:
            raise UserError(
                f"teacher_record is {self.args.teacher_record!r}, and compute_loss of {type(self).__name__} does not "
                "ask the teacher: call super().compute_loss there, or leave out teacher_record"
            )
        return self.health.see_step(
            self.state.global_step + 1,
            super()._get_grad_norm(model, grad_norm),
            self._get_learning_rate(),
            warmed_up=self.state.global_step >= self.args.get_warmup_steps(self.state.max_steps),
            scaler=self.accelerator.scaler,
        )

    def floating_point_ops(self, inputs: dict) -> int:
        """Return the FLOPs of one forward and backward pass, for `total_flos`: 6 per parameter and token.

        Transformers' own count takes each pixel of a DeiT's input for a token; this one counts the patches. The
        products inside attention (2 to 10 %) and the teacher are not counted.
        """
        config = self.model.config
        if not isinstance(config, DeiTConfig):
            return super().floating_point_ops(inputs)
        return 6 * len(inputs["pixel_values"]) * config.num_tokens * self.num_model_parameters

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` with the mean of each part of the loss since the last log line, over all ranks."""
        if "loss" in logs and self._batches_summed:
            for name, value in self._loss_sums.items():
                logs[name] = self.accelerator.reduce(value / self._batches_summed, reduction="mean").item()
            self._loss_sums, self._batches_summed = {}, 0
        super().log(logs, start_time)

    # The whole run

    def train_and_save(self) -> dict[str, float]:
        """Train, evaluate, and write all files of the run to `output_dir`; see [`hf_deit.training.run`]."""
        return run.train_and_save(self)

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | tuple[Tensor, Tensor] | None, Tensor | None]:
        """Evaluate one batch; without a `compute_metrics` of the user the result is small enough for every rank.

        Returns:
            None; the best classes of each head `(batch, heads, 5)` int64, fused first, then class and distillation,
            and the fused prediction's cross-entropy `(batch,)` float32, nats; the labels `(batch,)`. For another
            `compute_metrics`: the mean cross-entropy, the fused logits `(batch, classes)` float32, the labels.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(pixel_values=normalize(inputs["pixel_values"], self.mixing.mean, self.mixing.std))
        heads = [outputs["logits"]]
        if "distillation_logits" in outputs:
            heads += [outputs["cls_logits"], outputs["distillation_logits"]]
        labels = inputs["labels"]
        if self.compute_metrics is not three_head_accuracy:
            logits = outputs["logits"].float()
            return F.cross_entropy(logits, labels), None if prediction_loss_only else logits, labels
        cross_entropy = F.cross_entropy(outputs["logits"].float(), labels, reduction="none")
        return None, (top_classes(torch.stack(heads, dim=1)), cross_entropy), labels

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Return the accuracy of the three heads and, with `ema_decay`, of the averaged weights (`eval_ema_...`)."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.ema is not None and self.ema.average:
            with self.ema.averaged_weights(self.model):
                metrics |= super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_ema")
        if eval_dataset is None and metric_key_prefix == "eval":
            self.accuracy = metrics
        return metrics

    @torch.no_grad()
    def evaluate_teacher(self) -> dict[str, float]:
        """Return the teacher's accuracy on the evaluation set, `teacher_top1` and `teacher_top5`, as fractions.

        They are logged as `eval_teacher_top1` and so on, beside those of the student.
        """
        teacher = self.teacher.classifier
        best_classes, labels = [], []
        for batch in self.get_eval_dataloader():
            batch = self._prepare_inputs(batch)
            logits = teacher(normalize(batch["pixel_values"], self.mixing.mean, self.mixing.std))
            gathered = self.accelerator.gather_for_metrics((top_classes(logits), batch["labels"]))
            best_classes.append(gathered[0].cpu())
            labels.append(gathered[1].cpu())
        accuracy = top_k_accuracy(torch.cat(best_classes), torch.cat(labels))
        self.teacher_accuracy = {f"teacher_{name}": value for name, value in accuracy.items()}
        self.log({f"eval_{name}": value for name, value in self.teacher_accuracy.items()})
        return self.teacher_accuracy

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.accuracy = {}
