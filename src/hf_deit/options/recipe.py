"""Read the settings of a run from a recipe (flat YAML) and the command line.

Every key of the recipe and every option of the command line is a field of one of the run's dataclasses; the command
line overrides the recipe. A recipe is data: none of its values is executed, and an unknown key is an error.

Everything that can be refused without PyTorch's help is refused before it is imported, because importing
TrainingArguments alone takes longer than all of that.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import UserError, first_line, printable
from ..files import read_file
from .command_line import ShortHelp, did_you_mean
from .late_imports import late_imports
from .own_options import OwnOptions
from .stock_options import FirstOptions, names_in_transformers


if TYPE_CHECKING:
    from transformers import HfArgumentParser


# The recipes that come with the package: inside it where it was installed, beside `src` in a checkout.
PACKAGE = Path(__file__).parents[1]
RECIPES = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parents[1] / "recipes"


def parse_recipe(
    dataclass_types: Sequence[Any],
    argv: Sequence[str] | None = None,
    default_recipe: str | Path | None = None,
    replaced_by: Mapping[str, Collection[str]] | None = None,
    usage: str = "[recipe.yaml]",
    look_over: Callable[[argparse.Namespace], object] | None = None,
) -> tuple:
    """Parse `[recipe.yaml] [--key value ...]` into one instance of each dataclass.

    Args:
        dataclass_types: the run's dataclasses; no two of them may share a field name. [`OwnOptions`] stands for
            [`DistillationConfig`], which is imported, and PyTorch with it, once nothing else can be refused.
        argv: the command line after the program's name; `sys.argv[1:]` if None. [`find_recipe`] finds its recipe.
        default_recipe: file to use if the command line does not begin with a recipe. One line reports that it is used.
        replaced_by: for an option of the command line, the keys of the default recipe that then do not apply.
        usage: what `--help` shows before the keys.
        look_over: gets the values before that import, to refuse what can be refused without it.

    Raises:
        ValueError: the recipe cannot be read, a key is unknown (the message suggests the nearest known key), or a
            dataclass rejects a value. A value of the wrong type ends the program with argparse's message and status 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    named = argv.pop(0) if argv and not argv[0].startswith("-") else None
    helps = bool({"-h", "--help", "--help-all"} & set(argv))  # which shows the defaults, or those of a named recipe
    recipe = (None if helps else default_recipe) if named is None else find_recipe(named)
    known = {item.name for kind in dataclass_types for item in fields(kind) if item.init}
    if OwnOptions in dataclass_types:
        known |= names_in_transformers()
    usage = f"%(prog)s {usage} [--key value ...]"
    keys = {}
    if recipe is not None:
        keys = _read_recipe(Path(recipe), known)
        options = {word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")}
        if named is None and options & known:
            superseded = {key for option, others in (replaced_by or {}).items() if option in options for key in others}
            keys = {key: value for key, value in keys.items() if key not in superseded}
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"no recipe is named: the settings of {Path(recipe).name} apply where the command line gives none"
                )
    if OwnOptions in dataclass_types and "--help-all" not in argv:
        early = _parser([*dataclass_types, FirstOptions], keys, usage)
        values, unknown = early.parse_known_args(argv)
        for word in unknown:
            name = word.partition("=")[0].lstrip("-").replace("-", "_")
            if word.startswith("--") and not {name, name.removeprefix("no_")} & known:
                raise _unknown(word, known)
        if look_over is not None:
            look_over(values)
    parser = _parser(_complete(dataclass_types), keys, usage)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise _unknown(unknown[0], known)
    try:
        return parser.parse_dict(vars(values))
    except (ValueError, ImportError) as error:  # TrainingArguments rejected an option
        raise UserError(str(error)) from error


