"""Check a dataset without training: `python recipes/check_data.py DATA [--key value ...]`, or `hf-deit check`.

DATA is what `dataset_name` can be (a directory, a registered name, a Hub id), or a recipe of run_distill.py.
"""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("check")
