"""The facts of a made-up distilled run."""

from hf_deit.training.model_card import CardFacts


DISTILLED = CardFacts(
    name="my-deit",
    model_id="user/my-deit",
    license="apache-2.0",
    model_type="deit",
    architecture="DeiTForImageClassificationWithTeacher",
    num_parameters=5_910_800,
    num_classes=10,
    image_size=224,
    crop_ratio=0.875,
    head_fusion="softmax",
    base_model="facebook/deit-tiny-distilled-patch16-224",
    dataset="cifar10",
    dataset_id="uoft-cs/cifar10",
    dataset_terms="not stated",
    eval_split="test",
    held_out=True,
    data=["Trained on 50,000 images of the split 'train'", "Evaluated on [link](x) <b>"],
    num_train_images=50_000,
    num_eval_images=10_000,
    bad_images=3,
    distillation_type="hard",
    teacher="timm/regnety_160.deit_in1k",
    teacher_sha256="0123456789abcdef",
    teacher_parameters=83_590_140,
    metrics={
        **{"eval_top1": 0.8765, "eval_top5": 0.9912, "eval_class_top1": 0.8712, "eval_class_top5": 0.9901},
        **{"eval_distillation_top1": 0.8733, "eval_distillation_top5": 0.9908, "eval_loss": 0.5},
        **{"teacher_top1": 0.9123, "teacher_top5": 0.9956},
    },
    settings={"num_train_epochs": (100, 300), "random_crop": ("padded", None), "mix_prob": (0.5, 1.0)},
    epochs=100.0,
    steps=4_800,
    planned_steps=4_800,
    command=["recipes/run_distill.py", "recipes/my_run.yaml", "--seed", "3"],
    versions={"torch": "2.14.1", "transformers": "5.23.0"},
)
