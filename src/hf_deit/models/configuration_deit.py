"""DeiTConfig: the architecture of the network. The options of its training are in distillation_config.py.

The fields are those of the Hub's `deit` configurations plus three of our own (`drop_path_rate`, `head_fusion`,
`use_distillation_token`). The defaults are the paper's DeiT-B at 224 pixels, trained as in Table 9.

On disk a plain DeiT (no distillation token) is of type `vit`, as is `facebook/deit-base-patch16-224`, because the
only stock class that computes it is the ViT.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ..errors import UserError


if TYPE_CHECKING:
    from transformers import ViTConfig


# Table 1: width and heads; 12 layers and 64 dimensions per head throughout.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}

HEAD_FUSIONS = ("softmax", "logits", "class", "distillation")

# A config.json without one of these keys was written by stock Transformers, whose numbers it must reproduce.
STOCK_VALUES = {
    "drop_path_rate": 0.0,
    "head_fusion": "logits",
    "use_distillation_token": True,
    "layer_norm_eps": 1e-12,
}


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """`n` or `(height, width)` as `(height, width)`."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _vit_as_deit(config_dict: dict[str, Any]) -> dict[str, Any]:
    if config_dict.get("model_type") != "vit":
        return config_dict
    return {"use_distillation_token": False} | config_dict | {"model_type": "deit"}


