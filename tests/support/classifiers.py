"""A tiny ViT on disk, and the classes and pixels of the tests' classifiers."""

import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
)


NAMES = ["cat", "dog", "emu", "fox"]


ID2LABEL = dict(enumerate(NAMES))


OWN_MEAN, OWN_STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)


def save_vit(path, names=NAMES, **config):
    torch.manual_seed(0)
    config = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8} | config
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    model = ViTForImageClassification(ViTConfig(**config, id2label=dict(enumerate(names)))).eval()
    model.save_pretrained(path)
    return model
