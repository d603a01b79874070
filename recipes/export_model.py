"""Export a trained model: `python recipes/export_model.py SRC DST`, or `hf-deit export`."""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("export")
