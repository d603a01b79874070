"""views.py: views depend on nothing but their place in the run."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from hf_deit import (
    EvalViews,
    RepeatedAugmentationSampler,
    TrainViews,
    build_eval_transform,
    build_image_processor,
    build_train_transform,
    load_image_dataset,
)
from hf_deit import views as views_module
from hf_deit.decoding import decode_image
from hf_deit.views import collate_views


def loader(images, num_workers=0, batch_size=8, epoch=0, seed=5):
    views = TrainViews(images["train"], build_train_transform(16, crop="random_resized"), seed=seed)
    sampler = RepeatedAugmentationSampler(len(views), 3, seed=seed)
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    return DataLoader(views, batch_sampler=batches, collate_fn=collate_views, num_workers=num_workers)


def pixels(batches):
    return torch.cat([batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize("num_workers", [1, 4])
def test_views_do_not_depend_on_the_workers(tiny_images, num_workers):
    alone, shared = list(loader(tiny_images())), list(loader(tiny_images(), num_workers))
    assert torch.equal(pixels(alone), pixels(shared))
    assert all((a["view_seeds"] == b["view_seeds"]).all() for a, b in zip(alone, shared, strict=True))


def test_views_do_not_depend_on_the_batch(tiny_images):
    assert torch.equal(pixels(loader(tiny_images(), batch_size=8)), pixels(loader(tiny_images(), batch_size=16)))


def test_epochs_and_seeds_change_every_view(tiny_images):
    first = pixels(loader(tiny_images()))
    for other in (loader(tiny_images(), epoch=1), loader(tiny_images(), seed=6)):
        assert (first == pixels(other)).flatten(1).all(dim=1).sum() == 0


def test_repeats_of_an_image_are_different_views(tiny_images):
    views = pixels(loader(tiny_images(), batch_size=3))
    for start in range(0, len(views), 3):
        assert not torch.equal(views[start], views[start + 1])


def test_an_image_is_decoded_once_for_its_repeats(tiny_images, monkeypatch):
    decoded = []
    monkeypatch.setattr(views_module, "decode_image", lambda row: decoded.append(row) or decode_image(row))
    views = sum(len(batch["labels"]) for batch in loader(tiny_images(), batch_size=12))
    assert (views, len(decoded)) == (48, 16)


def test_a_batch_is_uint8_until_the_device(tiny_images):
    batch = next(iter(loader(tiny_images())))
    assert batch["pixel_values"].dtype == torch.uint8 and batch["pixel_values"].shape == (8, 3, 16, 16)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["labels"].dtype == torch.int64 and batch["view_seeds"].shape == (8,)


def test_evaluation_never_sees_an_augmentation(tiny_images):
    views = EvalViews(tiny_images()["eval"], build_eval_transform(16))
    first = [views[index]["pixel_values"] for index in range(len(views))]
    again = [views[index]["pixel_values"] for index in reversed(range(len(views)))][::-1]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    originals = [decode_image(row["image"]) for row in tiny_images()["eval"]]
    assert all((a == b).all() for a, b in zip(first, originals, strict=True))  # 16 px at size 16: nothing to do
    assert "view_seeds" not in views[0]


def test_the_saved_processor_is_the_evaluation_transform(shared_data):
    rows = load_image_dataset(str(shared_data / "imagenet_sample"), train_split="validation", max_eval_samples=20)[
        "eval"
    ]
    transform = build_eval_transform(224)
    processor, views = build_image_processor(transform), EvalViews(rows, transform)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (processor.image_mean, processor.image_std))
    compared = 0
    for index, row in enumerate(rows):
        image = decode_image(row["image"])
        if int(256 * max(image.shape) / min(image.shape[:2])) % 2:
            continue  # stock rounds the half pixel of an odd margin down, torchvision and the authors to even
        ours = (views[index]["pixel_values"].transpose(2, 0, 1) / 255 - mean) / std
        stock = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        # The processor resizes with torch, the transform with Pillow: the same filter, rounded elsewhere.
        assert np.abs(ours - stock).mean() < 0.01 and np.abs(ours - stock).max() < 0.3
        compared += 1
    assert compared >= 5
