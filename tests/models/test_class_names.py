"""Class names: ids and labels, spellings, and the order between two lists."""

import pytest
import timm

from hf_deit.errors import some_of
from hf_deit.models.class_names import class_names, class_order


def test_imagenet_names_match_in_each_of_their_spellings():
    info = timm.data.ImageNetInfo()
    wordnet, full = info.label_names(), info.label_descriptions()
    first = [name.split(",")[0].replace(" ", "_") for name in full]
    assert len(set(first)) < 1000  # two cranes: no permutation could tell them apart
    for wanted in (wordnet, full, first):
        for own in (wordnet, full, first):
            assert class_order(own, wanted) == list(range(1000))
    assert class_order(first[::-1], wordnet) is None


@pytest.mark.parametrize(
    ("own", "wanted", "order"),
    [
        (["a", "b"], ["a", "b"], [0, 1]),
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]),
        (["Sea snake, water snake", "emu"], ["emu", "sea_snake"], [1, 0]),
        (["a", "a"], ["a", "a"], [0, 1]),  # equal in place, although no permutation could be told
        (["a", "b"], ["a", "c"], None),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "a", "b"], ["b", "a", "a"], None),
    ],
)
def test_the_order_is_that_of_the_wanted_names(own, wanted, order):
    assert class_order(own, wanted) == order


def test_names_come_in_the_order_of_their_numbers():
    assert class_names({"1": "b", "0": "a"}) == ["a", "b"]
    assert class_names(None) is None and class_names({0: "LABEL_0", 1: "LABEL_1"}) is None
    assert class_names({0: "LABEL_0", 1: "LABEL_1"}, keep_generic=True) == ["LABEL_0", "LABEL_1"]
    with pytest.raises(ValueError, match="id2label must number the classes 0 to 1, got the keys 0, 2"):
        class_names({0: "a", 2: "b"})


def test_a_message_shows_a_few_names():
    assert some_of(["a", "b"]) == "a, b" and some_of(list("abcd")) == "a, b, c, ..."
