"""Distil a DeiT: build the images, the student, the teacher and the trainer from a recipe, then train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import DataArguments, ModelArguments, check_places
from ..options.late_imports import late_imports
from ..options.own_options import OwnOptions
from ..options.recipe import RECIPES, find_recipe, parse_recipe
from .teacher import evaluate_nothing, find_or_train_teacher


if TYPE_CHECKING:
    from ..training.distillation_trainer import DistillationTrainer

KINDS = (ModelArguments, DataArguments, OwnOptions)


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
    model_args, data_args, training_args = parse_recipe(
        KINDS, argv, RECIPES / "quickstart.yaml", replaced, look_over=check_places
    )
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from ..training.checkpoints import claim_output_dir

    claim_output_dir(training_args)
    with late_imports():
        from transformers import set_seed

        from ..data.summary import summarize
        from ..data.views import load_views
        from ..training.distillation_trainer import DistillationTrainer

    # 2. The images
    views = load_views(data_args, seed=training_args.view_seed, **training_args.transform_options())
    summary = summarize(views.images) if training_args.process_index == 0 else None
    if summary is not None:
        print(summary, flush=True)
    if views.eval is None:
        evaluate_nothing(training_args)

    # 3. The teacher, which may have to be trained first
    trains_teacher = training_args.needs_teacher and training_args.teacher_replay is None
    if trains_teacher and model_args.teacher is None and model_args.teacher_recipe is not None:
        recipe = find_recipe(model_args.teacher_recipe, [_folder_of_recipe(argv), RECIPES, Path()])
        model_args.teacher = find_or_train_teacher(recipe, data_args, command=command, summary=summary)

    # 4. The trainer, which builds the student and loads the teacher
    set_seed(training_args.seed)
    return DistillationTrainer(
        model_args,
        training_args,
        model_args.teacher,
        train_dataset=views.train,
        eval_dataset=views.eval,
        processing_class=views.processor,
        data_args=data_args,
        summary=summary,
        command=command,
    )


def _folder_of_recipe(argv: Sequence[str]) -> Path:
    return find_recipe(argv[0]).parent if argv and not argv[0].startswith("-") else RECIPES
