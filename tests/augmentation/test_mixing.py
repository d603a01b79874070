"""mixing.py against the formulas of Mixup, CutMix and random erasing, and against timm's drawn parameters."""

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing

from hf_deit import Mixing
from hf_deit.augmentation.mixing import normalize


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NO_MIX = {"mixup_alpha": 0, "cutmix_alpha": 0}


def batch(size=8, side=16):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    return pixels, torch.arange(size) % 4


def test_normalize_is_the_papers():
    pixels, _ = batch()
    expected = (pixels.double().numpy() / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(normalize(pixels, MEAN, STD).numpy(), expected, atol=2e-6)


def test_without_mixing_labels_stay_integers():
    pixels, labels = batch()
    mixed, targets = Mixing(4, MEAN, STD, random_erasing_prob=0, **NO_MIX)(pixels, labels, np.arange(8))
    assert torch.equal(targets, labels) and torch.equal(mixed, normalize(pixels, MEAN, STD))


@pytest.mark.parametrize("size", [1, 7, 8])
def test_mixup_is_a_convex_sum_with_the_mirror_image_of_the_batch(size):
    pixels, labels = batch(size)
    mixing = Mixing(4, MEAN, STD, cutmix_alpha=0, random_erasing_prob=0)
    mixed, targets = mixing(pixels, labels, np.arange(size))
    own, other = normalize(pixels, MEAN, STD), normalize(pixels, MEAN, STD).flip(0)
    one_hot = torch.eye(4)[labels]
    # The weight can be read off any label that differs from its partner's.
    differs = (labels != labels.flip(0)).nonzero()
    weight = targets[differs[0, 0], labels[differs[0, 0]]] if len(differs) else torch.tensor(1.0)
    torch.testing.assert_close(mixed, weight * own + (1 - weight) * other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(targets, weight * one_hot + (1 - weight) * one_hot.flip(0))


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_label_weight_is_the_share_of_pixels(seed):
    pixels, _ = batch(2, side=32)
    mixing = Mixing(2, MEAN, STD, mixup_alpha=0, random_erasing_prob=0)
    mixed, targets = mixing(pixels, torch.tensor([0, 1]), np.array([seed, 99]))
    own, other = normalize(pixels, MEAN, STD), normalize(pixels, MEAN, STD).flip(0)
    from_own, from_other = (mixed == own).all(dim=1), (mixed == other).all(dim=1)
    assert (from_own | from_other).all()
    share = from_own[0].float().mean().item()
    assert targets[0, 0].item() == pytest.approx(share, abs=0.01)  # a pasted pixel may happen to equal its own


def test_mixup_weights_follow_beta_and_half_of_the_batches_are_cut():
    pixels, labels = batch(2, side=4)
    labels = torch.tensor([0, 1])
    only_mixup = Mixing(2, MEAN, STD, cutmix_alpha=0, random_erasing_prob=0)
    weights = [only_mixup(pixels, labels, np.array([seed, 1]))[1][0, 0].item() for seed in range(2000)]
    assert stats.kstest(weights, stats.beta(0.8, 0.8).cdf).pvalue > 0.001

    both = Mixing(2, MEAN, STD, random_erasing_prob=0)
    own = normalize(pixels, MEAN, STD)
    cut = 0
    for seed in range(1000):
        mixed, _ = both(pixels, labels, np.array([seed, 2]))
        cut += bool(((mixed == own) | (mixed == own.flip(0))).all())
    assert 0.45 < cut / 1000 < 0.55


def test_erased_share_of_views_and_pixels_equals_timms():
    side, views = 64, 3000
    erased = timm_erased = 0
    areas, timm_areas = [], []
    timm_erasing = RandomErasing(0.25, mode="pixel", device="cpu")
    ours = Mixing(2, MEAN, STD, **NO_MIX)
    for start in range(0, views, 100):
        blank = torch.zeros(100, 3, side, side)
        ours(blank, torch.zeros(100, dtype=int), np.arange(start, start + 100))
        share = (blank != 0).float().mean(dim=(1, 2, 3))
        erased += (share > 0).sum().item()
        areas += share[share > 0].tolist()
        timm_share = (timm_erasing(torch.zeros(100, 3, side, side)) != 0).float().mean(dim=(1, 2, 3))
        timm_erased += (timm_share > 0).sum().item()
        timm_areas += timm_share[timm_share > 0].tolist()
    assert abs(erased - timm_erased) / views < 0.04
    assert stats.ks_2samp(areas, timm_areas).pvalue > 0.001


def test_erased_pixels_are_standard_normal():
    blank = torch.zeros(200, 3, 32, 32)
    Mixing(2, MEAN, STD, random_erasing_prob=1, **NO_MIX)(blank, torch.zeros(200, dtype=int), np.arange(200))
    noise = blank[blank != 0]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_a_batch_depends_on_its_seeds_only():
    pixels, labels = batch()
    mixing = Mixing(4, MEAN, STD)
    first, targets = mixing(pixels, labels, np.arange(8))
    torch.rand(3), np.random.rand(3)  # whatever else the process draws
    again, targets_again = mixing(pixels, labels, np.arange(8))
    other, _ = mixing(pixels, labels, np.arange(1, 9))
    assert torch.equal(first, again) and torch.equal(targets, targets_again)
    assert not torch.equal(first, other)


def test_erasing_a_view_does_not_depend_on_its_neighbours():
    pixels, labels = batch()
    mixing = Mixing(4, MEAN, STD, random_erasing_prob=1, **NO_MIX)
    together, _ = mixing(pixels, labels, np.arange(8))
    alone, _ = mixing(pixels[5:6], labels[5:6], np.array([5]))
    assert torch.equal(together[5:6], alone)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mix_prob": 1.5}, "mix_prob is 1.5"),
        ({"mixup_alpha": -1}, "mixup_alpha is -1"),
        ({"random_erasing_prob": 2}, "is 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixing(10, MEAN, STD, **arguments)
