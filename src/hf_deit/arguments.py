"""The arguments that the scripts share: which images, which student, which teacher."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal


Affects = Literal["views", "weights", "machine"]


class OptionHelp(str):
    """The help text of an option, which carries what the option affects.

    HfArgumentParser hands every entry of a field's metadata to argparse, which refuses entries of ours.
    """

    affects: Affects


def option(default: Any, text: str, *, affects: Affects = "weights") -> Any:
    """A field of a dataclass of settings.

    Args:
        default: its default, or a function without arguments that returns it.
        text: what `--help` says of it.
        affects: what another value changes: the "views" (which pixels are shown when, and so also the weights), the
            "weights", or only the "machine" (speed, memory, files, what is logged). Cards, the comparison on resuming,
            records of teacher outputs and sweeps read it.
    """
    metadata = {"help": OptionHelp(text)}
    metadata["help"].affects = affects
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def names_affecting(kind: type, *affects: Affects) -> list[str]:
    """The names of the dataclass's fields that affect one of these, in their order."""
    return [item.name for item in fields(kind) if getattr(item.metadata.get("help"), "affects", None) in affects]


@dataclass
class DataArguments:
    """Which images, and at what size."""

    dataset_name: str = option("imagenet-1k", "Registry name, Hub id, or directory of images or parquet files.")
    data_dir: str | None = option(None, "Where the set of that registry name lies; unset: on the Hub.")
    category_level: str | None = option(
        None, "iNaturalist: what a class is, 'kingdom' ... 'genus' or 'name' (species; default)."
    )
    streaming: bool = option(False, "Read the training images (parquet) while training, without downloading them.")
    image_column: str | None = option(None, "Column of the images, where it cannot be told from the types.")
    label_column: str | None = option(None, "Column of the labels, where it cannot be told from the types.")
    train_split: str | None = option(None, "Split to train on.")
    eval_split: str | None = option(None, "Split to evaluate on.")
    max_train_samples: int | None = option(None, "Train on a random subset of this many images.")
    max_eval_samples: int | None = option(None, "Evaluate on a random subset of this many images.")
    image_size: int = option(224, "Side of the square views, pixels.")
    crop_ratio: float | None = option(
        None,
        "Evaluation: share of the shorter side that the centre crop keeps. Unset: 0.875; 1 up to 32 px and from 384.",
    )

    def loading(self) -> dict:
        """The arguments of [`load_image_dataset`]."""
        names = {item.name for item in fields(DataArguments)} - {"dataset_name", "image_size", "crop_ratio"}
        return {"name": self.dataset_name} | {name: getattr(self, name) for name in names}


@dataclass
class ModelArguments:
    """Which student and which teacher: a checkpoint, or a named size, or the fields of DeiTConfig (they override)."""

    model_name_or_path: str | None = option(None, "DeiT checkpoint to start from: directory or Hub id.")
    model_size: str | None = option(None, "'tiny', 'small' or 'base' (Table 1), with fresh weights.")
    use_distillation_token: bool = option(True, "Two tokens and two heads; false is the plain DeiT.")
    hidden_size: int | None = option(None, "Embedding dimension.")
    num_hidden_layers: int | None = option(None, "Number of blocks.")
    num_attention_heads: int | None = option(None, "Number of attention heads.")
    patch_size: int | None = option(None, "Side of a patch, pixels.")
    drop_path_rate: float | None = option(None, "Stochastic depth of the last block, in [0, 1). Paper: 0.1.")
    hidden_dropout_prob: float | None = option(
        None, "Dropout after the embeddings and on both branches of a block, in [0, 1). Paper: 0."
    )
    head_fusion: str | None = option(None, "'softmax' (paper), 'logits', 'class' or 'distillation'.")
    attn_implementation: str | None = option(None, "'sdpa', 'eager', 'flash_attention_2' or 'flex_attention'.")
    teacher: str | None = option(
        None, "Directory, Hub id, timm:<name>[?checkpoint=path] or python:<module>:<factory>; several with commas."
    )
    teacher_recipe: str | None = option(
        None, "Where teacher is unset: recipe beside run_teacher.py that makes it, run first if its output is absent."
    )

    def config_overrides(self) -> dict:
        """The fields of DeiTConfig that were given."""
        elsewhere = {"model_name_or_path", "model_size", "use_distillation_token", "attn_implementation"}
        names = {item.name for item in fields(self)} - elsewhere - {"teacher", "teacher_recipe"}
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class ClassifierArguments:
    """Which teacher run_teacher.py trains."""

    model_name_or_path: str = option(
        "timm:regnety_160", "timm:<architecture> for fresh weights, or a directory or Hub id to fine-tune."
    )
    model_args: dict | str | None = option(None, "Arguments of timm's create_model, as a mapping (JSON).")

    def __post_init__(self):
        if isinstance(self.model_args, str):
            self.model_args = json.loads(self.model_args)
