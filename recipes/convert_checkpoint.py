"""Convert a checkpoint: `python recipes/convert_checkpoint.py SRC DST [--to timm]`, or `hf-deit convert`."""

from hf_deit.commands.convert import main
from hf_deit.errors import run_script


if __name__ == "__main__":
    run_script(main)
