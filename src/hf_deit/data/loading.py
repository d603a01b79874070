"""From the name of a dataset to its images: encoded bytes and labels.

`load_image_dataset` finds the images (registry name, local directory or Hub id) and returns them with two columns,
`image` and `label`, on disk or as a stream. Only this file imports the datasets library.

Not here: decoding the images (decoding.py) and making batches (views.py).
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, first_line, some_of
from ..files import check_tar
from .decoding import check_paths, storable_path
from .folders import (
    IMAGE_FOLDERS,
    SPLIT_MEANINGS,
    LocalImages,
    UnreadFiles,
    find_image_folders,
    find_shards,
    list_beside,
    read_image_folders,
    sort_classes,
    split_named,
    unread_files,
)
from .registry import REGISTRY, RegisteredDataset
from .streaming import StreamedImages, read_schema


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Splits to evaluate on if eval_split is unset, best first.
EVAL_SPLITS = tuple(name for name, meaning in SPLIT_MEANINGS.items() if meaning != "train")
# Names of label columns whose type is not ClassLabel.
LABEL_COLUMNS = ("label", "labels", "cls", "json.label", "json.cls")

# The splits of a source, each with the function that loads it.
Splits = Mapping[str, Callable[[], datasets.Dataset]]


class Source(NamedTuple):
    """Where the images of a dataset are.

    Attributes:
        place: absolute directory, or the page of the dataset.
        layout: how the images are stored, in a few words.
        splits: the splits, each with the function that loads it.
        locations: files or folder of each split, if they are on this machine.
        streamed: the parquet files of each split to stream; None if nothing is streamed.
    """

    place: str
    layout: str
    splits: Splits
    locations: Mapping[str, tuple[str, ...]]
    streamed: Mapping[str, Sequence[str]] | None = None


class Piece(NamedTuple):
    """A split, or a slice of it.

    Attributes:
        split: name of the split in the source.
        rows: the slice in the notation of the datasets library, such as "[:80%]"; "" for the whole split.
    """

    split: str
    rows: str

    def __str__(self) -> str:
        return self.split + self.rows


class LoadedImages(dict[str, Any]):
    """The images of each part, "train" and "eval", and what was found on the way.

    Attributes:
        name: the dataset, as it was asked for.
        place: absolute directory, or the page of the dataset.
        layout: how the images are stored, in a few words.
        splits: the source's own names of the splits of each part, slices included, joined with "+".
        unread: files of image folders that are not read.
        held_out: number of training images that were held out for evaluation, and of how many; None if the evaluation
            images are another split.
        trained_on: number of evaluation images that are training images too, because the splits overlap.
    """

    def __init__(self, name: str, source: Source):
        super().__init__()
        self.name = name
        self.place = source.place
        self.layout = source.layout
        self.splits: dict[str, str] = {}
        self.unread = UnreadFiles()
        self.held_out: tuple[int, int] | None = None
        self.trained_on = 0


def load_image_dataset(
    name: str,
    *,
    data_dir: str | None = None,
    category_level: str | None = None,
    splits: Sequence[str] = ("train", "eval"),
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    eval_fraction: float = 0.15,
    seed: int = 0,
    rows: datasets.Dataset | Mapping[str, datasets.Dataset] | None = None,
) -> LoadedImages:
    """Load a labelled image dataset as `{"train", "eval"}`, each with the columns `image` and `label`.

    A directory may contain parquet files or webdataset-style tar shards, whose names or folders name their split, or
    one folder per split with one folder of images per class. Image files are read in place, those that are not read
    are reported in one warning; parquet files and tar shards go through the cache of the datasets library.

    Args:
        name: a name in [`REGISTRY`], a local directory, or a Hub id.
        data_dir: directory of a registered dataset, in its official layout or in one of the above.
        category_level: level of iNaturalist's classes, "kingdom" to "name" (the species; default).
        splits: the parts to load; `("eval",)` for a dataset that is only for evaluation.
        streaming: read the training images from parquet files, on the Hub or on disk, while training, without
            downloading or converting them first. Evaluation images are downloaded once, because every epoch needs
            them. Image folders are always read in place.
        image_column, label_column: needed only if the dataset has several columns of that kind.
        train_split, eval_split: splits, joined with "+", in upper or lower case, or slices of them in the notation of
            the datasets library: "train[:80%]", "train[100:200]", "train[-20%:]". The defaults are the registry's,
            else "train" (or training) and the first of validation, val, valid, dev, test, evaluation, eval, testing
            that exists.
        max_train_samples, max_eval_samples: size of a random subset, the same for the same seed; for a stream the
            first images instead.
        eval_fraction: share of the images of each class that is held out for evaluation if there is no split to
            evaluate on, in [0, 1); 0: there is no part "eval" then. What is held out depends only on the images, their
            order and `seed`; a class with one image keeps it. Default: as in Hugging Face's
            run_image_classification.py.
        seed: seed of the subsets and of what is held out.
        rows: the dataset itself, as the datasets library holds it: the training images, or one dataset for each split.
            `name` is then only what messages call it.

    Returns:
        A dict of the parts; its attributes say where the images come from, see [`LoadedImages`]. `image` is not
        decoded (`{"bytes", "path"}`). `label` is a `ClassLabel` with the class names, the same in both splits; for
        imagenet-real a list of class labels, which may be empty. Labels that are numbers keep their order. If the
        splits number the same classes in another order, the order is that of the training images. A stream is a
        [`StreamedImages`].

    Raises:
        ValueError: if nothing is found under the name, the directory has no images, a split or column is missing, the
            splits have different classes, there are fewer than two classes to train on, or nothing to evaluate on
            can be held out.
    """
    entry = REGISTRY.get(name) if rows is None else None
    if not splits or not set(splits) <= {"train", "eval"}:
        raise UserError(
            f"splits is {splits!r}; expected 'train', 'eval' or both (set train_split for the dataset's own names)"
        )
    if "train" in splits and entry is not None and entry.train_split is None:
        raise UserError(
            f"{name!r} is only for evaluation, it has no training images: train on {entry.classes_of!r}, or load the "
            "dataset with splits=('eval',)"
        )
    limits = {"train": max_train_samples, "eval": max_eval_samples}
    for part, limit in limits.items():
        if limit is not None and limit < 1:
            raise UserError(f"max_{part}_samples is {limit}; use a positive number, or leave it unset for all images")

    if not 0 <= eval_fraction < 1:
        raise UserError(f"eval_fraction is {eval_fraction}; it must be at least 0 and below 1, such as 0.15")

    requested = {"train": train_split, "eval": eval_split}
    if rows is None:
        source, unread = _find(name, data_dir, category_level, entry, streaming, requested)
    else:
        source, unread = _given(rows), UnreadFiles()
    source = source._replace(splits={split: cache(load) for split, load in source.splits.items()})
    available, files = source.splits, source.streamed
    used = {part: requested[part] or split for part, split in _default_splits(available, entry, eval_split).items()}
    columns = (image_column, label_column)
    load = partial(_load_split, source, name=name, columns=columns, entry=entry)
    holds_out = eval_split is None and "train" in used and _nothing_else_to_evaluate_on(used, available)
    if holds_out:
        _check_hold_out(files is not None, eval_fraction, splits, used, name)
    if files is not None:
        splits_to_load = [part for part in splits if part == "eval" and not holds_out]
    else:
        splits_to_load = ("train",) if holds_out else splits
    loaded = {part: load(used[part], f"{part}_split") for part in splits_to_load}
    chosen = {part: rows for part, (rows, _) in loaded.items()}
    spans = {part: spans for part, (_, spans) in loaded.items()}

    values = None
    if any(isinstance(rows.features["label"], datasets.Value) for rows in chosen.values()):
        # The training images define the classes, even if only the evaluation images are loaded. A stream cannot be
        # searched for its classes; then the evaluation images define them.
        has_train = files is None and "train" in used and _pieces(used["train"], available) is not None
        reference = chosen.get("train") or (load(used["train"], "train_split")[0] if has_train else chosen["eval"])
        values, class_names = _values_of_classes(reference, entry, name)
        chosen = {part: _with_class_names(rows, values, class_names, name) for part, rows in chosen.items()}
    if files is not None and "train" in splits:
        pieces = _pieces_of_stream(used["train"], available, name)
        label = chosen["eval"].features["label"] if "eval" in chosen else None
        train_files = [file for piece in pieces for file in files[piece.split]]
        chosen["train"] = _stream(train_files, columns, entry, label, values, name)
        spans["train"] = [_Span(source.locations.get(piece.split, piece.split), 0, None) for piece in pieces]
    if "train" in chosen and "eval" in chosen:
        order = _class_names(chosen["train"])
        chosen["eval"] = _in_the_order_of(order, chosen["eval"], name, (used["train"], used["eval"]))
    if "train" in chosen and entry is None:
        _check_number_of_classes(chosen["train"], name, used["train"])
    if source.layout == IMAGE_FOLDERS:
        pieces = [piece for part in chosen for piece in _pieces(used[part], available) or ()]
        folders = [Path(folder) for piece in pieces for folder in source.locations[piece.split]]
        list_beside(Path(source.place), folders, unread)
    unread.warn()
    _warn_of_sizes(name, entry, {part: len(rows) for part, rows in chosen.items() if requested[part] is None})

    images = LoadedImages(name, source)
    images.unread = unread
    if holds_out and eval_fraction > 0:
        whole = chosen["train"]
        kept, held_out = hold_out(_labels_of(whole), eval_fraction, seed)
        if not len(held_out):
            raise UserError(
                f"{name!r} has no split to evaluate on, and no class of {used['train']} has two images, so that none "
                "can be held out: add images, set eval_split, or set eval_fraction to 0 to train without evaluation"
            )
        chosen = {"train": whole.select(kept), "eval": whole.select(held_out)}
        images.held_out = len(held_out), len(whole)
        used["eval"] = used["train"]
    elif "train" in spans and "eval" in spans:
        images.trained_on = _warn_of_shared_images(spans, used, len(chosen["eval"]))
    _warn_of_classes_not_trained(chosen, used)
    for part in splits:
        if part in chosen:
            images.splits[part] = "+".join(map(str, _pieces(used[part], available) or ()))
            images[part] = _subset(chosen[part], limits[part], seed)
    return images


def hold_out(labels: np.ndarray, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Choose a share of the images of each class at random, the same for the same labels and seed.

    Args:
        labels: class of each image, `(images,)` int64.
        fraction: share to hold out, in (0, 1). Of a class with at least two images, at least one is held out and at
            least one is kept; the only image of a class is kept.

    Returns:
        Positions of the images that are kept and of those that are held out, both in rising order.
    """
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares = np.minimum(np.maximum(np.rint(sizes * fraction), 1), sizes - 1).astype(int)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(classes[order], kind="stable")]  # the images of each class together, in random order
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    is_held_out = rank < np.repeat(shares, sizes)
    return np.sort(order[~is_held_out]), np.sort(order[is_held_out])


