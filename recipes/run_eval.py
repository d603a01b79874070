"""Evaluate classifiers: `accelerate launch recipes/run_eval.py --models a,b [--key value ...]`, or `hf-deit eval`."""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("eval")
