"""The trainable DeiT: the network, its one-head and its two-head classifier.

Tensor names are those of the Hub's `facebook/deit-*` repositories, in memory as on disk, so weights travel both ways
between this file and stock Transformers without a conversion. What stock lacks is here: an init that trains,
stochastic depth, `labels` and `teacher_logits`, head fusions, one QKV product, positions resized in the weights.
Not here: the losses (losses.py), the teacher (teachers.py), foreign checkpoint formats (checkpoint_conversion.py).

Source: the paper, sections 3 to 5; facebookresearch/deit models.py; transformers models/deit for the tensor names.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ..losses import distillation_loss
from .auto_classes import register_models
from .configuration_deit import DeiTConfig, as_pair


logger = logging.getLogger(__name__)

LABEL_SMOOTHING = 0.1  # Table 9
# Where a checkpoint lives on the Hub; what finds its weights finds its config.json.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What a checkpoint and a network may have one without the other: heads, stock's pooler, the distillation token, and
# the mask token and decoder of stock's masked-image model.
HEADS = re.compile(r"^(cls_|distillation_)?classifier\.")
OPTIONAL = re.compile(rf"{HEADS.pattern}|(^|\.)pooler\.|(^|\.)(distillation_token|mask_token)$|^decoder\.")


def resample_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings of another grid of patches; the very same tensor where the grids are equal.

    Bicubic keeps the norm of the vectors, bilinear would shrink it (section 3 of the paper). Not antialiased and
    `align_corners=False`, as in the authors' fine-tuning (timm antialiases, which differs when the grid shrinks).

    Args:
        positions: `(1, prefix tokens + rows * columns, width)`, any float dtype; the prefix is left untouched.
        old_grid: (rows, columns) of `positions`.
        new_grid: (rows, columns) wanted.

    Returns:
        `(1, prefix tokens + new rows * new columns, width)` of the same dtype.

    Source: facebookresearch/deit main.py (`--finetune`).
    """
    if old_grid == new_grid:
        return positions
    num_prefix_tokens = positions.shape[1] - math.prod(old_grid)
    prefix, patches = positions.split([num_prefix_tokens, math.prod(old_grid)], dim=1)
    patches = patches.unflatten(1, old_grid).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


def add_branch(
    hidden_states: Tensor,
    branch: Callable[[Tensor], Tensor],
    drop_path_rate: float = 0.0,
    num_outputs: int | None = None,
    skip_dropped: bool = False,
) -> Tensor:
    """`hidden_states + branch(hidden_states)` with stochastic depth: a sample loses its branch with that probability.

    Kept branches are scaled by 1 / (1 - rate), so the expectation is that of evaluation.

    Args:
        hidden_states: `(batch, tokens, width)`.
        branch: returns the first `num_outputs` tokens; of all of them by default.
        drop_path_rate: in [0, 1).
        num_outputs: tokens that are returned, the first.
        skip_dropped: do not compute the branch where it is dropped. The number of samples then varies from call to
            call, which neither a compiler nor a GPU's queue likes.

    Source: Huang et al. 2016; Table 9 of the paper; timm/layers/drop.py for the scaling.
    """
    residual = hidden_states if num_outputs is None else hidden_states[:, :num_outputs]
    if drop_path_rate == 0.0:
        return residual + branch(hidden_states)
    keep = 1.0 - drop_path_rate
    mask = hidden_states.new_empty(len(hidden_states), 1, 1).bernoulli_(keep)
    kept = mask.flatten().nonzero().flatten() if skip_dropped else ()
    if 0 < len(kept) < len(mask):
        return residual.index_add(
            0, kept, branch(hidden_states.index_select(0, kept)).to(residual.dtype), alpha=1 / keep
        )
    return torch.addcmul(residual, branch(hidden_states), mask.div_(keep))


def fuse_heads(cls_logits: Tensor, distillation_logits: Tensor, head_fusion: str) -> Tensor:
    """One prediction from two heads, in the logits' dtype.

    Args:
        cls_logits, distillation_logits: `(batch, classes)`.
        head_fusion: `"softmax"` returns the log of the mean of both heads' probabilities, `"logits"` the mean of the
            logits, `"class"` and `"distillation"` that head's logits.

    Source: "we add the softmax output by the two classifiers" (section 4); facebookresearch/deit models.py: the mean.
    """
    if head_fusion == "softmax":
        log_probabilities = (F.log_softmax(logits.float(), dim=-1) for logits in (cls_logits, distillation_logits))
        return (torch.logaddexp(*log_probabilities) - math.log(2)).to(cls_logits.dtype)
    if head_fusion == "logits":
        return (cls_logits + distillation_logits) / 2
    return cls_logits if head_fusion == "class" else distillation_logits


