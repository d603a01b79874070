"""The types that an editor of a consumer sees: the top level completes, and a wrong argument is an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def errors_of(folder: Path, source: str) -> list[tuple[int, str]]:
    """Line and rule of each error that pyright finds in a consumer's file."""
    (folder / "consumer.py").write_text(source)
    config = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT / "src")]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    report = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False).stdout
    found = [one for one in json.loads(report)["generalDiagnostics"] if one["severity"] == "error"]
    return [(one["range"]["start"]["line"] + 1, one["rule"]) for one in found]


@pytest.mark.slow
def test_a_wrong_argument_is_an_error_and_a_right_one_is_none(tmp_path):
    source = "from hf_deit import DeiTConfig, load_teacher\nDeiTConfig.from_size('tiny', image_size=32)\n"
    assert errors_of(tmp_path, source) == []
    wrong = source + "DeiTConfig.from_size(123, nonsense=True)\nload_teacher()\n"
    lines = {line for line, _ in errors_of(tmp_path, wrong)}
    assert lines == {3, 4}
