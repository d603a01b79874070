"""repeated_augmentation.py: the multiset of an epoch, its order, and what accelerate makes of it on several ranks."""

import pickle
from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hf_deit import RepeatedAugmentationSampler


def test_an_epoch_shows_a_third_of_the_images_three_times():
    views = list(RepeatedAugmentationSampler(num_images=12, num_repeats=3, seed=0))
    assert len(views) == 12
    assert sorted(Counter(map(int, views)).values()) == [3, 3, 3, 3]


def test_repeats_of_an_image_stand_together():
    views = [int(view) for view in RepeatedAugmentationSampler(30, num_repeats=3)]
    assert all(len(set(views[start : start + 3])) == 1 for start in range(0, 30, 3))


def test_one_repeat_is_a_permutation():
    assert sorted(RepeatedAugmentationSampler(17, num_repeats=1)) == list(range(17))


def test_epochs_differ_and_come_again_with_the_same_seed():
    sampler = RepeatedAugmentationSampler(50, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(RepeatedAugmentationSampler(50, seed=4)) != first


def test_a_view_knows_its_place_and_survives_the_way_to_a_worker():
    sampler = RepeatedAugmentationSampler(10)
    sampler.set_epoch(2)
    view = pickle.loads(pickle.dumps(list(sampler)[7]))
    assert (view.epoch, view.position) == (2, 7) and view == list(sampler)[7]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_count_gives_the_same_global_batches(num_ranks):
    global_batch = 16
    reference = list(RepeatedAugmentationSampler(100, 3, batch_size=global_batch))

    def batches(rank):
        sampler = RepeatedAugmentationSampler(100, 3, batch_size=global_batch)
        local = BatchSampler(sampler, global_batch // num_ranks, drop_last=False)
        return list(BatchSamplerShard(local, num_processes=num_ranks, process_index=rank))

    ranks = [batches(rank) for rank in range(num_ranks)]
    assert {len(local) for local in ranks} == {6}  # 96 views: the last 4 make no whole batch
    for step, locals_ in enumerate(zip(*ranks, strict=True)):
        together = [view.position for local in locals_ for view in local]
        assert together == [view.position for view in reference[step * global_batch : (step + 1) * global_batch]]


def test_a_set_smaller_than_256_images_is_not_empty():
    """The authors' sampler rounds an epoch down to a multiple of 256."""
    assert len(RepeatedAugmentationSampler(100)) == 100


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="empty"):
        RepeatedAugmentationSampler(0)
    with pytest.raises(ValueError, match="num_repeats is 0; use 3"):
        RepeatedAugmentationSampler(10, num_repeats=0)
