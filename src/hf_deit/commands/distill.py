"""Distil a DeiT: build the images, the student, the teacher and the trainer from a recipe, then train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import DataArguments, ModelArguments
from ..errors import refusals_of_libraries
from ..options.recipe import RECIPES, find_recipe, parse_recipe
from ..training.checkpoints import claim_output_dir
from ..training.distillation_config import DistillationConfig
from .teacher import evaluate_nothing, find_or_train_teacher


if TYPE_CHECKING:
    from ..models.modeling_deit import DeiTPreTrainedModel
    from ..training.distillation_trainer import DistillationTrainer

KINDS = (ModelArguments, DataArguments, DistillationConfig)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train the student that the command-line arguments describe; see [`build_trainer`].

    Args:
        argv: command-line arguments, without the program's name; those of this process if None.

    Returns:
        The content of all_results.json; see [`DistillationTrainer.train_and_save`].
    """
    command = sys.argv if argv is None else ["-m", "hf_deit", "distill", *argv]
    return build_trainer(sys.argv[1:] if argv is None else argv, command=command).train_and_save()


def build_trainer(argv: Sequence[str], *, command: Sequence[str]) -> DistillationTrainer:
    """Build the trainer of a run, ready to train.

    Args:
        argv: command-line arguments, without the program's name. Without a recipe they change the quickstart's.
        command: the whole command line, for the model card.

    Raises:
        ValueError: the recipe, the images, the student or the teacher is not usable.
    """
    # 1. The settings
    # A checkpoint has an architecture of its own, so that of the quickstart's student does not apply to it.
    replaced = {"model_name_or_path": {item.name for item in fields(ModelArguments)} - {"teacher_recipe"}}
    replaced["output_dir"] = {"overwrite_output_dir"}  # only the quickstart's own directory may be overwritten
    model_args, data_args, training_args = parse_recipe(KINDS, argv, RECIPES / "quickstart.yaml", replaced)
    claim_output_dir(training_args)
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from transformers import set_seed

    from ..data.summary import summarize
    from ..data.views import load_views
    from ..teachers.teacher import load_teacher
    from ..training.distillation_trainer import DistillationTrainer

    # 2. The images
    views = load_views(data_args, seed=training_args.view_seed, **training_args.transform_options())
    summary = summarize(views.images) if training_args.process_index == 0 else None
    if summary is not None:
        print(summary, flush=True)
    if views.eval is None:
        evaluate_nothing(training_args)

    # 3. The student and its teacher
    needs_teacher = training_args.distillation_type in ("hard", "soft")
    trains_teacher = needs_teacher and training_args.teacher_replay is None
    if trains_teacher and model_args.teacher is None and model_args.teacher_recipe is not None:
        recipe = find_recipe(model_args.teacher_recipe, [_folder_of_recipe(argv), RECIPES, Path()])
        model_args.teacher = find_or_train_teacher(recipe, data_args, command=command, summary=summary)
    set_seed(training_args.seed)
    with refusals_of_libraries():  # a missing attention backend, say
        student = build_student(model_args, data_args.image_size, views.id2label)
    teacher = None
    if needs_teacher and model_args.teacher is not None:
        teacher = load_teacher(
            model_args.teacher,
            id2label=views.id2label,
            mean=views.processor.image_mean,
            std=views.processor.image_std,
            image_size=training_args.teacher_image_size,
            student_size=data_args.image_size,
            compile=training_args.torch_compile,
        )

    # 4. The trainer
    return DistillationTrainer(
        student,
        training_args,
        teacher,
        train_dataset=views.train,
        eval_dataset=views.eval,
        processing_class=views.processor,
        data_args=data_args,
        summary=summary,
        command=command,
    )


def _folder_of_recipe(argv: Sequence[str]) -> Path:
    return find_recipe(argv[0]).parent if argv and not argv[0].startswith("-") else RECIPES


def build_student(model_args: ModelArguments, image_size: int, id2label: dict[int, str]) -> DeiTPreTrainedModel:
    """Load `model_name_or_path`, or build a model of `model_size` with random weights."""
    from ..models.classifiers import load_pretrained
    from ..models.configuration_deit import DeiTConfig
    from ..models.modeling_deit import DeiTForImageClassification, DeiTForImageClassificationWithTeacher
    from ..models.weight_files import check_attention

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
