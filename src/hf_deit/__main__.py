"""The command: `hf-deit <command> ...`, or `python -m hf_deit <command> ...` for a launcher.

Each command is the `main` of the module in `commands/` that has its name. Only that module is imported, so that
`hf-deit --help` needs no PyTorch.
"""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module

from . import __version__
from .errors import UserError, run_script


COMMANDS = {
    "init": "write a recipe for your own photos, its teacher's recipe and a machine file",
    "distill": "train a DeiT, with or without a teacher; without a recipe the quickstart",
    "teacher": "train or fine-tune a teacher on your images",
    "check": "what a run would find in a dataset, without training",
    "pack": "any dataset as a few large files, made for streaming from a network disk or the Hub",
    "eval": "accuracy of any checkpoints, head by head",
    "analyze": "who disagrees with whom, and where a DeiT looks",
    "demo": "a page in your browser that classifies your images and shows where the model looks",
    "throughput": "images per second, parameters and memory of networks",
    "table": "run a table of the paper as a sweep",
    "convert": "a checkpoint from or to the formats of the Hub, timm and the authors",
    "options": "every key of a recipe, as Markdown",
    "export": "a trained model as one ONNX or torch.export file",
    "record": "publish recorded teacher outputs on the Hub",
}
HELP = """usage: hf-deit <command> [arguments]     (hf-deit <command> --help says more)

Train, distil, fine-tune and publish DeiT.

{commands}

With a machine file of accelerate, for several GPUs say:
  accelerate launch --config_file machine.yaml -m hf_deit <command> [arguments]
"""


# Any of these says how long an idle thread of OpenMP looks for work before it sleeps.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def main() -> None:
    """Run the command that the command line of this process names."""
    let_threads_sleep()
    run_script(_run)


def run_command(name: str) -> None:
    """Run one command with the arguments of this process, as the scripts of `recipes/` do.

    The command's module is imported here, so that SIGTERM and Ctrl-C are answered during its slow imports too.
    """
    let_threads_sleep()
    run_script(lambda: import_module(f".commands.{name}", __package__).main())


def let_threads_sleep() -> None:
    """Let the idle threads of this process sleep, unless the environment says how they should wait.

    OpenMP reads the environment when PyTorch is imported, so this comes first. By default its threads wait by looking
    for work again and again. Where another program needs a core, they take it from the thread that they wait for, once
    more at each of the thousands of small operations of a step. Their number changes results, how they wait does not.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _run() -> None:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())), end="")
    elif name == "--version":
        print(f"hf_deit {__version__}")
    elif name in COMMANDS:
        sys.argv[0] = f"hf-deit {name}"  # what argparse calls the program
        import_module(f".commands.{name}", __package__).main(rest)
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        wanted = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"{name!r} is no command of hf-deit; {wanted}")


if __name__ == "__main__":
    main()
