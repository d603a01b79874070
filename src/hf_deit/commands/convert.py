"""Convert a checkpoint of a DeiT between the Hub's format, timm's and the authors'.

SRC is a `.safetensors` or `.pth` file of the authors or timm, or a directory or Hub id. DST is a new directory for
`hub`, a `.safetensors` file for `timm`, and for `original` either that or a `.pth` file that the authors' code reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; an existing DST or a wrong suffix ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("destination", metavar="DST", type=Path)
    parser.add_argument("--to", choices=("hub", "timm", "original"), default="hub")
    parser.add_argument("--image_size", type=int, help="resize the positions to images of so many pixels a side")
    parser.add_argument("--class_names", help="text file, one name a line in the order of the classes")
    parser.add_argument("--num_attention_heads", type=int, help="where the width does not tell: not Ti, S, B or ViT-L")
    parser.add_argument("--head_fusion", help="'logits' (the authors' code, default), 'softmax' (the paper), ...")
    parser.add_argument(
        "--crop_ratio", type=float, help="evaluation; if not given 0.875, and 1 up to 32 and from 384 pixels"
    )
    pixels = "per channel, of pixels in [0, 1]: SRC's if it says so, else ImageNet's; many timm vit_* have 0.5 0.5 0.5"
    parser.add_argument("--image_mean", type=float, nargs=3, help=pixels)
    parser.add_argument("--image_std", type=float, nargs=3)
    args = parser.parse_args(argv)
    if args.destination.exists():
        parser.error(f"{args.destination} exists already")
    if args.to == "timm" and args.destination.suffix != ".safetensors":
        parser.error(f"{args.destination}: a file for timm must end in .safetensors")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Convert the checkpoint that the command line names."""
    # 1. Read
    args = parse_arguments(argv)
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from ..augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD, build_eval_transform, build_image_processor
    from ..models.checkpoint_conversion import read_checkpoint, read_class_names, write_original
    from ..models.modeling_deit import DeiTForImageClassification, DeiTForImageClassificationWithTeacher

    fields = {"num_attention_heads": args.num_attention_heads, "head_fusion": args.head_fusion}
    if args.class_names is not None:
        fields["id2label"] = read_class_names(args.class_names)
    fields = {name: value for name, value in fields.items() if value is not None}
    config, weights, image_mean, image_std = read_checkpoint(args.source, **fields)

    # 2. Build, at the size wanted
    distilled = config.use_distillation_token
    model_class = DeiTForImageClassificationWithTeacher if distilled else DeiTForImageClassification
    model: Any = model_class.from_pretrained(None, config=config, state_dict=weights)
    if args.image_size is not None:
        model.resize_position_embeddings(args.image_size)

    # 3. Write
    if args.to == "hub":
        transform = build_eval_transform(model.config.image_size, crop_ratio=args.crop_ratio)
        processor = build_image_processor(transform)
        processor.image_mean = args.image_mean or image_mean or list(IMAGENET_MEAN)
        processor.image_std = args.image_std or image_std or list(IMAGENET_STD)
        model.save_pretrained(args.destination)
        processor.save_pretrained(args.destination)
    else:
        write_original(model.to_original(), args.destination)
    kind = "distilled" if distilled else "plain"
    classes, size = model.config.num_labels, model.config.image_size
    print(f"{args.destination}: {kind} DeiT, {model.num_parameters():,} parameters, {classes} classes, {size} pixels")
