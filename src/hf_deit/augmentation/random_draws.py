"""Random numbers of a view: the generator that they come from, and the distributions."""

from __future__ import annotations

import math
from typing import Protocol


class Generator(Protocol):
    """Source of random choices: a `random.Random` (quick to seed), a NumPy generator, or anything similar."""

    def random(self) -> float:
        """Return a uniform number in [0, 1)."""
        ...


def draw_uniform(low: float, high: float, rng: Generator) -> float:
    """Draw a uniform number in [low, high)."""
    return low + (high - low) * rng.random()


def draw_index(count: int, rng: Generator) -> int:
    """Draw a uniform whole number in [0, count)."""
    return int(count * rng.random())


def draw_normal(mean: float, std: float, rng: Generator) -> float:
    """Draw from a normal distribution."""
    return mean + std * math.sqrt(-2 * math.log(1 - rng.random())) * math.cos(2 * math.pi * rng.random())  # Box-Muller
