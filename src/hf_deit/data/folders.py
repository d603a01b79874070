"""List the images and classes of a directory of class folders, and the shard files of a dataset."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError


IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)
# Names by which a folder or a file is recognised as a split.
SPLIT_NAMES = ("train", "validation", "val", "valid", "dev", "test")


@dataclass(frozen=True)
class LocalImages:
    """The images and labels of one split.

    Attributes:
        images: absolute paths, or encoded bytes if the official files hold raw pixels.
        labels: class of each image; for ReaL a list of classes per image, which may be empty.
        class_names: class names in label order; None if only the registry has them.
    """

    images: list[str] | list[bytes]
    labels: list[int] | list[list[int]]
    class_names: list[str] | None


def find_image_folders(directory: Path) -> dict[str, Path]:
    """Return `{split: folder}` of `<split>/<class>/<image>`; only "train" if `directory` holds the classes itself.

    Split folders keep their names. A split without a folder per class is listed too, so that reading the split raises
    an error that explains the expected layout.
    """
    folders = {entry.name: Path(entry.path) for entry in visible_entries(directory) if entry.is_dir()}
    splits = {name: folder for name, folder in folders.items() if name in SPLIT_NAMES and _has_image(folder)}
    return splits or ({"train": directory} if any(_has_image(folder) for folder in folders.values()) else {})


def read_image_folders(folder: Path, train_folder: Path | None = None) -> LocalImages:
    """Read the images of `<folder>/<class>/...`, at any depth below the class, sorted by path.

    The classes are the folders of `train_folder` (default: `folder`) that hold an image, in the order of
    [`sort_classes`]: torchvision's order, except that numbers are sorted as numbers ("10" after "2").

    Raises:
        ValueError: `folder` has no folder per class, or has a class that `train_folder` lacks.
    """
    names = _class_folders(train_folder or folder)
    found = _class_folders(folder)
    if not found:
        raise UserError(
            f"{str(folder)!r} holds images but no folder per class; expected {folder.name}/<class>/<image>.jpg. For "
            "ImageNet's flat validation folder use dataset_name: imagenet-1k with data_dir"
        )
    if unknown := [name for name in found if name not in set(names)]:
        raise UserError(
            f"{str(folder)!r} has {len(unknown)} classes that {str(train_folder)!r} has no images of, such as "
            f"{', '.join(unknown[:3])}; both folders need the same classes"
        )
    images, labels = [], []
    for name in found:
        paths = image_paths(folder / name)
        images += paths
        labels += [names.index(name)] * len(paths)
    return LocalImages(images, labels, names)


def sort_classes(names: Iterable[str]) -> list[str]:
    """Sort class names alphabetically, or as numbers if every name is a number ("2" before "10")."""
    names = list(names)
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numbers else name)


def find_shards(directory: Path, suffix: str, everywhere: bool = False) -> dict[str, list[str]]:
    """Return `{split: files}` of a sharded dataset: train-00000-of-00002.parquet, test/0000.parquet, val-03.tar, ...

    Args:
        suffix: ".parquet" or ".tar". A tar file without a split name is no shard, because plain archives are tars too.
        everywhere: search all folders below `directory`, not only its direct subfolders.
    """
    shards: dict[str, list[str]] = {}
    patterns = (f"**/*{suffix}",) if everywhere else (f"*{suffix}", f"*/*{suffix}")
    for file in sorted(file for pattern in patterns for file in directory.glob(pattern)):
        if any(part.startswith(".") for part in file.relative_to(directory).parts):
            continue
        words = re.split(r"[-_.]", file.stem)
        split = next((word for word in (*map(str.lower, words), file.parent.name) if word in SPLIT_NAMES), None)
        if split is None and suffix == ".tar":
            continue
        if split is None:
            split = file.parent.name if words[0].isdigit() and file.parent != directory else words[0]
        shards.setdefault(split, []).append(str(file))
    return shards


def visible_entries(folder: str | Path) -> list[os.DirEntry]:
    """List the entries of a folder sorted by name, without names that begin with a dot."""
    """List the entries of a folder by name, without those that begin with a dot."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _walk_images(folder: str | Path) -> Iterable[str]:
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in seen:  # a link to a folder that was already visited
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in files if _is_image(name))


def image_paths(folder: str | Path) -> list[str]:
    """List the absolute paths of all images in a folder, at any depth, sorted."""
    """List the absolute paths of all images below a folder, sorted."""
    return sorted(_walk_images(os.path.abspath(folder)))


def _has_image(folder: str | Path) -> bool:
    return next(iter(_walk_images(folder)), None) is not None


def _class_folders(folder: Path) -> list[str]:
    return sort_classes(entry.name for entry in visible_entries(folder) if entry.is_dir() and _has_image(entry.path))
