"""Clients of the local Hub: processes of their own, and a run on the digits for them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
TEACHER = """
    import torch

    def make():
        layer = torch.nn.Linear(768, 10)
        layer.weight.data = torch.arange(7680.0).view(10, 768)
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(16), torch.nn.Flatten(), layer)
"""
# Two steps on the digits; the network of the quickstart, smaller. JSON is YAML.
RECIPE = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "drop_path_rate": 0},
    **{"dataset_name": "digits", "image_size": 16, "max_train_samples": 64, "max_eval_samples": 20, "max_steps": 2},
    **{"per_device_train_batch_size": 16, "learning_rate": 1e-3, "auto_augment": "none", "random_erasing_prob": 0},
    **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "use_cpu": True},
    **{"dataloader_num_workers": 0, "disable_tqdm": True},
}


def environment(hub, folder: Path, token: str) -> dict[str, str]:
    """The environment of a client that works in `folder`, where its teacher's code lies."""
    path = [str(folder), str(ROOT / "recipes"), str(ROOT / "src")]
    return hub.environment | {"HF_TOKEN": token, "PYTHONPATH": ":".join(path)}


class Client:
    """A Python process as a client of the hub, told what to do line by line, so that the hub can change between."""

    def __init__(self, hub, folder: Path, token: str):
        loop = "import json, sys\nfor line in sys.stdin:\n    exec(json.loads(line), globals())\n"
        loop += "    print('\\nanswer:' + json.dumps(globals().pop('answer', None)), flush=True)\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", loop],
            cwd=folder,
            env=environment(hub, folder, token),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr.txt").open("w"),
            text=True,
        )
        self.errors = folder / "stderr.txt"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def __call__(self, program: str):
        """Runs statements; what they leave in `answer`, through JSON."""
        self.process.stdin.write(json.dumps(textwrap.dedent(program)) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer:"):
                return json.loads(line.removeprefix("answer:"))
        raise AssertionError(self.errors.read_text())


def run(words: list, hub, folder: Path, token: str, **variables: str) -> subprocess.CompletedProcess:
    """Run Python with these words as a client, to its end."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(hub, folder, token) | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
