"""Train a teacher: any timm or Transformers classifier, from scratch or fine-tuned, on the student's data.

The augmentation is the student's ("a RegNetY-16GF that we trained with the same data and same
data-augmentation as DeiT", section 5.2 of the paper).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import ClassifierArguments, DataArguments, check_places
from ..errors import UserError
from ..options.late_imports import late_imports
from ..options.own_options import OwnOptions
from ..options.recipe import parse_recipe


if TYPE_CHECKING:
    from ..data.summary import DatasetSummary
    from ..options.distillation_config import DistillationConfig

KINDS = (ClassifierArguments, DataArguments, OwnOptions)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train the teacher that the command-line arguments describe.

    Args:
        argv: command-line arguments, without the program's name; those of this process if None.

    Returns:
        The content of all_results.json; see [`DistillationTrainer.train_and_save`].
    """
    command = sys.argv if argv is None else ["-m", "hf_deit", "teacher", *argv]
    return train_teacher(*parse_recipe(KINDS, argv, look_over=check_places), command=command)


def find_or_train_teacher(
    recipe: Path, data_args: DataArguments, *, command: Sequence[str], summary: DatasetSummary | None = None
) -> str:
    """Return the recipe's output_dir; if it holds no finished run, first train the teacher on the student's data."""
    from ..training.checkpoints import is_finished

    model_args, _, training_args = parse_recipe(KINDS, [str(recipe)])
    if not is_finished(training_args.output_dir):
        train_teacher(model_args, data_args, training_args, command=command, summary=summary)
    return training_args.output_dir


def train_teacher(
    model_args: ClassifierArguments,
    data_args: DataArguments,
    training_args: DistillationConfig,
    *,
    command: Sequence[str],
    summary: DatasetSummary | None = None,
) -> dict[str, float]:
    """Train the classifier on labels only (`distillation_type` 'none'); `summary` is set if it was printed already."""
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from ..training.checkpoints import claim_output_dir

    claim_output_dir(training_args)
    with late_imports():
        from transformers import set_seed

        from ..data.summary import summarize
        from ..data.views import load_views
        from ..models.classifiers import new_classifier
        from ..training.distillation_trainer import DistillationTrainer

    training_args.distillation_type = "none"
    set_seed(training_args.seed)
    views = load_views(data_args, seed=training_args.view_seed, **training_args.transform_options())
    if summary is None and training_args.process_index == 0:
        summary = summarize(views.images)
        print(summary, flush=True)
    if views.eval is None:
        evaluate_nothing(training_args)
    model = new_classifier(
        model_args.model_name_or_path,
        id2label=views.id2label,
        mean=views.processor.image_mean,
        std=views.processor.image_std,
        image_size=data_args.image_size,
        model_args=dict(model_args.model_args or {}),
    )
    trainer = DistillationTrainer(
        model,
        training_args,
        train_dataset=views.train,
        eval_dataset=views.eval,
        processing_class=views.processor,
        data_args=data_args,
        summary=summary,
        command=command,
    )
    return trainer.train_and_save()


def evaluate_nothing(training_args: DistillationConfig) -> None:
    """Turn evaluation off, for a dataset without images to evaluate on.

    Raises:
        UserError: the run was to keep its best model, which only an evaluation can tell.
    """
    from transformers import IntervalStrategy

    if training_args.load_best_model_at_end:
        raise UserError(
            "load_best_model_at_end needs images to evaluate on, and there are none: set eval_split, or an "
            "eval_fraction above 0"
        )
    training_args.eval_strategy = IntervalStrategy.NO
