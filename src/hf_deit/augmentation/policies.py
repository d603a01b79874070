"""Policies that choose the operations of a view and their strength: RandAugment, AutoAugment, colour jitter."""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from ..errors import UserError
from .operations import Operation
from .random_draws import Generator, draw_index, draw_normal, draw_uniform


def _signed(value: float, rng: Generator) -> float:
    return -value if rng.random() > 0.5 else value


def _enhance(level: float, rng: Generator) -> float:
    return 0.1 + 1.8 * level


def _enhance_increasing(level: float, rng: Generator) -> float:
    return max(0.1, 1 + _signed(0.9 * level, rng))


def _shear(level: float, rng: Generator) -> float:
    return _signed(0.3 * level, rng)


def _translate(level: float, rng: Generator) -> float:
    return _signed(0.45 * level, rng)


def _within(low: float, high: float, level: float) -> float:
    return min(high, low + (high - low) * level)


Argument = Callable[[float, Generator], float | int]
# Argument of each operation, under timm's names, for `level`: the magnitude over 10. A plain name weakens or
# strengthens with the level as the first published code did; "Increasing" always strengthens (`inc1` in the paper's
# policy); "Original" keeps the range of the AutoAugment paper. None: the operation has no argument.
_ARGUMENTS: dict[str, Argument | None] = {
    "AutoContrast": None,
    "Equalize": None,
    "Invert": None,
    "Rotate": lambda level, rng: _signed(30 * level, rng),
    "Posterize": lambda level, rng: int(4 * level),
    "PosterizeIncreasing": lambda level, rng: 4 - int(4 * level),
    "PosterizeOriginal": lambda level, rng: 4 + int(4 * level),
    "Solarize": lambda level, rng: min(256, int(256 * level)),
    "SolarizeIncreasing": lambda level, rng: 256 - min(256, int(256 * level)),
    "SolarizeAdd": lambda level, rng: min(128, int(110 * level)),
    "Color": _enhance,
    "ColorIncreasing": _enhance_increasing,
    "Contrast": _enhance,
    "ContrastIncreasing": _enhance_increasing,
    "Brightness": _enhance,
    "BrightnessIncreasing": _enhance_increasing,
    "Sharpness": _enhance,
    "SharpnessIncreasing": _enhance_increasing,
    "ShearX": _shear,
    "ShearY": _shear,
    "TranslateXRel": _translate,
    "TranslateYRel": _translate,
    "Desaturate": lambda level, rng: _within(0.5, 1.0, level),
    "GaussianBlur": lambda level, rng: _within(0.1, 2.0, level),
    "GaussianBlurRand": lambda level, rng: draw_uniform(0.1, 2 * _within(0.0, 1.0, level), rng),
}
_WEIGHTED = {
    "Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1, "ColorIncreasing": 0.25,
    "SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05,
    "ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05,
    "Invert": 0.05,
}  # fmt: skip
_WEIGHTED_3A = {
    "SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2, "ShearY": 2,
    "PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1, "SharpnessIncreasing": 1,
    "ContrastIncreasing": 1, "BrightnessIncreasing": 1, "Equalize": 1, "Invert": 1,
}  # fmt: skip
_PLAIN = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
_INCREASING = tuple(f"{name}Increasing" if f"{name}Increasing" in _ARGUMENTS else name for name in _PLAIN)
# One sub-policy a line: operation, probability, magnitude, twice.
_ORIGINAL = """
    PosterizeOriginal .4 8   Rotate .6 9
    Solarize .6 5            AutoContrast .6 5
    Equalize .8 8            Equalize .6 3
    PosterizeOriginal .6 7   PosterizeOriginal .6 6
    Equalize .4 7            Solarize .2 4
    Equalize .4 4            Rotate .8 8
    Solarize .6 3            Equalize .6 7
    PosterizeOriginal .8 5   Equalize 1 2
    Rotate .2 3              Solarize .6 8
    Equalize .6 8            PosterizeOriginal .4 6
    Rotate .8 8              Color .4 0
    Rotate .4 9              Equalize .6 2
    Equalize 0 7             Equalize .8 8
    Invert .6 4              Equalize 1 8
    Color .6 4               Contrast 1 8
    Rotate .8 8              Color 1 2
    Color .8 8               Solarize .8 7
    Sharpness .4 7           Invert .6 8
    ShearX .6 5              Equalize 1 9
    Color .4 0               Equalize .6 3
    Equalize .4 7            Solarize .2 4
    Solarize .6 5            AutoContrast .6 5
    Invert .6 4              Equalize 1 8
    Color .6 4               Contrast 1 8
    Equalize .8 8            Equalize .6 3
"""
_V0 = """
    Equalize .8 1            ShearY .8 4
    Color .4 9               Equalize .6 3
    Color .4 1               Rotate .6 8
    Solarize .8 3            Equalize .4 7
    Solarize .4 2            Solarize .6 2
    Color .2 0               Equalize .8 8
    Equalize .4 8            SolarizeAdd .8 3
    ShearX .2 9              Rotate .6 8
    Color .6 1               Equalize 1 2
    Invert .4 9              Rotate .6 0
    Equalize 1 9             ShearY .6 3
    Color .4 7               Equalize .6 0
    Posterize .4 6           AutoContrast .4 7
    Solarize .6 8            Color .6 9
    Solarize .2 4            Rotate .8 9
    Rotate 1 7               TranslateYRel .8 9
    ShearX 0 0               Solarize .8 4
    ShearY .8 0              Color .6 4
    Color 1 0                Rotate .6 2
    Equalize .8 4            Equalize 0 8
    Equalize 1 4             AutoContrast .6 2
    ShearY .4 7              SolarizeAdd .6 7
    Posterize .8 2           Solarize .6 10
    Solarize .6 8            Equalize .6 1
    Color .8 6               Rotate .4 5
"""
_POLICIES = {
    "original": _ORIGINAL,
    "originalr": _ORIGINAL.replace("PosterizeOriginal", "PosterizeIncreasing"),
    "v0": _V0,
    "v0r": _V0.replace("Posterize", "PosterizeIncreasing"),
    "3a": "Solarize 1 5\nDesaturate 1 10\nGaussianBlurRand 1 10",
}


