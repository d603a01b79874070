"""Images and comparisons for the tests of the augmentation."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp


DRAWS = 10_000


PAPER = "rand-m9-mstd0.5-inc1"


FILL = (124, 116, 104)


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


def same_distribution(ours: list[float], theirs: list[float], what: str) -> None:
    assert ks_2samp(ours, theirs).pvalue > 1e-4, what
