"""The names that networks have on the command line of run_throughput.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..arguments import words
from ..errors import UserError
from .tables import PAPER_TABLES


@dataclass(frozen=True)
class ModelSpec:
    """The parts of a model's name; `source` is `"ours"`, `"stock"`, `"timm"` or, for trained weights, `"trained"`.

    `image_size` is None if not given.
    """

    source: str
    name: str
    distilled: bool
    image_size: int | None

    @classmethod
    def parse(cls, spec: str) -> ModelSpec:
        """Read `[stock:]<size>[-distilled]`, `timm:<name>`, a directory or a Hub id, each perhaps with `@<pixels>`.

        Raises:
            ValueError: if the name has none of these forms.
        """
        found = re.fullmatch(r"(?:(stock):)?(tiny|small|base)(-distilled)?(?:@(\d+))?", spec)
        if found:
            return cls(found[1] or "ours", found[2], bool(found[3]), int(found[4]) if found[4] else None)
        found = re.fullmatch(r"timm:([\w.]+)(?:@(\d+))?", spec)
        if found:
            return cls("timm", found[1], "_distilled" in found[1], int(found[2]) if found[2] else None)
        found = None if Path(spec).is_dir() else re.fullmatch(r"(.+)@(\d+)", spec)
        name, size = (found[1], int(found[2])) if found else (spec, None)
        if Path(name).is_dir() or ("/" in name and ":" not in name):
            return cls("trained", name, False, size)
        raise UserError(
            f"model {spec!r}: expected tiny, small or base, with -distilled or @<pixels> where wanted, the same after "
            f"'stock:', timm:<name>[@<pixels>], the directory or Hub id of a trained model, or one of "
            f"{', '.join(PAPER_TABLES)}"
        )

    @property
    def architecture(self) -> str:
        """The network's name in `PaperRow.model`, the same for every implementation."""
        if self.source == "timm":
            found = re.match(r"deit_(tiny|small|base)_(distilled_)?patch16_", self.name)
            return f"{found[1]}-distilled" if found and found[2] else found[1] if found else f"timm:{self.name}"
        return self.name + ("-distilled" if self.distilled else "")


def expand_models(models: str) -> list[str]:
    """The single names in `ThroughputArguments.models`, each once, tables replaced by their rows.

    Raises:
        ValueError: [`ModelSpec`] refuses a name, or there is no name.
    """
    specs = []
    for word in words(models):
        specs += [row.spec for row in PAPER_TABLES[word]] if word in PAPER_TABLES else [word]
    for spec in specs:
        ModelSpec.parse(spec)
    if not specs:
        raise UserError(f"models is {models!r}; name at least one, for example tiny,timm:resnet50 or table5")
    return list(dict.fromkeys(specs))
