"""Fingerprint of the training views: everything except the teacher that decides the teacher outputs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ..data.decoding import MAX_BYTES, path_of
from ..data.views import TrainViews
from ..errors import UserError
from ..files import MEBIBYTE, read_file


# How much of the images is part of the fingerprint beside their sizes; of a larger stream this number of images.
HASHED_BYTES = 256 * MEBIBYTE
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
        "labels and images": fingerprint_of_images(views.images),
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
    """Return 16 hexadecimal digits that depend on every label, the order, and every encoded image.

    Of each image the number of bytes counts, and the bytes themselves of images spread evenly over the dataset, up to
    `HASHED_BYTES`: of a small set all images. Of a stream that is larger, whose images would have to be downloaded,
    the bytes of 8 images count, and the stored size of each row group in place of the single sizes.
    """
    if hasattr(images, "block_sizes"):
        images = images.take(len(images))  # a copy, so that the row groups read here are not kept
        sizes = images.stored_sizes()
        digest = hashlib.sha256(json.dumps([images.stored_labels(), sizes], default=str).encode())
        count = len(images) if sum(sizes) <= HASHED_BYTES else SAMPLED_IMAGES
        sample = sorted(set(np.linspace(0, len(images) - 1, count).astype(int).tolist()))
        for start in range(0, len(sample), 64):  # a few row groups at a time
            for row in images.__getitems__(sample[start : start + 64]):
                digest.update(hashlib.sha256(_encoded(row["image"] or {})).digest())
        return digest.hexdigest()[:16]
    labels, sizes = _labels_and_sizes(images)
    digest = hashlib.sha256(np.asarray(labels, "<i8").tobytes() + np.asarray(sizes, "<i8").tobytes())
    count = len(images) if sum(sizes) <= HASHED_BYTES else int(len(images) * HASHED_BYTES / sum(sizes))
    for index in sorted(set(np.linspace(0, len(images) - 1, count).astype(int).tolist())):
        digest.update(hashlib.sha256(_encoded(images[index]["image"] or {})).digest())
    return digest.hexdigest()[:16]


def _labels_and_sizes(images: Any) -> tuple[Sequence[int], list[int]]:
    """The label and the number of encoded bytes of each image, -1 for a missing file; no image is read."""
    if hasattr(images, "with_format"):
        rows, labels, sizes = images.with_format("arrow"), [], []
        for start in range(0, len(rows), 1000):  # a subset is copied out of its table
            table = rows[start : start + 1000].flatten()
            labels += table["label"].to_pylist()
            lengths = pc.call_function("binary_length", [table["image.bytes"]]).to_pylist()
            paths = table["image.path"].to_pylist()
            sizes += [_size_of(path) if n is None else n for n, path in zip(lengths, paths, strict=True)]
        return labels, sizes
    rows = [images[index] for index in range(len(images))]
    stored = [row["image"] or {} for row in rows]
    return [row["label"] for row in rows], [
        _size_of(image.get("path")) if image.get("bytes") is None else len(image["bytes"]) for image in stored
    ]


def _size_of(path: str | None) -> int:
    try:
        return -1 if path is None else os.stat(path_of(path)).st_size
    except (OSError, ValueError):  # a damaged image, which training replaces by its neighbour
        return -1


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
        return read_file(path_of(image["path"]), MAX_BYTES)
    except (OSError, ValueError):  # a damaged image, which training replaces by its neighbour
        return b""


def digest(data: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]
