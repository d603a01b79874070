"""Distil a DeiT: `accelerate launch recipes/run_distill.py [recipe.yaml] [--key value ...]`.

Without a recipe it runs quickstart.yaml: offline, on a CPU, the teacher included. `--help` lists the keys.
"""

import sys
from pathlib import Path

import run_teacher
from transformers import set_seed

import hf_deit  # the rest of it is imported when first used, after the command line has been read
from hf_deit import DataArguments, DistillationConfig, ModelArguments, exit_clearly, parse_recipe


RECIPES = Path(__file__).parent
KINDS = (ModelArguments, DataArguments, DistillationConfig)


def build_student(model_args: ModelArguments, image_size: int, id2label: dict[int, str]):
    """The checkpoint that is named, or fresh weights."""
    model_class = hf_deit.DeiTForImageClassification
    if model_args.use_distillation_token:
        model_class = hf_deit.DeiTForImageClassificationWithTeacher
    fields = model_args.config_overrides() | {"image_size": image_size, "id2label": id2label}
    fields["use_distillation_token"] = model_args.use_distillation_token
    if model_args.model_name_or_path is not None:
        return hf_deit.load_pretrained(
            model_class,
            model_args.model_name_or_path,
            attn_implementation=model_args.attn_implementation,
            **fields,
        )
    config = hf_deit.DeiTConfig.from_size(model_args.model_size or "base", **fields)
    return model_class._from_config(config, attn_implementation=model_args.attn_implementation)


def build_trainer(argv: list[str] | None = None) -> "hf_deit.DistillationTrainer":
    # 1. What to do
    model_args, data_args, training_args = parse_recipe(KINDS, argv, RECIPES / "quickstart.yaml")
    needs_teacher = training_args.distillation_type in ("hard", "soft")
    trains_teacher = needs_teacher and training_args.teacher_replay is None
    if trains_teacher and model_args.teacher is None and model_args.teacher_recipe is not None:
        model_args.teacher = run_teacher.find_or_train(RECIPES / model_args.teacher_recipe, data_args)
    set_seed(training_args.seed)

    # 2. The images
    train_views, eval_views, id2label, processor = run_teacher.load_views(data_args, training_args)

    # 3. The student and its teacher
    student = build_student(model_args, data_args.image_size, id2label)
    teacher = None
    if needs_teacher and model_args.teacher is not None:
        teacher = hf_deit.load_teacher(
            model_args.teacher,
            id2label=id2label,
            mean=processor.image_mean,
            std=processor.image_std,
            compile=training_args.torch_compile,
        )

    # 4. What trains, evaluates and saves them
    return hf_deit.DistillationTrainer(
        student,
        training_args,
        teacher,
        train_dataset=train_views,
        eval_dataset=eval_views,
        processing_class=processor,
        data_args=data_args,
        command=sys.argv if argv is None else [__file__, *argv],
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    return build_trainer(argv).train_and_save()


if __name__ == "__main__":
    exit_clearly(main)
