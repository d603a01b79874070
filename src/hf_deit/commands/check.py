"""Check a dataset: load it as a run would, without training, and print what was found."""

from __future__ import annotations

from collections.abc import Sequence

from ..arguments import DataArguments
from ..recipe import parse_recipe


def main(argv: Sequence[str]) -> str:
    """Load the dataset, check its labels and print the block that run_distill.py prints before training.

    Args:
        argv: the dataset or a recipe (`.yaml`) of run_distill.py first, then options; without the script's name.

    Returns:
        The printed text.

    Raises:
        ValueError: a run could not use the dataset; see [`load_image_dataset`].
    """
    words, kinds = list(argv), [DataArguments]
    if words and words[0].endswith((".yaml", ".yml")):
        from .distill import KINDS  # slow to import, and only a recipe holds more than the options of the images

        kinds = list(KINDS)
    elif words and not words[0].startswith("-"):
        words.insert(0, "--dataset_name")
    data_args = next(args for args in parse_recipe(kinds, words) if isinstance(args, DataArguments))
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from ..data.labels import check_labels
    from ..data.loading import load_image_dataset
    from ..data.summary import summarize

    images = load_image_dataset(**data_args.loading())
    text = str(summary := summarize(images))
    print(text, flush=True)
    for part, rows in images.items():
        check_labels(rows, len(summary.class_names), {"train": "training", "eval": "evaluation"}[part])
    return text
