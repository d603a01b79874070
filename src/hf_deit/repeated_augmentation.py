"""The repeated order: each image of an epoch is seen `num_repeats` times, in differently augmented views.

An epoch still counts as many views as the set has images, so it meets one image in `num_repeats` (the paper's 300
epochs are "100 epochs, but each is 3x longer"). The repeats of an image stand next to each other: the loader decodes
it once, and the global batch holds what the authors' sampler, which spreads the repeats over the ranks, would have put
there.

The order knows nothing of ranks or workers. accelerate deals out whole batches of it, so a view's place in the epoch,
and with it every random number of its augmentation, is the same on 1 and on 64 GPUs.

Source: Touvron et al. 2021 (arXiv 2012.12877), section 6; facebookresearch/deit samplers.py (RASampler).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


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

    Raises:
        ValueError: if the set is empty or `num_repeats` is not positive.
    """

    def __init__(self, num_images: int, num_repeats: int = 3, seed: int = 0, batch_size: int = 1):
        if num_images < 1:
            raise ValueError("the training set is empty; check the path, the split and max_train_samples")
        if num_repeats < 1:
            raise ValueError(f"num_repeats is {num_repeats}; use 3 as in the paper, or 1 for no repeated augmentation")
        self.num_images = num_images
        self.num_views = num_images // batch_size * batch_size
        self.num_repeats = num_repeats
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_views

    def __iter__(self) -> Iterator[View]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        for position in range(self.num_views):
            yield View(order[position // self.num_repeats], self.epoch, position)
