"""hf_deit: train, distil and publish DeiT with 🤗 Transformers.

The Auto classes know our models from here on; every other module is imported when one of its names is first used.
"""

from importlib import import_module

from .modeling_deit import register_auto_classes


__version__ = "0.1.0"

_MODULE_OF = {
    "DeiTConfig": "configuration_deit",
    "DeiTModel": "modeling_deit",
    "DeiTForImageClassification": "modeling_deit",
    "DeiTForImageClassificationWithTeacher": "modeling_deit",
    "read_checkpoint": "checkpoint_conversion",
    "read_class_names": "checkpoint_conversion",
    "write_original": "checkpoint_conversion",
    "DistillationConfig": "distillation_config",
    "DistillationTrainer": "distillation_trainer",
    "distillation_loss": "losses",
    "soft_target_cross_entropy": "losses",
    "Teacher": "teachers",
    "load_teacher": "teachers",
    "new_classifier": "teachers",
    "EvalViews": "views",
    "collate_views": "views",
    "TrainViews": "views",
    "build_image_processor": "views",
    "load_image_dataset": "data",
    "decode_image": "decoding",
    "IMAGENET_MEAN": "augmentation",
    "IMAGENET_STD": "augmentation",
    "build_eval_transform": "augmentation",
    "build_train_transform": "augmentation",
    "Mixing": "mixing",
    "ClassifierArguments": "recipe",
    "DataArguments": "recipe",
    "ModelArguments": "recipe",
    "exit_clearly": "recipe",
    "parse_recipe": "recipe",
    "RepeatedAugmentationSampler": "repeated_augmentation",
    "Disagreement": "metrics",
    "TopKAccuracy": "metrics",
}
__all__ = sorted(_MODULE_OF)

register_auto_classes()


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
