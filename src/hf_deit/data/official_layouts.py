"""The official directory layouts of the registered datasets, read into plain lists.

A reader lists files and labels; it opens no image file and unpickles nothing. Names that begin with a dot are never
images, folders or classes.

Not here: plain folders of classes (folders.py), and datasets made of the lists (loading.py).

Source: the datasets' own descriptions; for iNaturalist's classes `datasets.py` of github.com/facebookresearch/deit.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError, first_line, printable
from ..files import MEBIBYTE, read_file, read_json, read_text
from .decoding import check_paths
from .folders import LocalImages, image_paths, sort_classes, visible_entries


# From coarse to fine; iNaturalist 2019 has no supercategory.
CATEGORY_LEVELS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


# Largest official files: iNaturalist 2018's training annotations have some 120 MB, unpacked Fashion-MNIST 47 MB.
MAX_LIST_BYTES = 256 * MEBIBYTE


@dataclass(frozen=True)
class Layout:
    """The official directory layout of one dataset.

    Attributes:
        description: the layout in a few words, for messages.
        splits: names of the official splits.
        markers: paths inside the directory, any of which identifies the layout; empty if no directory is needed.
        read: function of `(root, split)` that reads a split; iNaturalist's also takes `category_level`.
    """

    description: str
    splits: tuple[str, ...]
    markers: tuple[str, ...]
    read: Callable[..., LocalImages]

    def find(self, directory: Path) -> Path | None:
        """Find the folder with a marker: `directory` or one just below it (as archives unpack), else None."""
        below = (Path(entry.path) for entry in visible_entries(directory) if entry.is_dir())
        for folder in (directory, *below):
            if any((folder / marker).exists() for marker in self.markers):
                return folder
        return None


# --- ImageNet ----------------------------------------------------------------------------------------------------


def _read_imagenet(root: Path, split: str) -> LocalImages:
    """Read ImageNet; the classes are the sorted WordNet ids, which is the order of every ImageNet-1k checkpoint."""
    devkit = root / "ILSVRC2012_devkit_t12" / "data"
    mapping = root / "LOC_synset_mapping.txt"
    if (root / "LOC_val_solution.csv").exists():
        truth = _read_solution(root / "LOC_val_solution.csv")
        lines = read_text(mapping).splitlines() if mapping.exists() else truth.values()
        names = sorted({line.split()[0] for line in lines if line.strip()})
    else:
        with _damage_of(file := _existing(devkit / "meta.mat")):
            synsets = _load_mat(file)["synsets"]
            wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
        file = _existing(devkit / "ILSVRC2012_validation_ground_truth.txt")
        with _damage_of(file):
            truth = {f"ILSVRC2012_val_{i:08d}": wnids[int(n)] for i, n in enumerate(read_text(file).split(), 1)}
        names = sorted(wnids.values())
    number = {name: i for i, name in enumerate(names)}
    paths = image_paths(_existing(_imagenet_images(root) / ("train" if split == "train" else "val")))
    labels = []
    for path in paths:
        folder, file = os.path.split(path)
        wnid = os.path.basename(folder)
        wnid = wnid if wnid in number else truth.get(os.path.splitext(file)[0])
        if wnid not in number:
            raise UserError(
                f"{path!r} has no label: neither its folder nor the official list of labels names its class"
            )
        labels.append(number[wnid])
    return LocalImages(paths, labels, names)


def _read_solution(file: Path) -> dict[str, str]:
    """The WordNet id by the name of the image, of Kaggle's list."""
    with _damage_of(file):
        rows = csv.DictReader(io.StringIO(read_text(file)))
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}


def _read_imagenet_v2(root: Path, split: str) -> LocalImages:
    """Read ImageNet-V2; folder i is class i of ImageNet-1k, and the files contain no WordNet ids or names."""
    folders = sort_classes(entry.name for entry in visible_entries(root) if entry.is_dir() and entry.name.isdecimal())
    paths = {name: image_paths(root / name) for name in folders}
    labels = [int(name) for name in folders for _ in paths[name]]
    return LocalImages([path for name in folders for path in paths[name]], labels, None)