def _subset(
    rows: datasets.Dataset | StreamedImages, limit: int | None, seed: int
) -> datasets.Dataset | StreamedImages:
    if limit is None or limit >= len(rows):
        return rows
    if isinstance(rows, StreamedImages):
        return rows.take(limit)
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:limit])


# --- where the images are ----------------------------------------------------------------------------------------


def is_image_dataset(candidate: object) -> bool:
    """Whether this is a dataset, or are the splits of one, of the datasets library, with a column of images."""
    splits = candidate.values() if isinstance(candidate, Mapping) else [candidate]
    features = [split.features for split in splits if isinstance(split, datasets.Dataset)]
    return bool(features) and all(
        any(isinstance(column, datasets.Image) for column in columns.values()) for columns in features
    )


def _given(rows: datasets.Dataset | Mapping[str, datasets.Dataset]) -> Source:
    # The caller has made these datasets in this process: their paths are the caller's own.
    splits = rows if isinstance(rows, Mapping) else {"train": rows}
    loaders = {str(name): partial(_as_is, split) for name, split in splits.items()}
    return Source("memory", "a dataset of the datasets library", loaders, {})


def _as_is(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.with_format(None)


def _find(
    name: str,
    data_dir: str | None,
    category_level: str | None,
    entry: RegisteredDataset | None,
    streaming: bool,
    requested: Mapping[str, str | None],
) -> tuple[Source, UnreadFiles]:
    """Find the dataset. The files that are not read are known once the splits have been loaded."""
    unread = UnreadFiles()
    if category_level is not None and not name.startswith("inat"):
        raise UserError(
            f"category_level is only for inat18 and inat19; leave it unset for {name!r}, which has one level of "
            "classes"
        )
    if data_dir is not None and entry is None:
        raise UserError(
            f"data_dir is the directory of a registered dataset ({', '.join(REGISTRY)}), and {name!r} is none of "
            "them; leave data_dir unset and give the directory as dataset_name"
        )
    if entry is not None and not entry.layout.markers:
        if data_dir is not None:
            raise UserError(f"{name!r} is {entry.layout.description} and needs no data_dir: leave data_dir unset")
        return Source(entry.page, entry.layout.description, _from_layout(entry, None, None), {}), unread
    directory = Path(data_dir or name).expanduser()
    if directory.is_dir():
        root = entry.layout.find(directory) if entry is not None else None
        if root is not None:
            layout = f"the official files: {entry.layout.description}"
            return Source(os.path.abspath(root), layout, _from_layout(entry, root, category_level), {}), unread
        if category_level is not None:
            raise UserError(
                f"category_level needs the official files, which are not in {str(directory)!r}; expected "
                f"{entry.layout.description}"
            )
        return _find_in_directory(directory, entry, streaming, requested, unread), unread
    if data_dir is not None:
        raise UserError(f"data_dir is {data_dir!r}, which is not a directory; check the path")
    if not streaming:
        rows = _from_hub(datasets.load_dataset, name, entry)
        for split in rows.values():
            _check_paths_of_rows(split, None)
        splits = {split: partial(rows.__getitem__, split) for split in rows}
        return Source(_page_on_hub(name, entry), "a dataset of the Hub", splits, {}), unread
    files = _from_hub(datasets.load_dataset_builder, name, entry).config.data_files or {}
    if not files or not all(str(path).endswith(".parquet") for paths in files.values() for path in paths):
        raise UserError(
            f"{name!r} is not stored as parquet files on the Hub, and only parquet is streamed; use streaming: false"
        )
    files = {str(split): [str(path) for path in paths] for split, paths in files.items()}
    layout = "parquet files on the Hub, streamed"
    return Source(_page_on_hub(name, entry), layout, _splits_of_shards("parquet", files), {}, files), unread


def _page_on_hub(name: str, entry: RegisteredDataset | None) -> str:
    return f"https://huggingface.co/datasets/{name if entry is None else entry.hub_id}"


def _stream(
    files: list[str],
    columns: tuple[str | None, str | None],
    entry: RegisteredDataset | None,
    eval_label: datasets.ClassLabel | None,
    eval_values: Sequence | None,
    name: str,
) -> StreamedImages:
    """Stream the images of `files`. If their labels have no names, the evaluation images define the classes."""
    features = datasets.Features.from_arrow_schema(read_schema(files[0]))
    no_rows = datasets.Dataset.from_dict({column: [] for column in features}, features)
    image_column, label_column = _choose_columns(no_rows, columns, entry, name)
    label, classes = features[label_column], None
    if not isinstance(label, datasets.ClassLabel):
        if eval_label is None:
            raise UserError(
                f"{name!r}: the labels of the streamed files have no names, so the classes must come from the "
                "evaluation images; load both splits, or use streaming: false"
            )
        label, classes = eval_label, {value: index for index, value in enumerate(eval_values or eval_label.names)}
    images = StreamedImages(
        files,
        datasets.Features({"image": datasets.Image(decode=False), "label": label}),
        image_column=image_column,
        label_column=label_column,
        classes=classes,
    )
    _check_class_names_of_shards(files, images.schemas)
    return images


def _from_hub(load: Callable[[str], T], name: str, entry: RegisteredDataset | None) -> T:
    if entry is None:
        hub_id, gated = name, False
        local = "Give the path of a directory of images or parquet files"
    else:
        hub_id, gated = entry.hub_id, entry.gated
        local = f"Give data_dir, a directory with {entry.layout.description}"
    if hub_id is None:
        raise UserError(
            f"dataset {name!r} can only be read from a directory, because no complete copy on the Hub is known. "
            f"{local}; the dataset is at {entry.page} (licence: {entry.licence})"
        )
    try:
        return load(hub_id)
    except Exception as error:  # datasets, huggingface_hub and fsspec each raise their own type for "not found"
        reason = (str(error).splitlines() or [""])[0]
        page = f"https://huggingface.co/datasets/{hub_id}"
        fix = "check the name and the network"
        if gated or "gated" in str(error).lower():
            fix = f"accept the terms at {page} and run `hf auth login`"
        raise UserError(
            f"dataset {name!r} could not be loaded: it is no local directory, and the Hub replied with "
            f"{type(error).__name__}: {reason}. {local}, or {fix}"
        ) from error


def _from_layout(entry: RegisteredDataset, root: Path | None, category_level: str | None) -> Splits:
    options = {} if category_level is None else {"category_level": category_level}
    return {
        split: partial(_from_lists, partial(entry.layout.read, root, split, **options), split, entry.class_names)
        for split in entry.layout.splits
    }


def _find_in_directory(
    directory: Path,
    entry: RegisteredDataset | None,
    streaming: bool,
    requested: Mapping[str, str | None],
    unread: UnreadFiles,
) -> Source:
    place = os.path.abspath(directory)
    # The cheap searches come first: a directory may contain a million images.
    files = find_shards(directory, ".parquet")
    if not files and (folders := find_image_folders(directory, requested)):
        pieces = _pieces(requested["train"] or "train", folders)
        train_folder = folders[pieces[0].split] if pieces else None
        splits = {
            split: partial(_from_lists, partial(read_image_folders, folder, train_folder, unread), split)
            for split, folder in folders.items()
        }
        return Source(place, IMAGE_FOLDERS, splits, {split: (str(folder),) for split, folder in folders.items()})
    if files := files or find_shards(directory, ".parquet", everywhere=True):
        splits = _splits_of_shards("parquet", files)
        layout = "parquet files, streamed" if streaming else "parquet files"
        return Source(place, layout, splits, _locations(files), files if streaming else None)
    if files := find_shards(directory, ".tar", everywhere=True):
        if streaming:
            raise UserError(
                f"{str(directory)!r} holds tar shards, and only parquet files are streamed. Use streaming: false, "
                "which copies the shards once into the cache of the datasets library"
            )
        return Source(place, "tar shards", _splits_of_shards("webdataset", files), _locations(files))
    official = f", or the official layout: {entry.layout.description}" if entry is not None else ""
    if (others := unread_files(directory)).paths:
        official += f". It holds other files ({others}): {others.advice}"
    raise UserError(
        f"no images found in {str(directory)!r}: expected parquet files such as train.parquet and test.parquet, tar "
        "shards such as train-0000.tar and val-0000.tar, or folders such as train/<class>/<image>.jpg and "
        f"val/<class>/<image>.jpg{official}"
    )


def _locations(files: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    return {split: tuple(paths) for split, paths in files.items()}


def _splits_of_shards(kind: str, files: Mapping[str, list[str]]) -> Splits:
    for paths in files.values():
        _warn_of_missing_shards(paths)
    if any("://" in path for paths in files.values() for path in paths):  # on the Hub
        folder = None
    else:
        folder = os.path.commonpath(
            [os.path.dirname(os.path.abspath(path)) for paths in files.values() for path in paths]
        )
    return {split: partial(_from_shards, kind, split, paths, folder) for split, paths in files.items()}


def _warn_of_missing_shards(paths: Sequence[str]) -> None:
    """Warn if files are missing among numbered ones, such as train-00003-of-00006.parquet."""
    counted: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(.*)", path):
            before, number, total, after = match.groups()
            counted.setdefault((before, total, after), set()).add(int(number))
    for (before, total, after), numbers in counted.items():
        if len(numbers) < int(total):
            first = next(number for number in itertools.count() if number not in numbers)
            logger.warning(
                "%d of %d shard files are missing, such as %r: training and evaluation go without their images",
                *(int(total) - len(numbers), int(total), f"{before}{first:0{len(total)}}-of-{total}{after}"),
            )


def _from_shards(kind: str, split: str, paths: list[str], folder: str | None) -> datasets.Dataset:
    # Load each split separately: loaded together, all splits would silently take the class names of the first.
    if kind == "parquet":
        with ThreadPoolExecutor(16) as threads:
            _check_class_names_of_shards(paths, list(threads.map(_schema_or_none, paths)))
    known_as = split if re.fullmatch(r"\w+(\.\w+)*", split) else "images"  # datasets accepts no other names of splits
    if kind == "webdataset":
        for path in paths:
            check_tar(path)
    try:
        # datasets takes a path for a pattern
        files = {known_as: [glob.escape(path) for path in paths]}
        rows = datasets.load_dataset(kind, data_files=files, split=known_as)
    except Exception as error:  # datasets, pyarrow and JSON each raise their own type for damaged files
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{paths[0]!r} or another shard of the split {split!r} cannot be read: {reason}") from error
    if "json" in rows.column_names and "cls" not in rows.column_names:  # a tar shard with the labels in json files
        keys = rows.select_columns(["json"]).flatten()
        rows = datasets.concatenate_datasets([rows.remove_columns("json"), keys], axis=1)
    _check_paths_of_rows(rows, folder)
    return rows


def _check_paths_of_rows(rows: datasets.Dataset, folder: str | None) -> None:
    """Refuse images without bytes whose path leads out of the folder; without one, out of the libraries' caches."""
    folders = [folder] if folder else [str(datasets.config.HF_CACHE_HOME), str(datasets.config.HF_DATASETS_CACHE)]
    for column, feature in rows.features.items():
        if not isinstance(feature, datasets.Image) or len(rows) == 0:
            continue
        for chunk in rows.with_format("arrow")[column].chunks:
            if pa.types.is_struct(chunk.type) and {"bytes", "path"} <= {field.name for field in chunk.type}:
                without = chunk.filter(pc.is_null(pc.struct_field(chunk, "bytes")))
                paths = pc.unique(pc.struct_field(without, "path")).to_pylist()
                check_paths([path for path in paths if path is not None], folders, f"a row of the column {column!r}")


def _check_class_names_of_shards(paths: Sequence[str], schemas: Sequence[pa.Schema | None]) -> None:
    """Refuse shards that number their classes differently: datasets would take the names of the first for all."""
    first: dict[str, tuple[str, list[str]]] = {}
    for path, schema in zip(paths, schemas, strict=True):
        try:
            features = datasets.Features.from_arrow_schema(schema) if schema is not None else {}
        except Exception:  # whatever is wrong with the features, the loading says it
            continue
        for column, feature in features.items():
            if not isinstance(feature, datasets.ClassLabel):
                continue
            other, names = first.setdefault(column, (path, feature.names))
            if feature.names != names:
                raise UserError(
                    f"{path!r} numbers the classes of the column {column!r} differently from {other!r}; expected the "
                    "same class names in the same order in all of these files: write the files anew"
                )


def _schema_or_none(path: str) -> pa.Schema | None:
    try:
        return read_schema(path)
    except UserError:
        return None


def _from_lists(
    read: Callable[[], LocalImages], split: str, class_names: Sequence[str] | None = None
) -> datasets.Dataset:
    found = read()
    label = datasets.ClassLabel(names=list(found.class_names or class_names))
    if found.labels and isinstance(found.labels[0], list):
        label = datasets.List(label)
    in_memory = bool(found.images) and isinstance(found.images[0], bytes)
    nothing = pa.nulls(len(found.images), pa.string() if in_memory else pa.binary())
    columns = (found.images, nothing) if in_memory else (nothing, list(map(storable_path, found.images)))
    image = pa.StructArray.from_arrays([pa.array(column) for column in columns], ["bytes", "path"])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    # Dataset.from_dict would encode every label by itself, which takes longer than listing the files
    table = pa.Table.from_arrays([image, pa.array(found.labels)], schema=features.arrow_schema)
    return datasets.Dataset(
        datasets.table.InMemoryTable(table),
        info=datasets.DatasetInfo(features=features),
        split=datasets.NamedSplit(split),
    )


# --- splits and columns ------------------------------------------------------------------------------------------


def _default_splits(available: Splits, entry: RegisteredDataset | None, eval_split: str | None) -> dict[str, str]:
    """Return the registry's splits if the source has all of them, else the usual splits."""
    if entry is not None:
        wanted = {"train": entry.train_split, "eval": entry.eval_split}
        wanted = {part: split for part, split in wanted.items() if split is not None}
        if all(_pieces(split, available) for split in wanted.values()):
            if eval_split is not None and "train" in wanted:  # do not train on the evaluation images
                held_out = _pieces(eval_split, available) or []
                kept = [part for part in wanted["train"].split("+") if _pieces(part, available)[0] not in held_out]
                wanted["train"] = "+".join(kept) or "train"
            return wanted
    lower = {name.lower(): name for name in reversed(available)}
    held_out = next((lower[split] for split in EVAL_SPLITS if split in lower), EVAL_SPLITS[0])
    return {"train": "train", "eval": next((split for split in EVAL_SPLITS if split in available), held_out)}


_SLICED = re.compile(r"(.*?)\s*((?:\[[^\[\]]*\](?:\(\w+\))?)?)", re.DOTALL)


def _pieces(split: str, available: Mapping[str, Any]) -> list[Piece] | None:
    """Return the source's own names of "a+b[:10%]", where validation may be called val; None if one is missing."""
    if split in available:  # a name may hold any character
        return [Piece(split, "")]
    pieces = []
    for part in split.split("+"):
        name, rows = (part.strip(), "")
        if name not in available:
            name, rows = _SLICED.fullmatch(name).groups()
        own = _named_like(name, available)
        if own is None:
            return None
        pieces.append(Piece(own, rows))
    return pieces


def _named_like(split: str, available: Mapping[str, Any]) -> str | None:
    validation = [name for name, meaning in SPLIT_MEANINGS.items() if meaning == "validation"]
    lower = {name.lower(): name for name in reversed(available)}
    aliases = [split, *(validation if split in validation else ())]
    known = [alias for alias in aliases if alias in available]
    # then in another case, and the other words for train and test
    words = [split.lower(), split_named(split), *(word for word, means in SPLIT_MEANINGS.items() if means == split)]
    known += [lower[word] for word in (*words, *aliases) if word in lower]
    return known[0] if known else None


def _existing_pieces(split: str, option: str, available: Splits, name: str) -> list[Piece]:
    pieces = _pieces(split, available)
    if pieces is None:
        raise UserError(f"{name!r} has no split {split!r}; it has {', '.join(available)}: choose one with {option}")
    return pieces


def _pieces_of_stream(split: str, available: Splits, name: str) -> list[Piece]:
    pieces = _existing_pieces(split, "train_split", available, name)
    if sliced := [str(piece) for piece in pieces if piece.rows]:
        raise UserError(
            f"train_split is {sliced[0]!r}, and a stream is read whole: name whole splits, limit them with "
            "max_train_samples, or use streaming: false"
        )
    return pieces


def _nothing_else_to_evaluate_on(used: Mapping[str, str], available: Splits) -> bool:
    """Whether the default evaluation split is missing, or is trained on as a whole."""
    pieces = _pieces(used["eval"], available)
    return pieces is None or set(pieces) <= set(_pieces(used["train"], available) or ())


def _check_hold_out(streams: bool, fraction: float, splits: Sequence[str], used: Mapping[str, str], name: str) -> None:
    if streams and fraction > 0:
        raise UserError(
            f"{name!r} has no split to evaluate on beside {used['train']!r}, and of a stream no images are held out: "
            "set eval_split to a split or to a slice, such as eval_split: train[-5%:], use streaming: false, or set "
            "eval_fraction to 0 to train on all of it"
        )
    if fraction == 0 and "eval" in splits and "train" not in splits:
        raise UserError(
            f"{name!r} has no split to evaluate on, and eval_fraction is 0: set eval_split, or leave out eval_fraction"
        )


class _Span(NamedTuple):
    """Rows of a split: `location` identifies the split, `end` is None for a stream, which is read to its end."""

    location: tuple[str, ...] | str
    start: int
    end: int | None


def _load_split(
    source: Source,
    split: str,
    option: str,
    *,
    name: str,
    columns: tuple[str | None, str | None],
    entry: RegisteredDataset | None,
) -> tuple[datasets.Dataset, list[_Span]]:
    parts, spans = [], []
    for piece in _existing_pieces(split, option, source.splits, name):
        rows = _with_two_columns(source.splits[piece.split](), columns, entry, name)
        start, end = _bounds(piece, len(rows), option)
        parts.append(rows.select(range(start, end)) if piece.rows else rows)
        location = source.locations.get(piece.split)
        spans.append(_Span(tuple(map(os.path.realpath, location)) if location else piece.split, start, end))
    for i, part in enumerate(parts[1:], 1):
        if all(isinstance(rows.features["label"], datasets.ClassLabel) for rows in (parts[0], part)):
            parts[i] = _in_the_order_of(_class_names(parts[0]), part, name, (str(parts[0].split), str(part.split)))
    if len({str(part.features["label"]) for part in parts}) > 1:
        raise UserError(
            f"{name!r}: the parts of {split!r} store their labels in different ways; expected the same type of the "
            f"label column in all of them: choose other splits with {option}"
        )
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if len(rows) == 0:
        raise UserError(f"{name!r}: the split {split!r} holds no images; check the path and {option}")
    return rows, spans


def _bounds(piece: Piece, num_images: int, option: str) -> tuple[int, int]:
    """Return the first row of a slice and the row after its last one."""
    try:
        (rows,) = datasets.ReadInstruction.from_spec(f"all{piece.rows}").to_absolute({"all": num_images})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{option} has the slice {str(piece)!r}, which cannot be read ({first_line(error)}); expected one such as "
            f"{piece.split}[:80%], {piece.split}[100:200] or {piece.split}[-20%:]"
        ) from error
    return rows.from_, max(rows.from_, rows.to)


def _warn_of_shared_images(spans: Mapping[str, Sequence[_Span]], used: Mapping[str, str], num_eval: int) -> int:
    """Count the evaluation images that are training images too, and warn if there are any."""
    shared = 0
    for held_out in spans["eval"]:
        rows = np.zeros((held_out.end or 0) - held_out.start, bool)
        for trained in spans["train"]:
            if trained.location == held_out.location:
                first = max(trained.start - held_out.start, 0)
                rows[first : None if trained.end is None else max(trained.end - held_out.start, 0)] = True
        shared += int(rows.sum())
    if shared:
        logger.warning(
            "%d of the %d evaluation images are training images too (train_split %s, eval_split %s): their accuracy "
            "says nothing about new images. Leave eval_split unset, or choose splits or slices without common images",
            *(shared, num_eval, used["train"], used["eval"]),
        )
    return shared


def _choose_column(
    rows: datasets.Dataset, column: str | None, usual: str | None, fits: Callable, kind: str, name: str
) -> str:
    listing = f"{name!r} has the columns {', '.join(rows.column_names)}"
    if column is not None:
        if column not in rows.column_names:
            raise UserError(f"no column {column!r}: {listing}; set {kind}_column to one of them")
        return column
    if usual in rows.column_names:
        return usual
    candidates = [name for name, feature in rows.features.items() if fits(name, feature)]
    if len(candidates) != 1:
        found = f"{len(candidates)} of them could be" if candidates else "none of them is recognised as"
        raise UserError(f"{listing}, {found} the {kind} column: set {kind}_column to one of them")
    return candidates[0]


def _choose_columns(
    rows: datasets.Dataset, columns: tuple[str | None, str | None], entry: RegisteredDataset | None, name: str
) -> tuple[str, str]:
    """Return the names of the image column and the label column."""
    image_column = _choose_column(
        rows,
        columns[0],
        entry and entry.image_column,
        lambda _, feature: isinstance(feature, datasets.Image),
        "image",
        name,
    )
    label_column = _choose_column(
        rows,
        columns[1],
        entry and entry.label_column,
        lambda column, feature: isinstance(feature, datasets.ClassLabel) or column in LABEL_COLUMNS,
        "label",
        name,
    )
    label = rows.features[label_column]
    several = isinstance(label, datasets.List) and isinstance(label.feature, datasets.ClassLabel)
    only_to_evaluate = entry is not None and entry.train_split is None  # ReaL has several labels an image
    if not isinstance(label, (datasets.ClassLabel, datasets.Value)) and not (several and only_to_evaluate):
        is_list = isinstance(label, (datasets.List, datasets.LargeList, list))
        holds = "lists" if is_list else f"values of the type {type(label).__name__}"
        raise UserError(
            f"one label an image is needed; column {label_column!r} of {name!r} holds {holds}: set label_column to "
            "another column, or keep one class number or name an image"
        )
    return image_column, label_column


def _with_two_columns(
    rows: datasets.Dataset, columns: tuple[str | None, str | None], entry: RegisteredDataset | None, name: str
) -> datasets.Dataset:
    columns = _choose_columns(rows, columns, entry, name)
    rows = rows.select_columns(list(columns))
    rows = rows.rename_columns({old: new for old, new in zip(columns, ("image", "label"), strict=True) if old != new})
    return rows.cast_column("image", datasets.Image(decode=False))


def _warn_of_sizes(name: str, entry: RegisteredDataset | None, counts: dict[str, int]) -> None:
    if entry is None:
        return
    expected = {"train": entry.train_size, "eval": entry.eval_size}
    released = dict(zip(("train", "eval"), entry.released_sizes or ()))
    odd = [
        f"{count:,} images in {part}, expected {expected[part]:,}"
        for part, count in counts.items()
        if count not in (expected[part], released.get(part))
    ]
    if odd:
        logger.warning(
            "%s: %s; this copy of the dataset is incomplete, or holds extra images", name, " and ".join(odd)
        )


# --- classes -----------------------------------------------------------------------------------------------------


def _class_names(rows: datasets.Dataset) -> list[str]:
    label = rows.features["label"]
    return (label.feature if isinstance(label, datasets.List) else label).names


def _labels_of(rows: datasets.Dataset) -> np.ndarray:
    """Return the labels as `(images,)` int64; `rows["label"]` of a subset would slice the table image by image."""
    labels = rows.data.column("label").to_numpy()
    return labels if rows._indices is None else labels[rows._indices.column(0).to_numpy()]


def count_by_class(rows: Any, num_classes: int) -> np.ndarray | None:
    """Count the images of each class, `(classes,)`; None for a stream and for lists of labels, which nobody counts."""
    if isinstance(rows, StreamedImages) or isinstance(rows.features["label"], datasets.List):
        return None
    labels = _labels_of(rows)
    return np.bincount(labels[(labels >= 0) & (labels < num_classes)], minlength=num_classes)


def _check_number_of_classes(rows: Any, name: str, split: str) -> None:
    names = _class_names(rows)
    counts = count_by_class(rows, len(names))
    found = names if counts is None else [label for label, count in zip(names, counts, strict=True) if count]
    if len(found) < 2:
        raise UserError(
            f"{name!r}: {len(found)} class found in {split}: {some_of([repr(label) for label in found])}; "
            "at least 2 are needed. In a directory expected train/<class>/<image>.jpg with a folder for each class"
        )


def _warn_of_classes_not_trained(chosen: Mapping[str, Any], used: Mapping[str, str]) -> None:
    if "train" not in chosen or "eval" not in chosen:
        return
    names = _class_names(chosen["train"])
    train, held_out = (count_by_class(chosen[part], len(names)) for part in ("train", "eval"))
    if train is None or held_out is None:
        return
    if missing := [label for label, a, b in zip(names, train, held_out, strict=True) if b and not a]:
        logger.warning(
            "%d classes of %s have no image in %s, such as %s: the model cannot learn them. A slice of images that "
            "are sorted by class leaves classes out; eval_fraction holds out images of every class",
            *(len(missing), used["eval"], used["train"], some_of([repr(label) for label in missing])),
        )


def _values_of_classes(
    rows: datasets.Dataset, entry: RegisteredDataset | None, name: str
) -> tuple[list, Sequence[str]]:
    """Return the values of a column of plain numbers or words, in the order of the classes, and the class names."""
    if not isinstance(rows.features["label"], datasets.Value):
        return _class_names(rows), _class_names(rows)
    values = rows.unique("label")
    _refuse_labels_without_meaning(values, rows, name)
    if all(isinstance(value, int) for value in values):
        if entry is not None and max(values) < entry.num_classes:
            return list(range(entry.num_classes)), entry.class_names or list(map(str, range(entry.num_classes)))
        values = sorted(values)
    else:
        values = sort_classes(values)
    return values, list(map(str, values))


def _refuse_labels_without_meaning(values: Sequence, rows: datasets.Dataset, name: str) -> None:
    """Refuse what is no class number and no word, naming the first image that has it."""

    def refuse(value: Any, why: str) -> None:
        column = rows.with_format("arrow")["label"][:].combine_chunks()
        number = pc.index(pc.is_null(column), True) if value is None else pc.index(column, value)
        raise UserError(f"{name!r}: image number {number} of the split {rows.split} has the label {value!r}, {why}")

    for value in values:
        if value is None or (isinstance(value, str) and not value.strip()):
            refuse(value, "which is none; remove the images without a label from the dataset, or label them")
        if isinstance(value, int) and value < 0:
            refuse(
                value,
                "and a negative number usually means that there is none; remove these images, or number the "
                "classes from 0",
            )
        if not isinstance(value, (int, str)):
            refuse(
                value,
                f"of the type {rows.features['label'].dtype}; expected whole numbers or words: store the "
                "names of the classes, or set label_column to another column",
            )


def _in_the_order_of(names: list[str], rows: datasets.Dataset, name: str, splits: tuple[str, str]) -> datasets.Dataset:
    """Number the classes of `rows` as in `names`, by their names."""
    own = _class_names(rows)
    if own == names:
        return rows
    missing, extra = ([x for x in a if x not in set(b)] for a, b in ((names, own), (own, names)))
    if missing or extra:
        differences = [
            f"{split} has {len(classes)} classes that {other} lacks, {some_of([repr(label) for label in classes])}"
            for split, other, classes in ((*splits, missing), (*reversed(splits), extra))
            if classes
        ]
        raise UserError(
            f"{name!r}: the classes of {splits[0]} ({len(names)}) and {splits[1]} ({len(own)}) differ; both splits "
            f"need the same classes: {' and '.join(differences)}"
        )
    column = rows.with_format("arrow")["label"][:].cast(pa.int64())
    number = {label: old for old, label in enumerate(own)}
    labels = pc.index_in(column, pa.array([number[label] for label in names], pa.int64())).cast(pa.int64())
    labels = pc.if_else(pc.is_null(labels), column, labels)  # no label of a class: refused where labels are checked
    return rows.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=names))


