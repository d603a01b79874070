"""Views per second and core: this pipeline beside timm's, and how far it is from decoding alone.

    python benchmarks/data_pipeline.py --images <directory of JPEGs, parquet file or directory of parquet files>

All read the same encoded images from memory and make batches of the same size, in one process on one core, in turns;
the table shows medians. timm's pipeline is its own: Pillow, create_transform with the authors' arguments (RandAugment,
random erasing, normalised float32), PyTorch's collation. Ours leaves normalisation, erasing and mixing to the device:
their cost on this core is shown in a row of its own. With repeats, ours decodes an image once for its views, timm once
for each, as the authors' sampler makes it. The packed images are the same ones as `hf-deit pack --max_side 256` stores
them; both timm's and ours are shown on them, beside timm's on the images as they were.

`--rivals` adds torchvision v2, NVIDIA DALI on the CPU and Meta's SPDL (data_rivals.py); those not installed are
named and left out. `--kinds` adds photos as phones take them (12 megapixels, turned by EXIF) and images of 32 pixels,
both made of the given ones.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
from data_rivals import POLICY, RIVALS, TimmImages, guard_timms_posterize, missing, rival_runs, views_of
from PIL import ExifTags, Image
from torch.utils.data import BatchSampler, DataLoader, Dataset

import hf_deit
from hf_deit import Mixing, TrainViews, build_train_transform
from hf_deit.augmentation.repeated_augmentation import RepeatedAugmentationSampler
from hf_deit.augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD
from hf_deit.data.decoding import decode_image
from hf_deit.data.packing import PackSettings, reduce_image
from hf_deit.data.views import collate_views
from hf_deit.paper.machine import device_name


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


def one_thread(_=None) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Keep to so many cores: DALI's and SPDL's threads are not processes that can be counted."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def pack(images: list[dict], max_side: int = 256) -> list[dict]:
    """The images as `hf-deit pack` stores them with this `max_side`."""
    settings = PackSettings(max_side)
    return [row | {"image": {"bytes": reduce_image(row["image"]["bytes"], settings), "path": None}} for row in images]


# Other kinds of images, made of those that are given

PHONE = (4032, 3024)  # 12 megapixels
TURNS = (6, 1, 8, 3)  # EXIF: most photos of people are upright, taken with the phone upright


def phone_photos(images: list[dict], count: int) -> list[dict]:
    """JPEGs as phones take them: 12 megapixels, a sensor's noise, turned by EXIF."""
    rng, photos = np.random.default_rng(0), []
    for number in range(count):
        row = images[number % len(images)]
        large = np.asarray(Image.fromarray(decode_image(row["image"])).resize(PHONE, Image.Resampling.BICUBIC))
        noise = rng.integers(-4, 5, large.shape[:2], np.int16)[..., None]
        photo = Image.fromarray((large.astype(np.int16) + noise).clip(0, 255).astype(np.uint8))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = TURNS[number % len(TURNS)]
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=90, exif=exif)
        photos.append(row | {"image": {"bytes": file.getvalue(), "path": None}})
    return photos


def small_images(images: list[dict], count: int, side: int = 32) -> list[dict]:
    """PNGs of 32 pixels, as CIFAR-10's parquet files have them."""
    small = []
    for number in range(count):
        row, file = images[number % len(images)], io.BytesIO()
        Image.fromarray(decode_image(row["image"])).resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
        small.append(row | {"image": {"bytes": file.getvalue(), "path": None}})
    return small


# The contestants


def new_loader(
    dataset: Dataset, num_repeats: int, collate: Callable | None, batch_size: int, num_workers: int
) -> DataLoader:
    sampler = RepeatedAugmentationSampler(len(dataset), num_repeats, batch_size=batch_size)
    return DataLoader(
        dataset,
        batch_sampler=BatchSampler(sampler, batch_size, drop_last=True),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=one_thread,
    )


def contestants(
    images: list[dict],
    args: argparse.Namespace,
    num_workers: int,
    packed: list[dict] | None = None,
    size: int | None = None,
    padded: bool = False,
) -> dict[str, Callable[[], int]]:
    """The runs of timm's pipeline, of ours, and of the rivals: on `images`, and two of us on `packed`.

    Args:
        size: of the views; default: `--image-size`.
        padded: the views are shifted instead of cropped and resized.
    """
    size, batch_size = size or args.image_size, min(args.batch_size, len(images))
    transform = build_train_transform(size, auto_augment=POLICY, crop="padded" if padded else "random_resized")
    plain = build_train_transform(size, auto_augment=None, color_jitter=0, crop=transform.crop)

    def timms(rows: list[dict], num_repeats: int) -> Callable[[], int]:
        return epochs(new_loader(TimmImages(rows, size, padded), num_repeats, None, batch_size, num_workers))

    def ours(rows: list[dict], num_repeats: int, transform=transform) -> Callable[[], int]:
        dataset = TrainViews(rows, transform)
        return epochs(new_loader(dataset, num_repeats, collate_views, batch_size, num_workers))

    runs = {"timm": timms(images, 1), "timm, 3 repeats": timms(images, 3)}
    runs |= {"hf_deit": ours(images, 1), "hf_deit, 3 repeats": ours(images, 3)}
    if packed is not None:
        runs["timm, packed at 256"] = timms(packed, 1)
        runs["hf_deit, packed at 256"] = ours(packed, 1)
        runs["hf_deit, packed at 256, 3 repeats"] = ours(packed, 3)
    if args.rivals:
        runs["hf_deit, crop and flip alone"] = ours(images, 1, plain)
        runs |= rival_runs(args.rivals, images, size, batch_size, num_workers, one_thread, padded)
    return runs


