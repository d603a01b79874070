"""What the speed benchmarks share: one network in three libraries with the same weights, and fair turns.

hf_deit's, timm's and stock Transformers' two-headed DeiT get equal weights, so that their losses can be compared
before their speed is. A contestant is a step to be called again and again; contestants take turns, so that a machine
which slows down slows all of them.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import timm
import torch
import transformers
from torch import Tensor, nn

from hf_deit import DeiTConfig, DeiTForImageClassificationWithTeacher


# tiny, small and base are Table 1's; "cpu" is the quickstart's, for 32 pixels.
SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_attention_heads": 12},
    "cpu": {
        **{"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 4},
        **{"image_size": 32, "patch_size": 8, "num_labels": 10},
    },
}
DEFAULTS = {"num_hidden_layers": 12, "image_size": 224, "patch_size": 16, "num_labels": 1000}


@dataclass(frozen=True)
class Peer:
    """A library's network, and how it is asked for the logits of both heads in training, or of one answer."""

    model: nn.Module
    two_heads: Callable[[Tensor], tuple[Tensor, Tensor]]
    answer: Callable[[Tensor], Tensor]


def build_peers(size: str, drop_path_rate: float, device: torch.device) -> dict[str, Peer]:
    """The three, with the same weights. Stock has no stochastic depth: it is left out where there shall be some."""
    fields = DEFAULTS | SIZES[size]
    twin = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=fields["image_size"],
        patch_size=fields["patch_size"],
        embed_dim=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_classes=fields["num_labels"],
        drop_path_rate=drop_path_rate,
    )
    fields["intermediate_size"] = 4 * fields["hidden_size"]
    ours = DeiTForImageClassificationWithTeacher(
        DeiTConfig(**fields, drop_path_rate=drop_path_rate, head_fusion="logits")
    )
    heads = fields["num_attention_heads"]
    weights = DeiTForImageClassificationWithTeacher.from_original(twin.state_dict(), num_attention_heads=heads)
    ours.load_state_dict(weights.state_dict())
    models = {"hf_deit": ours, "timm": twin}
    if not drop_path_rate:
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(folder)
            models["stock"] = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(folder)
    return {name: _peer(model.to(device), name) for name, model in models.items()}


def _peer(model: nn.Module, name: str) -> Peer:
    if name == "timm":
        model.set_distilled_training(True)
        return Peer(model, model, model)

    def two_heads(pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(pixel_values=pixels)
        return outputs.cls_logits, outputs.distillation_logits

    return Peer(model, two_heads, lambda pixels: model(pixel_values=pixels).logits)


def take_turns(steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seconds: float = 0.3):
    """Seconds a call of each step, round by round: in a round each is called for about `seconds`."""

    def timed(step: Callable, times: int) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            step()
        synchronize(device)
        return (time.perf_counter() - begin) / times

    calls = {}
    for name, step in steps.items():
        timed(step, 2)
        calls[name] = max(1, round(seconds / timed(step, 1)))
    results = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            results[name].append(timed(step, calls[name]))
    return results


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Between two groups of contestants, what the first has cached would be missing for the second."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shown(times: list[float], images: int) -> str:
    """Images per second: the median, and the slowest and fastest round."""
    return f"{images / median(times):.1f} ({images / max(times):.1f} - {images / min(times):.1f})"