def _with_class_names(
    rows: datasets.Dataset, values: Sequence, class_names: Sequence[str], name: str
) -> datasets.Dataset:
    if not isinstance(rows.features["label"], datasets.Value):
        return rows
    column = rows.with_format("arrow")["label"][:]
    if pa.types.is_integer(column.type):
        column = column.cast(pa.int64())  # the stored type may be too small for all classes
    numbers = pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
    if len(values) and numbers != isinstance(values[0], int):
        if not all(value.isdecimal() for value in map(str, values)):
            raise UserError(
                f"{name!r}: the labels of {rows.split} are {column.type}, but the classes are called "
                f"{some_of(list(class_names))}; expected labels of one kind in both splits: store them as names"
            )
        column = column.cast(pa.string())
        values = list(map(str, values))
    labels = pc.index_in(column, pa.array(values, column.type))
    if labels.null_count:
        unknown = pc.unique(column.filter(pc.is_null(labels))).to_pylist()
        raise UserError(
            f"{name!r}: {rows.split} has {len(unknown)} classes that the training images don't have, such as "
            f"{', '.join(map(str, unknown[:3]))}; both splits need the same classes"
        )
    feature = datasets.ClassLabel(names=list(class_names))
    return rows.remove_columns("label").add_column("label", labels.cast(pa.int64()), feature=feature)
