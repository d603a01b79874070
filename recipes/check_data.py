"""Check a dataset without training: `python recipes/check_data.py DATA [--key value ...]`.

DATA is what `dataset_name` can be (a directory, a registered name, a Hub id), or a recipe of run_distill.py; the keys
are those of its data. Prints where the images are, splits, classes, what is not read and what is odd. `--help` lists
the keys.
"""

import sys

from hf_deit.commands import check
from hf_deit.errors import run_script


def main(argv: list[str] | None = None) -> str:
    return check.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    run_script(main)
