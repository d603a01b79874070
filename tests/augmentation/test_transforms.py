"""augmentation.py against timm, torchvision and Pillow: same choices in distribution, same pixels."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.stats import ks_2samp
from timm.data import auto_augment as timm_auto_augment
from timm.data import create_transform
from torchvision import transforms

from hf_deit.augmentation.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Box,
    ColorJitter,
    Operation,
    apply_operations,
    build_eval_transform,
    build_train_transform,
    parse_auto_augment,
    resize,
    sample_crop_box,
)


DRAWS = 10_000
PAPER = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
TIMM_PARAMETERS = {"translate_const": 100, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}


def generated_images() -> list[np.ndarray]:
    """Smooth colour fields with edges and noise: pictures in spirit, of several shapes."""
    rng = np.random.default_rng(7)
    images = []
    for height, width in ((375, 500), (500, 333), (224, 224), (180, 260), (64, 48)):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        image[height // 4 : height // 2, width // 3 : width // 2] = rng.integers(0, 256, 3)
        image += rng.integers(-12, 13, image.shape)
        images.append(image.clip(0, 255).astype(np.uint8))
    return images


def imagenet_sample() -> list[np.ndarray]:
    root = Path(os.environ.get("HF_DEIT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    path = root / "imagenet_sample" / "validation.parquet"
    if not path.exists():
        return []
    parquet = pytest.importorskip("pyarrow.parquet")
    column = parquet.read_table(path, columns=["image"]).column("image").to_pylist()
    return [np.array(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in column]


@pytest.fixture(scope="module")
def real_images() -> list[np.ndarray]:
    return imagenet_sample() or pytest.skip("the ImageNet sample is not here (HF_DEIT_DATA)")


@pytest.fixture(scope="module")
def squares() -> list[np.ndarray]:
    """A dozen 224 x 224 pictures, real ones where there are any."""
    images = (imagenet_sample() or generated_images())[:12]
    return [np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]


def same_distribution(ours: list[float], theirs: list[float], what: str) -> None:
    assert ks_2samp(ours, theirs).pvalue > 1e-4, what


def same_rate(ours: int, theirs: int, trials: int, what: str) -> None:
    pooled = (ours + theirs) / (2 * trials)
    assert abs(ours - theirs) <= 4.5 * math.sqrt(2 * trials * pooled * (1 - pooled)) + 1e-9, (what, ours, theirs)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def record_timm(operations: list) -> list[tuple[str, float | None]]:
    """Replace the pixel functions of timm's operations by one that writes down their arguments."""
    calls: list[tuple[str, float | None]] = []
    for operation in operations:

        def write_down(image, *arguments, name=operation.name, **_):
            calls.append((name, arguments[0] if arguments else None))
            return image

        operation.aug_fn = write_down
    return calls


@pytest.mark.parametrize("config", [PAPER, "rand-m7-mstd101-inc0", "rand-m6-n3-p0.8-mstd2-mmax8-t3aw"])
def test_parameters_of_every_operation_are_distributed_as_timms(config):
    ours = parse_auto_augment(config)
    theirs = timm_auto_augment.rand_augment_transform(config, dict(TIMM_PARAMETERS))
    assert [step.name for step in ours.steps] == [operation.name for operation in theirs.ops]
    random.seed(1)
    rng = np.random.default_rng(1)
    for step, operation in zip(ours.steps, theirs.ops, strict=True):
        calls = record_timm([operation])
        for _ in range(DRAWS):
            operation(None)
        alone = dataclasses.replace(ours, steps=(step,), weights=None, num_layers=1)
        drawn = [operation for _ in range(DRAWS) for operation in alone.sample(rng)]
        same_rate(len(drawn), len(calls), DRAWS, f"{step.name}: how often it happens")
        values, expected = [value for _, value in drawn], [value for _, value in calls]
        if expected[0] is None:
            assert set(values) == {None}
            continue
        same_distribution(values, expected, step.name)
        assert type(values[0]) is type(expected[0])
        if len(set(expected)) <= 8:  # whole numbers, some of them rare
            for value in set(values) | set(expected):
                same_rate(values.count(value), expected.count(value), DRAWS, f"{step.name} {value}")
            continue
        spread = np.std(expected)
        assert np.mean(values) == pytest.approx(np.mean(expected), abs=0.08 * spread + 1e-9), step.name
        assert np.std(values) == pytest.approx(spread, rel=0.05, abs=1e-9), step.name