class _Step(NamedTuple):
    """One operation of a policy, before its random choices are drawn."""

    name: str
    probability: float
    magnitude: float


@dataclass(frozen=True)
class _Magnitudes:
    """Distribution of a drawn magnitude around the magnitude that the policy names.

    `std` is the standard deviation of a normal distribution; infinity means uniform between 0 and the named magnitude.
    The result is clipped to [0, `maximum`].
    """

    std: float = 0.0
    maximum: float = 10.0

    def draw(self, step: _Step, rng: Generator) -> Operation | None:
        """Draw the operation with its argument, or None if by its probability the operation does not happen."""
        if rng.random() >= step.probability:
            return None
        argument = _ARGUMENTS[step.name]
        if argument is None:
            return Operation(step.name)
        magnitude = step.magnitude
        if self.std == math.inf:
            magnitude = draw_uniform(0, magnitude, rng)
        elif self.std > 0:
            magnitude = draw_normal(magnitude, self.std, rng)
        return Operation(step.name, argument(max(0.0, min(magnitude, self.maximum)) / 10, rng))


@dataclass(frozen=True)
class RandAugment:
    """A policy of `num_layers` operations from `steps`, drawn with replacement; with `weights`, without replacement.

    Source: Cubuk et al., 2019 (arXiv:1909.13719), as timm varies it.
    """

    steps: tuple[_Step, ...]
    weights: tuple[float, ...] | None
    num_layers: int
    magnitudes: _Magnitudes

    def sample(self, rng: Generator) -> list[Operation]:
        """Draw the operations of one view, in order: at most `num_layers`."""
        if self.weights is None:
            chosen = [draw_index(len(self.steps), rng) for _ in range(self.num_layers)]
        else:
            bounds, chosen = list(accumulate(self.weights)), []
            while len(chosen) < self.num_layers:
                index = bisect(bounds, rng.random() * bounds[-1])
                if index not in chosen:
                    chosen.append(index)
        drawn = [self.magnitudes.draw(self.steps[index], rng) for index in chosen]
        return [operation for operation in drawn if operation is not None]


@dataclass(frozen=True)
class AutoAugment:
    """A policy that picks one sub-policy uniformly and applies its operations, each with its own probability.

    Source: Cubuk et al., 2018 (arXiv:1805.09501).
    """

    policy: tuple[tuple[_Step, ...], ...]
    magnitudes: _Magnitudes

    def sample(self, rng: Generator) -> list[Operation]:
        """Draw the operations of one view, in order: at most as many as the sub-policy has."""
        drawn = [self.magnitudes.draw(step, rng) for step in self.policy[draw_index(len(self.policy), rng)]]
        return [operation for operation in drawn if operation is not None]


