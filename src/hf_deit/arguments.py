"""Arguments shared by the scripts: the images, the student and the teacher."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .errors import UserError


# A name on the Hub: `owner/name`.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
Affects = Literal["views", "weights", "machine"]
# What people set first, in the order of `--help`.
Heading = Literal["data", "model", "teacher", "training", "output"]


class OptionHelp(str):
    """Help text of an option, with attributes that record what the option affects and where `--help` lists it.

    The attributes sit on the text because HfArgumentParser passes every entry of a field's metadata to argparse, and
    argparse rejects entries that it does not know.
    """

    affects: Affects
    heading: Heading | None


def option(default: Any, text: str, *, affects: Affects = "weights", heading: Heading | None = None) -> Any:
    """Build a field of a settings dataclass.

    Args:
        default: default value, or a function without arguments that returns it.
        text: help text of the option, as printed by `--help`.
        affects: what changes with the option's value: the "views" (which pixels are shown when, and therefore the
            weights too), the "weights", or only the "machine" (speed, memory, files, logs). Model cards, the
            comparison of settings on resume, recorded teacher outputs and sweeps read `affects`.
        heading: heading under which `--help` lists the option. None: only `--help-all` lists it.
    """
    metadata = {"help": OptionHelp(text)}
    metadata["help"].affects = affects
    metadata["help"].heading = heading
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def names_affecting(kind: type, *affects: Affects) -> list[str]:
    """Return the names of the fields of `kind` that affect any of `affects`, in declaration order."""
    return [item.name for item in fields(kind) if getattr(item.metadata.get("help"), "affects", None) in affects]


@dataclass
class DataArguments:
    """The images and their size."""

    dataset_name: str = option(
        "imagenet-1k",
        "Registry name, Hub id, or directory of images or parquet files.",
        affects="views",
        heading="data",
    )
    data_dir: str | None = option(
        None,
        "Directory of the registered dataset. Default: download the dataset from the Hub.",
        affects="views",
    )
    category_level: str | None = option(
        None,
        "iNaturalist only: category level of the classes, 'kingdom' to 'genus' or 'name' (species; default).",
        affects="views",
    )
    streaming: bool = option(
        False,
        "Read the training images from parquet files during training, without downloading the dataset.",
        affects="views",
    )
    image_column: str | None = option(
        None, "Column of the images. Default: found from the column types.", affects="views"
    )
    label_column: str | None = option(
        None, "Column of the labels. Default: found from the column types.", affects="views"
    )
    train_split: str | None = option(
        None,
        "Split to train on, or a slice such as 'train[:500]'; join several with '+'. Default: the registry's split, "
        "else 'train'.",
        affects="views",
        heading="data",
    )
    eval_split: str | None = option(
        None,
        "Split to evaluate on, or a slice such as 'train[-500:]'; join several with '+'. Default: the registry's "
        "split, else validation, val, dev, test, ...; if there is none, see eval_fraction.",
        affects="machine",
        heading="data",
    )
    eval_fraction: float = option(
        0.15,
        "Without a split to evaluate on: share of each class that is held out of the training images, in [0, 1). The "
        "choice depends on the images alone, not on a seed, so that a teacher, its students and run_eval.py agree. 0: "
        "train on all of them and evaluate nothing.",
        affects="views",
    )
    max_train_samples: int | None = option(
        None,
        "Train on a random subset of this many images (streaming: on the first ones).",
        affects="views",
        heading="data",
    )
    max_eval_samples: int | None = option(None, "Evaluate on a random subset of this many images.", affects="machine")
    image_size: int = option(224, "Side length of the square views, in pixels.", affects="views", heading="data")
    crop_ratio: float | None = option(
        None,
        "Share of the shorter side kept by the centre crop of evaluation. Default: 0.875, but 1 for image_size <= 32 "
        "and >= 384.",
        affects="machine",
    )

    def loading(self) -> dict:
        """Return the keyword arguments of [`load_image_dataset`]."""
        names = {item.name for item in fields(DataArguments)} - {"dataset_name", "image_size", "crop_ratio"}
        return {"name": self.dataset_name} | {name: getattr(self, name) for name in names}


@dataclass
class ModelArguments:
    """The student (a checkpoint or a named size, with fields of DeiTConfig that override either) and the teacher."""

    model_name_or_path: str | None = option(
        None, "DeiT checkpoint to start from: a directory or a Hub id.", heading="model"
    )
    model_size: str | None = option(
        None, "Model with fresh weights: 'tiny', 'small' or 'base' (Table 1).", heading="model"
    )
    use_distillation_token: bool = option(
        True, "Use a distillation token and a second head. False: the plain DeiT.", heading="model"
    )
    hidden_size: int | None = option(None, "Embedding dimension.")
    num_hidden_layers: int | None = option(None, "Number of transformer blocks.")
    num_attention_heads: int | None = option(None, "Number of attention heads.")
    patch_size: int | None = option(None, "Side length of a patch, in pixels.")
    drop_path_rate: float | None = option(
        None, "Stochastic depth rate of the last transformer block, in [0, 1). Paper: 0.1."
    )
    hidden_dropout_prob: float | None = option(
        None, "Dropout after the embeddings and on both branches of a transformer block, in [0, 1). Paper: 0."
    )
    head_fusion: str | None = option(
        None, "How the two heads are combined: 'softmax' (paper), 'logits', 'class' or 'distillation'."
    )
    attn_implementation: str | None = option(
        None, "Attention: 'sdpa', 'eager', 'flash_attention_2' or 'flex_attention'.", affects="machine"
    )
    teacher: str | None = option(
        None,
        "Teacher: directory, Hub id, timm:<name>[?checkpoint=path] or python:<module>:<factory>; separate several "
        "with commas.",
        heading="teacher",
    )
    teacher_recipe: str | None = option(
        None,
        "Recipe that trains the teacher, beside this recipe or one of the package; it runs first if its output_dir is "
        "missing. Used only if `teacher` is unset.",
        heading="teacher",
    )

    def config_overrides(self) -> dict:
        """Return the fields of DeiTConfig that were set."""
        elsewhere = {"model_name_or_path", "model_size", "use_distillation_token", "attn_implementation"}
        names = {item.name for item in fields(self)} - elsewhere - {"teacher", "teacher_recipe"}
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class ClassifierArguments:
    """The teacher that run_teacher.py trains."""

    model_name_or_path: str = option(
        "timm:regnety_160",
        "Teacher to train: timm:<architecture> with fresh weights, or a directory or Hub id to fine-tune.",
        heading="model",
    )
    model_args: dict | str | None = option(
        None, "Arguments of timm.create_model, as a YAML or JSON mapping.", heading="model"
    )

    def __post_init__(self):
        if isinstance(self.model_args, str):
            self.model_args = json.loads(self.model_args)


def check_places(args: Any) -> None:
    """Refuse a directory of images that is not there; nothing is imported that could load it.

    Args:
        args: anything with the attributes `dataset_name` and `data_dir`.

    Raises:
        UserError: `data_dir` is no directory, or `dataset_name` is a path and nothing is there.
    """
    if args.data_dir is not None and not Path(args.data_dir).expanduser().is_dir():
        raise UserError(f"data_dir is {args.data_dir!r}, which is not a directory; check the path")
    name = str(args.dataset_name)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path and "://" not in name and not Path(name).expanduser().exists():
        raise UserError(
            f"dataset {name!r} could not be loaded: it is no local directory, and names on the Hub have the form "
            "owner/name. Check the path; a relative one begins in the current directory"
        )


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def words(value: str | Sequence[str] | None) -> list[str]:
    """Split a list that a user wrote with commas. Blanks around a comma are dropped, blanks inside a word are kept.

    Args:
        value: `"a, b"`, or several such texts (`["a,b", "c"]`, as `--key a,b c` on a command line or a YAML list
            arrives); None is an empty list.
    """
    values = [value] if isinstance(value, str) else value or []
    return [word.strip() for text in values for word in str(text).split(",") if word.strip()]