def drop_out(states: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout; not even a call where nothing is dropped, as in the paper: it is 4 % of a small layer's time."""
    return F.dropout(states, rate) if rate and training else states


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether using the module's weights is the same as calling it.

    Not so for adapters and quantised layers, nor where hooks gather, move or watch the weights (offloading, ZeRO-3).
    """
    return type(module) is kind and not is_watched(module) and "forward" not in module.__dict__


def is_watched(module: nn.Module) -> bool:
    """Whether a hook of its own would notice work that is done otherwise, or not done.

    Transformers' recorders stay in place once they were asked for; what they record is known here without them.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) and any(
        hook.__module__ != capture_outputs.__module__ for each in hooks for hook in each.values()
    )


def runs_eagerly_on_cpu(states: Tensor) -> bool:
    """Where what a GPU or a compiler likes best costs time."""
    return states.device.type == "cpu" and not torch.compiler.is_compiling()


class DeiTPatchEmbeddings(nn.Module):
    """`(batch, channels, height, width)` pixels to `(batch, patches, width)` tokens, row by row."""

    def __init__(self, config: DeiTConfig):
        super().__init__()
        patch_size = as_pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if not is_plain(self.projection, nn.Conv2d):
            return self.projection(pixel_values).flatten(2).transpose(1, 2)
        # Patches do not overlap, so the convolution is a matrix product, which has its result in the right order.
        height, width = self.projection.kernel_size
        grid = pixel_values.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # batch, channels, row, y, column, x
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


