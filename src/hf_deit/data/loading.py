"""From a dataset's name to its images: encoded bytes and labels, decoded by nobody yet.

`load_image_dataset` finds the images (registry name, local directory or Hub id) and gives them two columns, `image`
and `label`, on disk or as a stream; views.py makes batches of them. Only this file imports datasets.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .folders import LocalImages, find_image_folders, find_shards, read_image_folders, sort_classes
from .registry import REGISTRY, RegisteredDataset
from .streaming import StreamedImages, read_schema


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Names that mean "the held-out part", best first, where nobody said which split to evaluate on.
EVAL_SPLITS = ("validation", "val", "valid", "dev", "test")
# Labels without class names are recognised by their column's name.
LABEL_COLUMNS = ("label", "labels", "cls", "json.label", "json.cls")

# The splits a source has, each loaded when it is asked for.
Splits = Mapping[str, Callable[[], datasets.Dataset]]


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
    seed: int = 0,
) -> dict[str, datasets.Dataset | StreamedImages]:
    """Loads a labelled image set as `{"train", "eval"}`, each with the columns `image` and `label`.

    A directory may hold parquet files or webdataset-style tar shards, whose names or folders say their split, or one
    folder per split holding one folder of images per class. Image files are read where they are; parquet files and
    tars go through datasets' cache.

    Args:
        name: a name of [`REGISTRY`], a local directory, or a Hub id.
        data_dir: where the registered set lies, in its official layout or as any directory does.
        category_level: what an iNaturalist class is, "kingdom" to "name" (the species; default).
        splits: what to load; `("eval",)` for a set that is only for evaluation.
        streaming: read the training images of parquet files, on the Hub or on disk, while training, without
            downloading or converting the set; the evaluation images are downloaded once, as they are met in every
            epoch. Image folders are read where they are in any case.
        image_column, label_column: needed only where the set has several columns of that kind.
        train_split, eval_split: several with "+" between them. Default to the registry's, else to "train" and to the
            first of validation, val, valid, dev, test that exists.
        max_train_samples, max_eval_samples: keep a random subset of that many images, the same for the same seed; of
            a stream the first.
        seed: of the subsets.

    Returns:
        `image` is undecoded (`{"bytes", "path"}`); `label` is a `ClassLabel` with the class names, the same in both
        splits; for imagenet-real it is a list of them, which may be empty. Labels that are numbers keep their order.
        A stream is a [`StreamedImages`].

    Raises:
        ValueError: nothing found under that name, no images in the directory, a split or column that isn't there.
    """
    entry = REGISTRY.get(name)
    if not splits or not set(splits) <= {"train", "eval"}:
        raise UserError(f"splits is {splits!r}; expected 'train', 'eval' or both (train_split names the data's own)")
    if "train" in splits and entry is not None and entry.train_split is None:
        raise UserError(
            f"{name!r} is only for evaluation, it has no training images: train on {entry.classes_of!r}, or load it "
            "with splits=('eval',)"
        )
    limits = {"train": max_train_samples, "eval": max_eval_samples}
    for part, limit in limits.items():
        if limit is not None and limit < 1:
            raise UserError(f"max_{part}_samples is {limit}; use a positive number, or leave it out for all images")

    available, files = _find(name, data_dir, category_level, entry, streaming)
    asked = {"train": train_split, "eval": eval_split}
    used = {part: asked[part] or split for part, split in _default_splits(available, entry, eval_split).items()}
    columns = (image_column, label_column)
    load = partial(_load_split, available, name=name, columns=columns, entry=entry)
    chosen = {part: load(used[part], f"{part}_split") for part in splits if files is None or part == "eval"}

    values = None
    if any(isinstance(rows.features["label"], datasets.Value) for rows in chosen.values()):
        # Which classes there are is for the training images to say, also where only the others are loaded; of a
        # stream, which cannot be asked, the evaluation images say it.
        has_train = files is None and "train" in used and _named_like(used["train"], available) is not None
        reference = chosen.get("train") or (load(used["train"], "train_split") if has_train else chosen["eval"])
        values, class_names = _values_of_classes(reference, entry, name)
        chosen = {part: _with_class_names(rows, values, class_names, name) for part, rows in chosen.items()}
    if files is not None and "train" in splits:
        train_files = [
            file for split in _names(used["train"], "train_split", available, name) for file in files[split]
        ]
        label = chosen["eval"].features["label"] if "eval" in chosen else None
        chosen["train"] = _stream(train_files, columns, entry, label, values, name)
    if len({tuple(_class_names(rows)) for rows in chosen.values()}) > 1:
        raise UserError(
            f"{name!r}: the classes of {used['train']} ({len(_class_names(chosen['train']))}) and {used['eval']} "
            f"({len(_class_names(chosen['eval']))}) differ; both need the same"
        )
    _warn_of_sizes(name, entry, {part: len(rows) for part, rows in chosen.items() if asked[part] is None})

    for part, rows in chosen.items():
        if limits[part] is not None and limits[part] < len(rows):
            chosen[part] = (
                rows.take(limits[part])
                if isinstance(rows, StreamedImages)
                else rows.select(np.random.default_rng(seed).permutation(len(rows))[: limits[part]])
            )
    return {part: chosen[part] for part in splits}


# --- where the images are ----------------------------------------------------------------------------------------


def _find(
    name: str, data_dir: str | None, category_level: str | None, entry: RegisteredDataset | None, streaming: bool
) -> tuple[Splits, dict[str, list[str]] | None]:
    """The splits; with `streaming`, the files of each too, unless images are files of their own."""
    if category_level is not None and not name.startswith("inat"):
        raise UserError(f"category_level is for inat18 and inat19; {name!r} has one level of classes")
    if data_dir is not None and entry is None:
        raise UserError(
            f"data_dir says where a registered set lies ({', '.join(REGISTRY)}); of any other set the name is the "
            f"directory itself, here {name!r}"
        )
    if entry is not None and not entry.layout.markers:
        if data_dir is not None:
            raise UserError(f"{name!r} is {entry.layout.description} and needs no data_dir: leave it out")
        return _from_layout(entry, None, None), None
    directory = Path(data_dir or name).expanduser()
    if directory.is_dir():
        root = entry.layout.find(directory) if entry is not None else None
        if root is not None:
            return _from_layout(entry, root, category_level), None
        if category_level is not None:
            raise UserError(
                f"category_level needs the official files in {str(directory)!r}: {entry.layout.description}"
            )
        return _find_in_directory(directory, entry, streaming)
    if data_dir is not None:
        raise UserError(f"data_dir {data_dir!r} is no directory")
    if not streaming:
        rows = _from_hub(datasets.load_dataset, name, entry)
        return {split: partial(rows.__getitem__, split) for split in rows}, None
    files = _from_hub(datasets.load_dataset_builder, name, entry).config.data_files or {}
    if not files or not all(str(path).endswith(".parquet") for paths in files.values() for path in paths):
        raise UserError(
            f"{name!r} is not stored in parquet files on the Hub, and only these are streamed; use streaming: false"
        )
    files = {str(split): [str(path) for path in paths] for split, paths in files.items()}
    return _splits_of_shards("parquet", files), files


def _stream(
    files: list[str],
    columns: tuple[str | None, str | None],
    entry: RegisteredDataset | None,
    eval_label: datasets.ClassLabel | None,
    eval_values: Sequence | None,
    name: str,
) -> StreamedImages:
    """The images of the files. Where their labels have no names, classes are those of the evaluation images."""
    features = datasets.Features.from_arrow_schema(read_schema(files[0]))
    no_rows = datasets.Dataset.from_dict({column: [] for column in features}, features)
    image_column, label_column = _choose_columns(no_rows, columns, entry, name)
    label, classes = features[label_column], None
    if not isinstance(label, datasets.ClassLabel):
        if eval_label is None:
            raise UserError(
                f"{name!r}: the labels of the streamed files have no names, and without the evaluation images it is "
                "not known which classes there are; load both splits, or use streaming: false"
            )
        label, classes = eval_label, {value: index for index, value in enumerate(eval_values or eval_label.names)}
    return StreamedImages(
        files,
        datasets.Features({"image": datasets.Image(decode=False), "label": label}),
        image_column=image_column,
        label_column=label_column,
        classes=classes,
    )


def _from_hub(load: Callable[[str], T], name: str, entry: RegisteredDataset | None) -> T:
    if entry is None:
        hub_id, gated = name, False
        local = "Give the path of a directory of images or parquet files"
    else:
        hub_id, gated = entry.hub_id, entry.gated
        local = f"Give data_dir, a directory with {entry.layout.description}"
    if hub_id is None:
        raise UserError(
            f"dataset {name!r} is read from a directory only, no copy on the Hub is known to be whole. {local}; it is "
            f"at {entry.page} (licence: {entry.licence})"
        )
    try:
        return load(hub_id)
    except Exception as error:  # datasets, huggingface_hub and fsspec each raise their own for "not there"
        reason = (str(error).splitlines() or [""])[0]
        page = f"https://huggingface.co/datasets/{hub_id}"
        fix = "check the name and the network"
        if gated or "gated" in str(error).lower():
            fix = f"accept the terms at {page} and run `hf auth login`"
        raise UserError(
            f"dataset {name!r} could not be loaded: it is no local directory, and the Hub said "
            f"{type(error).__name__}: {reason}. {local}, or {fix}"
        ) from error


def _from_layout(entry: RegisteredDataset, root: Path | None, category_level: str | None) -> Splits:
    options = {} if category_level is None else {"category_level": category_level}
    return {
        split: partial(_from_lists, partial(entry.layout.read, root, split, **options), split, entry.class_names)
        for split in entry.layout.splits
    }


def _find_in_directory(
    directory: Path, entry: RegisteredDataset | None, streaming: bool
) -> tuple[Splits, dict[str, list[str]] | None]:
    # The cheap looks come first: below a directory may lie a million images.
    files = find_shards(directory, ".parquet")
    if not files and (folders := find_image_folders(directory)):
        train = folders.get("train")
        return {
            split: partial(_from_lists, partial(read_image_folders, folder, train), split)
            for split, folder in folders.items()
        }, None
    if files := files or find_shards(directory, ".parquet", everywhere=True):
        return _splits_of_shards("parquet", files), files if streaming else None
    if files := find_shards(directory, ".tar", everywhere=True):
        if streaming:
            raise UserError(
                f"{str(directory)!r} holds tar shards, which can only be read from their start: only parquet files "
                "are streamed. With streaming: false they are copied once into datasets' cache"
            )
        return _splits_of_shards("webdataset", files), None
    official = f", or the official layout: {entry.layout.description}" if entry is not None else ""
    raise UserError(
        f"no images found in {str(directory)!r}: expected parquet files such as train.parquet and test.parquet, tar "
        "shards such as train-0000.tar and val-0000.tar, or folders such as train/<class>/<image>.jpg and "
        f"val/<class>/<image>.jpg{official}"
    )


def _splits_of_shards(kind: str, files: Mapping[str, list[str]]) -> Splits:
    for paths in files.values():
        _warn_of_missing_shards(paths)
    return {split: partial(_from_shards, kind, split, paths) for split, paths in files.items()}


def _warn_of_missing_shards(paths: Sequence[str]) -> None:
    """Of files whose names count them, such as train-00003-of-00006.parquet."""
    counted: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(.*)", path):
            before, number, total, after = match.groups()
            counted.setdefault((before, total, after), set()).add(int(number))
    for (before, total, after), numbers in counted.items():
        if len(numbers) < int(total):
            first = next(number for number in itertools.count() if number not in numbers)
            logger.warning(
                "%d of %d files are missing, such as %r: their images are left out",
                *(int(total) - len(numbers), int(total), f"{before}{first:0{len(total)}}-of-{total}{after}"),
            )


def _from_shards(kind: str, split: str, paths: list[str]) -> datasets.Dataset:
    # Each split by itself: together, the class names of the first would be given to the others unseen.
    try:
        rows = datasets.load_dataset(kind, data_files={split: paths}, split=split)
    except Exception as error:  # datasets, pyarrow and JSON each have their own for damaged files and features
        reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{paths[0]!r} and its like cannot be read: {reason}") from error
    if "json" in rows.column_names and "cls" not in rows.column_names:  # a tar whose labels are in its json files
        keys = rows.select_columns(["json"]).flatten()
        rows = datasets.concatenate_datasets([rows.remove_columns("json"), keys], axis=1)
    return rows


def _from_lists(
    read: Callable[[], LocalImages], split: str, class_names: Sequence[str] | None = None
) -> datasets.Dataset:
    found = read()
    label = datasets.ClassLabel(names=list(found.class_names or class_names))
    if found.labels and isinstance(found.labels[0], list):
        label = datasets.List(label)
    in_memory = bool(found.images) and isinstance(found.images[0], bytes)
    nothing = pa.nulls(len(found.images), pa.string() if in_memory else pa.binary())
    columns = (found.images, nothing) if in_memory else (nothing, found.images)
    image = pa.StructArray.from_arrays([pa.array(column) for column in columns], ["bytes", "path"])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    return datasets.Dataset.from_dict({"image": image, "label": found.labels}, features, split=split)


# --- which of them -----------------------------------------------------------------------------------------------


def _default_splits(available: Splits, entry: RegisteredDataset | None, eval_split: str | None) -> dict[str, str]:
    """The registry's splits where the source has them all, else the usual ones."""
    if entry is not None:
        wanted = {"train": entry.train_split, "eval": entry.eval_split}
        wanted = {part: split for part, split in wanted.items() if split is not None}
        if all(_named_like(split, available) for split in wanted.values()):
            if eval_split is not None and "train" in wanted:  # what is held out is not trained on
                held_out = _named_like(eval_split, available) or []
                kept = [s for s in wanted["train"].split("+") if _named_like(s, available)[0] not in held_out]
                wanted["train"] = "+".join(kept) or "train"
            return wanted
    return {"train": "train", "eval": next((split for split in EVAL_SPLITS if split in available), EVAL_SPLITS[0])}


