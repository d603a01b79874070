"""How long until a resumed run has its first batch? `python benchmarks/resume_time.py [--images 100000] [--trials 7]`.

One epoch of small images, streamed as parquet from a local server that speaks the Hub's API, is trained once with
checkpoints all the way. Then it is resumed at 1 %, 50 % and 99 % of the epoch, and from its start, in turns, each time
in a new process and only until the first batch is there. The table says how long that took from the call of `train`
and how much was asked of the server: nothing that was read before should be read again.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from survival import ROOT, run_distill, words


sys.path.insert(0, str(ROOT / "tests"))
from support.hub_server import HubServer

from hf_deit.training import distillation_trainer


NAME = "user/pictures"
SHARDS, IMAGES_PER_BLOCK, BATCH_SIZE = 10, 100, 100
PARTS = (0.0, 0.01, 0.5, 0.99)
RUN = {
    **{"dataset_name": NAME, "streaming": True, "distillation_type": "label", "image_size": 16, "patch_size": 8},
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_repeats": 1, "auto_augment": "none"},
    **{"per_device_train_batch_size": BATCH_SIZE, "num_train_epochs": 1, "warmup_epochs": 0, "learning_rate": 1e-3},
    **{"dataloader_num_workers": 1, "eval_strategy": "no", "save_strategy": "steps", "save_total_limit": 1000},
    **{"logging_steps": 1000, "use_cpu": True, "disable_tqdm": True, "report_to": "none"},
}


def write_digits(folder: Path, num_images: int) -> None:
    """Scikit-learn's digits, again and again, each a PNG."""
    datasets.disable_progress_bars()
    digits, encoded = load_digits(), []
    for pixels in digits.images:
        file = io.BytesIO()
        Image.fromarray((pixels * 15.9).astype("uint8")).save(file, "PNG")
        encoded.append(file.getvalue())
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(10)})
    for split, shards, size in (("train", SHARDS, num_images // SHARDS), ("test", 1, 100)):
        for shard in range(shards):
            rows = np.arange(shard * size, (shard + 1) * size) % len(encoded)
            content = datasets.Dataset.from_dict(
                {
                    "image": [{"bytes": encoded[row], "path": None} for row in rows],
                    "label": digits.target[rows].tolist(),
                },
                features=features,
            ).cast_column("image", datasets.Image())
            content.to_parquet(folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet", batch_size=IMAGES_PER_BLOCK)


class UntilTheFirstBatch(distillation_trainer.DistillationTrainer):
    """Ends the process with what was asked for: the time from `train` to the first batch."""

    answer: Path

    def train(self, *args, **kwargs):
        self._begin = time.perf_counter()
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        seconds = time.perf_counter() - self._begin
        self.answer.write_text(json.dumps({"seconds": seconds, "step": self.state.global_step}))
        os._exit(0)


def run_until_the_first_batch(arguments: list[str], answer: Path) -> None:
    with answer.with_suffix(".log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    torch.set_num_threads(1)
    UntilTheFirstBatch.answer = answer
    distillation_trainer.DistillationTrainer = UntilTheFirstBatch
    run_distill.main(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = args.images // BATCH_SIZE

    with tempfile.TemporaryDirectory() as folder, HubServer() as hub:
        folder = Path(folder)
        (folder / "pictures").mkdir()
        write_digits(folder / "pictures", args.images)
        hub.add_repo("dataset", NAME, folder / "pictures")
        os.environ.update(hub.environment)  # of the processes to come; this one asks the server nothing
        run = words(**RUN, save_steps=steps // 100, output_dir=folder / "whole")
        begin = time.perf_counter()
        subprocess.run([sys.executable, run_distill.__file__, *run], check=True, capture_output=True)
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in (folder / "pictures").glob("train*"))
        print(f"one epoch: {steps} steps, {seconds:.0f} s; the training files hold {size / 1e6:.1f} MB\n", flush=True)

        seen = {part: [] for part in PARTS}
        for trial in range(args.trials):
            for part in PARTS:
                step = round(part * steps)
                start = words(resume_from_checkpoint=folder / "whole" / f"checkpoint-{step}") if step else []
                before = len(hub.requests)
                arguments = [*words(**RUN, save_steps=steps // 100, output_dir=folder / f"{part}-{trial}"), *start]
                process = get_context("spawn").Process(
                    target=run_until_the_first_batch, args=(arguments, folder / "answer")
                )
                process.start()
                process.join()
                if not (answer := folder / "answer").exists():
                    raise SystemExit(f"no first batch came:\n{answer.with_suffix('.log').read_text()[-2000:]}")
                one = json.loads(answer.read_text())
                answer.unlink()
                assert one["step"] == step, one
                ranges = [request.range for request in hub.requests[before:] if request.range]
                seen[part].append(one | {"ranges": len(ranges)})

    print("| resumed at | seconds to the first batch: median | min - max | ranges asked of the server |")
    print("|---|---|---|---|")
    for part, trials in seen.items():
        times, ranges = [one["seconds"] for one in trials], [one["ranges"] for one in trials]
        print(f"| {part:.0%} | {median(times):.3f} | {min(times):.3f} - {max(times):.3f} | {median(ranges):.0f} |")
    if args.json:
        args.json.write_text(json.dumps({f"{part:.0%}": trials for part, trials in seen.items()}))


if __name__ == "__main__":
    main()
