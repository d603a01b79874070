"""augmentation.py against timm, torchvision and Pillow: same choices in distribution, same pixels."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from support.augmentation import DRAWS, PAPER, generated_images, imagenet_sample, same_distribution
from timm.data import auto_augment as timm_auto_augment
from timm.data import create_transform
from torchvision import transforms

from hf_deit.augmentation.operations import Operation
from hf_deit.augmentation.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Box,
    build_eval_transform,
    build_train_transform,
    resize,
    sample_crop_box,
)


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(500, 333), (60, 500), (32, 32)])
def test_crop_boxes_are_distributed_as_torchvisions(shape):
    height, width = shape
    torch.manual_seed(4)
    blank = Image.new("L", (width, height))
    theirs = [transforms.RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    rng = np.random.default_rng(4)
    ours = [sample_crop_box(height, width, rng) for _ in range(DRAWS)]
    for field, mine, expected in zip(Box._fields, zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        same_distribution(mine, expected, field)
    assert all(top >= 0 and left >= 0 and top + h <= height and left + w <= width for top, left, h, w in ours)


def test_crop_falls_back_to_the_centre():
    rng = np.random.default_rng(0)
    assert sample_crop_box(10, 10_000, rng) == Box(0, 4993, 10, 13)
    assert sample_crop_box(10_000, 10, rng) == Box(4993, 0, 13, 10)
    assert sample_crop_box(1, 1, rng) == Box(0, 0, 1, 1)


# --- what is done ----------------------------------------------------------------------------------------------------


def test_resize_is_pillows_bicubic_rows_first(squares):
    """Pillow 13 chooses the order of its passes by the shape of the image, so both are asked for here."""
    for image in generated_images() + squares:
        for size in (32, 224, 300):
            picture = Image.fromarray(image).resize((size, image.shape[0]), Image.Resampling.BICUBIC)
            theirs = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
            difference = np.abs(resize(image, size) - theirs)
            assert difference.max() <= 2 and difference.mean() < 0.01


def test_view_is_the_crop_then_the_flip_then_the_operations():
    image = generated_images()[0]
    transform = build_train_transform(64)
    view = transform.sample(*image.shape[:2], np.random.default_rng(0))._replace(
        box=Box(20, 30, 200, 180), flip=True, operations=(Operation("Solarize", 100), Operation("Brightness", 0.7))
    )
    expected = Image.fromarray(image).crop((30, 20, 210, 220)).resize((64, 64), Image.Resampling.BICUBIC)
    expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda v: v if v < 100 else 255 - v)
    expected = np.asarray(ImageEnhance.Brightness(expected).enhance(0.7)).astype(int)
    # a level's difference before the threshold of 100 becomes a large one after it
    assert (np.abs(transform.apply(image, view) - expected) <= 1).mean() > 0.99


def test_padded_crop_shifts_by_up_to_four_pixels_over_black():
    image = np.full((32, 32, 3), 200, np.uint8)
    transform = build_train_transform(32, auto_augment=None, color_jitter=None, horizontal_flip=0)
    rng = np.random.default_rng(0)
    views = [transform.sample(32, 32, rng) for _ in range(2000)]
    assert {view.box[:2] for view in views} == {(top, left) for top in range(-4, 5) for left in range(-4, 5)}
    for view in views[:50]:
        expected = np.zeros_like(image)
        top, left = view.box[:2]
        expected[max(0, -top) : 32 - max(0, top), max(0, -left) : 32 - max(0, left)] = 200
        assert np.array_equal(transform.apply(image, view), expected)


def test_authors_rule_pads_small_images_and_zooms_large_ones():
    assert build_train_transform(32).crop == "padded"
    assert build_train_transform(33).crop == "random_resized"
    assert build_train_transform(32, crop="random_resized").crop == "random_resized"
    digit = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert build_train_transform(32)(digit, np.random.default_rng(0)).shape == (32, 32, 3)


# --- purity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PAPER, "original-mstd0.5", "rand-m9-mstd101-t3aw", None])
def test_a_view_is_a_pure_function_of_image_and_seed(config):
    image = generated_images()[0]
    before = image.copy()
    transform = build_train_transform(96, auto_augment=config)
    views = [transform(image, np.random.default_rng(seed)) for seed in range(40)]
    copy = pickle.loads(pickle.dumps(transform))
    again = [copy(image, np.random.default_rng(seed)) for seed in reversed(range(40))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({view.tobytes() for view in views}) == 40
    assert all(v.dtype == np.uint8 and v.shape == (96, 96, 3) and v.flags.c_contiguous for v in views)
    assert np.array_equal(image, before)


def test_global_generators_are_untouched():
    image = generated_images()[1]
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    for config in (PAPER, "v0-mstd1", "3a", None):
        build_train_transform(64, auto_augment=config)(image, np.random.default_rng(1))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 5000), (5000, 3), (7, 5)])
def test_odd_shapes_make_ordinary_views(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for size in (32, 64):
        evaluated = build_eval_transform(size)(image)
        assert evaluated.shape == (size, size, 3) and evaluated.dtype == np.uint8
        transform = build_train_transform(size, auto_augment="rand-m9-n4-p1-mstd101-inc1")
        for seed in range(8):
            assert transform(image, np.random.default_rng(seed)).shape == (size, size, 3)
    if shape == (1, 1):
        assert (evaluated == image).all()


def test_grey_images_stay_grey():
    grey = np.repeat(generated_images()[0][..., :1], 3, axis=2)
    transform = build_train_transform(64, mean=(0.5, 0.5, 0.5))
    for seed in range(60):
        view = transform(grey, np.random.default_rng(seed)).astype(int)
        assert np.abs(view - view[..., :1]).max() <= 1


def timms_pipeline(size: int):
    """Guarded: timm's posterize fails on 0 bits with Pillow 13."""
    transform = create_transform(
        (3, size, size),
        is_training=True,
        auto_augment=PAPER,
        interpolation="bicubic",
        color_jitter=0.3,
        normalize=False,
    )
    policy = next(part for part in transform.transforms if isinstance(part, timm_auto_augment.RandAugment))
    for operation in policy.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = lambda image, bits, **_: image.point(lambda value: value & (0xFF00 >> bits))
    return transform


