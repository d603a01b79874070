"""late_imports.py: no garbage is looked for during imports, and afterwards as before."""

import gc
import subprocess
import sys

import pytest

from hf_deit.options.late_imports import late_imports


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_afterwards_as_before(enabled):
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), late_imports():
            assert not gc.isenabled()
            import no_such_module  # noqa: F401
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_only_what_an_import_made_is_left_out_of_later_searches():
    program = """
import gc
from hf_deit.options.late_imports import late_imports
with late_imports():
    import email.parser
first = gc.get_freeze_count()
assert first > 1000
garbage = []
garbage.append(garbage)
del garbage
with late_imports():
    import email.parser
assert gc.get_freeze_count() <= first and gc.collect() > 0
"""
    subprocess.run([sys.executable, "-c", program], check=True)
