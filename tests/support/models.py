"""Small DeiTs with weights far from their init, and a batch for them."""

import torch

from hf_deit.models.configuration_deit import DeiTConfig
from hf_deit.models.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
)


CLASSES = (DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher)
CLASSIFIERS = CLASSES[1:]


def small_config(**overrides) -> DeiTConfig:
    fields = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    return DeiTConfig(**(fields | {"image_size": 32, "patch_size": 8, "num_labels": 5} | overrides))


def small_model(kind=DeiTForImageClassificationWithTeacher, **overrides):
    torch.manual_seed(0)
    return scatter(kind(small_config(**overrides)))


def scatter(model):
    """Weights far from their init, so that no parameter can be ignored, swapped or left at zero unseen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if "token" in name or "position" in name else parameter.std().nan_to_num(0.0) + 0.02
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def small_batch(size=4):
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(size, 3, 32, 32, generator=generator)
    return pixel_values, torch.arange(size) % 5, torch.randn(size, 5, generator=generator)
