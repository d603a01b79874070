"""The trainable DeiT: the network, its one-head and its two-head classifier.

Tensor names are those of the Hub's `facebook/deit-*` repositories, in memory as on disk, so weights travel both ways
between this file and stock Transformers without a conversion. This file adds what stock lacks: an init that trains,
stochastic depth, `labels` and `teacher_logits`, head fusions, and one QKV product.

Not here: loading and resizing positions (pretrained.py), the losses (losses.py), the teacher (teachers/teacher.py),
foreign checkpoint formats (checkpoint_conversion.py).

Source: the paper, sections 3 to 5; facebookresearch/deit models.py; transformers models/deit for the tensor names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ..errors import UserError
from ..losses import distillation_loss
from .auto_classes import register_models
from .configuration_deit import DeiTConfig, as_pair
from .pretrained import LoadsAnyDeiT, resample_positions


LABEL_SMOOTHING = 0.1  # Table 9


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
        branch: a function that returns the first `num_outputs` tokens, or all tokens if `num_outputs` is None.
        drop_path_rate: probability in [0, 1) that a sample loses its branch.
        num_outputs: number of tokens to return, from the first; None: all.
        skip_dropped: do not compute the branch of samples that lose it. The number of computed samples then varies
            from call to call, which causes recompilations and, on a GPU, waits for the device.

    Source: Huang et al. 2016; Table 9 of the paper; timm/layers/drop.py for the scaling.
    """
    residual = hidden_states if num_outputs is None else hidden_states[:, :num_outputs]
    if drop_path_rate == 0.0:
        return residual + branch(hidden_states)
    keep = 1.0 - drop_path_rate
    mask = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(keep)
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
    """Dropout, without a call where nothing is dropped (the paper's setting): that call is 4 % of a small layer."""
    return F.dropout(states, rate) if rate and training else states


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if using the module's weights is the same as calling the module.

    False for adapters and quantised layers, and where hooks gather, move or watch the weights (offloading, ZeRO-3).
    """
    return type(module) is kind and not has_foreign_hooks(module) and "forward" not in module.__dict__


def has_foreign_hooks(module: nn.Module) -> bool:
    """True if the module has hooks that must see every forward call. Transformers' output recorders do not count.

    Those recorders stay installed after their first use; the model itself knows when it must record.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks) and any(
        hook.__module__ != capture_outputs.__module__ for each in hooks for hook in each.values()
    )


def runs_eagerly_on_cpu(states: Tensor) -> bool:
    """True in eager mode on a CPU, where skipping work beats fixed shapes and fused kernels."""
    return states.device.type == "cpu" and not torch.compiler.is_compiling()


