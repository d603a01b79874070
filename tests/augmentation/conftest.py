"""Images that the tests of the augmentation share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from support.augmentation import generated_images, imagenet_sample


@pytest.fixture(scope="module")
def real_images() -> list[np.ndarray]:
    return imagenet_sample() or pytest.skip("the ImageNet sample is not here (HF_DEIT_DATA)")


@pytest.fixture(scope="module")
def squares() -> list[np.ndarray]:
    """A dozen 224 x 224 pictures, real ones where there are any."""
    images = (imagenet_sample() or generated_images())[:12]
    return [np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