class DeiTEmbeddings(nn.Module):
    """Class token, distillation token and patches, with their positions."""

    def __init__(self, config: DeiTConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.distillation_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_distillation_token else None
        self.patch_embeddings = DeiTPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_tokens, width))
        self.dropout_rate = config.hidden_dropout_prob

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        grid = self._grid_of(pixel_values, interpolate_pos_encoding)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.projection.weight.dtype))
        prefix = [token.expand(len(patches), -1, -1) for token in self.prefix_tokens()]
        positions = resample_positions(self.position_embeddings, self.config.grid_size, grid)
        return drop_out(torch.cat([*prefix, patches], dim=1) + positions, self.dropout_rate, self.training)

    def prefix_tokens(self) -> list[Tensor]:
        return [self.cls_token] if self.distillation_token is None else [self.cls_token, self.distillation_token]

    def _grid_of(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        channels, image_size = self.config.num_channels, as_pair(self.config.image_size)
        if pixel_values is None:
            raise ValueError("pixel_values is missing: pass a (batch, channels, height, width) float tensor")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}: normalise them (ImageNet mean and std) to floats"
            )
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; expected (batch, {channels}, height, width)"
            )
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != image_size:
            raise ValueError(
                f"images are {height}x{width} pixels and the model's are {image_size[0]}x{image_size[1]}: resize the "
                f"images, call model.resize_position_embeddings(({height}, {width})), or pass "
                "interpolate_pos_encoding=True"
            )
        patch_height, patch_width = as_pair(self.config.patch_size)
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"images are {height}x{width} pixels: not a multiple of the patch, {patch_height}x{patch_width}"
            )
        return height // patch_height, width // patch_width


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention that keeps its weights. `(batch, heads, tokens, head width)` each; softmax in float32."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def sdpa_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """PyTorch's fused attention. Transformers' function for it prepares masks, caches and shared heads, of which DeiT
    has none; in a small model that takes as long as the attention (measured)."""
    context = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return context.transpose(1, 2), None


OWN_BACKENDS = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}


class DeiTAttention(nn.Module):
    """Multi-head self-attention through whichever backend `config._attn_implementation` names."""

    is_causal = False  # read by the backends

    def __init__(self, config: DeiTConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.dropout_rate = config.attention_probs_dropout_prob
        self.head_width = width // config.num_attention_heads
        self.scaling = self.head_width**-0.5
        # ModuleDict only spells the Hub's names: attention.attention.query, attention.output.dense.
        self.attention = nn.ModuleDict(
            {name: nn.Linear(width, width, bias=config.qkv_bias) for name in ("query", "key", "value")}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def query_key_value(self, hidden_states: Tensor, num_queries: int | None) -> tuple[Tensor, ...]:
        """`(batch, tokens, width)` to three of the same shape; the query of the first `num_queries` tokens only.

        One matrix product, which GPUs prefer to three small ones (not measured here) and exported graphs keep; three
        on a CPU, which gains nothing from a larger one (measured). The parameters stay apart, as every loader,
        optimizer, sharder and adapter knows them: joining them copies 0.4 (Ti) to 7 MB (B) a layer.
        """
        linears = query, key, value = list(self.attention.values())
        asking = hidden_states if num_queries is None else hidden_states[:, :num_queries]
        if runs_eagerly_on_cpu(hidden_states) or not all(is_plain(linear, nn.Linear) for linear in linears):
            return query(asking), key(hidden_states), value(hidden_states)
        alone = () if num_queries is None else (linears.pop(0)(asking),)
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears]) if self.config.qkv_bias else None
        return *alone, *F.linear(hidden_states, weight, bias).chunk(len(linears), dim=-1)

    def forward(
        self, hidden_states: Tensor, output_attentions: bool = False, num_queries: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What every token, or each of the first `num_queries`, gathers from all of them."""
        query, key, value = (
            states.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for states in self.query_key_value(hidden_states, num_queries)
        )
        # Only eager attention has weights to show.
        name = "eager" if output_attentions else self.config._attn_implementation
        backend = OWN_BACKENDS.get(name) or ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        dropout = self.dropout_rate if self.training else 0.0
        context, weights = backend(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return self.output.dense(context.flatten(2)), weights


class DeiTLayer(GradientCheckpointingLayer):
    """One pre-norm transformer block."""

    def __init__(self, config: DeiTConfig, drop_path_rate: float):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DeiTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.activation = ACT2FN[config.hidden_act]
        self.is_gelu = config.hidden_act == "gelu"
        self.output = nn.ModuleDict({"dense": nn.Linear(config.intermediate_size, config.hidden_size)})
        self.dropout_rate = config.hidden_dropout_prob

    def forward(
        self, hidden_states: Tensor, output_attentions: bool = False, num_outputs: int | None = None
    ) -> Tensor:
        """`(batch, tokens, width)` to the same, or to the first `num_outputs` tokens: the others are not computed."""

        def attend(states: Tensor) -> Tensor:
            context = self.attention(self.layernorm_before(states), output_attentions, num_outputs)[0]
            return drop_out(context, self.dropout_rate, self.training)

        def expand(states: Tensor) -> Tensor:
            expanded = self._activate(self.intermediate.dense(self.layernorm_after(states)))
            return drop_out(self.output.dense(expanded), self.dropout_rate, self.training)

        rate = self.drop_path_rate if self.training else 0.0
        skip_dropped = rate > 0 and self._may_skip(hidden_states, output_attentions)
        hidden_states = add_branch(hidden_states, attend, rate, num_outputs, skip_dropped)
        return add_branch(hidden_states, expand, rate, num_outputs, skip_dropped)

    def _activate(self, states: Tensor) -> Tensor:
        """In place where neither a gradient nor anybody else needs what was there before.

        A CPU's fresh memory of this size costs as much as the two matrix products around it (measured): the system
        clears it page by page.
        """
        in_place = self.is_gelu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if in_place and is_plain(self.intermediate.dense, nn.Linear) and not is_watched(self.activation):
            return torch.ops.aten.gelu_(states)
        return self.activation(states)

    def _may_skip(self, hidden_states: Tensor, output_attentions: bool) -> bool:
        """Whether samples may be left out of a branch: nobody looks into it, and it costs no waiting."""
        return (
            runs_eagerly_on_cpu(hidden_states) and not output_attentions and not any(map(is_watched, self.modules()))
        )


class DeiTPooler(nn.Module):
    """Activated linear map of the class token, as in stock's headless model."""

    def __init__(self, config: DeiTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


@contextmanager
def hold_loading_report() -> Iterator[None]:
    """Keep Transformers' table of what did not match to ourselves, unless loading fails."""
    loader, held = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in str(record.msg)
        if is_report:
            held.append(record)
        return not is_report

    loader.addFilter(hold)
    try:
        yield
    except Exception:
        loader.removeFilter(hold)
        for record in held:
            loader.handle(record)
        raise
    finally:
        loader.removeFilter(hold)


def names_of(names: Iterable[str]) -> str:
    """Sorted, with commas; those that differ only by the number of the layer once."""
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names}))


