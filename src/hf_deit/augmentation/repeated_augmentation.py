"""The repeated order: each image of an epoch is seen `num_repeats` times, in differently augmented views.

An epoch has as many views as the dataset has images, so it shows one image in `num_repeats` (the paper's 300 epochs
are "100 epochs, but each is 3x longer"). The repeats of an image are neighbours in the order, so that the loader
decodes the image once. The global batch has the same images as with the authors' sampler, which spreads the repeats
over the ranks.

The order does not depend on ranks or workers. accelerate deals out whole batches of the order, so the position of a
view in the epoch, and with it every random number of its augmentation, is the same on 1 and on 64 GPUs.

Images that are read one row group at a time (streaming.py; `block` in the code) come in an order in which each row
group has few readers. The global batch is cut into slices, and the steps take turns; a slice at every `TURNS`-th step
is a lane, which has row groups of its own. With 2 slices:

                      slice 0   slice 1
    step 0  (turn 0)  lane 0    lane 8
    step 1  (turn 1)  lane 1    lane 9
    ...
    step 7  (turn 7)  lane 7    lane 15
    step 8  (turn 0)  lane 0    lane 8

If the number of ranks divides the slices and the number of loader workers divides the turns, each rank always loads
the same slices and each worker the same turns; a lane is then read by one worker of one rank.

Source: Touvron et al. 2021 (arXiv 2012.12877), section 6; facebookresearch/deit samplers.py (RASampler).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..errors import UserError


logger = logging.getLogger(__name__)

# A batch has a slice for each of 1, 2, 4, ... ranks, as long as a slice has at least this many views.
VIEWS_PER_SLICE = 64
# Steps have a turn for each of 1, 2, 4 or 8 loader workers.
TURNS = 8


class View(int):
    """Index of an image, with the epoch and position of its view; it can index any map-style dataset.

    Attributes:
        epoch: counted from 0.
        position: position in the order of the epoch, from 0; the same on every rank.
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
    """Yields a [`View`] for each position of an epoch.

    Args:
        num_images: number of images in the dataset.
        num_repeats: consecutive views of an image; 3 in the paper, 1 is a plain shuffle.
        seed: fixes the order together with the epoch.
        batch_size: views of one optimiser step on all ranks together; the epoch ends with its last full batch.
        block_sizes: images in each row group of a stream; None for random access.
        shuffle_buffer_size: number of images of a stream that are shuffled with each other, over all ranks. A smaller
            buffer takes less memory. 0 keeps the stored order, of any dataset.
        labels: of all images, `(num_images,)`, int; if given, every class has the same number of images in an epoch,
            give or take one (drawn anew each epoch). A large class shows a random part of its images, a small one
            repeats its images, each as often as the others.

    Raises:
        ValueError: if the dataset is empty or smaller than a batch, `num_repeats` is not positive, `block_sizes` does
            not sum to `num_images`, or `labels` are given for a stream or in another number.
    """

    def __init__(
        self,
        num_images: int,
        num_repeats: int = 3,
        seed: int = 0,
        batch_size: int = 1,
        block_sizes: Sequence[int] | None = None,
        shuffle_buffer_size: int = 16_384,
        labels: np.ndarray | None = None,
    ):
        if num_images < 1:
            raise UserError("the training dataset is empty; check the path, train_split and max_train_samples")
        if num_images < batch_size:
            raise UserError(
                f"one step takes {batch_size} views and the training set has {num_images} images: lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        if num_repeats < 1:
            raise UserError(f"num_repeats is {num_repeats}; use 3 as in the paper, or 1 for no repeated augmentation")
        if block_sizes is not None and sum(block_sizes) != num_images:
            raise UserError(
                f"the row groups hold {sum(block_sizes)} images, but the dataset has {num_images}; both must agree"
            )
        if labels is not None and (block_sizes is not None or len(labels) != num_images):
            raise UserError(
                f"classes can be drawn evenly from {num_images} images only if all their labels are known, and not "
                f"from a stream; got {len(labels)} labels"
            )
        self.num_images = num_images
        self.num_views = num_images // batch_size * batch_size
        self.num_repeats = num_repeats
        self.seed = seed
        self.batch_size = batch_size
        self.block_sizes = None if block_sizes is None else np.array(block_sizes)
        self.shuffle_buffer_size = shuffle_buffer_size
        self.slices, self.turns = self._choose_lanes()
        self.classes = None  # the images of each class that has any
        if labels is not None:
            sizes = np.unique(labels, return_counts=True)[1]
            self.classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next order; accelerate calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_views

    def __iter__(self) -> Iterator[View]:
        for position, index in enumerate(self._images_of_positions().tolist()):
            yield View(index, self.epoch, position)

    def _images_of_positions(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.classes is not None:
            order = self._images_evenly_by_class(rng, self.classes)
        elif self.shuffle_buffer_size == 0:
            order = np.arange(self.num_images)
        elif self.block_sizes is None:
            order = rng.permutation(self.num_images)
        else:
            return self._images_by_lane(rng)
        return order[np.arange(self.num_views) // self.num_repeats]

    def _images_evenly_by_class(self, rng: np.random.Generator, classes: list[np.ndarray]) -> np.ndarray:
        """List the images of an epoch, `num_views / num_repeats` of them, each class in as many places."""
        share, rest = divmod(-(-self.num_views // self.num_repeats), len(classes))
        has_one_more = rng.permutation(len(classes)) < rest
        drawn = []
        for images, one_more in zip(classes, has_one_more.tolist(), strict=True):
            wanted = share + one_more
            rounds = [rng.permutation(images) for _ in range(-(-wanted // len(images)))]
            drawn.append(np.concatenate([images[:0], *rounds])[:wanted])
        return rng.permutation(np.concatenate(drawn))

    # The order of a stream

    def readers_of_a_block(self, num_ranks: int, num_workers: int, accumulation_steps: int = 1) -> int:
        """Count the loader workers, over all ranks, that read the same row group; the lanes aim at 1."""
        num_workers, parts = max(1, num_workers), num_ranks * accumulation_steps
        steps = range(0, self.turns * num_workers, self.turns)
        return len(
            {
                (part % num_ranks, (step * accumulation_steps + part // num_ranks) % num_workers)
                for step in steps
                for part in range(-(-parts // self.slices))
            }
        )

    def warn_of_repeated_reading(self, num_ranks: int, num_workers: int, accumulation_steps: int) -> None:
        """Log a warning if several loader workers will read the same row group of a stream."""
        if self.block_sizes is None:
            return
        readers = self.readers_of_a_block(num_ranks, num_workers, accumulation_steps)
        if readers > 1:
            logger.warning(
                "streaming: each row group (%d images on average) will be downloaded by %d workers, because %d row "
                "groups are too few for %d processes x %d workers. Results do not change. Use 1, 2, 4 or 8 workers, a "
                "larger shuffle_buffer_size, or smaller row groups",
                *(self.num_images // len(self.block_sizes), readers, len(self.block_sizes)),
                *(num_ranks, max(1, num_workers)),
            )

    def _choose_lanes(self) -> tuple[int, int]:
        """Return the most slices and turns for which each lane has a row group and all lanes fit in the buffer."""
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
        """Count the images of each lane, slices outermost; the last image of a lane may lack some of its repeats."""
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
        """List the epoch's images, lane after lane: row groups in random order, shuffled in windows of each lane."""
        assert self.block_sizes is not None  # only a stream has lanes
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
