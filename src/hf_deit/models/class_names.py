"""Class names: read them from a config, compare two lists of them, show a few in a message."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

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
    """The part of a name that its spellings share: "sea_snake", "Sea snake, water snake" -> "sea snake"."""
    return name.replace("_", " ").split(",")[0].strip().casefold()


def class_order(own: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """The index in `own` of each name in `wanted`; None if the two lists do not name the same classes.

    ImageNet's classes are named by WordNet ids, by all synonyms or by the first synonym, and a few classes share a
    name, so lists that are equal in place are accepted before a permutation is searched.
    """
    for key in (str, class_key):
        ours, theirs = ([key(name) for name in _described(names)] for names in (wanted, own))
        if ours == theirs:
            return list(range(len(ours)))
        if len(set(theirs)) == len(theirs) and set(ours) == set(theirs) and len(ours) == len(theirs):
            index = {name: i for i, name in enumerate(theirs)}
            return [index[name] for name in ours]
    return None


def _described(names: Sequence[str]) -> Sequence[str]:
    """WordNet ids (n01440764) replaced by timm's names for them; other names unchanged."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]

    words: dict[str, Any] = {}
    for subset in ("imagenet-21k-goog", "imagenet-1k"):  # ImageNet-1k has one class that ImageNet-21k lacks
        descriptions: Any = ImageNetInfo(subset).label_descriptions(as_dict=True)
        words.update(descriptions)
    return [words.get(name, name) for name in names]
