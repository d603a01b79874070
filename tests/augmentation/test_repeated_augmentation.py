"""repeated_augmentation.py: the multiset of an epoch, its order, and what accelerate makes of it on several ranks."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hf_deit.augmentation.repeated_augmentation import RepeatedAugmentationSampler


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


# Blockwise


def readers(sampler, num_ranks, num_workers, accumulation_steps=1):
    """(rank, worker) of every view, as accelerate deals out whole batches and DataLoader takes its workers in turn."""
    size = sampler.batch_size // num_ranks // accumulation_steps
    return [(place // size % num_ranks, place // size // num_ranks % num_workers) for place in range(len(sampler))]


BLOCKS = [100] * 199 + [37]


@pytest.mark.parametrize("num_repeats", [1, 3])
def test_blockwise_epochs_hold_every_image_as_often_as_shuffled_ones(num_repeats):
    sampler = RepeatedAugmentationSampler(sum(BLOCKS), num_repeats, batch_size=256, block_sizes=BLOCKS)
    counts = Counter(map(int, sampler))
    lanes = sampler.slices * sampler.turns
    assert lanes == 32 and sum(counts.values()) == len(sampler) == 19_937 // 256 * 256
    assert max(counts.values()) == num_repeats
    assert sum(count < num_repeats for count in counts.values()) <= lanes  # the last image of a lane
    if num_repeats == 1:
        assert len(counts) == len(sampler)


@pytest.mark.parametrize(
    ("num_ranks", "num_workers", "accumulation_steps"), [(1, 1, 1), (1, 8, 1), (4, 4, 1), (2, 2, 2)]
)
def test_a_block_is_read_by_one_worker_of_one_rank(num_ranks, num_workers, accumulation_steps):
    sampler = RepeatedAugmentationSampler(sum(BLOCKS), 3, batch_size=256, block_sizes=BLOCKS)
    assert sampler.readers_of_a_block(num_ranks, num_workers, accumulation_steps) == 1
    block_of = [block for block, size in enumerate(BLOCKS) for _ in range(size)]
    who = readers(sampler, num_ranks, num_workers, accumulation_steps)
    reads = {(reader, block_of[view]) for reader, view in zip(who, sampler, strict=True)}
    blocks = {block for _, block in reads}
    assert len(reads) <= len(blocks) + sampler.slices * sampler.turns  # where a lane ends inside a block
    assert len(blocks) <= len(BLOCKS) / 3 + 2  # and two thirds of them are left to other epochs


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 10), (1, 6), (8, 1), (8, 8), (3, 5)])
def test_how_many_read_a_block_is_told_rightly(num_ranks, num_workers):
    sampler = RepeatedAugmentationSampler(48_000, 3, batch_size=384, block_sizes=[400] * 120)
    block_of = [index // 400 for index in range(48_000)]
    reads = {
        (reader, block_of[view])
        for reader, view in zip(readers(sampler, num_ranks, num_workers), sampler, strict=True)
    }
    blocks, lanes = len({block for _, block in reads}), sampler.slices * sampler.turns
    told = sampler.readers_of_a_block(num_ranks, num_workers)
    assert told * blocks <= len(reads) <= told * (blocks + lanes)


def test_blockwise_order_mixes_and_changes_with_the_epoch():
    sampler = RepeatedAugmentationSampler(sum(BLOCKS), 1, seed=1, batch_size=256, block_sizes=BLOCKS)
    first = list(map(int, sampler))
    batch = first[:256]
    assert len({index // 100 for index in batch}) >= 4 * sampler.slices / 4  # from many places at a time
    assert sum(b == a + 1 for a, b in itertools.pairwise(first)) < len(first) / 50
    sampler.set_epoch(1)
    assert list(map(int, sampler)) != first


def test_an_order_without_shuffling_is_the_stored_one():
    for blocks in (None, [5, 4, 3]):
        sampler = RepeatedAugmentationSampler(12, 2, batch_size=4, block_sizes=blocks, shuffle_buffer_size=0)
        assert list(map(int, sampler)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("blocks", [[8], [5, 3], [1] * 8, [3, 1, 4]])
@pytest.mark.parametrize("num_repeats", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_small_sets_of_uneven_blocks_make_whole_epochs(blocks, num_repeats, batch_size):
    sampler = RepeatedAugmentationSampler(8, num_repeats, batch_size=batch_size, block_sizes=blocks)
    counts = Counter(map(int, sampler))
    assert sum(counts.values()) == 8 and set(counts) <= set(range(8)) and max(counts.values()) <= num_repeats


def test_blocks_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="the row groups hold 7 images, but the dataset has 8"):
        RepeatedAugmentationSampler(8, block_sizes=[4, 3])


# --- classes drawn evenly ----------------------------------------------------------------------------------------

UNEVEN = np.repeat([0, 1, 4], [100, 7, 21])[np.random.default_rng(0).permutation(128)]


@pytest.mark.parametrize("num_repeats", [1, 3])
def test_classes_drawn_evenly_have_as_many_places_and_rare_images_as_many_turns(num_repeats):
    sampler = RepeatedAugmentationSampler(128, num_repeats, 5, 8, labels=UNEVEN)
    views = list(sampler)
    assert [view.position for view in views] == list(range(128)) and len(sampler) == 128
    drawn = np.array(views)[::num_repeats]
    for group in range(0, 126, num_repeats):
        assert len(set(views[group : group + num_repeats])) == 1  # the repeats of an image still stand together
    places = np.bincount(UNEVEN[drawn])
    assert sorted(places[places > 0].tolist()) in ([42, 43, 43], [14, 14, 15])
    turns = np.bincount(drawn, minlength=128)
    for number in (0, 1, 4):
        assert np.ptp(turns[number == UNEVEN]) <= 1
    halves = np.array_split(UNEVEN[drawn], 2)  # in random order, not class after class
    assert all(set(half) == {0, 1, 4} for half in halves)


def test_the_even_order_is_a_function_of_seed_and_epoch_alone():
    def order(seed, epoch, labels=UNEVEN):
        sampler = RepeatedAugmentationSampler(128, 3, seed, 8, labels=labels)
        sampler.set_epoch(epoch)
        return [int(view) for view in sampler]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3) != order(2, 3)
    assert order(1, 2) != order(1, 2, labels=None)


def test_more_classes_than_places_take_turns():
    seen = set()
    sampler = RepeatedAugmentationSampler(128, 3, 0, 8, labels=np.arange(128))
    for epoch in range(12):
        sampler.set_epoch(epoch)
        seen |= set(map(int, sampler))
    assert len(seen) > 120


@pytest.mark.parametrize("fields", [{"labels": UNEVEN[:5]}, {"labels": UNEVEN, "block_sizes": [64, 64]}])
def test_classes_cannot_be_drawn_evenly_from_a_stream_or_without_all_labels(fields):
    with pytest.raises(ValueError, match="classes can be drawn evenly from 128 images only if all their labels"):
        RepeatedAugmentationSampler(128, 3, 0, 8, **fields)