@pytest.mark.parametrize("config", [PAPER, "rand-m9-n3-tweights"])
def test_operations_are_chosen_as_often_and_in_as_many_layers_as_timms(config):
    theirs = timm_auto_augment.rand_augment_transform(config, dict(TIMM_PARAMETERS))
    calls = record_timm(theirs.ops)
    random.seed(2)
    np.random.seed(2)
    their_counts = []
    for _ in range(DRAWS):
        before = len(calls)
        theirs(None)
        their_counts.append(len(calls) - before)
    ours, rng = parse_auto_augment(config), np.random.default_rng(2)
    views = [ours.sample(rng) for _ in range(DRAWS)]
    for count in range(4):
        same_rate(sum(len(view) == count for view in views), their_counts.count(count), DRAWS, f"{count} operations")
    for step in ours.steps:
        drawn = sum(operation.name == step.name for view in views for operation in view)
        same_rate(drawn, sum(name == step.name for name, _ in calls), 3 * DRAWS, step.name)


@pytest.mark.parametrize("name", ["original", "originalr", "v0", "v0r", "3a"])
def test_autoaugment_policies_are_timms(name):
    theirs = timm_auto_augment.auto_augment_transform(f"{name}-mstd0.5", dict(TIMM_PARAMETERS))
    ours = parse_auto_augment(f"{name}-mstd0.5")
    assert [[tuple(step) for step in sub] for sub in ours.policy] == [
        [(operation.name, operation.prob, operation.magnitude) for operation in sub] for sub in theirs.policy
    ]
    calls = record_timm([operation for sub in theirs.policy for operation in sub])
    random.seed(4)
    for _ in range(DRAWS):
        theirs(None)
    rng = np.random.default_rng(4)
    drawn = [operation for _ in range(DRAWS) for operation in ours.sample(rng)]
    for operation in {name for name, _ in calls} | {operation.name for operation in drawn}:
        mine = [o.value for o in drawn if o.name == operation]
        expected = [value for called, value in calls if called == operation]
        same_rate(len(mine), len(expected), 2 * DRAWS, operation)
        if operation == "GaussianBlurRand":  # timm draws the radius only while it blurs
            expected = [random.uniform(0.1, 2.0 * factor) for factor in expected]
        if expected[0] is not None:
            same_distribution(mine, expected, operation)


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


def test_flip_and_colour_jitter_rates():
    transform = build_train_transform(auto_augment=None, color_jitter=0.3, horizontal_flip=0.25)
    rng = np.random.default_rng(5)
    views = [transform.sample(300, 400, rng) for _ in range(DRAWS)]
    assert np.mean([view.flip for view in views]) == pytest.approx(0.25, abs=0.02)
    torch.manual_seed(5)
    expected = [transforms.ColorJitter.get_params([0.7, 1.3], [0.7, 1.3], [0.7, 1.3], None) for _ in range(DRAWS)]
    for column, name in enumerate(("Brightness", "Contrast", "Color"), start=1):
        values = [operation.value for view in views for operation in view.operations if operation.name == name]
        assert len(values) == DRAWS
        same_distribution(values, [parameters[column] for parameters in expected], name)
    orders = [tuple(operation.name for operation in view.operations) for view in views]
    assert len(set(orders)) == 6
    assert all(abs(orders.count(order) - DRAWS / 6) < 200 for order in set(orders))


def test_colour_jitter_is_idle_with_autoaugment_except_3a():
    def samplers(**arguments):
        return [type(policy) for policy in build_train_transform(**arguments).policies]

    assert ColorJitter not in samplers()
    assert ColorJitter not in samplers(auto_augment="original")
    assert samplers(auto_augment=None) == [ColorJitter]
    assert ColorJitter in samplers(auto_augment="3a")
    assert samplers(auto_augment=None, color_jitter=0) == samplers(auto_augment=None, color_jitter=None) == []


# --- what is done ----------------------------------------------------------------------------------------------------

# Largest difference from Pillow in levels of 255. 0: the same bytes.
PIXEL_CASES = (
    [("AutoContrast", None, 0), ("Equalize", None, 0), ("Invert", None, 0)]
    + [("Posterize", bits, 0) for bits in range(1, 9)]
    + [("Solarize", threshold, 0) for threshold in (0, 1, 26, 128, 255, 256)]
    + [("SolarizeAdd", added, 0) for added in (0, 55, 99, 110)]
    + [(name, factor, 1) for name in ("Color", "Sharpness") for factor in (0.1, 0.55, 1.0, 1.37, 1.9)]
    + [("Contrast", factor, 1) for factor in (0.1, 0.55, 1.0, 1.37, 1.9)]
    + [("Brightness", factor, 0) for factor in (0.1, 0.55, 1.0, 1.37, 1.9)]
    + [("Desaturate", fraction, 1) for fraction in (0.5, 0.8, 1.0)]
)
MAP_CASES = (
    [("Rotate", degrees) for degrees in (-30.0, 3.3, 27.0)]
    + [(name, shear) for name in ("ShearX", "ShearY") for shear in (-0.1, 0.27)]
    + [(name, fraction) for name in ("TranslateXRel", "TranslateYRel") for fraction in (-0.1, 0.403)]
)


def with_timm(image: np.ndarray, name: str, value: float | None) -> np.ndarray:
    arguments = () if value is None else (value,)
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    return np.asarray(timm_auto_augment.NAME_TO_OP[name](Image.fromarray(image), *arguments, **options)).astype(int)


