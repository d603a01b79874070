"""DistillationTrainer: Transformers' Trainer with the changes that DeiT needs.

The changes are the order of the views, mixing on the device, the loss with teacher outputs, the parameter groups and
the accuracy of the three heads. The numbers come from distillation_config.py, the mathematics from losses.py and
mixing.py; the model card and the Hub are in publishing.py, checkpoints in resuming.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, set_seed
from transformers.integrations import is_optuna_available
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import TrainOutput, number_of_arguments

from ..arguments import ModelArguments
from ..augmentation.mixing import MixedViews, Mixing, normalize
from ..augmentation.repeated_augmentation import RepeatedAugmentationSampler
from ..data.labels import CheckedLabels, all_labels_of, check_labels, labels_of
from ..data.views import collate_views
from ..errors import UserError, clear_hub_errors, refusals_of_libraries
from ..evaluation.metrics import TopKAccuracy, names_of_metrics, three_head_accuracy, top_classes
from ..losses import distillation_loss, inverse_class_weights
from ..models.classifiers import Spec
from ..models.configuration_deit import DeiTConfig
from ..options.trials import changes_since, check_search, check_trial, refuse_idle, refuse_ineffective
from ..plots.run import Report, plot_run
from ..teachers.fingerprint import fingerprint_of_views
from ..teachers.recording import RecordingTeacher
from ..teachers.replaying import ReplayedTeacher
from ..teachers.teacher import Teacher
from ..teachers.teacher_outputs import TeacherOutputs
from . import run
from .distillation_config import DistillationConfig
from .health import Health, Pace
from .publishing import NAME_IT_YOURS, PublishingTrainer, UnpickledToken, keys_of_images, name_on_hub


logger = logging.getLogger(__name__)

# Setups in which each process has every gradient as a plain tensor.
WHOLE_GRADIENTS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
# "No decay on biases, norms, class token and positions"; the authors do decay the distillation token
# (facebookresearch/deit, no_weight_decay of its models).
NOT_DECAYED = (r"bias", r"(^|\.)[a-z_]*norm[a-z_]*(\.|$)", r"cls_token", r"position_embeddings|pos_embed")


class DistillationTrainer(PublishingTrainer):
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
        self._student = model if isinstance(model, (str, ModelArguments)) else None
        model, teacher, kwargs = run.load_parts(model, args, teacher, kwargs)
        if args.hub_token is not None:
            args.hub_token = UnpickledToken(args.hub_token)
        num_labels = int(model.config.num_labels or 0)
        data_collator = CheckedLabels(data_collator, num_labels)
        advice = "Training has not begun: fix this first"
        with refusals_of_libraries(), clear_hub_errors(name_on_hub(args), lambda: advice, NAME_IT_YOURS):
            super().__init__(model, args, data_collator=data_collator, compute_metrics=compute_metrics, **kwargs)
        self.model_init = model_init  # from now on: the first student is made
        for part, dataset in (("training", self.train_dataset), ("evaluation", self.eval_dataset)):
            check_labels(getattr(dataset, "images", ()), num_labels, part)
        if compute_metrics is three_head_accuracy:
            self._check_best_metric()
        if mean is None or std is None:
            if self.processing_class is None:
                raise UserError("mean and std of the pixels are unknown: pass processing_class, or mean and std")
            processor: Any = self.processing_class
            mean, std = processor.image_mean, processor.image_std
        self._pixels = mean, std
        self._id2label = dict(model.config.id2label or {})
        self.teacher = self._recorded_or_replayed(teacher.to(args.device) if teacher is not None else None, mean, std)
        self.add_callback(Pace())
        if isinstance(self.teacher, TrainerCallback):
            self.add_callback(self.teacher)
        self._in_use = copy(args)
        self._before_search: DistillationConfig | None = None
        self._for_student: dict[str, Any] = {}  # what a trial sets that no option is
        self._is_changed = False
        self._set_up(num_labels)

    def _set_up(self, num_labels: int) -> None:
        """Make what depends on the settings and lasts for a run."""
        args = self.args
        self.health = Health(
            num_labels,
            teacher=self.teacher.name if self.teacher is not None else None,
            id2label=self._id2label,
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

    def _recorded_or_replayed(
        self, teacher: Teacher | None, mean: Sequence[float], std: Sequence[float]
    ) -> TeacherOutputs | None:
        args, names = self.args, list((self.model.config.id2label or {}).values())
        fingerprint = partial(fingerprint_of_views, self.train_dataset, args.view_settings(), mean, std, names)
        kind, batch_size = args.distillation_type, args.train_batch_size
        if args.teacher_replay is not None:
            return ReplayedTeacher(
                fingerprint,
                record=args.teacher_replay,
                kind=kind,
                batch_size=batch_size,
                teacher=teacher,
                commit=self._commit_before,
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
                data=keys_of_images(self.data_args),
            )
        return teacher

    def _check_best_metric(self) -> None:
        metric = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        heads = 3 if hasattr(self.model, "distillation_classifier") else 1
        labels = labels_of(getattr(self.eval_dataset, "images", ()))
        known = names_of_metrics(heads, int(self.model.config.num_labels or 0), labels)
        if self.ema is not None:
            known += [f"ema_{name}" for name in known]
        if metric not in known:
            raise UserError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}; it must be one of "
                f"{', '.join(known)}" + (". Accuracy is called 'top1'" if metric == "accuracy" else "")
            )

    # The order of the views

    def _get_train_sampler(self, train_dataset=None) -> RepeatedAugmentationSampler:
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        batch_size = self.get_total_train_batch_size(args)
        if len(dataset) < batch_size:
            raise UserError(
                f"one step takes {batch_size} views and the training set has {len(dataset)} images: lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        sampler = RepeatedAugmentationSampler(
            len(dataset),
            args.num_repeats,
            args.view_seed,
            batch_size,
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
        view_seeds = inputs.get("view_seeds")
        if view_seeds is None:  # a dataset other than TrainViews gives its views no seeds
            view_seeds = torch.randint(2**63 - 1, (len(inputs["labels"]),)).numpy()
        pixel_values, labels = self.mixing(inputs["pixel_values"], inputs["labels"], view_seeds)
        views = MixedViews(pixel_values=pixel_values, labels=labels)
        views.view_ids = inputs.get("view_ids")
        return views

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

    # Other settings: set on `args` since, or a trial's

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs) -> TrainOutput:
        """Train as [`ResumableTrainer`] does, with the settings that `args` has now, or those of a trial."""
        if trial is not None and resume_from_checkpoint:
            raise UserError(f"a trial starts from the beginning, not from {resume_from_checkpoint!r}")
        self.follow_settings(trial)
        return super().train(resume_from_checkpoint, trial=trial, **kwargs)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs,
    ) -> Any:
        """Search for good settings with optuna: each trial is the run that its values make, weights included.

        Afterwards the trainer is as it was before, with a new student. To train with what was found, set
        `trainer.args.<name> = <value>` for each of `best.hyperparameters`, and `trainer.train()`.

        Args:
            hp_space: returns the values of a trial by name: options of [`DistillationConfig`] that affect the weights;
                and fields of the student (`drop_path_rate`), where the model is given by name or `model_init` reads
                them from the trial.
            compute_objective: from the metrics of the trial's last evaluation; by default `eval_loss` to minimise, and
                `eval_top1` (with another `compute_metrics` the sum of its metrics, as in Transformers) to maximise.
            n_trials, direction, hp_name, **kwargs: as for `Trainer`.
            backend: "optuna"; another one is refused.

        Raises:
            ValueError: the model is neither given by name nor by model_init; an option of the run or of a trial would
                have no effect, or cannot be searched.
        """
        self.follow_settings()
        check_search(self.args, kwargs, evaluates=self.eval_dataset is not None)
        if getattr(backend, "value", backend) not in (None, "optuna"):
            raise UserError(f"backend is {backend!r}, with which trials were never tried: use 'optuna'")
        if not is_optuna_available():
            raise UserError("a search needs optuna: pip install optuna")
        if hp_space is None:
            raise UserError(
                "hp_space is missing: pass a function of a trial, such as lambda trial: {'learning_rate': "
                "trial.suggest_float('learning_rate', 1e-4, 1e-2, log=True)}"
            )
        if self.model_init is None and self._student is None:
            raise UserError(
                "the model is given as an object, which each trial would train further: give model_init, a function "
                "that returns a new one, or the model by name"
            )
        compute_objective = compute_objective or self._objective(direction)
        self.model_init = self.model_init or self._named_student
        self._before_search = self.args.with_changes({})
        try:
            return super().hyperparameter_search(
                hp_space, compute_objective, n_trials, direction, "optuna", hp_name, **kwargs
            )
        finally:
            before, self._before_search, self.hp_search_backend = self._before_search, None, None
            self._use_settings(before, {})
            self.state = TrainerState(is_world_process_zero=self.is_world_process_zero())
            self.model = self.model_wrapped = self.call_model_init().to(self.args.device)
            self.accuracy = {}

    def _objective(self, direction: str | list[str]) -> Callable[[dict[str, float]], float] | None:
        if not isinstance(direction, str):
            raise UserError(f"direction is {direction!r}: with several of them, compute_objective must be given")
        if direction == "minimize":
            return lambda metrics: metrics["eval_loss"]
        return (lambda metrics: metrics["eval_top1"]) if self.compute_metrics is three_head_accuracy else None

    def _named_student(self) -> PreTrainedModel:
        return run.student_of(self._student, self.train_dataset, self.args.seed, **self._for_student)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """Make the student of a run; refuse one that does not fit the run, or lacks what a trial sets."""
        model: Any = super().call_model_init(trial)
        if isinstance(model, (str, ModelArguments)):
            model = run.student_of(model, self.train_dataset, self.args.seed)
        run.name_classes(model, self._id2label)
        refuse_ineffective(self._for_student, model.config)
        teacher: Any = self.teacher
        run.check_heads_and_teacher(model, self.args, teacher)
        self.num_model_parameters = sum(parameter.numel() for parameter in model.parameters())
        set_seed(self.args.seed)  # what follows does not depend on how the student was made
        return model

    def follow_settings(self, trial: Any = None) -> None:
        """Set the run up anew if settings have changed: those of `args`, or in a search those of the trial."""
        before = self._before_search or self._in_use
        if trial is None:
            changes = changes_since(self._in_use, self.args)
            if not changes:
                return
        else:
            changes = check_trial(self.hp_space(trial), type(self.args))
        known = {item.name for item in fields(self.args)}
        options = {name: value for name, value in changes.items() if name in known}
        for_student = {name: value for name, value in changes.items() if name not in known}
        if trial is None:
            for name in for_student:
                delattr(self.args, name)
            before = copy(self.args)
            vars(before).update({name: getattr(self._in_use, name) for name in options})
        if self.args.teacher_record is not None or self.args.teacher_replay is not None:
            raise UserError(
                f"{', '.join(changes)} was set after the trainer was made, which a record of teacher outputs does not "
                "allow: set it in the DistillationConfig, and make a new trainer"
            )
        if for_student and self.model_init is None:
            if self._student is None:
                refuse_ineffective(for_student, self.model.config)
            self.model_init = self._named_student
        now = before.with_changes(options)
        refuse_idle(now, options)
        self._use_settings(now, for_student, options)

    def _use_settings(self, now: DistillationConfig, for_student: dict[str, Any], asked: Collection[str] = ()) -> None:
        """Set the run up for these settings and fields of the student; those asked for must have an effect."""
        views = run.views_with(self.train_dataset, self._in_use, now, asked)
        vars(self.args).clear()
        vars(self.args).update(vars(now))
        self.train_dataset, self._for_student = views, for_student
        self._in_use, self._is_changed = copy(now), True
        self.set_up_average()
        vars(self).pop("bad_images", None)  # it is made when first used
        self._set_up(self.mixing.num_labels)

    def _hp_search_setup(self, trial: Any) -> None:
        """Set up what Transformers sets up for the values of a trial, which `train` has put in place."""
        super()._hp_search_setup(None)
        self._trial = trial
        if self._is_changed:
            if self.compute_metrics is three_head_accuracy:
                self._check_best_metric()
            self._train_batch_size = self.args.train_batch_size
            self.create_accelerator_and_postprocess()
            self._is_changed = False

    # The whole run

    def train_and_save(self) -> dict[str, float]:
        """Train, evaluate, and write all files of the run to `output_dir`; see [`hf_deit.training.run`]."""
        return run.train_and_save(self)

    def report(self) -> Report:
        """Draw what was logged so far into report.png in `output_dir`; a notebook shows what is returned.

        Raises:
            ValueError: nothing was logged yet.
        """
        if not self.state.log_history:
            raise UserError("there is nothing to report yet: nothing was logged. Train or evaluate first")
        report = Report(Path(self.args.output_dir, "report.png"))
        if self.is_world_process_zero():
            held_out = self.summary is not None and self.summary.evaluates_on_new_images
            plot_run(
                self.state.log_history,
                report.path,
                teacher_top1=self.teacher_accuracy.get("teacher_top1"),
                held_out=held_out,
            )
        return report

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
        accuracy = TopKAccuracy().compute(predictions=torch.cat(best_classes), references=torch.cat(labels))
        self.teacher_accuracy = {f"teacher_{name}": value for name, value in accuracy.items()}
        self.log({f"eval_{name}": value for name, value in self.teacher_accuracy.items()})
        return self.teacher_accuracy

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.accuracy = {}