@dataclass(frozen=True)
class ColorJitter:
    """A policy that changes brightness, contrast and saturation in random order, by factors in 1 ± `strength`."""

    strength: float

    def sample(self, rng: Generator) -> list[Operation]:
        """Draw the three operations of one view, in order."""
        names = sorted(("Brightness", "Contrast", "Color"), key=lambda name: rng.random())
        return [Operation(name, draw_uniform(max(0.0, 1 - self.strength), 1 + self.strength, rng)) for name in names]


_RAND_KEYS = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int}


def parse_auto_augment(config: str) -> RandAugment | AutoAugment:
    """Read timm's policy string, sections joined by dashes.

    RandAugment: `rand`, then any of `m9` (magnitude), `n2` (operations per image), `p0.5` (probability of each
    operation), `mstd0.5` (noise on the magnitude; above 100: uniform), `mmax10` (upper bound of the magnitude), `inc1`
    (operations that strengthen with the magnitude), `tweights`, `t3a`, `t3aw` (other lists of operations).
    AutoAugment: `original`, `originalr`, `v0`, `v0r` or `3a`, then optionally `mstd0.5`.

    Raises:
        ValueError: for any other string. timm skips unknown sections, so a misspelt policy would train unnoticed.
    """
    if not isinstance(config, str):
        raise UserError(f"auto_augment must be a string such as 'rand-m9-mstd0.5-inc1' or None, got {config!r}.")
    kind, *sections = config.split("-")
    if kind != "rand" and kind not in _POLICIES:
        raise UserError(f"auto_augment={config!r} starts with {kind!r}; expected 'rand' or one of {[*_POLICIES]}.")
    types = _RAND_KEYS if kind == "rand" else {"mstd": float}
    values: dict[str, float | int] = {}
    names: str | None = None
    for section in sections:
        if kind == "rand" and section in ("tweights", "t3a", "t3aw"):
            names = section[1:]
            continue
        match = re.fullmatch(r"([a-z]+)(\d+|\d*\.\d+)", section)
        key = match[1] if match else ""
        if key not in types or key in values or (types[key] is int and "." in section):
            known = ", ".join(f"{known}<{kind.__name__}>" for known, kind in types.items())
            raise UserError(
                f"auto_augment={config!r} has the section {section!r}; expected each of {known} at most once"
                + (", or tweights, t3a, t3aw." if kind == "rand" else ".")
            )
        values[key] = types[key](section[len(key) :])
    std = values.get("mstd", 0.0)
    magnitudes = _Magnitudes(std=math.inf if std > 100 else std, maximum=values.get("mmax", 0) or 10)
    if kind != "rand":
        return AutoAugment(_read_policy(_POLICIES[kind]), magnitudes)

    layers, probability, magnitude = values.get("n", 2), values.get("p", 0.5), values.get("m", 10)
    if probability > 1:
        raise UserError(f"auto_augment={config!r} has p={probability:g}; expected a probability in [0, 1].")
    if values.get("inc", 0) > 1:
        raise UserError(f"auto_augment={config!r} has inc={values['inc']}; expected inc0 or inc1.")
    chosen: tuple[str, ...] | dict[str, float]
    if names is None:
        chosen = _INCREASING if values.get("inc", 0) else _PLAIN
    else:
        chosen = {
            "weights": _WEIGHTED, "3aw": _WEIGHTED_3A, "3a": ("SolarizeIncreasing", "Desaturate", "GaussianBlur")
        }[names]  # fmt: skip
    weights = None
    if isinstance(chosen, dict):
        weights = tuple(weight / sum(chosen.values()) for weight in chosen.values())
        if layers > len(chosen):
            raise UserError(
                f"auto_augment={config!r} has n{layers}, but its list holds only {len(chosen)} operations; lower n."
            )
    return RandAugment(tuple(_Step(name, probability, magnitude) for name in chosen), weights, int(layers), magnitudes)


def _read_policy(table: str) -> tuple[tuple[_Step, ...], ...]:
    rows = [line.split() for line in table.strip().splitlines()]
    return tuple(
        tuple(_Step(row[i], float(row[i + 1]), float(row[i + 2])) for i in range(0, len(row), 3)) for row in rows
    )
