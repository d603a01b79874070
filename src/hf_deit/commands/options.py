"""The reference of all options, made from what the options say of themselves.

`hf-deit options` prints docs/options.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields

from transformers import TrainingArguments

from ..arguments import ClassifierArguments, DataArguments, ModelArguments
from ..options.distillation_config import DistillationConfig
from ..options.own_options import OwnOptions
from ..options.stock_options import FORMER_OPTIONS, STOCK_OPTIONS


HEAD = """# Options

Every key of a recipe, and every `--key` of the command line, of `run_distill.py` and `run_teacher.py`. This page is
printed by `hf-deit options > docs/options.md`; a test compares the two.

What another value of an option changes: the **views** (which pixels are shown when, and through them the weights), the
**weights**, or only the **machine** (speed, memory, files, logs). A resumed run, a model card and a record of a
teacher's outputs go by it."""
STOCK_HEAD = """Options of Transformers' [`TrainingArguments`]\
(https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments), where they are
described. "No effect": one warning says so where the option is set. "Refused": the run does not start, because it
could not keep what the option promises. An option that others of the run make idle, such as `save_steps` with
`save_strategy: epoch`, is one warning too."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print docs/options.md."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    print(options_page(), end="")


def options_page() -> str:
    """Return the reference as Markdown: our options, then those of Transformers."""
    parts = [HEAD]
    for title, kind in (
        ("Images", DataArguments),
        ("Student and teacher", ModelArguments),
        ("Teacher that run_teacher.py trains", ClassifierArguments),
    ):
        parts += [f"## {title}", _table(("option", "default", "changes", "meaning"), map(_row, fields(kind)))]
    own = [item for item in fields(DistillationConfig) if item.name in OwnOptions.__annotations__]
    parts += ["## Training", _table(("option", "default", "changes", "meaning"), map(_row, own))]
    stock = [item for item in fields(TrainingArguments) if item.name in STOCK_OPTIONS]
    parts += ["## Training, inherited", STOCK_HEAD]
    parts.append(_table(("option", "default", "changes", "class", "why"), map(_stock_row, stock)))
    parts += ["## Options of earlier Transformers", "Refused by name, with what says the same today."]
    parts.append(_table(("option", "instead"), ((f"`{name}`", text) for name, text in FORMER_OPTIONS.items())))
    return "\n\n".join(parts) + "\n"


def _row(item: Field) -> Sequence[str]:
    text = item.metadata["help"]
    return f"`{item.name}`", _default(item), text.affects, str(text)


def _stock_row(item: Field) -> Sequence[str]:
    status, affects, why = STOCK_OPTIONS[item.name]
    return f"`{item.name}`", _default(item), affects if status == "honoured" else "", status, why


def _default(item: Field) -> str:
    if item.default is not MISSING:
        return f"`{item.default}`"
    # A default that is computed depends on the machine, and the text says how; an empty list is one everywhere.
    return "`[]`" if item.default_factory is list else "computed"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