def _named_like(split: str, available: Splits) -> list[str] | None:
    """The source's own names of "a+b"; validation may be called val there. None if one is missing."""
    validation = EVAL_SPLITS[:-1]
    names = []
    for part in split.split("+"):
        aliases = [part, *(validation if part in validation else ())]
        names.append(next((alias for alias in aliases if alias in available), None))
    return None if None in names else names


def _names(split: str, option: str, available: Splits, name: str) -> list[str]:
    names = _named_like(split, available)
    if names is None:
        raise UserError(f"{name!r} has no split {split!r}; it has {', '.join(available)}: choose one with {option}")
    return names


def _load_split(
    available: Splits,
    split: str,
    option: str,
    *,
    name: str,
    columns: tuple[str | None, str | None],
    entry: RegisteredDataset | None,
) -> datasets.Dataset:
    parts = [
        _with_two_columns(available[part](), columns, entry, name) for part in _names(split, option, available, name)
    ]
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if len(rows) == 0:
        raise UserError(f"{name!r}: the split {split!r} holds no images; check the path")
    return rows


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
        raise UserError(f"{listing}, {found} the {kind} column: name it with {kind}_column")
    return candidates[0]


def _choose_columns(
    rows: datasets.Dataset, columns: tuple[str | None, str | None], entry: RegisteredDataset | None, name: str
) -> tuple[str, str]:
    """The columns of the images and of the labels."""
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
        logger.warning("%s: %s; the copy is not the whole set, or more than it", name, " and ".join(odd))


