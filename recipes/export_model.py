"""Export a trained model: `python recipes/export_model.py SRC DST`, or `hf-deit export`."""

from hf_deit.commands.export import main
from hf_deit.errors import run_script


if __name__ == "__main__":
    run_script(main)
