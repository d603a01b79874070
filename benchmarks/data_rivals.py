"""Other data pipelines for data_pipeline.py, each as its own project writes it. Optional: what is missing is named.

The same encoded images in memory, batches of the same size, as far as each goes by itself:

- timm: Pillow, create_transform with the authors' arguments, PyTorch's collation;
- torchvision: v2's transforms on tensors (decode_image, RandomResizedCrop, RandAugment, flip, erasing, normalised);
- dali: NVIDIA DALI on the CPU (a decoder that crops, resize, its own RandAugment, normalised); threads for workers;
- spdl: Meta's SPDL, whose FFmpeg decodes, crops, scales and flips in threads; it has no RandAugment, so that
  torchvision's v2 follows in the row that says so.

DALI and SPDL have threads where PyTorch has loader workers: as many as `--workers`, or one.

    pip install nvidia-dali-cuda120 nvidia-nvimgcodec-cu12     # no driver is needed on the CPU
    pip install spdl-io                                        # and the libraries of FFmpeg 4 to 9
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomCrop

from hf_deit.augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD, sample_crop_box


POLICY = "rand-m9-mstd0.5-inc1"
EPOCHS = 3  # of a run
Run = Callable[[], int]  # decodes and augments, and returns how many views it made

# What has to be there, and how to get it.
RIVALS = {
    "torchvision": ("torchvision.transforms.v2", "pip install torchvision"),
    "dali": ("nvidia.dali", "pip install nvidia-dali-cuda120 nvidia-nvimgcodec-cu12"),
    "spdl": ("spdl.pipeline", "pip install spdl-io, and the libraries of FFmpeg"),
}


def _small_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()


def missing(names: Sequence[str]) -> dict[str, str]:
    """Of the rivals, those that cannot be imported, and why."""
    reasons = {}
    for name in names:
        try:
            import_module(RIVALS[name][0])
            if name == "spdl":  # FFmpeg is loaded with the first image
                decode_with_spdl(_small_jpeg(), 8, random.Random(0))
        except Exception as error:  # whatever a library has against this machine, the others are measured
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]} ({RIVALS[name][1]})"
    return reasons


def views_of(batches: Callable[[], Iterator[int]]) -> Run:
    """A run of a few epochs; `batches` is called for each and yields the sizes of its batches."""
    return lambda: sum(size for _ in range(EPOCHS) for size in batches())


# timm


class TimmImages(Dataset):
    """timm's way from an encoded image to a view."""

    def __init__(self, images: list[dict], image_size: int, padded: bool = False):
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
        if padded:  # as the authors' main.py for 32 pixels
            self.transform.transforms[0] = RandomCrop(image_size, padding=4)

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


# torchvision