def epochs(batches: DataLoader) -> Callable[[], int]:
    """Runs of a few epochs each, every time other ones: with 3 repeats an epoch shows a third of the images."""
    sampler, numbers = batches.batch_sampler.sampler, itertools.count()

    def epoch() -> Iterator[int]:
        sampler.set_epoch(next(numbers))
        for batch in batches:
            yield len(batch[0] if isinstance(batch, (tuple, list)) else batch["labels"])

    return views_of(epoch)


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
    """Medians; how many times timm's speed, and DALI's where DALI was measured."""
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    rivals = [name for name in ("timm", "DALI") if name in medians]
    columns = [title, "views/s", "ms a view", "min - max", *(f"times {name}'s" for name in rivals)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, runs in times.items():
        bases = [f"{rival}, 3 repeats" if "3 repeats" in name else rival for rival in rivals]
        cells = [name, f"{1e3 / medians[name]:,.0f}", f"{medians[name]:.2f}", f"{min(runs):.2f} - {max(runs):.2f}"]
        cells += [f"{medians.get(base, medians[rival]) / medians[name]:.2f}" for base, rival in zip(bases, rivals)]
        lines.append(f"| {' | '.join(cells)} |")
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


def mean_kilobytes(rows: list[dict]) -> float:
    return statistics.mean(len(row["image"]["bytes"]) for row in rows) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-images", type=int, default=192)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="0: leave the table with loader workers out")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, help="other pipelines; without a name: all")
    parser.add_argument("--kinds", nargs="*", choices=("phone", "small"), help="other images; without a name: both")
    parser.add_argument("--max-photos", type=int, default=16, help="of 12 megapixels")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.rivals = list(RIVALS) if args.rivals == [] else args.rivals or []
    args.kinds = ["phone", "small"] if args.kinds == [] else args.kinds or []
    one_thread()
    guard_timms_posterize()
    absent = missing(args.rivals)
    args.rivals = [name for name in args.rivals if name not in absent]
    images = read_images(args.images, args.max_images)
    packed = pack(images)
    facts = (
        f"{len(images)} images, {mean_kilobytes(images):.0f} KB each, packed at 256 pixels' shorter side "
        f"{mean_kilobytes(packed):.0f} KB; {args.image_size} px, batches of {args.batch_size}; {device_name('cpu')}, "
        f"torch {torch.__version__}, timm {timm.__version__}, hf_deit {hf_deit.__version__}"
    )
    print(facts, *(f"left out: {name}, {reason}" for name, reason in absent.items()), "", sep="\n", flush=True)
    results = {"machine": facts, "left out": absent}

    def show(key: str, times: dict[str, list[float]], title: str) -> None:
        results[key] = times
        print(table(times, title), "\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))

    with cores(1):
        cases = contestants(images, args, 0, packed)
        cases["decoding alone (the ceiling)"] = lambda: decode_all(images)
        show("one core", measure(cases, args.runs), "one process, one core")
        results["stages"] = stages(images, args)
        print("| stage of hf_deit, one repeat | ms a view |\n|---|---|")
        print("\n".join(f"| {name} | {value:.3f} |" for name, value in results["stages"].items()), "\n", flush=True)
        if "phone" in args.kinds:
            photos = phone_photos(images, args.max_photos)
            cases = contestants(photos, args, 0, pack(photos))
            cases["decoding alone"] = lambda: decode_all(photos)
            title = f"{len(photos)} photos of 12 megapixels with EXIF, {mean_kilobytes(photos) / 1e3:.1f} MB each"
            show("photos of phones", measure(cases, min(args.runs, 3)), title)
        if "small" in args.kinds:
            small = small_images(images, max(len(images), 4 * args.batch_size))
            cases = contestants(small, args, 0, size=32, padded=True)
            cases["decoding alone"] = lambda: decode_all(small)
            show("32 pixels", measure(cases, args.runs), f"{len(small)} PNGs of 32 pixels, padded crop")
    if args.workers:
        with cores(args.workers):
            count = len(os.sched_getaffinity(0))
            # Batches for all, so that few workers wait at the end of an epoch
            times = max(8, math.ceil(2 * args.workers * args.batch_size / len(images)))
            many = contestants(images * times, args, args.workers, packed * times)
            show(
                "workers",
                measure(many, min(args.runs, 3)),
                f"{args.workers} loader workers (or threads) on {count} cores",
            )


if __name__ == "__main__":
    main()
