"""Tables 1 and 5, Figure 1: `python recipes/run_throughput.py [--models table5]`, or `hf-deit throughput`."""

from hf_deit.commands.throughput import main
from hf_deit.errors import run_script


if __name__ == "__main__":
    run_script(main)
