"""views.py: views depend on nothing but their place in the run."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from hf_deit import (
    EvalViews,
    TrainViews,
    build_eval_transform,
    build_image_processor,
    build_train_transform,
    load_image_dataset,
)
from hf_deit.augmentation.repeated_augmentation import RepeatedAugmentationSampler, View
from hf_deit.data import views as views_module
from hf_deit.data.decoding import decode_image
from hf_deit.data.views import collate_views


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


def test_a_view_has_its_seed_from_seed_epoch_and_position(tiny_images):
    images, transform = tiny_images()["train"], build_train_transform(16)
    places = [(seed, epoch, position) for seed in (0, 1) for epoch in (0, 1) for position in (0, 1)]

    def view(seed, epoch, position, index=3):
        return TrainViews(images, transform, seed)[View(index, epoch, position)]["view_seeds"]

    assert len({view(*place) for place in places}) == 8
    assert [view(*place) for place in places] == [view(*place, index=4) for place in places]
    assert all(0 <= view(*place) < 2**63 for place in places)


def test_repeats_of_an_image_are_different_views(tiny_images):
    views = pixels(loader(tiny_images(), batch_size=3))
    for start in range(0, len(views), 3):
        assert not torch.equal(views[start], views[start + 1])


def test_an_image_is_decoded_once_for_its_repeats(tiny_images, monkeypatch):
    decoded = []
    monkeypatch.setattr(views_module, "decode_image", lambda *image: decoded.append(image) or decode_image(*image))
    views = sum(len(batch["labels"]) for batch in loader(tiny_images(), batch_size=12))
    assert (views, len(decoded)) == (48, 16)


def test_a_batch_is_uint8_until_the_device(tiny_images):
    batch = next(iter(loader(tiny_images())))
    assert batch["pixel_values"].dtype == torch.uint8 and batch["pixel_values"].shape == (8, 3, 16, 16)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["labels"].dtype == torch.int64 and batch["view_seeds"].shape == (8,)
    assert batch["view_ids"].dtype == np.int64


def test_a_batch_says_which_views_of_the_run_it_holds(tiny_images):
    views = TrainViews(tiny_images()["train"], build_train_transform(16))
    batch = collate_views(views.__getitems__([View(4, 2, 11), View(4, 2, 12), View(0, 3, 0), 7]))
    assert batch["view_ids"].tolist() == [[2, 11], [2, 12], [3, 0], [0, 7]]


def test_a_batch_is_collated_without_a_copy(tiny_images):
    views = TrainViews(tiny_images()["train"], build_train_transform(16))
    examples = views.__getitems__(list(range(5)))
    collated = collate_views(examples)
    assert collated["pixel_values"].data_ptr() == examples.pixels.ctypes.data
    for loose in (list(examples), [views[index] for index in range(5)]):  # as another loader may hand them on
        again = collate_views(loose)
        assert torch.equal(again["pixel_values"], collated["pixel_values"])
        assert again["pixel_values"].is_contiguous(memory_format=torch.channels_last)


def test_a_negative_seed_is_refused(tiny_images):
    with pytest.raises(ValueError, match="seed of the views is -1"):
        TrainViews(tiny_images()["train"], build_train_transform(16), seed=-1)


# Scale


def jpeg_rows(count, side=400):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((side, side))
        file = io.BytesIO()
        coarse.save(file, "JPEG", quality=95)
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{number}.jpg"}, "label": number})
    return rows


def test_a_large_image_is_decoded_smaller_without_visible_change(monkeypatch):
    rows = jpeg_rows(12)
    transform = build_train_transform(32, crop="random_resized", scale=(0.08, 1), auto_augment=None)
    assert transform.reduction(400, 400) == 2  # the smallest crop has a side of 98
    shapes = []

    def watched(*image):
        pixels = decode_image(*image)
        shapes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(views_module, "decode_image", watched)
    batch = [View(index, 0, 3 * index + repeat) for index in range(12) for repeat in range(3)]
    quick = TrainViews(rows, transform).__getitems__(batch)
    assert {shape[1] for shape in shapes} == {200} and max(shape[0] for shape in shapes) <= 200
    for example, view in zip(quick, batch, strict=True):
        # the same choices, carried out on the picture in full size
        rng = random.Random(int(view.position))
        rng.getrandbits(63)
        choices = transform.sample(200, 200, rng)
        box = choices.box._replace(**{side: 2 * length for side, length in choices.box._asdict().items()})
        whole = transform.apply(decode_image(rows[view]["image"]), choices._replace(box=box))
        assert np.abs(example["pixel_values"].astype(int) - whole).mean() < 1.5


# Damage


def with_damage(rows, *damaged):
    rows = [{"image": dict(row["image"]), "label": row["label"]} for row in rows]
    for index in damaged:
        rows[index]["image"] = {"bytes": b"no image", "path": f"{index}.jpg"}
    return rows


def test_a_damaged_image_is_replaced_by_the_next_whole_one(tiny_images):
    rows = with_damage(tiny_images(train=6)["train"], 1, 2, 5)
    views = TrainViews(rows, build_train_transform(16), seed=3)
    batch = [View(index, 4, position) for position, index in enumerate([1, 1, 0, 5])]
    examples = views.__getitems__(batch)
    stand_ins = TrainViews(rows, build_train_transform(16), seed=3).__getitems__(
        [View(index, 4, position) for position, index in enumerate([3, 3, 0, 0])]
    )
    for ours, expected in zip(examples, stand_ins, strict=True):
        np.testing.assert_array_equal(ours["pixel_values"], expected["pixel_values"])
        assert (ours["labels"], ours["view_seeds"]) == (expected["labels"], expected["view_seeds"])
    reason = "holds no image that Pillow can identify"
    assert collate_views(examples)["bad_images"] == [(index, f"{index}.jpg", reason) for index in (1, 2, 5)]
    assert "bad_images" not in collate_views(views.__getitems__([View(0, 4, 2)]))


@pytest.mark.parametrize("num_workers", [1, 4])
def test_replacements_do_not_depend_on_the_workers(tiny_images, num_workers):
    images = {"train": with_damage(tiny_images()["train"], 0, 7, 8, 9, 30, 47)}
    alone, shared = list(loader(images)), list(loader(images, num_workers))
    assert torch.equal(pixels(alone), pixels(shared))
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a["labels"], b["labels"]) and a.get("bad_images") == b.get("bad_images")
    assert any("bad_images" in batch for batch in alone)


@pytest.mark.parametrize("count, tried", [(5, 5), (150, 100)])
def test_a_set_of_damaged_images_is_an_error(count, tried):
    rows = [{"image": {"bytes": b"", "path": f"{index}.jpg"}, "label": 0} for index in range(count)]
    views = TrainViews(rows, build_train_transform(16))
    last = (2 + tried - 1) % count
    message = rf"{tried} training images in a row .* number 2 to number {last} \(path {last}.jpg: empty: 0 bytes\)"
    with pytest.raises(ValueError, match=message):
        views[2]


def test_evaluation_names_the_damaged_image(tiny_images):
    views = EvalViews(with_damage(tiny_images()["eval"], 3), build_eval_transform(16))
    with pytest.raises(ValueError, match=r"number 3 \(path 3.jpg\) is damaged: holds no image .* replace the file"):
        [views[index] for index in range(5)]


# Evaluation


def test_evaluation_never_sees_an_augmentation(tiny_images):
    views = EvalViews(tiny_images()["eval"], build_eval_transform(16))
    first = [views[index]["pixel_values"] for index in range(len(views))]
    again = [views[index]["pixel_values"] for index in reversed(range(len(views)))][::-1]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    originals = [decode_image(row["image"]) for row in tiny_images()["eval"]]
    assert all((a == b).all() for a, b in zip(first, originals, strict=True))  # 16 px at size 16: nothing to do
    assert "view_seeds" not in views[0]


def test_the_saved_processor_is_the_evaluation_transform(shared_data):
    options = {"splits": ("eval",), "eval_split": "validation", "max_eval_samples": 20}
    rows = load_image_dataset(str(shared_data / "imagenet_sample"), **options)["eval"]
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
