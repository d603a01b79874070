"""Fingerprint of the training views: everything except the teacher that decides the teacher outputs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.labels import labels_of
from ..data.views import TrainViews
from ..errors import UserError


# Number of images whose bytes are part of the fingerprint, spread evenly over the dataset.
SAMPLED_IMAGES = 8


def fingerprint_of_views(
    views: TrainViews,
    settings: Mapping[str, object],
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str],
) -> dict[str, object]:
    """Return everything that decides which pixels the teacher sees at which position, by name; values are JSON.

    The fingerprint excludes the location of the images and settings that affect only the student (loss, label
    smoothing, learning rate, length of the run).

    Args:
        views: the training set.
        settings: settings of the run, see [`DistillationConfig.view_settings`].
        mean, std: per channel, to normalise pixels in [0, 1] with.
        class_names: class names of the student, in order.

    Raises:
        ValueError: the training set is not a [`TrainViews`].
    """
    if not isinstance(views, TrainViews):
        raise UserError(
            f"the training set is a {type(views).__name__}, but teacher outputs can be recorded and replayed for "
            "TrainViews only, because other datasets do not number their views: use TrainViews, or leave out "
            "teacher_record and teacher_replay"
        )
    fingerprint = {
        "images": len(views),
        "labels and sampled images": fingerprint_of_images(views.images),
        "classes": len(class_names),
        "class names": digest(json.dumps(list(class_names)).encode()),
        "seed of the views": views.seed,
        "blocks of a stream": views.block_sizes and digest(json.dumps(views.block_sizes).encode()),
        "mean": mean,
        "std": std,
        **settings,
    }
    if is_dataclass(views.transform):
        parameters = {
            f"transform.{item.name}": getattr(views.transform, item.name) for item in fields(views.transform)
        }
    else:
        parameters = {"transform": views.transform}
    fingerprint |= {name: _shown(value) for name, value in parameters.items()}
    return json.loads(json.dumps(fingerprint))


def fingerprint_of_images(images: Any) -> str:
    """Return 16 hexadecimal digits that depend on all labels and on the encoded bytes of 8 images.

    For a stream, whose labels would have to be downloaded, only the labels of the 8 images count.
    """
    is_stream = hasattr(images, "block_sizes")
    if is_stream:
        images = images.take(len(images))  # a copy, so that the row groups read here are not kept
    labels = labels_of(images)
    digest = hashlib.sha256(b"" if labels is None else labels.astype("<i8").tobytes())
    sample = sorted(set(np.linspace(0, len(images) - 1, SAMPLED_IMAGES).astype(int).tolist()))
    sampled: Any = images
    for row in sampled.__getitems__(sample) if is_stream else [images[index] for index in sample]:
        digest.update(str(row["label"]).encode())
        digest.update(hashlib.sha256(_encoded(row["image"] or {})).digest())
    return digest.hexdigest()[:16]


def _shown(value: object) -> object:
    """Return the text or number that record.json holds for a parameter of the transform."""
    if isinstance(value, (int, float, str)):
        return value
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return text if len(text) <= 80 else f"{text[:60]}... ({digest(text.encode())})"


def _encoded(image: Mapping) -> bytes:
    if image.get("bytes") is not None or image.get("path") is None:
        return image.get("bytes") or b""
    try:
        return Path(image["path"]).read_bytes()
    except OSError:  # a damaged image, which training replaces by its neighbour
        return b""


def digest(data: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]
