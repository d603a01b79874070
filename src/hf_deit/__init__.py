"""hf_deit: train, distil and publish DeiT with 🤗 Transformers.

The Auto classes know our models from here on, whenever they are imported. Every other module, and with it PyTorch and
Transformers, is imported when one of its names is first used.
"""

from importlib import import_module

from .auto_classes import register_when_imported


__version__ = "0.1.0"

_MODULE_OF = {
    "DeiTConfig": "configuration_deit",
    "DeiTModel": "modeling_deit",
    "DeiTForImageClassification": "modeling_deit",
    "DeiTForImageClassificationWithTeacher": "modeling_deit",
    "export_model": "export",
    "load_for_export": "export",
    "read_checkpoint": "checkpoint_conversion",
    "read_class_names": "checkpoint_conversion",
    "write_original": "checkpoint_conversion",
    "load_pretrained": "classifiers",
    "DistillationConfig": "distillation_config",
    "DistillationTrainer": "distillation_trainer",
    "distillation_loss": "losses",
    "soft_target_cross_entropy": "losses",
    "new_classifier": "classifiers",
    "Teacher": "teachers",
    "load_teacher": "teachers",
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
    "Classifier": "evaluation",
    "EvaluationArguments": "evaluation",
    "Predictions": "evaluation",
    "evaluation_report": "evaluation",
    "evaluation_result": "evaluation",
    "evaluation_table": "evaluation",
    "load_classifier": "evaluation",
    "predict": "evaluation",
    "is_finished": "checkpoints",
    "is_recorded": "teacher_record",
    "Sweep": "sweep",
    "Disagreement": "metrics",
    "ReaLAccuracy": "metrics",
    "TopKAccuracy": "metrics",
    "AnalysisArguments": "analysis",
    "agreement_by_class": "analysis",
    "as_deit": "analysis",
    "attention_maps": "analysis",
    "confusion": "analysis",
    "deciders_of": "analysis",
    "disagreement": "analysis",
    "disagreement_table": "analysis",
    "eval_pixels": "analysis",
    "ground_truth": "analysis",
    "patch_filters": "analysis",
    "position_similarity": "analysis",
    "short_names": "analysis",
    "spread_evenly": "analysis",
    "token_similarity": "analysis",
    "plot_attention": "plots",
    "plot_attention_heads": "plots",
    "plot_by_class": "plots",
    "plot_confusion": "plots",
    "plot_disagreement": "plots",
    "plot_patch_filters": "plots",
    "plot_position_similarity": "plots",
    "plot_token_similarity": "plots",
    "plot_table": "plots",
    "plot_tradeoff": "plots",
    "ModelSpec": "paper_tables",
    "expand_models": "paper_tables",
    "ThroughputArguments": "throughput",
    "describe_machine": "throughput",
    "measure_throughput": "throughput",
    "resident_memory": "throughput",
    "restart_resident_peak": "throughput",
    "throughput_rows": "throughput",
    "throughput_table": "throughput",
    "tradeoff_points": "throughput",
}
__all__ = sorted(_MODULE_OF)

register_when_imported()


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