def _read_imagenet_real(root: Path, split: str) -> LocalImages:
    """Read ImageNet's validation images, by number, with the ReaL labels; 3,163 of the 50,000 images have no label."""
    with _damage_of(file := root / "real.json"):
        labels = read_json(file)
        if not all(isinstance(one, list) and all(0 <= label < 1000 for label in one) for one in labels):
            raise ValueError("expected a list of class numbers from 0 to 999 for each image")
    folder = _imagenet_images(root)
    folder = folder / "val" if (folder / "val").is_dir() else folder
    paths = sorted((path for path in image_paths(folder) if "_val_" in os.path.basename(path)), key=_imagenet_number)
    if not paths or _imagenet_number(paths[-1]) > len(labels):
        raise UserError(
            f"{str(folder)!r} holds {len(paths)} images named ILSVRC2012_val_<number>.JPEG and real.json holds "
            f"{len(labels)} lists of labels; expected ImageNet's validation images and one list for each of them"
        )
    return LocalImages(paths, [labels[_imagenet_number(path) - 1] for path in paths], None)


def _imagenet_images(root: Path) -> Path:
    kaggle = root / "ILSVRC" / "Data" / "CLS-LOC"
    return kaggle if kaggle.is_dir() else root


def _imagenet_number(path: str) -> int:
    """Return 12 for .../ILSVRC2012_val_00000012.JPEG; a class may follow the number (..._n01440764.JPEG)."""
    return int(re.findall(r"_val_(\d+)", os.path.basename(path))[0])


# --- the transfer datasets ---------------------------------------------------------------------------------------


def _read_flowers102(root: Path, split: str) -> LocalImages:
    part = {"train": "trnid", "validation": "valid", "test": "tstid"}[split]
    with _damage_of(file := _existing(root / "setid.mat")):
        numbers = [int(number) for number in np.atleast_1d(_load_mat(file)[part])]
    with _damage_of(file := _existing(root / "imagelabels.mat")):
        classes = [int(label) - 1 for label in np.atleast_1d(_load_mat(file)["labels"])]
        if not all(0 < number <= len(classes) for number in numbers):
            raise ValueError(f"it has {len(classes)} labels, and setid.mat names image {max(numbers)}")
        labels = [classes[number - 1] for number in numbers]
        if not all(0 <= label < 102 for label in labels):
            raise ValueError("a label is not from 1 to 102")
    paths = [os.path.abspath(root / "jpg" / f"image_{number:05d}.jpg") for number in numbers]
    return LocalImages(_check_first(paths), labels, None)


def _read_cars(root: Path, split: str) -> LocalImages:
    file = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}[split]
    annotations = _existing(root / "devkit" / file, root / file)
    with _damage_of(meta := _existing(root / "devkit" / "cars_meta.mat", root / "cars_meta.mat")):
        names = [str(name) for name in _load_mat(meta)["class_names"]]
    with _damage_of(annotations):
        rows = _load_mat(annotations)["annotations"]
        files, labels = [str(row["fname"]) for row in rows], [int(row["class"]) - 1 for row in rows]
        if not all(0 <= label < len(names) for label in labels):
            raise ValueError(f"a class is not from 1 to {len(names)}")
    return LocalImages(_check_first(_inside(root / f"cars_{split}", files, annotations)), labels, names)