def _parser(kinds: Sequence[Any], keys: Mapping[str, Any], usage: str) -> HfArgumentParser:
    """Build the parser of the dataclasses, whose defaults are the keys of the recipe where it has them."""
    from transformers import HfArgumentParser  # half a second, which `hf-deit --help` need not wait for

    parser = HfArgumentParser(kinds, usage=usage, allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--help", action=ShortHelp, help="List the keys that people set first.")
    parser.add_argument("--help-all", action="help", help="List every key.")
    names = {item.name for kind in kinds for item in fields(kind)}
    parser.set_defaults(**{key: value for key, value in keys.items() if key in names})
    return parser


def _complete(kinds: Sequence[Any]) -> list[Any]:
    """Put the class that has the options of Transformers as well, whose import takes seconds, in place of ours."""
    if OwnOptions not in kinds:
        return list(kinds)
    with late_imports():
        from .distillation_config import DistillationConfig

    return [DistillationConfig if kind is OwnOptions else kind for kind in kinds]


def _unknown(word: str, known: Collection[str]) -> UserError:
    return UserError(f"the command line has {word!r}{did_you_mean(word.lstrip('-'), known)}")


def find_recipe(name: str, folders: Sequence[Path] = (Path(), RECIPES)) -> Path:
    """Return the file of a recipe: on disk, or one that comes with the package.

    Args:
        name: path of a file, or name of a recipe of the package ("quickstart"); `.yaml` may be left out.
        folders: where to look, in this order. One line says so if a file hides a recipe of the package.

    Raises:
        UserError: there is no such recipe.
    """
    names = [name] if name.endswith((".yaml", ".yml")) else [name, f"{name}.yaml"]
    found = [path for folder in folders for each in names if (path := folder / each).is_file()]
    if not found and Path(name).exists():
        return Path(name)  # reading it says what it is
    if not found:
        packaged = [str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")]
        nearest = difflib.get_close_matches(name.removesuffix(".yaml"), packaged, n=1)
        raise UserError(
            f"recipe {name!r} cannot be read: there is no such file, and no recipe of the package has this name; "
            + (f"did you mean {nearest[0]!r}?" if nearest else "`hf-deit init DIR` writes recipes to begin with")
        )
    hidden = [path for path in found[1:] if path.is_relative_to(RECIPES) and not path.samefile(found[0])]
    if hidden and os.environ.get("RANK", "0") == "0":
        print(f"the recipe is {str(found[0])!r}, not the package's {name!r}")
    return found[0]


# Limits of a recipe: PyYAML reads some 20 kB a second, and its stack grows with the depth.
MAX_RECIPE_BYTES = 1 << 16
_MAX_DEPTH, _MAX_VALUES = 20, 2000


class _RecipeLoader(yaml.SafeLoader):
    """YAML as plain data: no aliases, which multiply a small file's values; no key twice; one document."""

    depth = num_values = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            name = getattr(event, "anchor", "")
            raise yaml.MarkedYAMLError(
                problem=f"found the anchor or alias {name!r}; write the value out", problem_mark=event.start_mark
            )
        self.num_values += 1
        if self.num_values > _MAX_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"found more than {_MAX_VALUES} keys and values", problem_mark=event.start_mark
            )
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"found more than {_MAX_DEPTH} levels of brackets or lines", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem=f"found a {key.id} as a key; expected a name", problem_mark=key.start_mark
                )
            if key.value == "<<":
                raise yaml.MarkedYAMLError(problem="found '<<'; write the keys out", problem_mark=key.start_mark)
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"found the key {key.value!r} twice, in line {lines[key.value]} and in line {line}; keep "
                    "one"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """Read one YAML document.

    Raises:
        ValueError: the text is none; the message is one line.
    """
    try:
        return yaml.load(text, _RecipeLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        parts = [part for part in (error.context, error.problem, error.note) if part]
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            parts.append(f"line {mark.line + 1}, column {mark.column + 1}")
        if "'\\t'" in str(error.problem):
            parts.append("indent with blanks, not tabs")
        raise ValueError(", ".join(parts)) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ValueError(f"{error.reason} in line {line} (character {error.character:#x})") from error
    except Exception as error:  # of a value that is not what its tag says, such as the date 2020-99-99
        raise ValueError(f"a value is not what its tag says ({first_line(error)})") from error


def _read_recipe(path: Path, known: set[str]) -> dict:
    try:
        keys = _load_yaml(read_file(path, MAX_RECIPE_BYTES).decode("utf-8-sig"))
        keys = {} if keys is None else keys
    except (OSError, ValueError) as error:
        raise UserError(f"recipe {str(path)!r} cannot be read: {printable(str(error))}") from error
    if not isinstance(keys, dict):
        raise UserError(f"recipe {str(path)!r} is a {type(keys).__name__}; expected lines of the form 'key: value'")
    for key in keys:
        if key not in known:
            raise UserError(f"recipe {str(path)!r} has the key {key!r}{did_you_mean(str(key), known)}")
        if re.search(r"(^|[\s,'\"\[])python:", str(keys[key])):
            raise UserError(
                f"recipe {str(path)!r} sets {key} to code to run, {keys[key]!r}; a recipe may only hold data. Pass "
                f"the value on the command line: --{key} {keys[key]}"
            )
    return {key: _as_typed(value) for key, value in keys.items()}


def _as_typed(value):
    """Convert a value of a recipe to the text that argparse would read on the command line.

    Recipe and command line then go through the same conversion. The types of YAML alone would not do: PyYAML reads
    5e-4 as a string, and a whole number as an int even if the field is a float.
    """
    if isinstance(value, dict):
        return json.dumps(value)
    return value if value is None or isinstance(value, list) else str(value)
