"""Time and memory of finding the images of a large directory of class folders, beside the peers.

    python benchmarks/find_images.py --count 1000000 --classes 1000

makes empty files `<class>/<number>.jpg` in a temporary directory, which is removed afterwards, and finds them in turn,
each time in a fresh process:

- hf_deit: `read_image_folders` after `find_image_folders`, and the whole of `load_image_dataset` (the table of paths
  and labels, the images held out for evaluation, the checks of the classes);
- torchvision: `ImageFolder(directory)`;
- datasets: `load_dataset("imagefolder", data_dir=directory)`, which resolves the files and writes their paths and
  labels to its cache.

None of them opens a file: a suffix is enough for all three. Seconds are those of the call, imports aside; memory is
the peak of the process beyond what it had before the call.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def find(how: str, directory: str) -> dict:
    """Find the images in this process; called by the child process."""
    if how.startswith("hf_deit"):
        from hf_deit.data.folders import find_image_folders, read_image_folders
        from hf_deit.data.loading import load_image_dataset

        def read() -> int:
            if how == "hf_deit, load_image_dataset":
                return sum(map(len, load_image_dataset(directory).values()))
            folders = find_image_folders(Path(directory))
            return len(read_image_folders(folders["train"]).images)

    elif how == "torchvision":
        from torchvision.datasets import ImageFolder

        def read() -> int:
            return len(ImageFolder(directory))

    else:
        import datasets

        def read() -> int:
            return len(datasets.load_dataset("imagefolder", data_dir=directory, split="train"))

    before, cpu, start = _peak(), time.process_time(), time.perf_counter()
    images = read()
    return {
        "images": images,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "megabytes": _peak() - before,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_files(root: Path, count: int, classes: int) -> None:
    for number in range(classes):
        folder = root / f"n{number:08d}"
        folder.mkdir()
        for image in range(number, count, classes):
            os.close(os.open(folder / f"{image:08d}.jpg", os.O_CREAT | os.O_WRONLY))


HOW = ("hf_deit", "hf_deit, load_image_dataset", "torchvision", "datasets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="number of files")
    parser.add_argument("--classes", type=int, default=1_000, help="number of class folders")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns; medians are printed")
    parser.add_argument("--directory", help="where to make the temporary directory")
    parser.add_argument("--only", nargs="+", default=HOW, choices=HOW, help="what to measure")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(find(*args.child)))
        return
    results: dict[str, list[dict]] = {how: [] for how in args.only}
    with tempfile.TemporaryDirectory(dir=args.directory) as root:
        images = Path(root, "images")
        images.mkdir()
        make_files(images, args.count, args.classes)
        for _ in range(args.repeats):
            for how in args.only:
                with tempfile.TemporaryDirectory(dir=args.directory) as cache:
                    environment = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
                    command = [sys.executable, __file__, "--child", how, str(images)]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                results[how].append(json.loads(done.stdout.splitlines()[-1]))
                print(how, results[how][-1], file=sys.stderr, flush=True)
    print(f"{args.count:,} empty files in {args.classes:,} folders, medians of {args.repeats}\n")
    print("| | images | seconds | CPU seconds | MB |\n|---|--:|--:|--:|--:|")
    for how, runs in results.items():
        seconds, cpu, megabytes = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "megabytes")
        )
        print(f"| {how} | {runs[0]['images']:,} | {seconds:.2f} | {cpu:.2f} | {megabytes:,.0f} |")


if __name__ == "__main__":
    main()