def test_pixel_statistics_match_timms_pipeline(squares):
    """Both with 40 views an image."""
    images = (imagenet_sample() or generated_images())[:15]
    theirs = timms_pipeline(64)
    random.seed(6), np.random.seed(6), torch.manual_seed(6)
    expected = np.stack([theirs(picture).numpy() for picture in map(Image.fromarray, images) for _ in range(40)])
    expected = np.moveaxis(expected, 1, -1)
    ours = build_train_transform(64)
    rng = np.random.default_rng(6)
    views = np.stack([ours(image, rng) for image in images for _ in range(40)])
    assert views.shape == expected.shape
    assert views.mean() == pytest.approx(expected.mean(), abs=0.02 * 255)
    assert views.std() == pytest.approx(expected.std(), abs=0.02 * 255)
    for channel in range(3):
        assert views[..., channel].mean() == pytest.approx(expected[..., channel].mean(), abs=0.025 * 255)


@pytest.mark.slow
def test_pixel_statistics_of_5000_views_are_timms_within_one_percent(real_images):
    """25 views of each of 200 images, at 224 pixels."""

    def moments(views) -> tuple[float, float]:
        sums = np.array([[view.mean(), np.square(view, dtype=np.float64).mean()] for view in views]).mean(0)
        return sums[0], math.sqrt(sums[1] - sums[0] ** 2)

    theirs, ours = timms_pipeline(224), build_train_transform(224)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    pictures = [Image.fromarray(image) for image in real_images]
    expected = moments(theirs(picture).numpy() for picture in pictures for _ in range(25))
    rng = random.Random(0)
    measured = moments(ours(image, rng) for image in real_images for _ in range(25))
    print(f"mean {measured[0]:.2f} (timm {expected[0]:.2f}), deviation {measured[1]:.2f} (timm {expected[1]:.2f})")
    assert measured[0] == pytest.approx(expected[0], rel=0.01)
    assert measured[1] == pytest.approx(expected[1], rel=0.01)


# --- evaluation ------------------------------------------------------------------------------------------------------


def reference_eval(image: np.ndarray, size: int = 224, shorter: int = 256) -> np.ndarray:
    pipeline = transforms.Compose(
        [transforms.Resize(shorter, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    )
    return np.asarray(pipeline(Image.fromarray(image)))


def assert_equals_reference(
    images: list[np.ndarray], size: int, shorter: int, crop_ratio: float | None = None
) -> None:
    transform = build_eval_transform(size, crop_ratio=crop_ratio)
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
    for image in images:
        view, expected = transform(image), reference_eval(image, size, shorter)
        assert np.array_equal(view, expected)
        normalized = (view / np.float32(255) - mean) / std
        pixels = transforms.functional.to_tensor(expected.copy())
        golden = transforms.functional.normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert np.abs(normalized - golden.permute(1, 2, 0).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("size", "shorter", "crop_ratio"), [(224, 256, None), (384, 384, None), (384, 438, 0.875), (96, 109, None)]
)
def test_eval_transform_equals_resize_and_centre_crop(size, shorter, crop_ratio):
    assert_equals_reference(generated_images(), size, shorter, crop_ratio)


def test_eval_transform_equals_the_reference_on_real_images(real_images):
    assert_equals_reference(real_images, 224, 256)


def test_small_images_of_the_right_size_are_evaluated_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(build_eval_transform(32)(image), image)
    larger = resize(image, 48)
    assert np.array_equal(build_eval_transform(48, crop_ratio=1.0)(larger), larger)


def test_eval_transform_shows_the_middle_of_a_ribbon_without_a_ribbon_of_memory():
    ribbon = np.zeros((2, 200_000, 3), np.uint8)
    ribbon[:, 99_990:100_010] = 200
    assert (build_eval_transform(224)(ribbon) == 200).all()
    assert (build_eval_transform(224)(ribbon.transpose(1, 0, 2)) == 200).all()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_size": 0},
        {"image_size": 22.4},
        {"crop": "centre"},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"ratio": (2.0, 1.0)},
        {"horizontal_flip": 1.5},
        {"color_jitter": -0.1},
    ],
)
def test_values_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        build_train_transform(**arguments)


@pytest.mark.parametrize("crop_ratio", [0, 1.2])
def test_crop_ratio_out_of_range_is_refused(crop_ratio):
    with pytest.raises(ValueError, match="crop_ratio"):
        build_eval_transform(crop_ratio=crop_ratio)


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8), "u1"), ((8, 8, 4), "u1"), ((8, 8, 3), "f4"), ((0, 8, 3), "u1")])
def test_anything_but_uint8_rgb_is_refused(shape, dtype):
    image = np.zeros(shape, dtype)
    for transform in (lambda x: build_train_transform()(x, np.random.default_rng(0)), build_eval_transform()):
        with pytest.raises(ValueError, match="uint8 RGB"):
            transform(image)