class DeiTConfig(PreTrainedConfig):
    """Configuration of a DeiT, of the kind of
    [facebook/deit-base-distilled-patch16-224](https://huggingface.co/facebook/deit-base-distilled-patch16-224).

    Args:
        hidden_size: width of a token.
        num_hidden_layers: number of transformer blocks.
        num_attention_heads: heads per block; must divide `hidden_size`.
        intermediate_size: width of the feed-forward layer; None is four times `hidden_size`, as in the paper.
        hidden_act: activation of the feed-forward layer, by its name in Transformers.
        hidden_dropout_prob: dropout after the embeddings and on both branches of a block, in [0, 1). Paper: 0.
        attention_probs_dropout_prob: dropout of the attention weights, in [0, 1). Paper: 0.
        drop_path_rate: stochastic depth of the last block, in [0, 1), growing linearly from 0 at the first. Table 9:
            0.1.
        initializer_range: standard deviation of the truncated normal of every linear weight, token and position.
        layer_norm_eps: epsilon of every layer norm. The default is the authors' 1e-6; a loaded checkpoint keeps its
            own (stock's: 1e-12).
        image_size: pixels, side or `(height, width)`; must be a multiple of `patch_size`.
        patch_size: pixels, side or `(height, width)`.
        num_channels: colour channels.
        qkv_bias: whether query, key and value have a bias.
        use_distillation_token: False is the plain DeiT of Table 1 (a ViT): one token and one position less, one head.
        head_fusion: how the two-head classifier predicts: `"softmax"`, log of the mean of both heads' probabilities
            (section 4 of the paper); `"logits"`, mean of the logits (the authors' code and stock Transformers);
            `"class"` or `"distillation"`, one head alone.
        encoder_stride: unused here, but read by stock's masked-image decoder.
        pooler_output_size: width of [`DeiTModel`]'s pooler; None is `hidden_size`.
        pooler_act: activation of the pooler.

    Raises:
        ValueError: a size does not divide another as it must, the fusion is unknown, or a rate is out of range.

    Source: Table 1 and Table 9 of the paper; facebookresearch/deit models.py (epsilon).
    """

    model_type = "deit"
    # Hub names of the layers, for `from_pretrained(distributed_config=...)`.
    base_model_fsdp_plan = {"encoder.layer.*": "free_full_weight", "layernorm": "keep_full_weight"}

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    use_distillation_token: bool = True
    head_fusion: str = "softmax"
    encoder_stride: int = 16
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.pooler_output_size = self.pooler_output_size or self.hidden_size
        super().__post_init__(**kwargs)
        if self.id2label and not self.label2id:  # Transformers fills it only for classes without names
            self.label2id = {name: index for index, name in self.id2label.items()}
        self.check()

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> DeiTConfig:
        """The configuration of Table 1's `"tiny"`, `"small"` or `"base"`; keyword arguments override single fields."""
        if size not in SIZES:
            raise UserError(f"model size is {size!r}; choose one of {', '.join(SIZES)}")
        width, heads = SIZES[size]
        return cls(**{"hidden_size": width, "num_attention_heads": heads, **overrides})

    @classmethod
    def from_stock(cls, config: PreTrainedConfig) -> DeiTConfig:
        """A copy of a `deit` or `vit` configuration object as a DeiTConfig."""
        if isinstance(config, cls):
            return copy.deepcopy(config)
        ours = cls.from_dict(config.to_dict())
        ours._attn_implementation = config._attn_implementation
        return ours

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a configuration as in Transformers; a `vit` becomes a DeiT without distillation token."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _vit_as_deit(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Make a configuration as in Transformers; keys of our own that are missing get stock's behaviour."""
        config_dict = STOCK_VALUES | _vit_as_deit(config_dict)
        if kwargs.get("num_labels") not in (None, len(config_dict.get("id2label") or ())):
            config_dict = {key: value for key, value in config_dict.items() if key not in ("id2label", "label2id")}
        loaded = super().from_dict(config_dict, **kwargs)
        # Transformers sets keyword arguments after construction: `from_pretrained(..., image_size=385)` must still be
        # refused, and new class names need a new label2id.
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.check()
        if "id2label" in kwargs:
            config.label2id = {name: index for index, name in config.id2label.items()}
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """The fields as in Transformers, with type `vit` where there is no distillation token."""
        fields = super().to_dict()
        if not self.use_distillation_token:
            fields["model_type"] = "vit"
        return fields

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: the class token and, if used, the distillation token."""
        return 2 if self.use_distillation_token else 1

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of patches: (rows, columns)."""
        (height, width), (patch_height, patch_width) = as_pair(self.image_size), as_pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_tokens(self) -> int:
        """Number of prefix tokens and patches."""
        return self.num_prefix_tokens + math.prod(self.grid_size)

    def check(self) -> None:
        """Raise ValueError if the fields do not describe a valid network."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "the paper has 64 dimensions per head"
            )
        image, patch = as_pair(self.image_size), as_pair(self.patch_size)
        if min(*image, *patch) < 1 or image[0] % patch[0] or image[1] % patch[1]:
            fitting = [max(1, round(side / max(part, 1))) * part for side, part in zip(image, patch, strict=True)]
            raise UserError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"the nearest valid size is {fitting[0] if fitting[0] == fitting[1] else tuple(fitting)}"
            )
        for name in ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.head_fusion not in HEAD_FUSIONS:
            raise UserError(f"head_fusion is {self.head_fusion!r}; choose one of {', '.join(HEAD_FUSIONS)}")


class ViTOrPlainDeiTConfig(PreTrainedConfig):
    """The class of type `vit` for AutoConfig: stock's ViTConfig, except for a config.json that a plain DeiT wrote.

    It is not a subclass of ViTConfig, because ViTConfig's module imports the Auto classes' models.

    Transformers requires the link to a checkpoint in this docstring when it writes the documentation of its ViT:
    [google/vit-base-patch16-224](https://huggingface.co/google/vit-base-patch16-224).
    """

    model_type = "vit"

    def __new__(cls, *args: Any, **kwargs: Any) -> ViTConfig:
        from transformers import ViTConfig

        return ViTConfig(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """A DeiTConfig if the file has our key `use_distillation_token`, otherwise stock's ViTConfig."""
        from transformers import ViTConfig

        config_class = DeiTConfig if "use_distillation_token" in config_dict else ViTConfig
        return config_class.from_dict(config_dict, **kwargs)


# The Auto classes ignore the remote code of a repository if its type is registered from outside Transformers.
ViTOrPlainDeiTConfig.__module__ = "transformers.models.vit.configuration_vit"
