"""Batch norms of a frozen convnet, multiplied into the convolutions that they follow.

In evaluation a batch norm scales and shifts each channel, which the convolution before it can do itself: the network
answers the same, without a pass over each of its activations.

Source: torch.nn.utils.fusion for the arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


# Of the largest logit: what other rounding may change, and far below what a wrongly folded norm does.
TOLERANCE = 1e-3


@torch.no_grad()
def fold_batch_norms(model: nn.Module, answer: Callable[[], Tensor]) -> int:
    """Folds in place, or leaves the model as it was where that would change its answer.

    Args:
        model: in evaluation mode; one that is not all float32 is left. Its own `nn.Conv2d` and `nn.BatchNorm2d` are
            folded, those that it calls once and one after the other; timm's batch norms with an activation keep that.
        answer: the model's logits for some images that are not blank, always the same.

    Returns:
        How many were folded.
    """
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    if not has_norms or any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return 0
    with torch.backends.cudnn.flags(allow_tf32=False):
        pairs, before = _pairs(model, answer)
        kept = {name: model.get_submodule(name) for pair in pairs for name in pair}
        for convolution, norm in pairs:
            model.set_submodule(convolution, fuse_conv_bn_eval(kept[convolution], kept[norm]))
            model.set_submodule(norm, _what_is_left_of(kept[norm]))
        # A convolution's result may go to others besides its norm, which no hook sees.
        if not pairs or (answer() - before).abs().max() <= TOLERANCE * before.abs().max():
            return len(pairs)
        for name, module in kept.items():
            model.set_submodule(name, module)
        return 0


def _pairs(model: nn.Module, answer: Callable[[], Tensor]) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of the convolutions and norms to fold, found by watching one answer, and that answer."""
    calls, results, pairs = Counter(), {}, []

    def see_convolution(name: str, result: Tensor) -> None:
        calls[name] += 1
        results[id(result)] = name, result  # kept, so that no other tensor gets its id

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
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: see_norm(name, args[0])))
    try:
        logits = answer()
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1], logits


def _is_watched(module: nn.Module) -> bool:
    """Somebody else's hooks gather, move or watch it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _can_be_left(norm: nn.BatchNorm2d) -> bool:
    with_activation = hasattr(norm, "drop") and hasattr(norm, "act")  # timm/layers/norm_act.py
    return norm.running_mean is not None and (type(norm) is nn.BatchNorm2d or with_activation)


def _what_is_left_of(norm: nn.BatchNorm2d) -> nn.Module:
    return nn.Identity() if type(norm) is nn.BatchNorm2d else nn.Sequential(norm.drop, norm.act)
