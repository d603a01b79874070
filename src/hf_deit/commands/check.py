"""Check a dataset: load it as a run would, without training, and print what was found."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..arguments import DataArguments
from ..options.recipe import parse_recipe


def main(argv: Sequence[str] | None = None) -> str:
    """Load the dataset, check its labels and print the block that `distill` prints before training.

    Args:
        argv: command-line arguments, without the program's name; those of this process if None.

    Returns:
        The printed text.

    Raises:
        ValueError: a run could not use the dataset; see [`load_image_dataset`].
    """
    data_args = parse_arguments(sys.argv[1:] if argv is None else argv)
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


def parse_arguments(argv: Sequence[str]) -> DataArguments:
    """Parse the command line: the dataset, or a recipe (`.yaml`) of `distill`, first, then options of the images."""
    words, kinds = list(argv), [DataArguments]
    if words and words[0].endswith((".yaml", ".yml")):
        from .distill import KINDS  # slow to import, and only a recipe holds more than the options of the images

        kinds = list(KINDS)
    elif words and not words[0].startswith("-"):
        words.insert(0, "--dataset_name")
    return next(args for args in parse_recipe(kinds, words) if isinstance(args, DataArguments))
