"""style.py: what the pictures share."""

from support.pictures import LONG

from hf_deit.plots import style


def test_a_long_name_loses_its_middle_and_keeps_its_head():
    assert style.shorten("short: class") == "short: class"
    shortened = style.shorten(f"{LONG}: class+distillation")
    assert (
        len(shortened) <= 40 and shortened.startswith("a_model_") and shortened.endswith("_hold: class+distillation")
    )
    assert style.shorten("abcdefghi", 5) == "ab…hi"