class TorchvisionImages(Dataset):
    """torchvision's v2 on uint8 tensors, in the order of its own training reference."""

    def __init__(self, images: list[dict], image_size: int, padded: bool):
        from torchvision.transforms import InterpolationMode, v2

        self.images = images
        cubic = InterpolationMode.BICUBIC
        crop = (
            v2.RandomCrop(image_size, padding=4) if padded else v2.RandomResizedCrop(image_size, interpolation=cubic)
        )
        self.transform = v2.Compose(
            [
                crop,
                v2.RandomHorizontalFlip(),
                v2.RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                v2.RandomErasing(0.25),
            ]
        )
        self.encoded = [torch.frombuffer(bytearray(row["image"]["bytes"]), dtype=torch.uint8) for row in images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from torchvision.io import ImageReadMode, decode_image

        pixels = decode_image(self.encoded[index], ImageReadMode.RGB, apply_exif_orientation=True)
        return self.transform(pixels), self.images[index]["label"]


def torchvision_run(
    images: list[dict], image_size: int, batch_size: int, num_workers: int, one_thread: Callable, padded: bool
) -> Run:
    loader = DataLoader(
        TorchvisionImages(images, image_size, padded),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=one_thread,
    )
    return views_of(lambda: (len(labels) for _, labels in loader))


# NVIDIA DALI


def dali_run(images: list[dict], image_size: int, batch_size: int, num_workers: int, augmented: bool) -> Run:
    """A pipeline of DALI on the CPU."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    encoded = [np.frombuffer(row["image"]["bytes"], np.uint8) for row in images]

    class Epoch:
        """An epoch's batches, each time in another order. At its end nothing is under way: a run pays for all."""

        rng = random.Random(0)

        def __iter__(self) -> Iterator[list[np.ndarray]]:
            order = self.rng.sample(range(len(encoded)), len(encoded))
            for start in range(0, len(encoded) - batch_size + 1, batch_size):
                yield [encoded[number] for number in order[start : start + batch_size]]

    @pipeline_def(batch_size=batch_size, num_threads=max(1, num_workers), device_id=None, enable_conditionals=True)
    def pipeline():
        source = fn.external_source(source=Epoch(), batch=True, cycle="raise", dtype=types.UINT8, ndim=1)
        area, aspect = [0.08, 1.0], [3 / 4, 4 / 3]
        views = fn.decoders.image_random_crop(
            source, device="cpu", output_type=types.RGB, random_area=area, random_aspect_ratio=aspect
        )
        views = fn.resize(views, size=[image_size, image_size], interp_type=types.INTERP_CUBIC, antialias=True)
        flip = fn.random.coin_flip()
        if augmented:
            views = rand_augment.rand_augment(fn.flip(views, horizontal=flip), n=2, m=9)
            flip = 0
        mean, std = ([255 * number for number in numbers] for numbers in (IMAGENET_MEAN, IMAGENET_STD))
        return fn.crop_mirror_normalize(views, mirror=flip, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)

    built = pipeline()
    built.build()

    def epoch() -> Iterator[int]:
        with suppress(StopIteration):
            while True:
                (views,) = built.run()
                yield len(torch.from_dlpack(views.as_tensor()))
        built.reset()

    return views_of(epoch)


# SPDL


def decode_with_spdl(encoded: bytes, image_size: int, rng: random.Random):
    """One image as SPDL's frames: FFmpeg's filters crop a random box, scale and flip it."""
    import spdl.io

    packets = spdl.io.demux_image(encoded)
    box = sample_crop_box(packets.height, packets.width, rng)
    steps = [f"crop={box.width}:{box.height}:{box.left}:{box.top}", f"scale={image_size}:{image_size}:flags=bicubic"]
    steps += ["hflip"] * (rng.random() < 0.5) + ["format=pix_fmts=rgb24"]
    return spdl.io.decode_packets(packets, filter_desc=",".join(steps))


def spdl_run(images: list[dict], image_size: int, batch_size: int, num_workers: int, augmented: bool) -> Run:
    """SPDL's pipeline: images are decoded one by one in threads, and made a batch in one copy."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder
    from torchvision.transforms import InterpolationMode, v2

    encoded = [row["image"]["bytes"] for row in images]
    batches, threads, rng = len(images) // batch_size, max(1, num_workers), random.Random(0)
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    each = v2.Compose([v2.RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR), *end, v2.RandomErasing(0.25)])
    whole = v2.Compose(end)

    def decode(number: int):
        frames = decode_with_spdl(encoded[number], image_size, rng)
        if not augmented:
            return frames
        return each(spdl.io.to_torch(spdl.io.convert_frames(frames)).permute(2, 0, 1))

    def join(views: list) -> torch.Tensor:
        if augmented:
            return torch.stack(views)
        return whole(spdl.io.to_torch(spdl.io.convert_frames(views)).permute(0, 3, 1, 2))

    def epoch() -> Iterator[int]:
        order = rng.sample(range(len(encoded)), batches * batch_size)
        builder = PipelineBuilder().add_source(order).pipe(decode, concurrency=threads)
        pipeline = builder.aggregate(batch_size).pipe(join).add_sink(2).build(num_threads=threads)
        with pipeline.auto_stop():
            for views in pipeline.get_iterator(timeout=60):
                yield len(views)

    return views_of(epoch)


def rival_runs(
    names: Sequence[str],
    images: list[dict],
    image_size: int,
    batch_size: int,
    num_workers: int,
    one_thread: Callable,
    padded: bool = False,
) -> dict[str, Run]:
    """The rows of the rivals `names`, but for timm's, by their names in the table.

    Args:
        one_thread: called in each loader worker.
        padded: small images are shifted over a margin instead of cropped and resized. DALI and SPDL are left out then:
            theirs would be another job.
    """
    shared, runs = (images, image_size, batch_size, num_workers), {}
    if "torchvision" in names:
        runs["torchvision v2"] = torchvision_run(*shared, one_thread, padded)
    if "dali" in names and not padded:
        runs["DALI"] = dali_run(*shared, augmented=True)
        runs["DALI, crop and flip alone"] = dali_run(*shared, augmented=False)
    if "spdl" in names and not padded:
        runs["SPDL, then torchvision v2's RandAugment"] = spdl_run(*shared, augmented=True)
        runs["SPDL, crop and flip alone"] = spdl_run(*shared, augmented=False)
    return runs
