"""Train a teacher: `accelerate launch recipes/run_teacher.py <recipe.yaml> [--key value ...]`.

Any timm or Transformers classifier, from scratch or fine-tuned, on the same data with the same augmentation as the
student ("a RegNetY-16GF that we trained with the same data and same data-augmentation as DeiT", section 5.2). What it
leaves in `output_dir` is what `teacher:` of run_distill.py takes. `--help` lists the keys.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

import hf_deit  # the rest of it is imported when first used, after the command line has been read
from hf_deit import ClassifierArguments, DataArguments, DistillationConfig, exit_clearly, parse_recipe


KINDS = (ClassifierArguments, DataArguments, DistillationConfig)


def load_views(data_args: DataArguments, training_args: DistillationConfig) -> tuple:
    """The augmented views to train on, the plain ones to evaluate on, the class names, the image processor."""
    images = hf_deit.load_image_dataset(**data_args.loading())
    transform = hf_deit.build_train_transform(data_args.image_size, **training_args.transform_options())
    train_views = hf_deit.TrainViews(images["train"], transform, training_args.view_seed)
    transform = hf_deit.build_eval_transform(data_args.image_size, crop_ratio=data_args.crop_ratio)
    eval_views = hf_deit.EvalViews(images["eval"], transform)
    id2label = dict(enumerate(images["train"].features["label"].names))
    processor = hf_deit.build_image_processor(transform)
    return train_views, eval_views, id2label, processor


def find_or_train(recipe: Path, data_args: DataArguments) -> str:
    """The recipe's output directory; if no finished run is there, the recipe is run first, on the student's data."""
    model_args, _, training_args = parse_recipe(KINDS, [str(recipe)])
    if not hf_deit.is_finished(training_args.output_dir):
        train(model_args, data_args, training_args)
    return training_args.output_dir


def train(
    model_args: ClassifierArguments,
    data_args: DataArguments,
    training_args: DistillationConfig,
    command: Sequence[str] | None = None,
) -> dict[str, float]:
    """Train the classifier from labels alone. `command` is for its card; by default that of this process."""
    training_args.distillation_type = "none"
    set_seed(training_args.seed)

    # 1. The images
    train_views, eval_views, id2label, processor = load_views(data_args, training_args)

    # 2. The classifier
    model = hf_deit.new_classifier(
        model_args.model_name_or_path,
        id2label=id2label,
        mean=processor.image_mean,
        std=processor.image_std,
        image_size=data_args.image_size,
        model_args=model_args.model_args,
    )

    # 3. Train, evaluate, save
    trainer = hf_deit.DistillationTrainer(
        model,
        training_args,
        train_dataset=train_views,
        eval_dataset=eval_views,
        processing_class=processor,
        data_args=data_args,
        command=command or sys.argv,
    )
    return trainer.train_and_save()


def main(argv: list[str] | None = None) -> dict[str, float]:
    return train(*parse_recipe(KINDS, argv), command=None if argv is None else [__file__, *argv])


if __name__ == "__main__":
    exit_clearly(main)