def _read_inaturalist(year: int, root: Path, split: str, category_level: str = "name") -> LocalImages:
    """Read iNaturalist; the classes are in the order of the training annotations, as in the authors' code."""
    files = {part: _existing(root / f"{part}{year}.json") for part in ("train", "val")}
    with _damage_of(file := _existing(root / "categories.json")):
        categories = {entry["id"]: entry for entry in read_json(file)}
        known = [level for level in CATEGORY_LEVELS if all(level in entry for entry in categories.values())]
    if category_level not in known:
        raise UserError(
            f"category_level is {category_level!r}; categories.json of {year} has {', '.join(known)}"
            + ("" if category_level in CATEGORY_LEVELS else f" (all levels: {', '.join(CATEGORY_LEVELS)})")
        )
    with _damage_of(file := files["train"]):
        listing = read_json(file, MAX_LIST_BYTES)
        names = list(dict.fromkeys(categories[row["category_id"]][category_level] for row in listing["annotations"]))
    with _damage_of(file := files["train" if split == "train" else "val"]):
        listing = listing if split == "train" else read_json(file, MAX_LIST_BYTES)
        number = {name: i for i, name in enumerate(names)}
        of_image = {row["image_id"]: row["category_id"] for row in listing["annotations"]}
        images = [str(row["file_name"]) for row in listing["images"]]
        labels = [number[categories[of_image[row["id"]]][category_level]] for row in listing["images"]]
    paths = _inside(root, images, file)
    if paths and not os.path.exists(paths[0]):  # the authors' copy has <category>/ without <super category>/ above
        paths = _inside(root, [re.sub(r"^([^/]+)/[^/]+/", r"\1/", image) for image in images], file)
    return LocalImages(_check_first(paths), labels, [str(name) for name in names])