class DeiTPatchEmbeddings(nn.Module):
    """Projection of `(batch, channels, height, width)` pixels to `(batch, patches, width)` tokens, row by row."""

    def __init__(self, config: DeiTConfig):
        super().__init__()
        patch_size = as_pair(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if not is_plain(self.projection, nn.Conv2d):
            return self.projection(pixel_values).flatten(2).transpose(1, 2)
        # Patches do not overlap, so the convolution is a matrix product, whose result is already in token order.
        height, width = self.projection.kernel_size
        grid = pixel_values.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # batch, channels, row, y, column, x
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


class DeiTEmbeddings(nn.Module):
    """Class token, distillation token and patches, with position embeddings added."""

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
        prefix = [token.expand(patches.shape[0], -1, -1) for token in self.prefix_tokens()]
        positions = resample_positions(self.position_embeddings, self.config.grid_size, grid)
        return drop_out(torch.cat([*prefix, patches], dim=1) + positions, self.dropout_rate, self.training)

    def prefix_tokens(self) -> list[Tensor]:
        return [self.cls_token] if self.distillation_token is None else [self.cls_token, self.distillation_token]

    def _grid_of(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        channels, image_size = self.config.num_channels, as_pair(self.config.image_size)
        if pixel_values is None:
            raise UserError("pixel_values is missing: pass a (batch, channels, height, width) float tensor")
        if not pixel_values.is_floating_point():
            raise UserError(f"pixel_values are {pixel_values.dtype}: normalise them (ImageNet mean and std) to floats")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise UserError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; expected (batch, {channels}, height, width)"
            )
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != image_size:
            raise UserError(
                f"images are {height}x{width} pixels and the model's are {image_size[0]}x{image_size[1]}: resize the "
                f"images, call model.resize_position_embeddings(({height}, {width})), or pass "
                "interpolate_pos_encoding=True"
            )
        patch_height, patch_width = as_pair(self.config.patch_size)
        if height % patch_height or width % patch_width:
            raise UserError(
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
    """Attention that returns its weights. Inputs are `(batch, heads, tokens, head width)`; softmax in float32."""
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
    """PyTorch's fused attention.

    Transformers' function for fused attention prepares masks, caches and shared heads, which DeiT does not have; in a
    small model that preparation takes as long as the attention (measured).
    """
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
        """Query, key and value of `(batch, tokens, width)`; the query has only the first `num_queries` tokens.

        One matrix product computes all three, because GPUs prefer one to three small ones (not measured here) and
        exported graphs keep it; on a CPU, which gains nothing from a larger product (measured), three products do. The
        parameters stay separate, as every loader, optimizer, sharder and adapter knows them: joining the parameters
        copies 0.4 (Ti) to 7 MB (B) per layer.
        """
        linears = query, key, value = list(self.attention.values())
        queried = hidden_states if num_queries is None else hidden_states[:, :num_queries]
        if runs_eagerly_on_cpu(hidden_states) or not all(is_plain(linear, nn.Linear) for linear in linears):
            return query(queried), key(hidden_states), value(hidden_states)
        alone = () if num_queries is None else (linears.pop(0)(queried),)
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears]) if self.config.qkv_bias else None
        return *alone, *F.linear(hidden_states, weight, bias).chunk(len(linears), dim=-1)

    def forward(
        self, hidden_states: Tensor, output_attentions: bool = False, num_queries: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every token, or the first `num_queries`, to all tokens; eager attention also returns weights."""
        query, key, value = (
            states.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for states in self.query_key_value(hidden_states, num_queries)
        )
        # Only eager attention returns its weights.
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
        """Compute `(batch, tokens, width)` of all tokens, or only of the first `num_outputs`."""

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
        """Apply the activation, in place where neither a gradient nor a hook needs its input.

        On a CPU, fresh memory of this size costs as much as the two matrix products around the activation (measured),
        because the system clears fresh memory page by page.
        """
        in_place = self.is_gelu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if in_place and is_plain(self.intermediate.dense, nn.Linear) and not has_foreign_hooks(self.activation):
            return torch.ops.aten.gelu_(states)
        return self.activation(states)

    def _may_skip(self, hidden_states: Tensor, output_attentions: bool) -> bool:
        """True if samples may be left out of a branch: no hook or recorder sees them, and no device has to wait."""
        return (
            runs_eagerly_on_cpu(hidden_states)
            and not output_attentions
            and not any(map(has_foreign_hooks, self.modules()))
        )


class DeiTPooler(nn.Module):
    """Linear layer and activation on the class token, as in stock's headless model."""

    def __init__(self, config: DeiTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


class DeiTPreTrainedModel(LoadsAnyDeiT):
    """Base of the three DeiT classes: initialisation, recorded outputs, loss, conversion."""

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
    def from_original(
        cls, checkpoint: str | os.PathLike | Mapping[str, Tensor], *, image_size=None, **config
    ) -> DeiTPreTrainedModel:
        """A classifier from a checkpoint of the authors or timm (or the Hub), in evaluation mode.

        Args:
            checkpoint: file, directory, Hub id or state dict; [`read_checkpoint`] documents what is read and inferred,
                and why the fusion of two heads is the mean of their logits unless `head_fusion` is given.
            image_size: pixels, side or `(height, width)`, to which the positions are resized.
            config: other fields of [`DeiTConfig`], such as `num_attention_heads` or `id2label`.

        Raises:
            ValueError: the checkpoint cannot be read without running code, tensors are missing, unexpected or of
                another shape, or the checkpoint has one head and this class two, or the reverse.
        """
        from .checkpoint_conversion import read_checkpoint

        found = read_checkpoint(checkpoint, image_size=image_size, **config)
        distilled = found.config.use_distillation_token
        wanted = DeiTForImageClassificationWithTeacher if distilled else DeiTForImageClassification
        if not issubclass(cls, wanted):
            heads = "two heads and a distillation token" if distilled else "one head and no distillation token"
            raise UserError(f"the checkpoint has {heads}: use {wanted.__name__}.from_original, not {cls.__name__}'s")
        model = cls.from_pretrained(None, config=found.config, state_dict=found.weights)
        if image_size is not None:
            model.resize_position_embeddings(image_size)
        return model

    def to_original(self) -> dict[str, Tensor]:
        """The classifier's state dict under the names of the authors and timm; see [`original_weights`].

        `torch.save({"model": model.to_original()}, "deit.pth")` writes a file for the authors' code.
        """
        from .checkpoint_conversion import original_weights

        return original_weights(self.state_dict(), self.config)

    def _recorded(self, **wishes: bool | None) -> dict[str, bool]:
        """The outputs to record (`output_attentions`, ...): as the caller wishes, or else as the config says."""
        return {name: getattr(self.config, name) if wish is None else wish for name, wish in wishes.items()}

    def _loss(
        self,
        cls_logits: Tensor,
        distillation_logits: Tensor | None,
        labels: Tensor | None,
        teacher_logits: Tensor | None,
    ) -> Tensor | None:
        """The paper's loss: eq. 3 with teacher logits; without them, every head learns the true label.

        Integer labels are smoothed, in training only; labels that are distributions are used unchanged.
        """
        if labels is None:
            if teacher_logits is not None:
                raise UserError("teacher_logits were given without labels: the loss needs both")
            return None
        problem_type = self.config.problem_type
        if problem_type in ("regression", "multi_label_classification"):
            if distillation_logits is not None or teacher_logits is not None:
                raise UserError(
                    f"config.problem_type is {problem_type!r}, but distillation is for images with one label each: "
                    "use DeiTForImageClassification, without a teacher"
                )
            return self.loss_function(labels, cls_logits, self.config)
        soft = labels.is_floating_point()
        if labels.shape != (cls_logits.shape if soft else cls_logits.shape[:1]):
            raise UserError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)} for logits {tuple(cls_logits.shape)}; "
                "expected (batch,) integers or (batch, classes) probabilities"
            )
        # On a GPU, reading the labels would make the host wait; the loss itself asserts their range there.
        if not soft and labels.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in labels.aminmax())
            if low < 0 or high >= cls_logits.shape[1]:
                raise UserError(
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
        config: the network to build.
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
            output_attentions: also return `(batch, heads, tokens, tokens)` weights per layer, computed eagerly.
            output_hidden_states: also return `(batch, tokens, width)` before the first and after each layer, unnormed.
            prefix_only: return only the class and the distillation token. The last layer then computes no other
                tokens, which saves nearly a twelfth of the work, unless its outputs are recorded or hooked.

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
        if prefix_only and not any(all_recorded.values()) and not any(map(has_foreign_hooks, last.modules())):
            recorded["num_outputs"] = self.config.num_prefix_tokens
        hidden_states = last(hidden_states, **recorded)
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class DeiTForImageClassification(DeiTPreTrainedModel):
    """One linear head on the class token.

    With `use_distillation_token=True` (the default) the model is that of stock's class of this name, which loads its
    checkpoints. Without, the model is the plain DeiT of Table 1, in memory and on disk a ViT (`model.vit`), and stock
    loads its checkpoints as `ViTForImageClassification`.
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
                of `"regression"` or `"multi_label_classification"` selects stock's loss and labels.
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
    """Output of the two-head classifier.

    Args:
        loss: float32 scalar; None without labels.
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

    The model does not contain the teacher. Stock's class of this name loads the checkpoints of this class, with equal
    `cls_logits` and `distillation_logits`; stock's `logits` are the mean of the two, for every `head_fusion`.
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
            raise UserError(
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
