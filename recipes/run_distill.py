"""Distil a DeiT: `accelerate launch recipes/run_distill.py [recipe.yaml] [--key value ...]`.

Without a recipe it runs quickstart.yaml: offline, on a CPU, the teacher included. `--help` lists the keys.
"""

import sys
from pathlib import Path

from hf_deit.commands import distill
from hf_deit.errors import run_script


RECIPES = Path(__file__).parent


def main(argv: list[str] | None = None) -> dict[str, float]:
    command = sys.argv if argv is None else [__file__, *argv]
    return distill.main(command[1:], RECIPES, command=command)


if __name__ == "__main__":
    run_script(main)
