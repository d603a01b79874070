"""The repeated order: each image of an epoch is seen `num_repeats` times, in differently augmented views.

An epoch still counts as many views as the set has images, so it meets one image in `num_repeats` (the paper's 300
epochs are "100 epochs, but each is 3x longer"). The repeats of an image stand next to each other: the loader decodes
it once, and the global batch holds what the authors' sampler, which spreads the repeats over the ranks, would have put
there.

The order knows nothing of ranks or workers. accelerate deals out whole batches of it, so a view's place in the epoch,
and with it every random number of its augmentation, is the same on 1 and on 64 GPUs.

Images that are stored in blocks and read block by block (streaming.py) come in an order that keeps each reader to its
own blocks. It is cut into lanes: a lane owns a fixed slice of the global batch in every eighth step, and fills it from
blocks of its own. A rank always works at the same slices and a loader worker always at the same steps, so a lane is
read by one worker of one rank, whatever their number, and no rank reads what another one shows.

Source: Touvron et al. 2021 (arXiv 2012.12877), section 6; facebookresearch/deit samplers.py (RASampler).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..errors import UserError


# Lanes of a batch: a slice of the batch for each of 1, 2, 4, ... ranks, as long as it keeps this many views, ...
VIEWS_PER_SLICE = 64
# ... and a turn for each of 1, 2, 4 or 8 loader workers.
TURNS = 8


class View(int):
    """The index of an image that also knows which view of the run it is for: any map-style set can be indexed with it.

    Attributes:
        epoch: from 0.
        position: place in the epoch's order, from 0; the same on every rank.
    """

    epoch: int
    position: int

    def __new__(cls, index: int, epoch: int, position: int) -> View:
        view = super().__new__(cls, index)
        view.epoch = epoch
        view.position = position
        return view

    def __reduce__(self):  # worker processes receive views pickled
        return View, (int(self), self.epoch, self.position)


class RepeatedAugmentationSampler(torch.utils.data.Sampler):
    """Yields a [`View`] for each place of an epoch.

    Args:
        num_images: size of the set.
        num_repeats: views of an image in a row; 3 in the paper, 1 is a plain shuffle.
        seed: with the epoch, fixes the order.
        batch_size: views of one optimiser step on all ranks together; the epoch ends with its last whole batch.
        block_sizes: images in each stored block, where images are read by the block; None for random access.
        shuffle_buffer_size: images of a blockwise read set that are mixed with each other, over all ranks. Smaller
            takes less memory. 0 is the stored order, for any set.

    Raises:
        ValueError: if the set is empty, `num_repeats` is not positive, or the blocks do not add up to the set.
    """

    def __init__(
        self,
        num_images: int,
        num_repeats: int = 3,
        seed: int = 0,
        batch_size: int = 1,
        block_sizes: Sequence[int] | None = None,
        shuffle_buffer_size: int = 16_384,
    ):
        if num_images < 1:
            raise UserError("the training set is empty; check the path, the split and max_train_samples")
        if num_repeats < 1:
            raise UserError(f"num_repeats is {num_repeats}; use 3 as in the paper, or 1 for no repeated augmentation")
        if block_sizes is not None and sum(block_sizes) != num_images:
            raise UserError(f"the blocks hold {sum(block_sizes)} images and the set {num_images}; both must agree")
        self.num_images = num_images
        self.num_views = num_images // batch_size * batch_size
        self.num_repeats = num_repeats
        self.seed = seed
        self.batch_size = batch_size
        self.block_sizes = None if block_sizes is None else np.array(block_sizes)
        self.shuffle_buffer_size = shuffle_buffer_size
        self.slices, self.turns = self._choose_lanes()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_views

    def __iter__(self) -> Iterator[View]:
        for position, index in enumerate(self._images_of_positions().tolist()):
            yield View(index, self.epoch, position)

    def _images_of_positions(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.shuffle_buffer_size == 0:
            order = np.arange(self.num_images)
        elif self.block_sizes is None:
            order = rng.permutation(self.num_images)
        else:
            return self._images_by_lane(rng)
        return order[np.arange(self.num_views) // self.num_repeats]

    # Blockwise

    def readers_of_a_block(self, num_ranks: int, num_workers: int, accumulation_steps: int = 1) -> int:
        """How many loader workers, of all ranks, read the same block; 1 is what the lanes are for."""
        num_workers, parts = max(1, num_workers), num_ranks * accumulation_steps
        steps = range(0, self.turns * num_workers, self.turns)
        return len(
            {
                (part % num_ranks, (step * accumulation_steps + part // num_ranks) % num_workers)
                for step in steps
                for part in range(-(-parts // self.slices))
            }
        )

    def _choose_lanes(self) -> tuple[int, int]:
        """As many slices and turns as leave each lane a block of its own and all lanes together in the buffer."""
        if self.block_sizes is None or self.shuffle_buffer_size == 0:
            return 1, 1
        slices, turns = 1, TURNS
        while self.batch_size % (2 * slices) == 0 and self.batch_size // (2 * slices) >= VIEWS_PER_SLICE:
            slices *= 2
        most = min(len(self.block_sizes), self.shuffle_buffer_size * len(self.block_sizes) // self.num_images)
        while slices * turns > max(1, most) or self._images_per_lane(slices, turns).sum() > self.num_images:
            if slices * turns == 1:
                break
            slices, turns = (slices // 2, turns) if slices > turns else (slices, turns // 2)
        return slices, turns

    def _images_per_lane(self, slices: int, turns: int) -> np.ndarray:
        """Lanes in the order slice-major, turn-minor; the last image of a lane may lack some of its repeats."""
        num_steps = self.num_views // self.batch_size
        steps = (num_steps + turns - 1 - np.arange(turns)) // turns
        return np.tile(-(-steps * (self.batch_size // slices) // self.num_repeats), slices)

    def _images_by_lane(self, rng: np.random.Generator) -> np.ndarray:
        step, place = np.divmod(np.arange(self.num_views), self.batch_size)
        slice_, place = np.divmod(place, self.batch_size // self.slices)
        lane = slice_ * self.turns + step % self.turns
        view_of_lane = step // self.turns * (self.batch_size // self.slices) + place
        images_per_lane = self._images_per_lane(self.slices, self.turns)
        lane_starts = np.cumsum(images_per_lane) - images_per_lane
        return self._shelf(images_per_lane, rng)[lane_starts[lane] + view_of_lane // self.num_repeats]

    def _shelf(self, images_per_lane: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The epoch's images, lane after lane: the blocks in random order, mixed inside windows of each lane."""
        block_starts = np.cumsum(self.block_sizes) - self.block_sizes
        blocks = rng.permutation(len(self.block_sizes))
        sizes = self.block_sizes[blocks]
        place_in_block = np.arange(self.num_images) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        shelf = (np.repeat(block_starts[blocks], sizes) + place_in_block)[: images_per_lane.sum()]
        window = max(1, self.shuffle_buffer_size // len(images_per_lane))
        lane = np.repeat(np.arange(len(images_per_lane)), images_per_lane)
        lane_starts = np.cumsum(images_per_lane) - images_per_lane
        place_in_lane = np.arange(len(shelf)) - lane_starts[lane]
        return shelf[np.lexsort((rng.random(len(shelf)), place_in_lane // window, lane))]
