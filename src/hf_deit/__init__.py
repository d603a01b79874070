"""hf_deit: train, distil and publish DeiT with 🤗 Transformers.

From here on, the Auto classes know our models, whether they are imported before this package or after it. Every other
module, and with it PyTorch and Transformers, is imported when one of its names is first used. What is not named here
is public in its room: `hf_deit.evaluation.predict`, `hf_deit.paper.analysis`, `hf_deit.plots.tables`, ...
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .models.auto_classes import register_when_imported


if TYPE_CHECKING:  # for editors and type checkers, which cannot see through __getattr__
    from .arguments import DataArguments as DataArguments
    from .arguments import ModelArguments as ModelArguments
    from .augmentation.mixing import Mixing as Mixing
    from .augmentation.transforms import build_eval_transform as build_eval_transform
    from .augmentation.transforms import build_image_processor as build_image_processor
    from .augmentation.transforms import build_train_transform as build_train_transform
    from .data.decoding import decode_image as decode_image
    from .data.loading import load_image_dataset as load_image_dataset
    from .data.views import EvalViews as EvalViews
    from .data.views import TrainViews as TrainViews
    from .data.views import load_views as load_views
    from .errors import UserError as UserError
    from .evaluation.classifier import load_classifier as load_classifier
    from .evaluation.metrics import Disagreement as Disagreement
    from .evaluation.metrics import TopKAccuracy as TopKAccuracy
    from .losses import distillation_loss as distillation_loss
    from .losses import soft_target_cross_entropy as soft_target_cross_entropy
    from .models.configuration_deit import DeiTConfig as DeiTConfig
    from .models.export import export_model as export_model
    from .models.modeling_deit import DeiTForImageClassification as DeiTForImageClassification
    from .models.modeling_deit import DeiTForImageClassificationWithTeacher as DeiTForImageClassificationWithTeacher
    from .models.modeling_deit import DeiTModel as DeiTModel
    from .options.distillation_config import DistillationConfig as DistillationConfig
    from .options.recipe import parse_recipe as parse_recipe
    from .teachers.teacher import load_teacher as load_teacher
    from .training.distillation_trainer import DistillationTrainer as DistillationTrainer

__version__ = "0.1.0"

_MODULE_OF = {
    "DataArguments": "arguments",
    "DeiTConfig": "models.configuration_deit",
    "DeiTForImageClassification": "models.modeling_deit",
    "DeiTForImageClassificationWithTeacher": "models.modeling_deit",
    "DeiTModel": "models.modeling_deit",
    "Disagreement": "evaluation.metrics",
    "DistillationConfig": "options.distillation_config",
    "DistillationTrainer": "training.distillation_trainer",
    "EvalViews": "data.views",
    "Mixing": "augmentation.mixing",
    "ModelArguments": "arguments",
    "TopKAccuracy": "evaluation.metrics",
    "TrainViews": "data.views",
    "UserError": "errors",
    "build_eval_transform": "augmentation.transforms",
    "build_image_processor": "augmentation.transforms",
    "build_train_transform": "augmentation.transforms",
    "decode_image": "data.decoding",
    "distillation_loss": "losses",
    "export_model": "models.export",
    "load_classifier": "evaluation.classifier",
    "load_image_dataset": "data.loading",
    "load_teacher": "teachers.teacher",
    "load_views": "data.views",
    "parse_recipe": "options.recipe",
    "soft_target_cross_entropy": "losses",
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
