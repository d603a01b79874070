"""Tables 1 and 5, Figure 1: `python recipes/run_throughput.py [--models table5]`, or `hf-deit throughput`."""

from hf_deit.__main__ import run_command


if __name__ == "__main__":
    run_command("throughput")
