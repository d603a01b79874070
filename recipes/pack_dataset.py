"""Pack a dataset into parquet files: `python recipes/pack_dataset.py SOURCE DIR [--max_side 256]`, or `hf-deit pack`.

SOURCE is what `dataset_name` can be: a directory, a registered name, a Hub id.
"""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("pack")
