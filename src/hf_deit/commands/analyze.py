"""Analyse trained models: who disagrees with whom, and where a DeiT looks.

Decisions: Table 4, accuracy and agreement with the teacher by class, confusions. Inside a DeiT: similarity of its two
tokens, attention, patch filters and positions. Every picture is written to `output_dir`, with its numbers as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from ..data.loading import load_image_dataset
from ..options.recipe import parse_recipe
from ..paper.analysis import (
    AnalysisArguments,
    compare_decisions,
    disagreement_table,
    ground_truth,
    look_inside,
    predict_with_all,
    write_result,
)
from ..plots.analysis import (
    plot_attention,
    plot_attention_heads,
    plot_by_class,
    plot_confusion,
    plot_disagreement,
    plot_patch_filters,
    plot_position_similarity,
    plot_token_similarity,
)


KINDS = (AnalysisArguments,)
# The pictures of each subject, by the suffix of their names.
PLOTS = {
    "disagreement": {"": plot_disagreement},
    "accuracy_by_class": {"": plot_by_class},
    "teacher_agreement_by_class": {"": plot_by_class},
    "confusion": {"": plot_confusion},
    "attention": {"": plot_attention, "_heads": plot_attention_heads},
    "filters": {"": plot_patch_filters},
    "positions": {"": plot_position_similarity},
    "token_similarity": {"": plot_token_similarity},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse the models that the command line names, and write pictures and numbers to `output_dir`."""
    # 1. What to do
    (args,) = parse_recipe(KINDS, argv)
    folder = Path(args.output_dir)
    images = load_image_dataset(**args.loading(), splits=("eval",))["eval"]
    truth = ground_truth(images["label"])
    class_names = list(images.features["label"].names)

    # 2. Predict, compare the decisions and look inside the networks
    models = predict_with_all(args, images, class_names)
    decisions = compare_decisions(models, truth, class_names)
    for result in chain(decisions, look_inside(models, images, class_names, args)):
        write_result(folder, result, PLOTS[result.subject])
        if result.subject == "disagreement":
            table = disagreement_table(**result.numbers)
            (folder / "disagreement.md").write_text(table, "utf-8")
            print(table)
    print(f"pictures and numbers are in {folder}")
