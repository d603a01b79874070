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
from peers import SIZES, Peer, autocast, compare, make_pixels, print_header, print_row
from torch import Tensor

from hf_deit.paper.machine import describe_machine


FACTS = ("size", "batch")


def answering(peer: Peer, pixels: Tensor, compiled: bool) -> Callable[[], Tensor]:
    peer.model.eval()
    answer = torch.compile(peer.answer) if compiled else peer.answer

    @torch.inference_mode()
    def step() -> Tensor:
        with autocast(pixels.device):
            return answer(pixels)

    return step


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
            pixels = make_pixels(size, batch_size, device)
            found = compare(
                {"size": size, "batch": batch_size},
                lambda name, peer, compiled, pixels=pixels: answering(peer, pixels, compiled),
                device,
                args.rounds,
                args.compile,
            )
            for row in found:
                print_row(row, FACTS, device)
            rows += found
            if args.json:  # what is measured stays, if a later size fails
                args.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
