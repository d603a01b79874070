"""Train a teacher: `accelerate launch recipes/run_teacher.py <recipe.yaml> [--key value ...]`.

Any timm or Transformers classifier, from scratch or fine-tuned, on the same data with the same augmentation as the
student ("a RegNetY-16GF that we trained with the same data and same data-augmentation as DeiT", section 5.2). What it
leaves in `output_dir` is what `teacher:` of run_distill.py takes. `--help` lists the keys.
"""

from transformers import set_seed

from hf_deit import (
    ClassifierArguments,
    DataArguments,
    DistillationConfig,
    DistillationTrainer,
    build_image_processor,
    build_views,
    exit_clearly,
    load_image_dataset,
    new_classifier,
    parse_recipe,
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    # 1. What to do
    model_args, data_args, training_args = parse_recipe((ClassifierArguments, DataArguments, DistillationConfig), argv)
    training_args.distillation_type = "none"  # labels only: a teacher has no teacher
    set_seed(training_args.seed)

    # 2. The images
    images = load_image_dataset(**data_args.loading())
    train_views, eval_views = build_views(
        images, data_args.image_size, data_args.crop_ratio, **training_args.view_options()
    )
    id2label = dict(enumerate(images["train"].features["label"].names))
    processor = build_image_processor(eval_views.transform)

    # 3. The classifier
    model = new_classifier(
        model_args.model_name_or_path,
        id2label=id2label,
        mean=processor.image_mean,
        std=processor.image_std,
        image_size=data_args.image_size,
        model_args=model_args.model_args,
    )

    # 4. Train, evaluate, save
    trainer = DistillationTrainer(
        model, training_args, train_dataset=train_views, eval_dataset=eval_views, processing_class=processor
    )
    return trainer.train_and_save()


if __name__ == "__main__":
    exit_clearly(main)
