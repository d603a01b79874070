"""Evaluate checkpoints of hf_deit, stock Transformers and timm, head by head.

A Markdown table goes to the screen and
to `<output>.md`, everything to `<output>.json`. ImageNet's other labels: `--dataset_name imagenet-v2` and
`imagenet-real`, each with its `--data_dir`. Without accelerate it runs in one process.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ..data.loading import load_image_dataset
from ..evaluation.classifier import load_classifier
from ..evaluation.predict import predict
from ..evaluation.report import EvaluationArguments, evaluation_report, evaluation_result, evaluation_table
from ..options.recipe import parse_recipe


KINDS = (EvaluationArguments,)


def main(argv: Sequence[str] | None = None) -> dict:
    """Evaluate the models that the command line names, and return the report that is written as JSON."""
    # 1. What to do
    (args,) = parse_recipe(KINDS, argv)

    # 2. Load the images, and every model before the first one runs: a wrong name ends the program here
    loaded = load_image_dataset(**args.loading(), splits=("eval",))
    images = loaded["eval"]
    label = images.features["label"]
    names = getattr(label, "feature", label).names  # ReaL's labels are lists
    classifiers = [
        load_classifier(
            spec,
            id2label=dict(enumerate(names)),
            image_size=image_size,
            trust_class_order=args.trust_class_order,
        )
        for spec, image_size in itertools.product(args.models or [], args.image_size or [None])
    ]

    # 3. Evaluate
    results = []
    for classifier, crop_ratio in itertools.product(classifiers, args.crop_ratio or [None]):
        start = time.perf_counter()
        predictions = predict(
            classifier, images, crop_ratio=crop_ratio, batch_size=args.batch_size, num_workers=args.num_workers
        )
        results.append(evaluation_result(classifier, predictions, time.perf_counter() - start, names))

    # 4. Report
    command = sys.argv if argv is None else ["-m", "hf_deit", "eval", *argv]
    report = evaluation_report(args, results, num_classes=len(names), command=command, held_out=loaded.held_out)
    if PartialState().is_main_process:
        table = evaluation_table(report, args.heads)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.output}.md").write_text(f"{table}\n", "utf-8")
        Path(f"{args.output}.json").write_text(json.dumps(report, indent=2), "utf-8")
        print(table, f"\neverything is in {args.output}.md and {args.output}.json", sep="\n", flush=True)
    return report
