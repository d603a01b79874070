"""commands/options.py: docs/options.md is what the options say of themselves, and has all of them."""

import re
from dataclasses import fields
from pathlib import Path

from hf_deit import DataArguments, DistillationConfig, ModelArguments
from hf_deit.arguments import ClassifierArguments
from hf_deit.commands.options import options_page


PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"


def test_the_page_in_docs_is_the_one_that_is_printed():
    assert PAGE.read_text("utf-8") == options_page(), "hf-deit options > docs/options.md"


def test_every_option_has_a_row():
    listed = re.findall(r"^\| `(\w+)` \| .* \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    kinds = (DataArguments, ModelArguments, ClassifierArguments, DistillationConfig)
    assert set(listed) >= {item.name for kind in kinds for item in fields(kind) if item.init}


def test_no_line_depends_on_this_machine(monkeypatch):
    here = options_page()
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert options_page() == here and "computed" in here