def _read_cifar(classes: int, root: Path, split: str) -> LocalImages:
    if (root / "batches.meta").exists() or (root / "meta").exists():
        raise UserError(
            f"{str(root)!r} holds CIFAR's Python version, a pickle, which could run foreign code and is never opened; "
            f"get the binary version, cifar-{classes}-binary.tar.gz, from https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    if classes == 10:
        files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    else:
        files = [f"{split}.bin"]
    label_bytes = 1 if classes == 10 else 2  # CIFAR-100 stores the coarse label first
    images, labels = [], []
    for file in files:
        file = _existing(root / file)
        with _damage_of(file):
            content = np.frombuffer(read_file(file, MAX_LIST_BYTES), np.uint8)
        if len(content) % (label_bytes + 3072):
            raise UserError(
                f"{str(file)!r} has {len(content)} bytes, no multiple of {label_bytes + 3072}: the file is truncated; "
                "download it again"
            )
        rows = content.reshape(-1, label_bytes + 3072)
        labels += rows[:, label_bytes - 1].tolist()
        pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        images += map(_encode, np.ascontiguousarray(pixels))
    file = _existing(root / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt"))
    names = read_text(file).split()
    if len(names) != classes or not all(label < classes for label in labels):
        raise UserError(
            f"{str(file)!r} names {len(names)} classes and the images have labels up to {max(labels, default=0)}; "
            f"expected {classes} classes: download the files again"
        )
    return LocalImages(images, labels, names)


def _read_fashion_mnist(root: Path, split: str) -> LocalImages:
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (_read_idx(root, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or labels.max(initial=0) > 9:
        raise UserError(
            f"the idx files {prefix}-* in {str(root)!r} hold arrays of the shapes {images.shape} and {labels.shape}; "
            "expected as many grey images as labels from 0 to 9: download them again"
        )
    return LocalImages([_encode(image) for image in images], labels.tolist(), None)


def _read_idx(root: Path, name: str) -> np.ndarray:
    file = _existing(root / name, root / f"{name}.gz")
    with _damage_of(file):
        content = read_file(file, MAX_LIST_BYTES)
        if file.suffix == ".gz":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_LIST_BYTES)
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0  # two zeros, the type (8: uint8), the dimensions
    whole = 0 < dimensions <= 3 and len(content) >= 4 + 4 * dimensions
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist() if whole else []
    if not whole or len(content) != 4 + 4 * dimensions + math.prod(shape):
        raise UserError(f"{str(file)!r} is not a complete idx file of bytes; download it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _read_digits(root: Path | None, split: str) -> LocalImages:
    """Read scikit-learn's 1,797 digits, 8x8 grey. There is no official split; one fifth of each class is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, held_out = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
    rows = train if split == "train" else held_out
    # Every BMP of one size begins with the same bytes, which take Pillow longer than the pixels. Rows stand bottom up.
    head = _encode(np.zeros_like(pixels[0]))[: -pixels[0].size]
    encoded = [head + image[::-1].tobytes() for image in pixels[rows]]
    return LocalImages(encoded, digits.target[rows].tolist(), None)


def _encode(pixels: np.ndarray) -> bytes:
    """Encode as BMP: lossless, and several times faster than PNG to write and to read."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


# --- MATLAB files ------------------------------------------------------------------------------------------------
# SciPy's reader crashes the process on damaged files (a type of data that it does not know leads out of its tables),
# so the little that the official files need is read here.

# Types of data: numbers with their NumPy names, and text with its encoding.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MATRIX, _COMPRESSED = 14, 15


def _load_mat(file: Path) -> dict[str, Any]:
    """Read a MATLAB 5 file: arrays of numbers, texts as `str`, cells as lists, structures as lists of dictionaries.

    Raises:
        ValueError: the file is damaged, of another version, or holds other things than these.

    Source: MathWorks, "MAT-File Format", level 5.
    """
    content = memoryview(read_file(file, 16 * MEBIBYTE))
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
    if order is None:
        raise ValueError("it is no MATLAB file of version 5 to 7")
    arrays = {}
    for kind, data in _elements(content[128:], order):
        if kind == _COMPRESSED:
            unpacked = zlib.decompressobj().decompress(data, MAX_LIST_BYTES + 1)
            if len(unpacked) > MAX_LIST_BYTES:
                raise ValueError(f"it holds more than {MAX_LIST_BYTES:,} bytes")
            ((kind, data),) = _elements(memoryview(unpacked), order)
        if kind != _MATRIX:
            raise ValueError(f"it holds data of the type {kind}")
        name, value = _matrix(data, order)
        arrays[name] = value
    return arrays


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield type and data of each element."""
    at = 0
    while at < len(data):
        kind, size = np.frombuffer(data[at : at + 8], f"{order}u4", 2).tolist()
        start = at + 8
        if kind >> 16:  # up to four bytes of data stand within the tag
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if size > (len(data) - start if start == at + 8 else 4):
            raise ValueError(f"an element of {size:,} bytes does not fit")
        yield kind, data[start : start + size]
        at = start + 4 if start == at + 4 else start + (size if kind == _COMPRESSED else -(-size // 8) * 8)


def _matrix(data: memoryview, order: str) -> tuple[str, Any]:
    """Read a matrix; returns its name and content."""
    (_, flags), (_, shape), (_, name), *parts = _elements(data, order)
    kind = int(np.frombuffer(flags, f"{order}u4")[0]) & 0xFF
    shape, name = np.frombuffer(shape, f"{order}i4").tolist(), bytes(name).decode("latin-1")
    count = math.prod(shape)
    if min(shape) < 0:
        raise ValueError(f"{printable(name)} has the shape {shape}")
    if 6 <= kind <= 15:  # numbers
        values = np.frombuffer(parts[0][1], order + _NUMBERS[parts[0][0]])
        return name, values.reshape(shape, order="F").squeeze()
    if kind == 4 and min(shape[:1]) <= 1:
        encoding = _TEXTS[parts[0][0]]
        endian = "" if encoding in ("latin-1", "utf-8") else {"<": "-le", ">": "-be"}[order]
        return name, bytes(parts[0][1]).decode(encoding + endian)
    fields = None
    if kind == 2:  # a structure, whose field names all have the same length
        (_, length), (_, names), *parts = parts
        length, names = int(np.frombuffer(length, f"{order}i4")[0]), bytes(names)
        fields = [names[i : i + length].split(b"\0")[0].decode("latin-1") for i in range(0, len(names), length)]
    elif kind != 1:
        raise ValueError(f"{printable(name)} is an array of class {kind} and shape {shape}")
    if len(parts) != count * (1 if fields is None else len(fields)) or any(type != _MATRIX for type, _ in parts):
        raise ValueError(f"{printable(name)} of shape {shape} has {len(parts)} parts")
    values = [_matrix(part, order)[1] for _, part in parts]
    if fields is None:
        return name, values
    rows = zip(*[iter(values)] * len(fields), strict=True)
    return name, [dict(zip(fields, row, strict=True)) for row in rows]


# --- files and paths ---------------------------------------------------------------------------------------------


@contextmanager
def _damage_of(file: Path) -> Iterator[None]:
    """Name the official file that something is wrong with."""
    try:
        yield
    except Exception as error:  # the readers of .mat, gzip and csv raise exceptions of any type
        if isinstance(error, UserError) and str(file) in str(error):
            raise
        what = f"no entry {error}" if isinstance(error, LookupError) else first_line(error)
        raise UserError(f"{str(file)!r} is damaged or another dataset's ({what}); download it again") from error


def _inside(folder: Path, names: list[str], listed_in: Path) -> list[str]:
    paths = [os.path.join(os.path.abspath(folder), name) for name in names]
    check_paths(paths, [folder], repr(str(listed_in)))
    return paths


def _existing(*candidates: Path) -> Path:
    for path in candidates:
        if path.exists():
            return path
    raise UserError(f"{' or '.join(repr(str(path)) for path in candidates)} is missing; the dataset is incomplete")


def _check_first(paths: list[str]) -> list[str]:
    if paths:  # check one file instead of half a million
        _existing(Path(paths[0]))
    return paths


IMAGENET = Layout(
    "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or a flat val/ next to LOC_val_solution.csv or "
    "ILSVRC2012_devkit_t12/, or Kaggle's ILSVRC/Data/CLS-LOC/",
    ("train", "validation"),
    ("LOC_val_solution.csv", "ILSVRC2012_devkit_t12"),
    _read_imagenet,
)
IMAGENET_V2 = Layout("the folders 0 to 999 of imagenetv2-matched-frequency", ("test",), ("0",), _read_imagenet_v2)
IMAGENET_REAL = Layout(
    "real.json next to ImageNet's val/ (flat or with class folders)",
    ("validation",),
    ("real.json",),
    _read_imagenet_real,
)
FLOWERS102 = Layout(
    "jpg/image_00001.jpg ..., imagelabels.mat and setid.mat",
    ("train", "validation", "test"),
    ("setid.mat",),
    _read_flowers102,
)
CARS = Layout(
    "cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat",
    ("train", "test"),
    ("devkit/cars_meta.mat", "cars_meta.mat"),
    _read_cars,
)
INATURALIST_2018, INATURALIST_2019 = (
    Layout(
        f"train_val{year}/, train{year}.json, val{year}.json and categories.json",
        ("train", "validation"),
        (f"train{year}.json",),
        partial(_read_inaturalist, year),
    )
    for year in (2018, 2019)
)
CIFAR10 = Layout(
    "cifar-10-batches-bin/: data_batch_1.bin ..., test_batch.bin and batches.meta.txt",
    ("train", "test"),
    ("data_batch_1.bin", "test_batch.bin", "batches.meta"),
    partial(_read_cifar, 10),
)
CIFAR100 = Layout(
    "cifar-100-binary/: train.bin, test.bin and fine_label_names.txt",
    ("train", "test"),
    ("fine_label_names.txt", "meta"),
    partial(_read_cifar, 100),
)
FASHION_MNIST = Layout(
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two of t10k, unpacked or not",
    ("train", "test"),
    ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz"),
    _read_fashion_mnist,
)
DIGITS = Layout("scikit-learn's own copy", ("train", "test"), (), _read_digits)
