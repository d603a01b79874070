"""A recipe: flat YAML and the command line, together the dataclasses of a run.

Every key is a field of one of the dataclasses, on both sides; the command line wins. A recipe is data: nothing in it
is executed, and a key nobody knows is refused.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from .errors import UserError


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
    except (ValueError, ImportError) as error:  # what TrainingArguments itself refuses is the user's to mend as well
        raise UserError(str(error)) from error
    if unknown:
        raise UserError(f"the command line has {unknown[0]!r}{_did_you_mean(unknown[0].lstrip('-'), known)}")
    return tuple(instances)


def _read_recipe(path: Path, known: set[str]) -> dict:
    try:
        keys = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {str(path)!r} cannot be read: {error}") from error
    if not isinstance(keys, dict):
        raise UserError(f"recipe {str(path)!r} holds a {type(keys).__name__}; it must be lines of 'key: value'")
    for key in keys:
        if key not in known:
            raise UserError(f"recipe {str(path)!r} has the key {key!r}{_did_you_mean(str(key), known)}")
        if re.search(r"(^|[\s,'\"\[])python:", str(keys[key])):
            raise UserError(
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
