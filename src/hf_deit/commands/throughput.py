"""Tables 1 and 5, Figure 1: measure the speed of networks.

Measures images per second, parameters, multiply-adds and peak memory of our models, stock Transformers', timm's and
the paper's convnets, which take turns; weights are random, except those of a trained model (`--models
outputs/quickstart`). Writes throughput.json, throughput.md and, if the paper has the accuracies of two or more of the
models, tradeoff.png. For one core: `OMP_NUM_THREADS=1 taskset -c 1 python ...`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD
from ..errors import UserError
from ..evaluation.classifier import load_classifier
from ..models.classifiers import new_classifier
from ..models.configuration_deit import DeiTConfig
from ..models.modeling_deit import DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from ..options.recipe import parse_recipe
from ..paper.machine import describe_machine
from ..paper.model_names import ModelSpec, expand_models
from ..paper.throughput import ThroughputArguments, measure_throughput, throughput_rows, throughput_table
from ..paper.tradeoff import tradeoff_points
from ..plots.tables import plot_tradeoff


KINDS = (ThroughputArguments,)
CLASSES = {number: str(number) for number in range(1000)}  # ImageNet's


def build(spec: str, image_size: int | None = None) -> tuple[nn.Module, int]:
    """Build a network; return it and the side of its images, which is `image_size` where the spec says none."""
    wanted = ModelSpec.parse(spec)
    size = wanted.image_size or image_size
    if wanted.source == "timm":
        return build_timm(wanted.name, size)
    if wanted.source == "trained":
        trained = load_classifier(wanted.name, image_size=size)
        return trained.model.to(memory_format=torch.contiguous_format), trained.image_size
    size = size or 224
    config = DeiTConfig.from_size(
        wanted.name, image_size=size, id2label=CLASSES, use_distillation_token=wanted.distilled
    )
    if wanted.source == "stock":
        return build_stock(config), size
    model_class = DeiTForImageClassificationWithTeacher if wanted.distilled else DeiTForImageClassification
    return model_class(config), size


def build_stock(config: DeiTConfig) -> nn.Module:
    """Build Transformers' own network: for a plain DeiT its ViT, because its DeiT always has two tokens."""
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "image_size", "num_labels")
    fields = {name: getattr(config, name) for name in names}
    if config.use_distillation_token:
        return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**fields))
    return transformers.ViTForImageClassification(transformers.ViTConfig(**fields))


def build_timm(name: str, size: int | None) -> tuple[nn.Module, int]:
    """Build timm's own module at `size`, or at the architecture's own size if `size` is None."""

    def classifier(**model_args) -> Any:
        pixels: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "image_size": size or 224}
        return new_classifier(f"timm:{name}", id2label=CLASSES, **pixels, model_args=model_args or None).timm_model

    model = classifier()
    own_size = model.pretrained_cfg["input_size"][-1]
    if size not in (None, own_size) and model.pretrained_cfg.get("fixed_input_size"):
        model = classifier(img_size=size)
    return model, size or own_size


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure the models that the command line names, and return one row for each."""
    # 1. What to measure
    (args,) = parse_recipe(KINDS, argv)
    specs = expand_models(args.models)
    if args.reference is not None and args.reference not in specs:
        raise UserError(f"reference is {args.reference!r}; it must be one of {', '.join(specs)}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_deit.paper.throughput").setLevel(logging.INFO)
    machine = describe_machine(args.device)

    # 2. Measure
    models = {spec: build(spec, args.image_size) for spec in specs}
    rows = throughput_rows(measure_throughput(models, args), args.reference)

    # 3. Report
    table = throughput_table(rows, args)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "settings": asdict(args) | {"batch_rule": args.rule}, "models": rows}
    (output_dir / "throughput.json").write_text(json.dumps(report, indent=2) + "\n")
    (output_dir / "throughput.md").write_text(table)
    if len(points := tradeoff_points(rows)) > 1:
        plot_tradeoff(points, output_dir / "tradeoff.png", device=str(machine["device"]))
    print(table)
    return rows
