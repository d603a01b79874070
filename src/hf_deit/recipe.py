"""A recipe: flat YAML and the command line, together the dataclasses of a run.

Every key is a field of one of the dataclasses, on both sides; the command line wins. A recipe is data: nothing in it
is executed, and a key nobody knows is refused.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def option(default, text: str):
    """A field of a dataclass of settings; the text is what `--help` says of it."""
    return field(default=default, metadata={"help": text})


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
        names = (
            *("data_dir", "category_level", "streaming", "image_column", "label_column", "train_split", "eval_split"),
            *("max_train_samples", "max_eval_samples"),
        )
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
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "patch_size",
            "drop_path_rate",
            "hidden_dropout_prob",
            "head_fusion",
        )
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


def parse_recipe(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, default_recipe: str | Path | None = None
) -> tuple:
    """`[recipe.yaml] [--key value ...]` to one instance of each dataclass.

    Args:
        dataclass_types: the run's dataclasses; no field name may stand in two of them.
        argv: the words after the script's name; `sys.argv[1:]` if None.
        default_recipe: used where the first word is no recipe.

    Raises:
        ValueError: a recipe that cannot be read, an unknown key (the nearest known one is named), a value that a
            dataclass refuses. A value of the wrong type ends the program with argparse's message and status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else default_recipe
    known = {item.name for kind in dataclass_types for item in fields(kind) if item.init}
    parser = HfArgumentParser(dataclass_types, usage="%(prog)s [recipe.yaml] [--key value ...]", allow_abbrev=False)
    if recipe is not None:
        parser.set_defaults(**_read_recipe(Path(recipe), known))
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # what TrainingArguments itself refuses is the user's to mend as well
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"the command line has {unknown[0]!r}{_did_you_mean(unknown[0].lstrip('-'), known)}")
    return tuple(instances)


def _read_recipe(path: Path, known: set[str]) -> dict:
    try:
        keys = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {str(path)!r} cannot be read: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"recipe {str(path)!r} holds a {type(keys).__name__}; it must be lines of 'key: value'")
    for key in keys:
        if key not in known:
            raise ValueError(f"recipe {str(path)!r} has the key {key!r}{_did_you_mean(str(key), known)}")
        if re.search(r"(^|[\s,'\"\[])python:", str(keys[key])):
            raise ValueError(
                f"recipe {str(path)!r} names code to run, {keys[key]!r}, and a recipe is data: give it on the command "
                f"line, --{key} {keys[key]}"
            )
    return {key: _as_typed(value) for key, value in keys.items()}


def _as_typed(value):
    """What argparse would have read on the command line, so that both go through the same conversion.

    YAML has opinions of its own: PyYAML reads 5e-4 as a string, and a whole number as an int where a float is meant.
    """
    if isinstance(value, dict):
        return json.dumps(value)
    return value if value is None or isinstance(value, list) else str(value)


def _did_you_mean(word: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f", which is no key; did you mean {nearest[0]!r}?" if nearest else ", which is no key; --help lists them"


def exit_clearly(main: Callable[[], object]) -> None:
    """Runs a script's `main`. An error that hf_deit itself raises was written for the user: one line, exit status 1.

    So is what the machine does to a run: a full disk, a loader's worker that is killed. Any other error is a bug, here
    or below, and keeps its traceback. What a worker raises counts like what is raised in this process.
    """
    try:
        main()
    except SystemExit as error:
        if message := getattr(error, "message", None):
            print(message, file=sys.stderr, flush=True)
        raise
    except Exception as error:
        try:  # PyTorch tells of a worker's death wherever the signal finds us: here too, or on the way into `suppress`
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except RuntimeError:
            pass
        if (message := _done_by_the_machine(error) or _written_for_the_user(error)) is None:
            raise
        sys.exit(f"error: {message}")


def _done_by_the_machine(error: Exception) -> str | None:
    if isinstance(error, ValueError):  # ours, and more to the point
        return None
    text, again = str(error), "Start the same command again: it goes on from its last checkpoint"
    if os.strerror(errno.ENOSPC) in text:  # safetensors has a type of its own for it
        return f"the disk is full ({text.splitlines()[0]}). Free some space. {again}"
    # A worker that dies is noticed by PyTorch, or where its answer is taken from its queue.
    dies = re.match(r"DataLoader worker \(pid.*", text)
    files = [Path(frame.filename).parts[-2:] for frame in traceback.extract_tb(error.__traceback__)]
    if dies or (isinstance(error, (OSError, EOFError)) and ("multiprocessing", "queues.py") in files):
        return (
            f"a loader worker died ({dies[0].strip() if dies else type(error).__name__}). Usual causes: no memory "
            f"left (see dmesg), a full /dev/shm, a crash of a library (dataloader_num_workers: 0 shows it). {again}"
        )
    return None


def _written_for_the_user(error: Exception) -> str | None:
    if not isinstance(error, (ValueError, FloatingPointError)):
        return None
    here = traceback.extract_tb(error.__traceback__)[-1].filename, str(error)
    file, message = _raised_in_worker(str(error)) or here
    return message if Path(__file__).parent in Path(file).parents else None


def _raised_in_worker(text: str) -> tuple[str, str] | None:
    """File and message of the error that PyTorch hands on from a worker, with the traceback as its text."""
    if not re.match(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback", text):
        return None
    *_, last_frame = re.finditer(r'^  File "(.+)", line \d+.*\n(?:    .*\n)*', text, re.MULTILINE)
    return last_frame[1], text[last_frame.end() :].partition(": ")[2].strip()
