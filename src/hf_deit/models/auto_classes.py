"""Register our classes with the Auto classes of Transformers, for types `deit` and `vit`, in either import order.

`import hf_deit` does not import Transformers, which takes seconds. Our classes are registered with a module of Auto
classes right after its import, or at once if that module is imported already. Often this happens during the import of
a module that our model needs, so that our model cannot be imported yet: stand-ins are registered in its place, until
the first use of a stand-in, or the user, imports `modeling_deit`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt


class StandIn:
    """One of our model classes, imported at the first access to one of its attributes."""

    def __init__(self, name: str, config_class: type) -> None:
        self.__name__ = name
        self.config_class = config_class  # read by `register`

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(import_module(".modeling_deit", __package__), self.__name__), attribute)

    def __reduce__(self) -> tuple:
        return StandIn, (self.__name__, self.config_class)  # pickle must not look up `__setstate__`


def register_when_imported() -> None:
    """Register our classes with the Auto classes: for model type `deit`, and for a `vit` that is our plain DeiT.

    Importing hf_deit calls this.

    Raises:
        ImportError: here or from the import of the Auto classes, if the registration had no effect (some 5.x releases
            of Transformers ignore it silently).
    """
    wrapt.register_post_import_hook(register_configurations, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_register_stand_ins, "transformers.models.auto.modeling_auto")


def register_configurations(auto: ModuleType) -> None:
    """Register our configurations with AutoConfig; `auto` is the module that defines it."""
    from .configuration_deit import DeiTConfig, ViTOrPlainDeiTConfig

    for config_class in (DeiTConfig, ViTOrPlainDeiTConfig):
        # exist_ok, because stock has the same types.
        auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        _check(config_class.model_type, auto.CONFIG_MAPPING[config_class.model_type], config_class)


def _register_stand_ins(auto: ModuleType) -> None:
    from .configuration_deit import DeiTConfig

    names = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
    register_models(auto, *(StandIn(name, DeiTConfig) for name in names))


def register_models(auto: ModuleType, backbone: type | StandIn, *classifiers: type | StandIn) -> None:
    """Register our models with AutoModel and AutoModelForImageClassification; `auto` is the module with both."""
    config_class = backbone.config_class
    auto.AutoModel.register(config_class, backbone, exist_ok=True)
    auto.AutoModelForImageClassification.register(config_class, classifiers, exist_ok=True)
    _check("deit", auto.MODEL_MAPPING.get(config_class, None), backbone)
    _check("deit", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(config_class, None), classifiers)


def _check(model_type: str, registered: Any, expected: Any) -> None:
    if registered != expected:
        raise ImportError(
            f"this release of transformers did not register hf_deit's classes for model type {model_type!r}: the Auto "
            "classes would return stock's. Install transformers>=5.23,<6, or load with hf_deit's classes directly"
        )
