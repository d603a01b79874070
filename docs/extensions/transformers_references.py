"""Makes links of the references in docstrings, which are written as in Transformers: a name in backticks in brackets.

A name that no page of the reference holds stays plain code.
"""

import re
from typing import Any

from griffe import Class, Extension, Function, Module, Object


NAME = re.compile(r"\[`([\w.]+)`\]")


class TransformersReferences(Extension):
    """Writes optional cross-references into the docstrings of a package."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Find every name of the package, then rewrite every docstring."""
        paths: dict[str, str] = {}
        objects = list(walk(pkg))
        for item in objects:
            pieces = item.path.split(".")
            for start in range(len(pieces)):
                paths.setdefault(".".join(pieces[start:]), item.path)

        def link(match: re.Match) -> str:
            name = match[1]
            return f'<autoref optional identifier="{paths.get(name, name)}"><code>{name}</code></autoref>'

        for item in objects:
            if item.docstring:
                item.docstring.value = NAME.sub(link, item.docstring.value)


def walk(item: Object) -> Any:
    """Yield an object and its members; names that are imported are met where they are defined."""
    yield item
    for member in item.members.values():
        if not member.is_alias and isinstance(member, (Class, Function, Module, Object)):
            yield from walk(member)
