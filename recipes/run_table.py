"""Run a table of the paper: `python recipes/run_table.py <table> ... [--scale paper|small]`, or `hf-deit table`."""

from hf_deit.commands.table import main
from hf_deit.errors import run_script


if __name__ == "__main__":
    run_script(main)
