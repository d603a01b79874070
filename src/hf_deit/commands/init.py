"""Write the recipes for own photos and a machine file into a folder, to be edited there.

The recipes are those of `recipes/`: what is written is a copy.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..options.recipe import RECIPES


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Write recipes for your own photos, and a machine file, into DIR.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write to; it is made if it is missing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write my_photos.yaml, my_photos_teacher.yaml and machine.yaml; a file that exists is never overwritten.

    Raises:
        UserError: one of the files exists, or the folder cannot be written to. Then nothing is written.
    """
    folder = parse_arguments(argv).folder
    machine = "single_gpu" if shutil.which("nvidia-smi") else "cpu"
    sources = {
        "my_photos.yaml": RECIPES / "my_photos.yaml",
        "my_photos_teacher.yaml": RECIPES / "my_photos_teacher.yaml",
        "machine.yaml": RECIPES / "accelerate" / f"{machine}.yaml",
    }
    if there := [name for name in sources if (folder / name).exists()]:
        raise UserError(f"{str(folder)!r} already has {' and '.join(there)}: name another folder, or move them away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in sources.items():
            with (folder / name).open("x", encoding="utf-8") as file:  # "x": not even a file that has just appeared
                file.write(source.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written to: {error.strerror or error}") from error
    recipe = folder / "my_photos.yaml"
    print(
        f"wrote {', '.join(sources)} to {folder}",
        f"1. put your photos into one folder per class, and that folder's name into {recipe} (dataset_name)",
        f"2. hf-deit distill {recipe}",
        sep="\n",
    )
