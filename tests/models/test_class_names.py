"""Class names: ids and labels, spellings, and the order between two lists."""

import pytest
import timm

from hf_deit.errors import some_of
from hf_deit.models.class_names import class_names, match_class_names, repeated_name


def test_imagenet_names_match_in_each_of_their_spellings():
    info = timm.data.ImageNetInfo()
    wordnet, full = info.label_names(), info.label_descriptions()
    first = [name.split(",")[0].replace(" ", "_") for name in full]
    assert len(set(first)) < 1000  # two cranes: no permutation could tell them apart
    for wanted in (wordnet, full, first):
        for own in (wordnet, full, first):
            assert match_class_names(own, wanted) == (list(range(1000)), None)
    assert match_class_names(first[::-1], wordnet) is None


BLANKS, COMMA = "differ in case or blanks", "are compared up to the first comma"


@pytest.mark.parametrize(
    ("own", "wanted", "match"),
    [
        (["a", "b"], ["a", "b"], ([0, 1], None)),
        (["a", "b", "c"], ["c", "a", "b"], ([2, 0, 1], None)),
        (["a", "a"], ["a", "a"], ([0, 1], None)),  # equal in place, although no permutation could be told
        (["a", "b"], ["a", "c"], None),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "a", "b"], ["b", "a", "a"], None),
        # whole names, with commas or not
        (["plum, ripe", "plum, raw"], ["plum, raw", "plum, ripe"], ([1, 0], None)),
        (["plum, ripe", "plum, raw"], ["Plum,  Raw", "Plum_,_ripe".replace("_,", ",")], ([1, 0], BLANKS)),
        (["A", "a"], ["a", "A"], ([1, 0], None)),
        (["A", "a"], ["a ", "A "], None),  # two classes that only their case tells apart
        (["sea snake", "caf\u00e9"], ["cafe\u0301", "Sea_Snake"], ([1, 0], BLANKS)),
        # WordNet's synonyms
        (["Sea snake, water snake", "emu"], ["emu", "sea_snake"], ([1, 0], COMMA)),
        (["tench, Tinca tinca", "emu"], ["tench, Tinca tinca, fish", "emu"], ([0, 1], COMMA)),
        (["plum, ripe", "plum, raw"], ["plum, green", "plum, rotten"], None),
        (["plum, ripe", "plum, raw"], ["plum", "plum"], None),
        (["plum, ripe", "emu"], ["plum, raw", "emu"], None),  # unique before the comma, and yet another plum
        (["plum, ripe", "plum, raw", "emu"], ["plum", "emu", "plum, raw"], None),
    ],
)
def test_names_are_compared_whole_and_then_by_their_synonyms(own, wanted, match):
    assert match_class_names(own, wanted) == match


def test_a_name_of_two_classes_is_found():
    assert repeated_name(["emu", "Sea snake", "sea_snake"]) == "Sea snake" and repeated_name(["a, b", "a, c"]) is None


def test_names_come_in_the_order_of_their_numbers():
    assert class_names({"1": "b", "0": "a"}) == ["a", "b"]
    assert class_names(None) is None and class_names({0: "LABEL_0", 1: "LABEL_1"}) is None
    assert class_names({0: "LABEL_0", 1: "LABEL_1"}, keep_generic=True) == ["LABEL_0", "LABEL_1"]
    with pytest.raises(ValueError, match="id2label must number the classes 0 to 1, got the keys 0, 2"):
        class_names({0: "a", 2: "b"})


def test_a_message_shows_a_few_names():
    assert some_of(["a", "b"]) == "a, b" and some_of(list("abcd")) == "a, b, c, ..."
