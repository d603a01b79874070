"""All that a GPU is to be measured for, in a command of eight minutes: `python benchmarks/gpu.py --output_dir my_gpu`.

Steps of DeiT-B, Ti and S beside timm and stock, compiled, with and without a RegNetY-16GF, its records replayed, and
memory (train_step.py); inference (inference.py); the loader on this machine's cores (data_pipeline.py); and the views,
the steps and both together as they run (end_to_end.py). The images and the teacher's weights are made here: nothing is
downloaded. Each part is a process with a time limit, in the order of their worth; one that fails or is late is
reported, and the next is begun. `gpu.json` in the folder has all figures, `<part>.log` the tables. A part that is
already there is not run again, so that the same command does what was left.

`--device cpu --small` tries all of it in a few minutes.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


HERE = Path(__file__).resolve().parent


class Part(NamedTuple):
    """A command as a GPU gets it and as it is only tried, and how many seconds it may take."""

    words: str
    small: str
    seconds: int


STEP = "train_step.py --device {device} --json {figures}"
TRY = f"{STEP} --sizes cpu --batch_sizes 2 --rounds 1 --teacher resnet10t --memory_gb 1"
INFER = "inference.py --device {device} --json {figures}"
VIEWS = "data_pipeline.py --images {images} --json {figures}"
WHOLE = (
    "end_to_end.py {made}/recipe.yaml --json {figures} --dataset_name {made}/data --output_dir {made}/run "
    "--teacher timm:{teacher}?checkpoint={made}/teacher.safetensors"
)
# In the order of their worth: what comes last is what a slow compiler costs.
PARTS = {
    "student_base": Part(f"{STEP} --parts student --drop_paths 0", f"{TRY} --parts student --drop_paths 0", 180),
    "trainer_base": Part(f"{STEP} --parts trainer --rounds 5", f"{TRY} --parts trainer", 130),
    "teacher_base": Part(f"{STEP} --parts teacher --rounds 5", f"{TRY} --parts teacher", 60),
    "end_to_end": Part(
        f"{WHOLE} --steps 30 --per_device_train_batch_size 256 --bf16 true --dataloader_num_workers {{cores}}",
        f"{WHOLE} --steps 2 --per_device_train_batch_size 4 --use_cpu true",
        90,
    ),
    "views": Part(
        f"{VIEWS} --runs 2 --max-images 64 --workers {{cores}}",
        f"{VIEWS} --runs 1 --max-images 4 --batch-size 2 --workers 1",
        110,
    ),
    "memory_base": Part(f"{STEP} --parts memory --rounds 3 --memory_gb 80", f"{TRY} --parts memory", 90),
    "inference_base": Part(
        f"{INFER} --compile --sizes base --batch_sizes 1 256 --rounds 5",
        f"{INFER} --sizes cpu --batch_sizes 2 --rounds 1",
        80,
    ),
    "student_small": Part(
        f"{STEP} --parts student --sizes small --drop_paths 0 --rounds 5",
        f"{TRY} --parts student --drop_paths 0.1",
        120,
    ),
    "student_tiny": Part(
        f"{STEP} --parts student --sizes tiny --drop_paths 0 --rounds 5", f"{TRY} --parts student --drop_paths 0", 120
    ),
}
LAST = 20  # seconds: with less left, no part is begun
RECIPE = """\
model_size: {size}
image_size: {side}
learning_rate: 1.0e-4
eval_strategy: "no"
save_strategy: "no"
report_to: none
"""


def make(folder: Path, args: argparse.Namespace) -> str:
    """The images, the teacher with random weights and the recipe of end_to_end.py; returns the teacher's name.

    An epoch has to have enough steps, so that the same JPEGs stand in the table many times.
    """
    import timm
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture
    from safetensors.torch import save_file

    rng, jpegs = np.random.default_rng(0), []
    (folder / "jpegs").mkdir()
    for number in range(8 if args.small else 128):  # smooth, with grain: about as many bytes as ImageNet's
        coarse = Picture.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((500, 375), Picture.BICUBIC)
        pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (375, 500, 1))
        file = io.BytesIO()
        Picture.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        (folder / "jpegs" / f"{number}.jpg").write_bytes(file.getvalue())
        jpegs.append(file.getvalue())
    classes = 10 if args.small else 1000
    features = Features(
        {"image": Image(), "label": ClassLabel(names=[f"class {number}" for number in range(classes)])}
    )
    (folder / "data").mkdir()
    for split, count in (("train", 64 if args.small else 4096), ("test", len(jpegs))):
        images = [{"bytes": jpegs[number % len(jpegs)], "path": None} for number in range(count)]
        columns = {"image": images, "label": [number % classes for number in range(count)]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    name = "resnet10t" if args.small else "regnety_160"
    save_file(timm.create_model(name, num_classes=classes).state_dict(), folder / "teacher.safetensors")
    size, side = ("tiny", 32) if args.small else ("base", 224)
    (folder / "recipe.yaml").write_text(RECIPE.format(size=size, side=side))
    return name


def run(name: str, words: list[str], seconds: float, output: Path) -> dict:
    """Run a part; what came of it, how long it took, and its figures as far as they were written."""
    figures, begin, state = output / f"{name}.json", time.monotonic(), "done"
    with open(output / f"{name}.log", "w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, cwd=HERE, start_new_session=True)
        try:
            if process.wait(timeout=seconds):
                log.seek(0)
                last = [line for line in log.read().splitlines() if line.strip()][-1:]
                state = f"failed with {process.returncode}: {' '.join(last)[:300]}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its loader workers and compilers as well
                process.wait()
    found = json.loads(figures.read_text("utf-8")) if figures.exists() else None
    return {"state": state, "seconds": time.monotonic() - begin, "command": " ".join(words[1:]), "figures": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=Path, help="of data_pipeline.py; default: JPEGs made here")
    parser.add_argument("--minutes", type=float, default=8, help="for all; 8")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks: does every part run here?")
    args = parser.parse_args()
    begin = time.monotonic()
    if args.device == "cuda" and not torch_sees_a_gpu():
        parser.error("PyTorch sees no GPU here: --device cpu --small tries the commands")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    whole = args.output_dir / "gpu.json"
    results = json.loads(whole.read_text("utf-8")) if whole.exists() else {}
    left = [name for name in args.parts if results.get(name, {}).get("state") != "done"]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        facts = {
            "made": made,
            "teacher": make(made, args),
            "device": args.device,
            "cores": len(os.sched_getaffinity(0)),
        }
        facts["images"] = (args.images or made / "jpegs").resolve()
        print(f"images and a teacher were made in {time.monotonic() - begin:.0f} s", flush=True)
        for name in left:
            part, remaining = PARTS[name], 60 * args.minutes - (time.monotonic() - begin)
            if remaining < LAST:
                results[name] = {"state": "not begun: no time was left"}
            else:
                text = part.small if args.small else part.words
                words = text.format(**facts, figures=(args.output_dir / f"{name}.json").resolve()).split()
                seconds = remaining if args.small else min(part.seconds, remaining)
                results[name] = run(name, [sys.executable, *words], seconds, args.output_dir)
            print(f"{name}: {results[name]['state']} ({results[name].get('seconds', 0):.0f} s)", flush=True)
            whole.write_text(json.dumps(results, indent=1))
    print(f"all took {time.monotonic() - begin:.0f} s; figures: {whole}, tables: {args.output_dir}/*.log")
    sys.exit(any(results[name]["state"] != "done" for name in args.parts))


def torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
