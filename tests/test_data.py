"""data.py: finding sets, decoding every kind of file, and views that depend on nothing but their place in the run."""

import io
import warnings

import datasets
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
from hf_deit import data as data_module
from hf_deit.data import collate_views, decode_image


# Loading


def test_digits_come_without_network():
    images = load_image_dataset("digits")
    assert (len(images["train"]), len(images["eval"])) == (1437, 360)
    assert images["train"].features["label"].names == [str(digit) for digit in range(10)]
    assert decode_image(images["eval"][0]["image"]).shape == (8, 8, 3)
    together = {row["image"]["bytes"] for split in images.values() for row in split}
    assert len(together) == 1797  # nothing is in both


def test_a_subset_is_random_and_repeatable():
    first = load_image_dataset("digits", max_train_samples=100, max_eval_samples=10)
    again = load_image_dataset("digits", max_train_samples=100, max_eval_samples=10)
    assert (len(first["train"]), len(first["eval"])) == (100, 10)
    assert first["train"]["label"][:] == again["train"]["label"][:]
    assert len(set(first["train"]["label"])) == 10


@pytest.fixture
def picture():
    def encode(color=(200, 30, 60), size=(20, 12), format="PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", size, color).save(buffer, format)
        return buffer.getvalue()

    return encode


def test_a_folder_of_classes_is_a_set(tmp_path, picture):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number}.png").write_bytes(picture((number, 0, 0)))
    images = load_image_dataset(str(tmp_path))
    assert (len(images["train"]), len(images["eval"])) == (8, 4)
    assert images["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    "names", [("train.parquet", "test.parquet"), ("train-00000-of-00001.parquet", "test/0000.parquet")]
)
def test_parquet_files_are_a_set(tmp_path, picture, names):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for name, count in zip(names, (6, 4), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = {"img": [{"bytes": picture(), "path": None}] * count, "label": [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / name))
    images = load_image_dataset(str(tmp_path))
    assert (len(images["train"]), len(images["eval"])) == (6, 4)
    assert images["train"].column_names == ["image", "label"]


def test_integer_labels_get_names(tmp_path, picture):
    for split in ("train", "test"):
        rows = {"picture": [{"bytes": picture(), "path": None}] * 3, "kind": [7, 9, 7]}
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / f"{split}.parquet"))
    images = load_image_dataset(str(tmp_path), label_column="kind")
    assert images["train"].features["label"].names == ["7", "9"]
    assert images["train"]["label"][:] == [0, 1, 0]


def test_a_directory_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images found in .*expected parquet files such as train.parquet"):
        load_image_dataset(str(tmp_path))
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match="no images found"):
        load_image_dataset(str(tmp_path))


def test_a_name_that_is_nothing_is_refused():
    with pytest.raises(ValueError, match="'nobody/nothing' could not be loaded.*Give the path of a directory"):
        load_image_dataset("nobody/nothing")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_column": "picture"}, "no column 'picture': 'digits' has the columns image, label; set image_column"),
        ({"label_column": "kind"}, "no column 'kind'"),
        (
            {"train_split": "training"},
            "'digits' has no split 'training'; it has train, test: choose one with train_split",
        ),
        ({"max_eval_samples": 0}, "max_eval_samples is 0"),
    ],
)
def test_bad_arguments_are_refused_with_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset("digits", **arguments)


def test_cifar10_loads_from_parquet(shared_data):
    images = load_image_dataset(str(shared_data / "cifar10"), max_eval_samples=100)
    assert len(images["train"]) == 50_000 and images["train"].features["label"].names[3] == "cat"
    assert decode_image(images["eval"][0]["image"]).shape == (32, 32, 3)


# Decoding


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def gradient():
    """A colour picture that no mode can confuse with another."""
    y, x = np.mgrid[:24, :32]
    return np.stack([x * 8, y * 10, 255 - x * 4 - y * 4], axis=-1).astype(np.uint8)


def test_rgb_is_exact(gradient):
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(gradient))), gradient)


def test_grey_becomes_three_equal_channels(gradient):
    decoded = decode_image(encoded(Image.fromarray(gradient[..., 0])))
    np.testing.assert_array_equal(decoded, np.repeat(gradient[..., :1], 3, axis=2))


def test_alpha_is_dropped(gradient):
    alpha = np.full_like(gradient[..., :1], 77)
    decoded = decode_image(encoded(Image.fromarray(np.concatenate([gradient, alpha], axis=2))))
    np.testing.assert_array_equal(decoded, gradient)


def test_grey_with_alpha_is_grey(gradient):
    image = Image.fromarray(gradient[..., 0]).convert("LA")
    np.testing.assert_array_equal(decode_image(encoded(image)), np.repeat(gradient[..., :1], 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 3])
def test_palette_colours_are_looked_up(gradient, transparency):
    image = Image.fromarray(gradient).quantize(64)
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(encoded(image, **options))
    np.testing.assert_array_equal(
        decoded, np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)[np.asarray(image)]
    )


def test_cmyk_jpeg_has_its_colours(gradient):
    decoded = decode_image(encoded(Image.fromarray(gradient).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - gradient).mean() < 6  # an inverted reading is off by 100


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(decoded[..., 0], values // 256)
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_one_bit_images_are_black_and_white(gradient):
    decoded = decode_image(encoded(Image.fromarray(gradient[..., 0] > 100)))
    assert set(np.unique(decoded)) == {0, 255}


def test_images_stand_upright(gradient):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    decoded = decode_image(encoded(Image.fromarray(gradient), "PNG", exif=exif))
    np.testing.assert_array_equal(decoded, np.rot90(gradient, -1))


def test_broken_exif_does_not_matter(gradient):
    decoded = decode_image(encoded(Image.fromarray(gradient), "PNG", exif=b"Exif\0\0 this is no TIFF header"))
    np.testing.assert_array_equal(decoded, gradient)


# Views


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
    monkeypatch.setattr(data_module, "decode_image", lambda row: decoded.append(row) or decode_image(row))
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
