"""Publishing: collects the facts for the model card and uploads to the Hub.

Not here: the text of the card (model_card.py). Transformers does the upload; this module adds early, one-line errors,
saves the model before any upload can fail, and keeps the token out of every file.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import shlex
from collections.abc import Sequence
from copy import copy
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import auth_check
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from .. import __version__
from ..arguments import DataArguments, names_affecting
from ..data.registry import REGISTRY
from ..data.summary import DatasetSummary
from ..errors import UserError, clear_hub_errors, why_of_hub
from ..models.configuration_deit import DeiTConfig
from ..models.modeling_deit import DeiTPreTrainedModel
from ..options.distillation_config import (
    BASE_BATCH_SIZE,
    PAPER_BASE_LEARNING_RATE,
    PAPER_WARMUP_EPOCHS,
    DistillationConfig,
    settings_of,
)
from ..teachers.fingerprint import fingerprint_of_images
from ..teachers.replaying import record_at
from ..teachers.teacher_outputs import TeacherOutputs
from . import checkpoints
from .model_card import CardFacts, build_model_card, hub_id, public_name
from .resuming import ResumableTrainer


if TYPE_CHECKING:
    from ..plots.run import Report

logger = logging.getLogger(__name__)

NAME_IT_YOURS = "set hub_model_id to <your name>/<model>"


class PublishingTrainer(ResumableTrainer):
    """Trainer that writes the model card of its run and uploads to the Hub.

    Args:
        data_args: names of the dataset and its splits, for the card.
        summary: what was found in the dataset, for the card and dataset.json; needed on the main process only.
        command: command line that started the run, as separate arguments.
        *args, **kwargs: as for `Trainer`.

    Attributes:
        teacher: source of the teacher outputs; None in this class, and when only labels are learnt.
        accuracy: accuracy of the current weights, by the names of `evaluate`; empty after the next training step.
        teacher_accuracy: accuracy of the teacher, by the names of `evaluate_teacher`.
        num_model_parameters: number of parameters, counted before they are sharded.
    """

    def __init__(
        self,
        *args,
        data_args: DataArguments | None = None,
        summary: DatasetSummary | None = None,
        command: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = UnpickledToken(self.args.hub_token)
        if self.pop_callback(TensorBoardCallback):
            self.add_callback(OneEventFile())
        self.summary = summary
        if summary is not None:
            self.add_callback(DatasetFile(summary))
        self.data_args = data_args or DataArguments(dataset_name=None)  # pyright: ignore[reportArgumentType]
        self.command = command
        self.teacher: TeacherOutputs | None = None
        self._digests: dict[int, str] = {}
        self.accuracy: dict[str, float] = {}
        self.teacher_accuracy: dict[str, float] = {}
        self.num_model_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        adapter = _adapter_of(self.model)
        if adapter is not None and not adapter.base_model_name_or_path:
            logger.warning(
                "the model is an adapter of weights that have no name, so what is saved cannot be loaded: save the "
                "base with save_pretrained, load it from there and add the adapter to that; or merge the adapter "
                "afterwards (merge_and_unload)"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Transformers does; beside an adapter of PEFT also the config of the model it belongs to.

        The adapter's own config tells the base, and not the classes and the image size of the run.
        """
        super().save_model(output_dir, _internal_call)
        if (
            output_dir in (None, self.args.output_dir)
            and self.args.should_save
            and _adapter_of(self.model) is not None
        ):
            config = copy(self.model.config)
            config.architectures = [type(_base_of(self.model)).__name__]
            config.save_pretrained(self.args.output_dir)

    def report(self) -> Report:
        """Draw what was logged so far into report.png in `output_dir`; a notebook shows what is returned.

        Raises:
            ValueError: nothing was logged yet.
        """
        from ..plots.run import Report, plot_run  # Matplotlib, which the first step need not wait for

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

    def create_model_card(
        self, *, model_name: str | None = None, license: str = "apache-2.0", tags: Sequence[str] = ()
    ) -> None:
        """Write the model card, README.md, into `output_dir`.

        Args:
            model_name: name of the model; by default that of the repository, or of `output_dir`.
            license: license of the weights, one of the Hub's identifiers.
            tags: tags in addition to those that every card has.
        """
        if self.is_world_process_zero():
            card = build_model_card(self._card_facts(model_name, license, tags))
            readme = Path(self.args.output_dir, "README.md")
            readme.write_text(f"{card}\n", encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8

    def _facts_of_run(self) -> dict:
        """Add the teacher, the images, the options that choose the images, and what taught the weights before.

        The directory of the images is left out, so that they may be moved.
        """
        taught_by = self._taught_by()
        data: dict[str, object] = {
            "training images": taught_by["training images"],
            "evaluation images": self._images_of(self.eval_dataset),
        }
        names = set(names_affecting(DataArguments, "views", "weights")) - {"dataset_name", "data_dir"}
        data |= {name: getattr(self.data_args, name) for name in sorted(names)}
        history = self.history if taught_by in self.history else [*self.history, taught_by]
        teacher = {"teacher": taught_by["teacher"]}
        if self.teacher is not None and self.teacher.record_on_hub is not None:
            teacher["record"] = self.teacher.record_on_hub
        facts = {"data": data, "teacher": teacher, "history": history}
        return super()._facts_of_run() | json.loads(json.dumps(facts, default=str))

    def _commit_before(self, record: str) -> str | None:
        """Return the commit of a record on the Hub with which the last checkpoint in `output_dir` was trained.

        None if there is no unfinished run, or it replayed another record: the branch says the commit then.
        """
        facts = checkpoints.facts_to_resume(self.args.output_dir, self.args.resume_from_checkpoint or "auto")
        teacher = facts.get("teacher")
        before = str(teacher.get("record")) if isinstance(teacher, dict) else ""
        found = re.fullmatch(re.escape(record_at(record, "")) + "([0-9a-f]{40})", before)
        return found[1] if found else None

    def _taught_by(self) -> dict[str, str]:
        """Return the names of the training set and the teacher, and what tells them from others of the same name."""
        return {
            "dataset": Path(self.data_args.dataset_name or "").name or "none named",
            "training images": self._images_of(self.train_dataset),
            "teacher": f"{self.teacher.name} ({self.teacher.sha256})" if self.teacher is not None else "none",
        }

    def _images_of(self, dataset) -> str:
        """Return the number of images and a digest of them and their labels, computed once for each dataset."""
        images = getattr(dataset, "images", None)
        if images is None:
            return "not known"
        if id(images) not in self._digests:
            self._digests[id(images)] = f"{len(images):,} images ({fingerprint_of_images(images)})"
        return self._digests[id(images)]

    def _card_facts(self, model_name: str | None, license: str, tags: Sequence[str]) -> CardFacts:
        args, config, data = self.args, self.model.config, self.data_args
        registered = REGISTRY.get(data.dataset_name)
        output_dir = Path(args.output_dir)
        transform = getattr(self.eval_dataset, "transform", None)
        adapter, base = _adapter_of(self.model), _base_of(self.model)
        teacher = {}
        if self.teacher is not None:
            teacher = {
                "teacher": self.teacher.name,
                "teacher_sha256": self.teacher.sha256,
                "teacher_parameters": self.teacher.num_parameters,
                "teacher_replayed": self.teacher.replays,
                "teacher_record": self.teacher.record_on_hub,
            }
        return CardFacts(
            name=model_name or (self.hub_model_id or output_dir.absolute().name).split("/")[-1],
            model_id=self.hub_model_id or _named_in_public(str(output_dir)),
            license=license,
            tags=[tags] if isinstance(tags, str) else tags,
            model_type=config.model_type,
            architecture=" of ".join(filter(None, (type(base).__name__, getattr(config, "architecture", None)))),
            num_parameters=self.num_model_parameters,
            num_classes=config.num_labels or 0,
            image_size=getattr(transform, "image_size", None) or getattr(config, "image_size", None),
            crop_ratio=getattr(transform, "crop_ratio", None),
            head_fusion=config.head_fusion if hasattr(self.model, "distillation_classifier") else None,
            base_model=self.model.name_or_path or None,
            adapter=getattr(adapter.peft_type, "value", str(adapter.peft_type)) if adapter is not None else None,
            adapter_parameters=sum(each.numel() for each in self.model.parameters() if each.requires_grad),
            base_id=_named_in_public(adapter.base_model_name_or_path) if adapter is not None else None,
            is_ours=isinstance(base, DeiTPreTrainedModel),
            dataset=data.dataset_name,
            dataset_id=registered.hub_id if registered else hub_id(data.dataset_name),
            dataset_terms=registered.licence if registered else None,
            **self._facts_of_evaluation_images(),
            num_train_images=len(self.train_dataset or ()),
            num_eval_images=len(self.eval_dataset or ()),
            taught_before=[entry for entry in self.history if entry != self._taught_by()],
            bad_images=len(self.bad_images) if self.train_dataset is not None else 0,
            distillation_type=args.distillation_type,
            **teacher,
            metrics=self.accuracy | self.teacher_accuracy,
            settings=_settings_that_differ(args, config),
            ema_decay=args.ema_decay,
            epochs=self.state.epoch or 0,
            steps=self.state.global_step,
            planned_steps=self.state.max_steps,
            command=self.command,
            processes=args.world_size,
            versions={"hf_deit": __version__, "Python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "timm", "datasets", "albumentations")},
        )

    def _facts_of_evaluation_images(self) -> dict:
        data, summary = self.data_args, self.summary
        registered = REGISTRY.get(data.dataset_name)
        if summary is None:
            return {"eval_split": data.eval_split or (registered.eval_split if registered else None)}
        part = summary.parts.get("eval") if summary.held_out is None else None  # a part of a split has no name
        return {
            "eval_split": part.splits if part is not None else None,
            "held_out": summary.evaluates_on_new_images,
            "trained_on": summary.trained_on or summary.identical or 0,
            "data": summary.sentences(),
        }

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository and check write access to it, before hours are spent on training."""
        super().init_hf_repo(token, private)
        if self.is_world_process_zero():
            auth_check(str(self.hub_model_id), token=token or self.args.hub_token, write=True)

    def push_to_hub(self, *args, **kwargs):
        """Upload the run as Transformers does, without the teacher; `license` and `tags` are passed to the card.

        Raises:
            ValueError: the upload failed. The model is in `output_dir`; the message has the command to upload it.
        """
        # Save before anything can fail. If the repository exists, the model is saved twice, which costs little.
        self.save_model(_internal_call=True)
        self.create_model_card(**{name: value for name, value in kwargs.items() if name in ("license", "tags")})
        with clear_hub_errors(
            name_on_hub(self.args),
            lambda: f"The model is saved in {self.args.output_dir}; upload it again: {self._upload_command()}",
            NAME_IT_YOURS,
        ):
            return super().push_to_hub(*args, **kwargs)

    def _upload_command(self) -> str:
        args = self.args
        words = ["hf", "upload", self.hub_model_id or name_on_hub(args)]
        words += [args.output_dir, ".", "--exclude", "checkpoint-*", "--exclude", "_*"]
        words += ["--private"] * bool(args.hub_private_repo)
        words += ["--revision", args.hub_revision] if args.hub_revision else []
        return shlex.join(words)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Write a card for the checkpoint first; without it a card of an earlier run, or none, would be uploaded."""
        if self.is_world_process_zero():
            uploading = self.push_in_progress is not None and not self.push_in_progress.is_done()
            if (
                self.args.hub_always_push or not uploading
            ):  # else nothing is pushed, and the running upload still reads the card
                self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """Warn if a background upload failed, which Transformers does not check."""
        super()._finish_current_push()
        push = getattr(self, "push_in_progress", None)
        for error in filter(None, (job.exception() for job in push.jobs)) if push else ():
            logger.warning(
                "a checkpoint was not uploaded to %s: %s", self.hub_model_id, why_of_hub(error, NAME_IT_YOURS)
            )
        self.push_in_progress = None


def _named_in_public(path: str | None) -> str:
    """Return a Hub id or a relative path as it is, and of an absolute path the last part."""
    path = path or ""
    return Path(path).name if Path(path).is_absolute() else path


def _adapter_of(model: Any) -> Any:
    """Return the config of the model's active adapter, as PEFT or as Transformers adds one; None if there is none."""
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None)
    return configs.get(active if isinstance(active, str) else None) or next(iter(configs.values()), None)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


PAPER_BATCH_SIZE = 1024


def _settings_that_differ(args: DistillationConfig, config) -> dict[str, tuple[object, object]]:
    """Return this run's value and the default (Table 9), by name, for settings that differ."""
    defaults = {item.name: item.default for item in fields(args)} | {"warmup_epochs": PAPER_WARMUP_EPOCHS}
    values = {name: (value, defaults[name]) for name, value in settings_of(args).items()}
    batch_size = args.effective_batch_size
    scaled = PAPER_BASE_LEARNING_RATE * batch_size / BASE_BATCH_SIZE
    values["batch size"] = (batch_size, PAPER_BATCH_SIZE)
    if args.learning_rate != scaled:
        values["learning_rate"] = (args.learning_rate, f"{scaled:g}, which is 5e-4 x batch / 512")
    if isinstance(config, DeiTConfig):
        values["drop_path_rate"] = (config.drop_path_rate, DeiTConfig.drop_path_rate)
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


class DatasetFile(TrainerCallback):
    """Writes dataset.json when training begins: by then, everything that could refuse the run has agreed to it."""

    def __init__(self, summary: DatasetSummary):
        self.summary = summary

    def on_train_begin(self, args: DistillationConfig, state, control, **kwargs):
        self.summary.write(args.output_dir)


def keys_of_images(data: DataArguments) -> dict[str, object]:
    """Return the keys of a recipe that say which images are trained on, without directories of this machine.

    Empty for images that have no name.
    """
    if not data.dataset_name:
        return {}
    names = set(names_affecting(DataArguments, "views")) - {"data_dir"}
    defaults = {item.name: item.default for item in fields(DataArguments)}
    kept = {name: getattr(data, name) for name in sorted(names) if getattr(data, name) != defaults[name]}
    return kept | {"dataset_name": public_name(data.dataset_name), "image_size": data.image_size}


def name_on_hub(args: DistillationConfig) -> str:
    """Return the name of the repository that a run is pushed to: `hub_model_id`, or that of its directory."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


class OneEventFile(TensorBoardCallback):
    """Writes one event file a run, also with what is logged after the training, such as the last evaluation."""

    def __init__(self):
        super().__init__()
        self._given_dir = self.logging_dir
        self._has_ended = False

    def on_train_begin(self, args, state, control, **kwargs):
        if self._has_ended:  # another run of the same trainer
            super().on_train_end(args, state, control)
            self.logging_dir, self._has_ended = self._given_dir, False
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.logging_dir is None:  # an evaluation before the training
            self.logging_dir = str(Path(args.output_dir, default_logdir()))
        super().on_log(args, state, control, logs=logs, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the file open; every line is flushed when it is logged."""
        self._has_ended = True


class UnpickledToken(str):
    """Hub token that pickles as "": Transformers pickles its arguments into training_args.bin and uploads the file."""

    def __reduce__(self):
        return str, ("",)
