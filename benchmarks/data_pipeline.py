"""Views per second and core: this pipeline beside timm's, and how far it is from decoding alone.

    python benchmarks/data_pipeline.py --images <directory of JPEGs, parquet file or directory of parquet files>

All read the same encoded images from memory and make batches of the same size, in one process on one core, in turns;
the table shows medians. timm's pipeline is its own: Pillow, create_transform with the authors' arguments (RandAugment,
random erasing, normalised float32), PyTorch's collation. Ours leaves normalisation, erasing and mixing to the device:
their cost on this core is shown in a row of its own. With repeats, ours decodes an image once for its views, timm once
for each, as the authors' sampler makes it. The packed images are the same ones as `hf-deit pack --max_side 256` stores
them; both timm's and ours are shown on them, beside timm's on the images as they were.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import BatchSampler, DataLoader, Dataset

import hf_deit
from hf_deit import Mixing, TrainViews, build_train_transform
from hf_deit.augmentation.repeated_augmentation import RepeatedAugmentationSampler
from hf_deit.augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD
from hf_deit.data.decoding import decode_image
from hf_deit.data.packing import PackSettings, reduce_image
from hf_deit.data.views import collate_views


POLICY = "rand-m9-mstd0.5-inc1"


def read_images(path: Path, limit: int) -> list[dict]:
    """Encoded images, as the views take them, in memory."""
    if path.suffix == ".parquet" or any(path.glob("**/*.parquet")):
        from datasets import Dataset as Table
        from datasets import Image as ImageColumn

        files = [path] if path.suffix == ".parquet" else sorted(path.glob("**/*.parquet"))
        table = Table.from_parquet([str(file) for file in files])
        column = next(name for name, feature in table.features.items() if isinstance(feature, ImageColumn))
        rows = table.cast_column(column, ImageColumn(decode=False))
        encoded = [row[column]["bytes"] for row in rows.select(range(min(limit, len(rows))))]
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))[:limit]
        encoded = [file.read_bytes() for file in files]
    if not encoded:
        raise SystemExit(f"no parquet files and no JPEGs in {path}")
    return [{"image": {"bytes": data, "path": None}, "label": 0} for data in encoded]


class TimmImages(Dataset):
    """timm's way from an encoded image to a view."""

    def __init__(self, images: list[dict], image_size: int):
        self.images = images
        self.transform = create_transform(
            input_size=image_size,
            is_training=True,
            color_jitter=0.3,
            auto_augment=POLICY,
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            re_count=1,
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.images[index]
        return self.transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")), row["label"]


def guard_timms_posterize() -> None:
    """Under Pillow 13 timm's RandAugment fails when it keeps 0 bits: let it keep one."""
    posterize = auto_augment.posterize
    for name, function in auto_augment.NAME_TO_OP.items():
        if function is posterize:
            auto_augment.NAME_TO_OP[name] = lambda image, bits, **options: posterize(image, max(1, bits), **options)


def one_thread(_=None) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def pack(images: list[dict], max_side: int = 256) -> list[dict]:
    """The images as `hf-deit pack` stores them with this `max_side`."""
    settings = PackSettings(max_side)
    return [row | {"image": {"bytes": reduce_image(row["image"]["bytes"], settings), "path": None}} for row in images]


def loaders(
    images: list[dict], packed: list[dict], args: argparse.Namespace, num_workers: int
) -> dict[str, DataLoader]:
    """Each yields the batches of an epoch."""
    transform = build_train_transform(args.image_size, auto_augment=POLICY)

    def loader(dataset: Dataset, num_repeats: int, collate: Callable | None) -> DataLoader:
        sampler = RepeatedAugmentationSampler(len(images), num_repeats, batch_size=args.batch_size)
        return DataLoader(
            dataset,
            batch_sampler=BatchSampler(sampler, args.batch_size, drop_last=True),
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=one_thread,
        )

    return {
        "timm": loader(TimmImages(images, args.image_size), 1, None),
        "timm, 3 repeats": loader(TimmImages(images, args.image_size), 3, None),
        "hf_deit": loader(TrainViews(images, transform), 1, collate_views),
        "hf_deit, 3 repeats": loader(TrainViews(images, transform), 3, collate_views),
        "timm, packed at 256": loader(TimmImages(packed, args.image_size), 1, None),
        "hf_deit, packed at 256": loader(TrainViews(packed, transform), 1, collate_views),
        "hf_deit, packed at 256, 3 repeats": loader(TrainViews(packed, transform), 3, collate_views),
    }


def epochs(batches: DataLoader) -> Callable[[], int]:
    """Runs of three epochs each, every time other ones: with 3 repeats an epoch shows a third of the images."""
    sampler, numbers = batches.batch_sampler.sampler, itertools.count()

    def run() -> int:
        count = 0
        for _ in range(3):
            sampler.set_epoch(next(numbers))
            for batch in batches:
                count += len(batch[0] if isinstance(batch, (tuple, list)) else batch["labels"])
        return count

    return run


def decode_all(images: list[dict]) -> int:
    for row in images:
        decode_image(row["image"])
    return len(images)


def measure(cases: dict[str, Callable[[], int]], runs: int) -> dict[str, list[float]]:
    """Milliseconds a view of each run, the cases in turns after one unmeasured run each."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(runs + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            count = case()
            if run:
                times[name].append((time.perf_counter() - start) / count * 1e3)
    return times


def table(times: dict[str, list[float]], title: str) -> str:
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    lines = [f"| {title} | views/s | ms a view | min - max | times timm's |", "|---|---|---|---|---|"]
    for name, runs in times.items():
        base = medians["timm, 3 repeats" if "3 repeats" in name else "timm"]
        spread = f"{min(runs):.2f} - {max(runs):.2f}"
        lines.append(
            f"| {name} | {1e3 / medians[name]:,.0f} | {medians[name]:.2f} | {spread} | {base / medians[name]:.2f} |"
        )
    return "\n".join(lines)


def stages(images: list[dict], args: argparse.Namespace) -> dict[str, float]:
    """Where the time of our pipeline goes: milliseconds, one view an image."""
    transform = build_train_transform(args.image_size, auto_augment=POLICY)
    rng = np.random.default_rng(0)
    decoded = [decode_image(row["image"]) for row in images]
    drawn = [transform.sample(*image.shape[:2], rng) for image in decoded]
    pairs = list(zip(decoded, drawn, strict=True))
    views = [transform.apply(*pair) for pair in pairs]
    batch = min(args.batch_size, len(views))
    examples = [{"pixel_values": view, "labels": 0, "view_seeds": 1} for view in views[:batch]]
    mixing = Mixing(1000, IMAGENET_MEAN, IMAGENET_STD)
    collated = collate_views(examples)

    def every(function: Callable, items: list) -> Callable[[], int]:
        def case() -> int:
            for item in items:
                function(item)
            return len(items)

        return case

    def on_batch(function: Callable) -> Callable[[], int]:
        def case() -> int:
            function()
            return batch

        return case

    times = measure(
        {
            "decode": every(lambda row: decode_image(row["image"]), images),
            "draw": every(lambda image: transform.sample(*image.shape[:2], rng), decoded),
            "crop, resize, flip": every(lambda pair: transform.apply(pair[0], pair[1]._replace(operations=())), pairs),
            "crop to RandAugment": every(lambda pair: transform.apply(*pair), pairs),
            "collate": on_batch(lambda: collate_views(examples)),
            "normalise, erase, mix (on the device in training)": on_batch(
                lambda: mixing(collated["pixel_values"], collated["labels"], collated["view_seeds"])
            ),
        },
        args.runs,
    )
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    medians["RandAugment"] = medians.pop("crop to RandAugment") - medians["crop, resize, flip"]
    order = ("decode", "draw", "crop, resize, flip", "RandAugment", "collate")
    return {name: medians.pop(name) for name in order} | medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-images", type=int, default=192)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    one_thread()
    guard_timms_posterize()
    images = read_images(args.images, args.max_images)
    packed = pack(images)
    size, packed_size = (np.mean([len(row["image"]["bytes"]) for row in rows]) / 1e3 for rows in (images, packed))
    print(
        f"{len(images)} images, {size:.0f} KB each, packed at 256 pixels' shorter side {packed_size:.0f} KB; "
        f"{args.image_size} px, batches of {args.batch_size}; {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}, timm {timm.__version__}, hf_deit {hf_deit.__version__}\n"
    )
    cases = {name: epochs(loader) for name, loader in loaders(images, packed, args, 0).items()}
    cases["decoding alone (the ceiling)"] = lambda: decode_all(images)
    alone = measure(cases, args.runs)
    print(table(alone, "one process, one core"), "\n")
    spent = stages(images, args)
    print("| stage of hf_deit, one repeat | ms a view |\n|---|---|")
    print("\n".join(f"| {name} | {value:.3f} |" for name, value in spent.items()), "\n")
    many = loaders(images * 8, packed * 8, args, args.workers)  # no worker waits long at the end of an epoch
    together = measure({name: epochs(loader) for name, loader in many.items()}, 3)
    print(table(together, f"DataLoader, {args.workers} workers on {len(os.sched_getaffinity(0))} cores"))
    if args.json:
        args.json.write_text(json.dumps({"one core": alone, "stages": spent, "workers": together}, indent=1))


if __name__ == "__main__":
    main()
