"""What the speed benchmarks share: one network in three libraries with the same weights, fair turns, one table.

hf_deit's, timm's and stock Transformers' two-headed DeiT get equal weights, so that their results can be compared
before their speed is. A contestant is a step to be called again and again; contestants take turns, so that a machine
which slows down slows all of them.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import timm
import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_deit import DeiTConfig, DeiTForImageClassificationWithTeacher


# tiny, small and base are Table 1's; "cpu" is the small scale's, for 32 pixels.
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
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}  # dense bfloat16, NVIDIA's data sheets
# PyTorch's operations that multiply matrices, attention's fused ones among them: what no library can leave out.
MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product")


LIBRARIES = ("hf_deit", "timm", "stock")


transformers.utils.logging.disable_progress_bar()  # of files of a few megabytes


@dataclass(frozen=True)
class Peer:
    """A library's network, and how it is asked for the logits of both heads in training, or of one answer."""

    model: nn.Module
    two_heads: Callable[[Tensor], tuple[Tensor, Tensor]]
    answer: Callable[[Tensor], Tensor]


def model_fields(size: str) -> dict[str, int]:
    """The fields of our configuration."""
    fields = DEFAULTS | SIZES[size]
    return fields | {"intermediate_size": 4 * fields["hidden_size"]}


def build_peers(size: str, drop_path_rate: float, device: torch.device) -> dict[str, Peer]:
    """The three, with the same weights. Stock has no stochastic depth: it is left out where there shall be some."""
    fields = model_fields(size)
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
        model.set_distilled_training(True)  # two answers while it trains, their mean otherwise
        return Peer(model, model, model)

    def two_heads(pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(pixel_values=pixels)
        return outputs.cls_logits, outputs.distillation_logits

    return Peer(model, two_heads, lambda pixels: model(pixel_values=pixels).logits)


def make_pixels(size: str, batch_size: int, device: torch.device) -> Tensor:
    side = model_fields(size)["image_size"]
    return torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


def autocast(device: torch.device):
    """bfloat16 on a GPU; float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# Turns


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


def matrix_product_share(step: Callable[[], object], calls: int = 3) -> float:
    """Of the time of a step on a CPU, that within matrix products and fused attention, forward and backward."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(calls):
            step()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    products = (key for key in times if key.startswith("aten::") and any(name in key for name in MATRIX_PRODUCTS))
    return sum(times[key] for key in products) / sum(times.values())


def compare(
    facts: Mapping,
    new_step: Callable[[str, Peer, bool], Callable[[], Tensor]],
    device: torch.device,
    rounds: int,
    compiled: bool,
    drop_path_rate: float = 0.0,
) -> list[dict]:
    """The rows of one network: each library's step in turns, eager and, if wished, compiled.

    Args:
        facts: what the rows are of, "size" and "batch" among them.
        new_step: (library, its network, whether to compile it) -> a step, which returns what the libraries agree on.
    """
    times, shares = {}, {}
    for mode in ["eager", "compiled"][: 1 + compiled]:
        peers = build_peers(facts["size"], drop_path_rate, device)
        steps = {name: new_step(name, peer, mode == "compiled") for name, peer in peers.items()}
        if not drop_path_rate:  # the same work, or the comparison is of nothing
            results = {name: step().detach().float() for name, step in steps.items()}
            for result in results.values():
                bound = 0.05 if device.type == "cuda" else 1e-4
                torch.testing.assert_close(result, results["hf_deit"], rtol=0, atol=bound)
        times[mode] = take_turns(steps, rounds, device)
        if mode == "eager":
            with FlopCounterMode(display=False) as counter:  # of timm's, which leaves nothing out
                steps["timm"]()
        if device.type == "cpu":
            shares[mode] = matrix_product_share(steps["hf_deit"])
        del peers, steps
        release()
    return speed_rows({**facts, "flops": counter.get_total_flops()}, times, shares, facts["batch"])


# The table


def speed_rows(
    facts: Mapping, times: Mapping[str, Mapping[str, list[float]]], shares: Mapping[str, float], images: int
) -> list[dict]:
    """One row a mode, and, where there are several, one in which each library has its best.

    Args:
        facts: what the row is of.
        times: mode -> library -> seconds of each round.
        shares: mode -> share of matrix products in our step, where that is known.
        images: in a step.
    """
    if len(times) > 1:
        libraries = next(iter(times.values()))
        best = {name: min((mode[name] for mode in times.values()), key=median) for name in libraries}
        times = {**times, "best of each": best}
    return [
        {**facts, "mode": mode, "images": images, "seconds": seconds, "matrix_product_share": shares.get(mode)}
        for mode, seconds in times.items()
    ]


def print_header(facts: Iterable[str]) -> None:
    columns = [*facts, "mode", *LIBRARIES, "times timm's", "times stock's", "limit", "MFU"]
    print(f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), sep="\n", flush=True)


def print_row(row: Mapping, facts: Iterable[str], device: torch.device) -> None:
    """Images/s; how many times the peers' speed; the limit of that beside timm; the share of the GPU's peak."""
    seconds = row["seconds"]
    cells = [str(row[name]) for name in (*facts, "mode")]
    cells += [shown(seconds[name], row["images"]) if name in seconds else "" for name in LIBRARIES]
    cells += [f"{times_as_fast(seconds, name):.3f}" if name in seconds else "" for name in LIBRARIES[1:]]
    share, peak = row["matrix_product_share"], peak_flops(device)
    cells.append(f"{times_as_fast(seconds, 'timm') / share:.2f}" if share else "")
    cells.append(f"{row['flops'] / median(seconds['hf_deit']) / peak:.1%}" if peak else "")
    print(f"| {' | '.join(cells)} |", flush=True)


def times_as_fast(seconds: Mapping[str, list[float]], peer: str) -> float:
    """As the peer: the median of the rounds' ratios, for the two of a round have met the same machine."""
    return median(theirs / ours for theirs, ours in zip(seconds[peer], seconds["hf_deit"], strict=True))


def shown(times: list[float], images: int) -> str:
    """Images per second: the median, and the slowest and fastest round."""
    return f"{images / median(times):.1f} ({images / max(times):.1f} - {images / min(times):.1f})"


def peak_flops(device: torch.device) -> float | None:
    """Multiplications and additions a second in bfloat16, where the device is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
