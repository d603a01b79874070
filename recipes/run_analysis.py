"""Analyse trained models: `python recipes/run_analysis.py --models a,b [--key value ...]`, or `hf-deit analyze`."""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("analyze")
