"""Convert a checkpoint: `python recipes/convert_checkpoint.py SRC DST [--to timm]`, or `hf-deit convert`."""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("convert")
