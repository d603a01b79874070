"""Class names: read them from a config, compare two lists of them, show a few in a message."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UserError, some_of


def class_names(id2label: Mapping[int, str] | None, keep_generic: bool = False) -> list[str] | None:
    """Names in class order; None without names, or for the LABEL_0, LABEL_1, ... that Transformers makes up."""
    if not id2label:
        return None
    by_class = {int(i): str(name) for i, name in id2label.items()}
    if sorted(by_class) != list(range(len(by_class))):
        keys = some_of([str(i) for i in sorted(by_class)], 5)
        raise UserError(f"id2label must number the classes 0 to {len(by_class) - 1}, got the keys {keys}")
    names = [by_class[i] for i in range(len(by_class))]
    generic = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return names if keep_generic or not generic else None


def class_key(name: str) -> str:
    """A whole name without what its spellings differ in: case, blanks, underscores and the Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", name).replace("_", " ").casefold().split())


class ClassMatch(NamedTuple):
    """How the classes of one list are those of another.

    Attributes:
        order: the index in the own list of each wanted name.
        doubt: in which respect equal names are spelled differently, in words; None where the spelling is the same.
    """

    order: list[int]
    doubt: str | None = None


def match_class_names(own: Sequence[str], wanted: Sequence[str]) -> ClassMatch | None:
    """Match two lists of class names; None if they do not name the same classes, or do not tell them apart.

    Names are compared whole: first as they are, then without case and blanks. Only then is "tench" taken for the
    WordNet-like "tench, Tinca tinca": where what stands before the first comma is unique on both sides, and all
    synonyms of one name are among those of the other. A list that names ImageNet-1k's classes in their order, in any
    of its spellings (WordNet ids, all synonyms, the first synonym), is recognised as a whole, because a few of its
    classes share a first synonym.
    """
    own, wanted = _described(own), _described(wanted)
    if own == wanted:
        return ClassMatch(list(range(len(own))))
    for key, doubt in (
        (str, None),
        (class_key, "differ in case or blanks"),
        (lambda name: _synonyms(name)[0], "are compared up to the first comma"),
    ):
        ours, theirs = [key(name) for name in own], [key(name) for name in wanted]
        if set(ours) == set(theirs) and len(set(ours)) == len(ours) == len(theirs):
            index = {name: i for i, name in enumerate(ours)}
            order = [index[name] for name in theirs]
            same = all(_are_synonyms(own[i], name) for i, name in zip(order, wanted, strict=True))
            return ClassMatch(order, doubt) if same else None
    return None


def repeated_name(names: Sequence[str]) -> str | None:
    """The first name that another class has as well, apart from case and blanks."""
    counts = Counter(map(class_key, names))
    return next((name for name in names if counts[class_key(name)] > 1), None)


def _synonyms(name: str) -> list[str]:
    return [class_key(part) for part in name.split(",")]


def _are_synonyms(one: str, other: str) -> bool:
    first, second = set(_synonyms(one)), set(_synonyms(other))
    return first <= second or second <= first


def _described(names: Sequence[str]) -> list[str]:
    """timm's descriptions of WordNet ids (n01440764), and of ImageNet-1k in its own order; other names unchanged."""
    are_ids = all(re.fullmatch(r"n\d{8}", name) for name in names)
    if not are_ids and len(names) != 1000:
        return list(names)
    from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]

    if are_ids:
        words: dict[str, Any] = {}
        for subset in ("imagenet-21k-goog", "imagenet-1k"):  # ImageNet-1k has one class that ImageNet-21k lacks
            descriptions: Any = ImageNetInfo(subset).label_descriptions(as_dict=True)
            words.update(descriptions)
        return [words.get(name, name) for name in names]
    imagenet: Any = ImageNetInfo("imagenet-1k").label_descriptions()
    in_order = all(_synonyms(name)[0] == _synonyms(known)[0] for name, known in zip(names, imagenet, strict=True))
    return list(imagenet) if in_order else list(names)
