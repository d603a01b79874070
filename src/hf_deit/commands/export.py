"""Export a trained model to one file, for ONNX Runtime or torch.export.load.

SRC is a directory or Hub id of a DeiT or ViT classifier with its image processor, ours or stock's. DST is a new file:
`.onnx`, or `.pt2` for torch.export.load. It is compared with PyTorch before this ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; an existing DST ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST", type=Path)
    args = parser.parse_args(argv)
    if args.destination.exists():
        parser.error(f"{args.destination} exists already")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Export the model that the command line names."""
    args = parse_arguments(argv)
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from ..models.export import export_model, load_for_export

    model, processor = load_for_export(args.source)
    difference = export_model(model, processor, args.destination)
    size, classes = args.destination.stat().st_size / 1e6, model.config.num_labels
    print(f"{args.destination}: {size:.1f} MB, {classes} classes, max |logit - PyTorch's| {difference:.1e}")
