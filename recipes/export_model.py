"""Export a trained model: `python recipes/export_model.py SRC DST`.

SRC is a directory or Hub id of a DeiT or ViT classifier with its image processor, ours or stock's. DST is a new file:
`.onnx`, or `.pt2` for torch.export.load. It is compared with PyTorch before this ends.
"""

import argparse
from pathlib import Path

from hf_deit import export_model
from hf_deit.errors import run_script
from hf_deit.models.export import load_for_export


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST", type=Path)
    args = parser.parse_args(argv)
    if args.destination.exists():
        parser.error(f"{args.destination} exists already")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    model, processor = load_for_export(args.source)
    difference = export_model(model, processor, args.destination)
    size, classes = args.destination.stat().st_size / 1e6, model.config.num_labels
    print(f"{args.destination}: {size:.1f} MB, {classes} classes, max |logit - PyTorch's| {difference:.1e}")


if __name__ == "__main__":
    run_script(main)