@pytest.mark.parametrize(("name", "value", "bound"), PIXEL_CASES)
def test_pixel_operation_equals_pillows(squares, name, value, bound):
    for image in squares:
        ours = apply_operations(image, [Operation(name, value)], FILL)
        difference = np.abs(ours - with_timm(image, name, value))
        assert ours.dtype == np.uint8 and difference.max() <= bound
        assert difference.mean() < 0.01


@pytest.mark.parametrize("image", [np.full((9, 9, 3), 77, np.uint8), np.zeros((1, 1, 3), np.uint8)])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Sharpness"])
def test_flat_and_tiny_images_are_treated_as_by_pillow(image, name):
    value = 1.9 if name == "Sharpness" else None
    assert np.array_equal(apply_operations(image, [Operation(name, value)], FILL), with_timm(image, name, value))


@pytest.mark.parametrize("pixels", [1, 200, 254, 255, 256, 257, 1000])
def test_equalization_of_few_pixels_equals_pillows(pixels):
    image = np.random.default_rng(pixels).integers(0, 256, (1, pixels, 3), dtype=np.uint8)
    assert np.array_equal(apply_operations(image, [Operation("Equalize")], FILL), with_timm(image, "Equalize", None))


@pytest.mark.parametrize(("name", "value"), MAP_CASES)
def test_geometric_operation_is_within_two_levels_of_pillows(squares, name, value):
    """Mean distance: cv2's cubic filter has another free parameter and blends with the fill colour at the edge."""
    mean = []
    for image in squares:
        ours = apply_operations(image, [Operation(name, value)], FILL).astype(int)
        mean.append(np.abs(ours - with_timm(image, name, value)).mean())
    assert np.mean(mean) < 2


@pytest.mark.parametrize(("name", "value"), MAP_CASES)
def test_geometric_operation_moves_a_smooth_picture_exactly_as_pillow(name, value):
    """No filter matters on a ramp, so any error left would be one of direction, centre or half a pixel."""
    y, x = np.mgrid[0:150, 0:200]
    image = np.stack([x, y, (x + y) // 2], axis=-1).astype(np.uint8)
    ours = apply_operations(image, [Operation(name, value)], FILL).astype(int)
    theirs = with_timm(image, name, value)
    difference = np.abs(ours - theirs)
    far = np.ones(image.shape[:2], bool)  # further than two pixels from the edge of the moved picture
    filled = (np.abs(theirs - FILL) <= 2).all(-1)
    far[[0, 1, 2, -1, -2, -3]] = far[:, [0, 1, 2, -1, -2, -3]] = False
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            far &= np.roll(filled, (dy, dx), (0, 1)) == filled
    assert far.mean() > 0.5
    assert difference[far].max() <= 2 and difference[far].mean() < 0.7


def test_posterizing_to_no_bits_is_black(squares):
    image = squares[0]
    assert not apply_operations(image, [Operation("PosterizeIncreasing", 0)], FILL).any()


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0])
def test_gaussian_blur_is_near_pillows_box_approximation(squares, sigma):
    for image in squares:
        ours = apply_operations(image, [Operation("GaussianBlur", sigma)], FILL)
        assert np.abs(ours - with_timm(image, "GaussianBlur", sigma)).mean() < 1.5


def test_operations_on_a_part_of_an_image_equal_those_on_its_copy(squares):
    part = squares[0][10:90, 30:100]
    for name, value in [case[:2] for case in PIXEL_CASES] + MAP_CASES:
        ours = apply_operations(part, [Operation(name, value)], FILL)
        assert ours.flags.c_contiguous
        assert np.array_equal(ours, apply_operations(part.copy(), [Operation(name, value)], FILL)), name


def test_no_operation_writes_to_its_input(squares):
    image = squares[0].copy()
    image.flags.writeable = False
    before = image.copy()
    for name, value, _ in PIXEL_CASES:
        apply_operations(image, [Operation(name, value)], FILL)
    for name, value in MAP_CASES:
        apply_operations(image, [Operation(name, value)], FILL)
    assert np.array_equal(image, before)


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
    ("config", "said"),
    [
        ("randaugment", "'rand' or one of"),
        ("", "'rand' or one of"),
        ("augmix-m5", "'rand' or one of"),
        ("rand-m9-mstd", "'mstd'"),
        ("rand-x3", "'x3'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-m9-m8", "'m8'"),
        ("rand-m9-", "section ''"),
        ("rand-w0", "tweights"),
        ("rand-tfoo", "'tfoo'"),
        ("rand-p1.5", "probability"),
        ("rand-inc2", "inc0 or inc1"),
        ("rand-n99-tweights", "15"),
        ("original-m9", "'m9'"),
        (9, "string"),
    ],
)
def test_unknown_policies_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        build_train_transform(auto_augment=config)


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