# --- classes -----------------------------------------------------------------------------------------------------


def _class_names(rows: datasets.Dataset) -> list[str]:
    label = rows.features["label"]
    return (label.feature if isinstance(label, datasets.List) else label).names


def _values_of_classes(
    rows: datasets.Dataset, entry: RegisteredDataset | None, name: str
) -> tuple[list, Sequence[str]]:
    """Of a column of plain numbers or words: the values in the order of the classes, and the classes' names."""
    if not isinstance(rows.features["label"], datasets.Value):
        return _class_names(rows), _class_names(rows)
    values = rows.unique("label")
    if None in values:
        raise UserError(f"{name!r} has images without a label in {rows.split}; leave them out")
    if all(isinstance(value, int) for value in values):
        if entry is not None and 0 <= min(values) and max(values) < entry.num_classes:
            return list(range(entry.num_classes)), entry.class_names or list(map(str, range(entry.num_classes)))
        values = sorted(values)
    elif all(isinstance(value, str) for value in values):
        values = sort_classes(values)
    else:
        raise UserError(
            f"{name!r}: the labels are of the type {rows.features['label'].dtype}; expected whole numbers or words"
        )
    return values, list(map(str, values))


def _with_class_names(
    rows: datasets.Dataset, values: Sequence, class_names: Sequence[str], name: str
) -> datasets.Dataset:
    if not isinstance(rows.features["label"], datasets.Value):
        return rows
    column = rows.with_format("arrow")["label"][:]
    if pa.types.is_integer(column.type):
        column = column.cast(pa.int64())  # all classes may not fit the type that holds those seen
    labels = pc.index_in(column, pa.array(values, column.type))
    if labels.null_count:
        unknown = pc.unique(column.filter(pc.is_null(labels))).to_pylist()
        raise UserError(
            f"{name!r}: {rows.split} has {len(unknown)} classes that the training images don't have, such as "
            f"{', '.join(map(str, unknown[:3]))}; both splits need the same classes"
        )
    feature = datasets.ClassLabel(names=list(class_names))
    return rows.remove_columns("label").add_column("label", labels.cast(pa.int64()), feature=feature)