class DeiTPreTrainedModel(PreTrainedModel):
    """What the three DeiT classes share: init, loading, resizing."""

    config_class = DeiTConfig
    base_model_prefix = "deit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a batch mean: Trainer must do the scaling when it accumulates gradients
    _no_split_modules = ["DeiTEmbeddings", "DeiTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DeiTLayer, "attentions": DeiTAttention}
    _input_embed_layer = "patch_embeddings"
    _head_names: dict[str, str] = {}  # another class's name of the class head, to ours

    def __init__(self, config: DeiTConfig):
        super().__init__(config)
        if not config.use_distillation_token:
            self.base_model_prefix = "vit"  # its name on the Hub

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal for linear weights, tokens and positions; PyTorch's own default for the patch projection.

        Source: facebookresearch/deit models.py with timm 0.3.2 `_init_weights`, which leaves the convolution alone.
        """
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, DeiTEmbeddings):
            for parameter in (*module.prefix_tokens(), module.position_embeddings):
                init.trunc_normal_(parameter, std=std)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in Transformers, from any DeiT or ViT checkpoint, ours or stock's, whatever heads it has.

        These may differ from the checkpoint: `image_size` (the positions in the weights are resized); `num_labels` or
        `id2label` (new heads); the class and `use_distillation_token` (the class head stays, the distillation token,
        its position and its head are new or dropped). One logged line says what is new and what is not used.

        Raises:
            ValueError: for weights that do not fit otherwise, by name, also with `ignore_mismatched_sizes=True`. With
                `output_loading_info=True` those that are missing or left over are the caller's to judge.
        """
        source, given = pretrained_model_name_or_path, isinstance(config, PreTrainedConfig)
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if given:
            config = DeiTConfig.from_stock(config)
            image_size, num_heads = config.image_size, config.num_attention_heads
        else:
            image_size, num_heads = kwargs.pop("image_size", None), kwargs.get("num_attention_heads")
        stored = {}
        if source is not None and (image_size or num_heads):
            # The shapes of the weights tell neither rows from columns nor the number of heads; config.json does.
            try:
                stored, _ = DeiTConfig.get_config_dict(source if given or config is None else config, **where)
            except OSError:
                if not given:
                    raise  # else: weights alone, described by the config that came with the call
        if num_heads and num_heads != stored.get("num_attention_heads", num_heads):
            raise ValueError(
                f"num_attention_heads is {num_heads}, but {source} was trained with {stored['num_attention_heads']}: "
                "its weights would compute something else. Leave num_attention_heads out"
            )
        if given:
            config.image_size = stored.get("image_size", image_size)
        # Our names are the Hub's; the loader adds the prefix of the class.
        names = {r"^(?:deit|vit)\.": "", **cls._head_names, **(kwargs.pop("key_mapping", None) or {})}
        with_report = kwargs.pop("output_loading_info", False)
        # Shapes are judged below, stricter than Transformers: its flag would let any weight start afresh.
        kwargs |= {"key_mapping": names, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with hold_loading_report():
            model, report = super().from_pretrained(source, *model_args, config=config, **kwargs)
        # Or saving would rename back what loading has renamed.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in conversions if not isinstance(each, WeightRenaming)] or None
        if model._account_for(report, source, only_shapes=with_report):
            files = where | {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
            model._take_positions(source, key_mapping=names, **files)
        if image_size:
            model.resize_position_embeddings(image_size)
        return (model, report) if with_report else model

    def _account_for(self, report: dict[str, set], source: str | None, only_shapes: bool) -> bool:
        """Log one line of what is new and what is not used; refuse what must not be, or only shapes that do not fit.

        Returns:
            Whether the positions are still to be taken over, without or with one for the distillation token.
        """
        new, unused = set(report["missing_keys"]), set(report["unexpected_keys"])
        shapes = {name: (tuple(stored), tuple(own)) for name, stored, own in report["mismatched_keys"]}
        positions = {name for name in shapes if name.endswith("position_embeddings")}
        if source is None or not any(name.endswith("distillation_token") for name in new | unused):
            positions = set()
        new_heads = {name for name, (old, own) in shapes.items() if HEADS.search(name) and old[1:] == own[1:]}
        misfits = {
            "missing": names_of(name for name in new if not OPTIONAL.search(name)),
            "not in the network": names_of(name for name in unused if not OPTIONAL.search(name)),
            "of another shape": names_of(
                f"{name} {old} instead of {own}"
                for name, (old, own) in shapes.items()
                if name not in new_heads | positions
            ),
        }
        if misfits["of another shape"] or any(misfits.values()) and not only_shapes:
            raise ValueError(
                f"the weights of {source or 'the state dict'} do not fit {type(self).__name__} with this config: "
                + "; ".join(f"{what}: {names}" for what, names in misfits.items() if names)
                + ". Of a checkpoint's config only num_labels, image_size and use_distillation_token can be changed"
            )
        new |= new_heads
        if positions:
            (new if self.config.use_distillation_token else unused).add("the distillation token's position")
        if new or unused:
            lines = {"new, not trained": names_of(new), "not used": names_of(unused)}
            text = "; ".join(f"{what}: {names}" for what, names in lines.items() if names)
            logger.warning("%s from %s: %s", type(self).__name__, source or "a state dict", text)
        return bool(positions)

    @torch.no_grad()
    def _take_positions(self, source: str, **kwargs) -> None:
        """Those of the class token and the patches, from a checkpoint with one token more or less."""
        config = copy.deepcopy(self.config)
        config.use_distillation_token = not config.use_distillation_token
        with hold_loading_report():
            other = super(DeiTPreTrainedModel, DeiTModel).from_pretrained(
                source, config=config, add_pooling_layer=False, **kwargs
            )
        old, new = other.embeddings.position_embeddings, self.base_model.embeddings.position_embeddings
        new[:, :1] = old[:, :1]
        new[:, self.config.num_prefix_tokens :] = old[:, config.num_prefix_tokens :]

    @classmethod
    def from_original(
        cls, checkpoint: str | os.PathLike | Mapping[str, Tensor], *, image_size=None, **config
    ) -> DeiTPreTrainedModel:
        """A classifier from a checkpoint of the authors or timm (or the Hub), in evaluation mode.

        Args:
            checkpoint: file, directory, Hub id or state dict; [`read_checkpoint`] says what is read, what is inferred
                and why the fusion of two heads is the mean of their logits unless `head_fusion` is given.
            image_size: pixels, side or `(height, width)`: resize the positions to it.
            config: other fields of [`DeiTConfig`], such as `num_attention_heads` or `id2label`.

        Raises:
            ValueError: for what cannot be read without running code, for tensors that are missing, unexpected or of
                another shape, and for one head where this class has two, or the reverse.
        """
        from .checkpoint_conversion import read_checkpoint

        found = read_checkpoint(checkpoint, image_size=image_size, **config)
        distilled = found.config.use_distillation_token
        wanted = DeiTForImageClassificationWithTeacher if distilled else DeiTForImageClassification
        if not issubclass(cls, wanted):
            heads = "two heads and a distillation token" if distilled else "one head and no distillation token"
            raise ValueError(f"the checkpoint has {heads}: use {wanted.__name__}.from_original, not {cls.__name__}'s")
        model = cls.from_pretrained(None, config=found.config, state_dict=found.weights)
        if image_size is not None:
            model.resize_position_embeddings(image_size)
        return model

    def to_original(self) -> dict[str, Tensor]:
        """The classifier's state dict under the names of the authors and timm; see [`original_weights`].

        `torch.save({"model": model.to_original()}, "deit.pth")` is a file for the authors' code.
        """
        from .checkpoint_conversion import original_weights

        return original_weights(self.state_dict(), self.config)

    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:
        """Make the model one for images of `image_size` pixels: side or `(height, width)`.

        The positions of the patches are resampled bicubically, those of the tokens stay, and `config.image_size`
        follows. Nothing changes where the grid of patches is the same. Build the optimizer afterwards.

        Raises:
            ValueError: if `image_size` is not a multiple of the patch.

        Source: section 3 of the paper, "fine-tuning at different resolution".
        """
        old_size, old_grid = self.config.image_size, self.config.grid_size
        self.config.image_size = image_size
        try:
            self.config.check()
        except ValueError:
            self.config.image_size = old_size
            raise
        embeddings = self.base_model.embeddings
        old = embeddings.position_embeddings
        new = resample_positions(old, old_grid, self.config.grid_size)
        if new is not old:
            embeddings.position_embeddings = nn.Parameter(new.detach(), requires_grad=old.requires_grad)

    def _recorded(self, **wishes: bool | None) -> dict[str, bool]:
        """What to record of `output_attentions` and the like: the caller's wish, else the config's."""
        return {name: getattr(self.config, name) if wish is None else wish for name, wish in wishes.items()}

    def _loss(
        self,
        cls_logits: Tensor,
        distillation_logits: Tensor | None,
        labels: Tensor | None,
        teacher_logits: Tensor | None,
    ) -> Tensor | None:
        """The paper's loss for what is at hand: eq. 3 with a teacher; without one, every head learns the true label.

        Labels are smoothed in training only, and only where they are classes: a distribution is used as it is.
        """
        if labels is None:
            if teacher_logits is not None:
                raise ValueError("teacher_logits came without labels: the loss needs both")
            return None
        problem_type = self.config.problem_type
        if problem_type in ("regression", "multi_label_classification"):
            if distillation_logits is not None or teacher_logits is not None:
                raise ValueError(
                    f"config.problem_type is {problem_type!r}, but distillation is for images with one label each: "
                    "use DeiTForImageClassification, without a teacher"
                )
            return self.loss_function(labels, cls_logits, self.config)
        soft = labels.is_floating_point()
        if labels.shape != (cls_logits.shape if soft else cls_logits.shape[:1]):
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)} for logits {tuple(cls_logits.shape)}; "
                "expected (batch,) integers or (batch, classes) probabilities"
            )
        # Reading the labels would make the host wait for a GPU; there the loss itself asserts the range.
        if not soft and labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in labels.aminmax())
            if low < 0 or high >= cls_logits.shape[1]:
                raise ValueError(
                    f"labels run from {low} to {high}, but the model's {cls_logits.shape[1]} classes are numbered "
                    "from 0: set num_labels"
                )
        without_teacher = "none" if distillation_logits is None else "label"
        return distillation_loss(
            cls_logits,
            distillation_logits,
            labels if soft else labels.long(),
            teacher_logits,
            distillation_type=without_teacher if teacher_logits is None else "hard",
            label_smoothing=LABEL_SMOOTHING if self.training and not soft else 0.0,
        )["loss"]


