"""Run a table of the paper: `python recipes/run_table.py <table> ... [--scale paper|small]`, or `hf-deit table`."""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("table")
