"""hf_deit: train, distil and publish DeiT with 🤗 Transformers.

The Auto classes know our models from here on, whenever they are imported. Every other module, and with it PyTorch and
Transformers, is imported when one of its names is first used.
"""

from importlib import import_module

from .models.auto_classes import register_when_imported


__version__ = "0.1.0"

_MODULE_OF = {
    "DeiTConfig": "models.configuration_deit",
    "DeiTModel": "models.modeling_deit",
    "DeiTForImageClassification": "models.modeling_deit",
    "DeiTForImageClassificationWithTeacher": "models.modeling_deit",
    "export_model": "models.export",
    "load_for_export": "models.export",
    "read_checkpoint": "models.checkpoint_conversion",
    "read_class_names": "models.checkpoint_conversion",
    "write_original": "models.checkpoint_conversion",
    "load_pretrained": "models.classifiers",
    "DistillationConfig": "training.distillation_config",
    "DistillationTrainer": "training.distillation_trainer",
    "distillation_loss": "losses",
    "soft_target_cross_entropy": "losses",
    "new_classifier": "models.classifiers",
    "Teacher": "teachers.teacher",
    "load_teacher": "teachers.teacher",
    "EvalViews": "data.views",
    "collate_views": "data.views",
    "TrainViews": "data.views",
    "build_image_processor": "data.views",
    "load_image_dataset": "data.loading",
    "decode_image": "data.decoding",
    "IMAGENET_MEAN": "augmentation.transforms",
    "IMAGENET_STD": "augmentation.transforms",
    "build_eval_transform": "augmentation.transforms",
    "build_train_transform": "augmentation.transforms",
    "Mixing": "augmentation.mixing",
    "ClassifierArguments": "recipe",
    "DataArguments": "recipe",
    "ModelArguments": "recipe",
    "exit_clearly": "recipe",
    "parse_recipe": "recipe",
    "RepeatedAugmentationSampler": "data.repeated_augmentation",
    "Classifier": "evaluation.classifier",
    "EvaluationArguments": "evaluation.classifier",
    "Predictions": "evaluation.classifier",
    "evaluation_report": "evaluation.classifier",
    "evaluation_result": "evaluation.classifier",
    "evaluation_table": "evaluation.classifier",
    "load_classifier": "evaluation.classifier",
    "predict": "evaluation.classifier",
    "is_finished": "training.checkpoints",
    "is_recorded": "teachers.record",
    "Sweep": "paper.sweep",
    "Disagreement": "evaluation.metrics",
    "ReaLAccuracy": "evaluation.metrics",
    "TopKAccuracy": "evaluation.metrics",
    "AnalysisArguments": "paper.analysis",
    "agreement_by_class": "paper.analysis",
    "as_deit": "paper.analysis",
    "attention_maps": "paper.analysis",
    "confusion": "paper.analysis",
    "deciders_of": "paper.analysis",
    "disagreement": "paper.analysis",
    "disagreement_table": "paper.analysis",
    "eval_pixels": "paper.analysis",
    "ground_truth": "paper.analysis",
    "patch_filters": "paper.analysis",
    "position_similarity": "paper.analysis",
    "short_names": "paper.analysis",
    "spread_evenly": "paper.analysis",
    "token_similarity": "paper.analysis",
    "plot_attention": "plots.style",
    "plot_attention_heads": "plots.style",
    "plot_by_class": "plots.style",
    "plot_confusion": "plots.style",
    "plot_disagreement": "plots.style",
    "plot_patch_filters": "plots.style",
    "plot_position_similarity": "plots.style",
    "plot_token_similarity": "plots.style",
    "plot_table": "plots.style",
    "plot_tradeoff": "plots.style",
    "ModelSpec": "paper.tables",
    "expand_models": "paper.tables",
    "ThroughputArguments": "paper.throughput",
    "describe_machine": "paper.throughput",
    "measure_throughput": "paper.throughput",
    "resident_memory": "paper.throughput",
    "restart_resident_peak": "paper.throughput",
    "throughput_rows": "paper.throughput",
    "throughput_table": "paper.throughput",
    "tradeoff_points": "paper.throughput",
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
