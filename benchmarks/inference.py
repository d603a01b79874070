"""One forward pass beside timm's and stock Transformers': `python benchmarks/inference.py [--device cuda] [...]`.

The three libraries' distilled DeiT with the same weights answers the same ready batch (the mean of both heads'
logits), without gradients, in turns: images/s, the median and (slowest - fastest round); ratios, the median of the
rounds'. "Limit" is what the ratio to timm would be if all but our matrix products and the fused attention took no
time, by a profile of the eager step on a CPU. The paper's models beside the convnets, at their best batch:
`recipes/run_throughput.py`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from peers import (
    LIBRARIES,
    SIZES,
    Peer,
    autocast,
    build_peers,
    make_pixels,
    matrix_product_share,
    print_header,
    print_row,
    release,
    speed_rows,
    take_turns,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_deit import describe_machine


FACTS = ("size", "batch")


def answering(peer: Peer, pixels: Tensor, compiled: bool) -> Callable[[], Tensor]:
    peer.model.eval()
    answer = torch.compile(peer.answer) if compiled else peer.answer

    @torch.inference_mode()
    def step() -> Tensor:
        with autocast(pixels.device):
            return answer(pixels)

    return step


def compare(size: str, batch_size: int, modes: list[str], rounds: int, device: torch.device) -> list[dict]:
    pixels, times, share = make_pixels(size, batch_size, device), {}, None
    for mode in modes:
        peers = build_peers(size, 0.0, device)
        steps = {name: answering(peers[name], pixels, mode == "compiled") for name in LIBRARIES}
        logits = {name: step().float() for name, step in steps.items()}
        for name in LIBRARIES:  # the same work, or the comparison is of nothing
            bounds = {"rtol": 0.05, "atol": 0.05} if device.type == "cuda" else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(logits[name], logits["hf_deit"], **bounds)
        times[mode] = take_turns(steps, rounds, device)
        if mode == "eager":
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                peers["timm"].answer(pixels)
            if device.type == "cpu":
                share = matrix_product_share(steps["hf_deit"])
        del peers, steps
        release()
    facts = {"size": size, "batch": batch_size, "flops": counter.get_total_flops(), "matrix_product_share": share}
    return speed_rows(facts, times, batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small", "cpu"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compiled networks too, and the best mode of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device = torch.device(args.device)
    facts, rows = describe_machine(args.device), []
    print(facts, "", sep="\n", flush=True)
    print_header(FACTS)
    for size in args.sizes:
        for batch_size in args.batch_sizes:
            found = compare(size, batch_size, ["eager", "compiled"][: 1 + args.compile], args.rounds, device)
            for row in found:
                print_row(row, FACTS, device)
            rows += found
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
