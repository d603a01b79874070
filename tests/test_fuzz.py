"""tests/fuzz: every target reads what was changed, or refuses it in one line. `make fuzz` runs it for longer."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_changed_file_breaks_a_reader():
    pytest.importorskip("hypothesis")
    script = Path(__file__).parent / "fuzz" / "fuzz.py"
    done = subprocess.run(
        [sys.executable, str(script), "--minutes", "0", "--examples", "50"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "CRASH" not in done.stdout and done.stdout.count(" inputs, ") >= 20