class DeiTModel(DeiTPreTrainedModel):
    """The network without a classifier.

    Args:
        config: what to build.
        add_pooling_layer: whether to add stock's pooler, which the paper does not have.
    """

    def __init__(self, config: DeiTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        config.check()
        # Linear stochastic depth decay rule of Huang et al. 2016, from 0 as in timm/models/vision_transformer.py.
        last = max(config.num_hidden_layers - 1, 1)
        rates = [config.drop_path_rate * depth / last for depth in range(config.num_hidden_layers)]
        self.embeddings = DeiTEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(DeiTLayer(config, rate) for rate in rates)})
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = DeiTPooler(config) if add_pooling_layer else None
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        prefix_only: bool = False,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(batch, channels, height, width)`, float, normalised.
            interpolate_pos_encoding: accept images of another size than the config's, for this call only.
            output_attentions: also return `(batch, heads, tokens, tokens)` weights a layer, computed eagerly.
            output_hidden_states: also return `(batch, tokens, width)` before the first and after each layer, unnormed.
            prefix_only: the class and distillation token are enough. The last layer then computes no others (a
                twelfth of the work, nearly), unless something of it is recorded or hooked.

        Returns:
            `last_hidden_state` `(batch, tokens, width)`: class token, distillation token (if any), patches row by row,
            normed; `pooler_output` `(batch, pooler width)` or None.

        Raises:
            ValueError: for images of the wrong shape, size or type.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        recorded = self._recorded(output_attentions=output_attentions)  # hidden states are recorded by hooks
        *layers, last = self.encoder.layer
        for layer in layers:
            hidden_states = layer(hidden_states, **recorded)
        all_recorded = recorded | self._recorded(output_hidden_states=output_hidden_states)
        if prefix_only and not any(all_recorded.values()) and not any(map(is_watched, last.modules())):
            recorded["num_outputs"] = self.config.num_prefix_tokens
        hidden_states = last(hidden_states, **recorded)
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class DeiTForImageClassification(DeiTPreTrainedModel):
    """One linear head on the class token.

    With `use_distillation_token=True` (the default) it is stock's class of this name and loads there. Without, it is
    the plain DeiT of Table 1, in memory and on disk a ViT (`model.vit`): what it saves, stock loads as
    `ViTForImageClassification`.
    """

    _head_names = {r"^cls_classifier\.": "classifier."}

    def __init__(self, config: DeiTConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, DeiTModel(config, add_pooling_layer=False))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImageClassifierOutput:
        """Classify images; with `labels`, also return the loss.

        Args:
            pixel_values: `(batch, channels, height, width)`, float, normalised.
            labels: `(batch,)` integers in [0, classes), or `(batch, classes)` probabilities. A `config.problem_type`
                of `"regression"` or `"multi_label_classification"` is honoured with stock's loss and labels.
            teacher_logits: `(batch, classes)`; the class head then also learns the teacher's decisions (Table 3,
                "hard").
            interpolate_pos_encoding, output_attentions, output_hidden_states: see [`DeiTModel`].

        Returns:
            `loss` (float32 scalar or None), `logits` `(batch, classes)`.

        Raises:
            ValueError: for images or labels of the wrong shape or range.
        """
        recorded = self._recorded(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
        outputs = self.base_model(pixel_values, interpolate_pos_encoding, **recorded, prefix_only=True)
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        return ImageClassifierOutput(
            loss=self._loss(logits, None, labels, teacher_logits),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@dataclass
class DeiTForImageClassificationWithTeacherOutput(ModelOutput):
    """What the two-head classifier returns.

    Args:
        loss: float32 scalar, where labels were given.
        logits: `(batch, classes)`, both heads fused as `config.head_fusion` says.
        cls_logits: `(batch, classes)` of the head on the class token.
        distillation_logits: `(batch, classes)` of the head on the distillation token.
        hidden_states, attentions: see [`DeiTModel`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class DeiTForImageClassificationWithTeacher(DeiTPreTrainedModel):
    """Two linear heads: one on the class token, one on the distillation token, which learns from the teacher.

    The teacher itself is not in here, only the head that it taught. Stock's class of this name loads what this one
    saves, with equal `cls_logits` and `distillation_logits`; its `logits` are their mean, whatever `head_fusion` is.
    """

    _head_names = {r"^classifier\.": "cls_classifier."}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """See [`DeiTPreTrainedModel.from_pretrained`]; a plain checkpoint gets a new distillation token."""
        if not isinstance(config, PreTrainedConfig):
            kwargs.setdefault("use_distillation_token", True)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def __init__(self, config: DeiTConfig):
        super().__init__(config)
        if not config.use_distillation_token:
            raise ValueError(
                "the two-head classifier needs the distillation token: set use_distillation_token=True, "
                "or use DeiTForImageClassification"
            )
        self.deit = DeiTModel(config, add_pooling_layer=False)
        self.cls_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.distillation_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> DeiTForImageClassificationWithTeacherOutput:
        """Classify images; with `labels`, also return the loss.

        Args:
            pixel_values: `(batch, channels, height, width)`, float, normalised.
            labels: `(batch,)` integers in [0, classes), or `(batch, classes)` probabilities.
            teacher_logits: `(batch, classes)`; the distillation head then learns the teacher's decisions (eq. 3).
                Without them it learns the labels, so that a plain fine-tuning trains both heads.
            interpolate_pos_encoding, output_attentions, output_hidden_states: see [`DeiTModel`].

        Returns:
            `loss` (float32 scalar or None), fused `logits`, `cls_logits` and `distillation_logits` `(batch, classes)`.

        Raises:
            ValueError: for images, labels or teacher logits of the wrong shape or range.
        """
        recorded = self._recorded(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
        outputs = self.deit(pixel_values, interpolate_pos_encoding, **recorded, prefix_only=True)
        cls_logits = self.cls_classifier(outputs.last_hidden_state[:, 0])
        distillation_logits = self.distillation_classifier(outputs.last_hidden_state[:, 1])
        return DeiTForImageClassificationWithTeacherOutput(
            loss=self._loss(cls_logits, distillation_logits, labels, teacher_logits),
            logits=fuse_heads(cls_logits, distillation_logits, self.config.head_fusion),
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


register_models(modeling_auto, DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher)
