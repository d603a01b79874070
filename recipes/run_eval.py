"""Evaluate classifiers: `accelerate launch recipes/run_eval.py --models a,b [--key value ...]`, or `hf-deit eval`."""

from hf_deit.commands.eval import main
from hf_deit.errors import run_script


if __name__ == "__main__":
    run_script(main)
