"""Batch norm folding: multiplies the batch norms of a frozen convnet into the convolutions before them.

In evaluation a batch norm scales and shifts each channel, which the preceding convolution can do itself. The network's
outputs stay the same, and one pass over each activation is saved.

Source: torch.nn.utils.fusion for the arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


# Largest accepted change of a logit, relative to the largest logit: above rounding, far below a wrongly folded norm.
TOLERANCE = 1e-3


@torch.no_grad()
def fold_batch_norms(model: nn.Module, answer: Callable[[], Tensor]) -> int:
    """Fold batch norms in place; a model whose logits would change is left unchanged.

    Folds each pair of `nn.Conv2d` and `nn.BatchNorm2d` that runs exactly once, directly in sequence. timm's batch
    norms with an activation keep the activation.

    Args:
        model: model in evaluation mode; a model with any parameter that is not float32 is left unchanged.
        answer: function that returns the model's logits for the same images, not blank, at each call.

    Returns:
        The number of folded batch norms.
    """
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if not has_norms or any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return 0
    with torch.backends.cudnn.flags(allow_tf32=False):
        pairs, before = _pairs(model, answer)
        kept: dict[str, Any] = {name: model.get_submodule(name) for pair in pairs for name in pair}
        for convolution, norm in pairs:
            model.set_submodule(convolution, fuse_conv_bn_eval(kept[convolution], kept[norm]))
            model.set_submodule(norm, _what_is_left_of(kept[norm]))
        # A convolution's output may also be used by something other than its norm, which no hook notices.
        if not pairs or (answer() - before).abs().max() <= TOLERANCE * before.abs().max():
            return len(pairs)
        for name, module in kept.items():
            model.set_submodule(name, module)
        return 0


def _pairs(model: nn.Module, answer: Callable[[], Tensor]) -> tuple[list[tuple[str, str]], Tensor]:
    """Return the names of the convolutions and norms to fold, found by hooks in one forward pass, and its logits."""
    calls: Counter[str] = Counter()
    results: dict[int, tuple[str, Tensor]] = {}
    pairs: list[tuple[str, str]] = []

    def see_convolution(name: str, result: Any) -> None:
        calls[name] += 1
        results[id(result)] = name, result  # the tensor is kept, so that no other tensor gets the same id

    def see_norm(name: str, pixels: Tensor) -> None:
        calls[name] += 1
        if id(pixels) in results:
            pairs.append((results[id(pixels)][0], name))

    handles = []
    for name, module in model.named_modules():
        if _is_watched(module):
            continue
        if type(module) is nn.Conv2d:
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: see_convolution(name, out)))
        elif isinstance(module, nn.BatchNorm2d) and _can_be_left(module):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: see_norm(str(name), args[0])))
    try:
        logits = answer()
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1], logits


def _is_watched(module: nn.Module) -> bool:
    """Return True if the module has hooks or a replaced forward, so that folding could break other code."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _can_be_left(norm: nn.BatchNorm2d) -> bool:
    with_activation = hasattr(norm, "drop") and hasattr(norm, "act")  # timm/layers/norm_act.py
    return norm.running_mean is not None and (type(norm) is nn.BatchNorm2d or with_activation)


def _what_is_left_of(norm: Any) -> nn.Module:
    return nn.Identity() if type(norm) is nn.BatchNorm2d else nn.Sequential(norm.drop, norm.act)
