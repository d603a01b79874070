"""A run whose settings change after it was made: a hyperparameter search, or values set on `trainer.args`.

Whatever follows from the settings is made anew, so that the run is the one that these values make from the start.

Not here: which settings may change (options/trials.py) and how a student or the views are made (run.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import copy
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel, TrainerState, set_seed
from transformers.integrations.integration_utils import is_optuna_available
from transformers.trainer_utils import TrainOutput

from ..arguments import ModelArguments
from ..errors import UserError
from ..evaluation.accuracy import three_head_accuracy
from ..options.distillation_config import DistillationConfig
from ..options.trials import changes_since, check_search, check_trial, refuse_idle, refuse_ineffective
from . import run
from .publishing import PublishingTrainer


class SearchingTrainer(PublishingTrainer):
    """Trainer that is set up anew where settings have changed: those of `args`, or those of a trial.

    Args:
        model: the first student.
        student: what it was made from, if it was given by name.
        model_init: function that makes the students after the first one, which is given.
        *args, **kwargs: as for [`PublishingTrainer`].

    Attributes:
        id2label: names of the classes, which every student has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args,
        student: ModelArguments | str | None = None,
        model_init: Callable | None = None,
        **kwargs,
    ):
        super().__init__(model, *args, **kwargs)
        self.model_init = model_init
        self.id2label: dict[Any, str] = dict(model.config.id2label or {})
        self._student = student
        self._in_use = copy(self.args)
        self._before_search: DistillationConfig | None = None
        self._for_student: dict[str, Any] = {}  # what a trial sets that no option is
        self._is_changed = False

    def set_up(self) -> None:
        """Make what depends on the settings and lasts for a run; a subclass has some."""

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
            student: Any = self.call_model_init()
            self.model = self.model_wrapped = student.to(self.args.device)
            self.accuracy = {}

    def _objective(self, direction: str | list[str]) -> Callable[[dict[str, float]], float] | None:
        if not isinstance(direction, str):
            raise UserError(f"direction is {direction!r}: with several of them, compute_objective must be given")
        if direction == "minimize":
            return lambda metrics: metrics["eval_loss"]
        return (lambda metrics: metrics["eval_top1"]) if self.compute_metrics is three_head_accuracy else None

    def _named_student(self) -> PreTrainedModel:
        student: Any = self._student
        return run.student_of(student, self.train_dataset, self.args.seed, **self._for_student)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """Make the student of a run; refuse one that does not fit the run, or lacks what a trial sets."""
        model: Any = super().call_model_init(trial)
        if isinstance(model, (str, ModelArguments)):
            model = run.student_of(model, self.train_dataset, self.args.seed)
        run.name_classes(model, self.id2label)
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
        self.set_up()

    def _hp_search_setup(self, trial: Any) -> None:
        """Set up what Transformers sets up for the values of a trial, which `train` has put in place."""
        super()._hp_search_setup(None)
        self._trial = trial
        if self._is_changed:
            self._train_batch_size = self.args.train_batch_size
            self.create_accelerator_and_postprocess()
            self._is_changed = False
