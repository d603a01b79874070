"""Distil a DeiT: `accelerate launch recipes/run_distill.py [recipe.yaml] [--key value ...]`, or `hf-deit distill`.

Without a recipe it runs quickstart.yaml: offline, on a CPU, the teacher included. `--help` lists the keys.
"""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("distill")
