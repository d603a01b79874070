"""Analyse trained models: `python recipes/run_analysis.py --models a,b [--key value ...]`, or `hf-deit analyze`."""

from hf_deit.commands.analyze import main
from hf_deit.errors import run_script


if __name__ == "__main__":
    run_script(main)
