"""What the Auto classes of Transformers know of us: types `deit` and `vit`, in whichever order the two are imported.

`import hf_deit` imports nothing of Transformers, which takes seconds. A module of Auto classes hears of our classes as
soon as it has been imported, or at once if it has been already. Often that is half-way through the import of a module
on which our model rests, so that our model cannot be imported yet: stand-ins take its place until `modeling_deit` has
been imported, by the first use of one of them or by the user.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt


class StandIn:
    """A model class of ours that is imported when something is asked of it."""

    def __init__(self, name: str, config_class: type) -> None:
        self.__name__ = name
        self.config_class = config_class  # `register` asks

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(import_module(".modeling_deit", __package__), self.__name__), attribute)

    def __reduce__(self) -> tuple:
        return StandIn, (self.__name__, self.config_class)  # without asking for `__setstate__`


def register_when_imported() -> None:
    """Have the Auto classes return ours for model type `deit`, and for a `vit` that is a plain DeiT of ours.

    Importing hf_deit calls this.

    Raises:
        ImportError: here or from the import of the Auto classes, if the registration did not take (some 5.x releases
            of Transformers ignore it silently).
    """
    wrapt.register_post_import_hook(register_configurations, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_register_stand_ins, "transformers.models.auto.modeling_auto")


def register_configurations(auto: ModuleType) -> None:
    """Ours with AutoConfig; `auto` is the module that defines it."""
    from .configuration_deit import DeiTConfig, ViTOrPlainDeiTConfig

    for config_class in (DeiTConfig, ViTOrPlainDeiTConfig):
        # exist_ok, because the types are stock's as well.
        auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        _check(config_class.model_type, auto.CONFIG_MAPPING[config_class.model_type], config_class)


def _register_stand_ins(auto: ModuleType) -> None:
    from .configuration_deit import DeiTConfig

    names = ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
    register_models(auto, *(StandIn(name, DeiTConfig) for name in names))


def register_models(auto: ModuleType, backbone: type | StandIn, *classifiers: type | StandIn) -> None:
    """Ours with AutoModel and AutoModelForImageClassification; `auto` is the module that defines them."""
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
