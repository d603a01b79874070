"""Does bfloat16 pay on this CPU? `python benchmarks/bf16.py [--sizes tiny small] [--json file]`.

Our own network's training step and its answer to a ready batch, in float32 and under autocast to bfloat16, as `bf16:
true` sets it, in turns: images/s, the median and (slowest - fastest round), and the median of the rounds' ratios.
Instructions for bfloat16 (AVX512_BF16, AMX) are named where the system says so; without them PyTorch converts.
How far the results are apart is shown as the largest difference of the logits over the largest logit.
`--accuracy` also trains the quickstart in both, as a user would, and shows accuracy and seconds.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from peers import SIZES, build_peers, make_pixels, release, shown, take_turns
from train_step import DROP_PATH, make_batch, new_optimizer, our_loss

from hf_deit.paper.machine import describe_machine


INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")
KINDS = {"float32": None, "bfloat16": torch.bfloat16}


def instructions() -> list[str] | None:
    """Those for bfloat16 that the CPU has; None where the system does not say."""
    with suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return [name for name in INSTRUCTIONS if flags is not None and name in flags[1].split()]
    return None


def autocast(dtype: torch.dtype | None):
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def training_step(size: str, batch_size: int, dtype: torch.dtype | None) -> Callable[[], None]:
    peer = build_peers(size, DROP_PATH, torch.device("cpu"))["hf_deit"]
    pixels, labels, decisions = make_batch(size, batch_size, torch.device("cpu"))
    optimizer = new_optimizer(peer.model.train())

    def step() -> None:
        optimizer.zero_grad()
        with autocast(dtype):
            heads = peer.two_heads(pixels)
        our_loss(*heads, labels, decisions).backward()
        optimizer.step()

    return step


def answer(size: str, batch_size: int, dtype: torch.dtype | None) -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)  # the same weights in both
    peer = build_peers(size, 0.0, torch.device("cpu"))["hf_deit"]
    peer.model.eval()
    pixels = make_pixels(size, batch_size, torch.device("cpu"))

    @torch.inference_mode()
    def step() -> torch.Tensor:
        with autocast(dtype):
            return peer.answer(pixels).float()

    return step


def compare(size: str, batch_size: int, rounds: int) -> list[dict]:
    rows = []
    for work, new_step in (("training", training_step), ("inference", answer)):
        steps = {name: new_step(size, batch_size, dtype) for name, dtype in KINDS.items()}
        apart = None
        if work == "inference":
            exact, rounded = (step() for step in steps.values())
            apart = ((exact - rounded).abs().max() / exact.abs().max()).item()
        seconds = take_turns(steps, rounds, torch.device("cpu"))
        gain = median(one / other for one, other in zip(seconds["float32"], seconds["bfloat16"], strict=True))
        rows.append(
            {"size": size, "batch": batch_size, "work": work, "seconds": seconds, "gain": gain, "apart": apart}
        )
        release()
    return rows


def quickstart() -> dict[str, dict[str, float]]:
    """Top-1 and the seconds of the training of the quickstart in both; its teacher is trained once."""
    from hf_deit.commands.distill import main as distill

    found = {}
    for name, dtype in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            words = ["--output_dir", folder, "--bf16", str(dtype is not None).lower(), "--use_cpu", "true"]
            words += ["--report_to", "none", "--save_strategy", "no", "--eval_strategy", "no"]
            results = distill([*words, "--disable_tqdm", "true"])
        found[name] = {"top1": results["eval_top1"], "seconds": results["train_runtime"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small", "cpu"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--accuracy", action="store_true", help="train the quickstart in both as well")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    facts = describe_machine("cpu") | {"bfloat16 instructions": instructions()}
    print(facts, "", sep="\n", flush=True)
    print(
        "| size | batch | work | float32 | bfloat16 | bfloat16 is times as fast | logits apart |",
        "|---" * 7 + "|",
        sep="\n",
    )
    results: dict = {"machine": facts, "rows": []}
    for size in args.sizes:
        for batch_size in args.batch_sizes:
            for row in compare(size, batch_size, args.rounds):
                speeds = " | ".join(shown(seconds, batch_size) for seconds in row["seconds"].values())
                apart = "" if row["apart"] is None else f"{row['apart']:.1%}"
                print(
                    f"| {size} | {batch_size} | {row['work']} | {speeds} | {row['gain']:.2f} | {apart} |", flush=True
                )
                results["rows"].append(row)
    if args.accuracy:
        results["quickstart"] = quickstart()
        print("\n| quickstart | top-1 | seconds of training |", "|---|---|---|", sep="\n")
        for name, found in results["quickstart"].items():
            print(f"| {name} | {found['top1']:.4f} | {found['seconds']:.1f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
