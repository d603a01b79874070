"""From the name of a dataset to its images: encoded bytes and labels.

`load_image_dataset` finds the images (registry name, local directory or Hub id) and returns them with two columns,
`image` and `label`, on disk or as a stream.

Not here: finding the source and its splits (sources.py), the classes of labels (labels.py), decoding the images
(decoding.py) and making batches (views.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from ..errors import UserError, first_line
from .folders import IMAGE_FOLDERS, UnreadFiles, list_beside
from .labels import (
    check_number_of_classes,
    class_names_of,
    hold_out,
    in_the_order_of,
    labels_in,
    values_of_classes,
    warn_of_classes_not_trained,
    with_class_names,
)
from .registry import REGISTRY, RegisteredDataset
from .sources import (
    Piece,
    Source,
    Splits,
    check_class_names_of_shards,
    default_splits,
    existing_pieces,
    find_source,
    pieces_of,
    source_of_rows,
)
from .streaming import StreamedImages, read_schema


logger = logging.getLogger(__name__)

# Names of label columns whose type is not ClassLabel.
LABEL_COLUMNS = ("label", "labels", "cls", "json.label", "json.cls")


class LoadedImages(dict[str, Any]):
    """The images of each part, "train" and "eval", and what was found on the way.

    Attributes:
        name: the dataset, as it was asked for.
        place: absolute directory, or the page of the dataset.
        layout: how the images are stored, in a few words.
        splits: the source's own names of the splits of each part, slices included, joined with "+".
        available: the source's own names of all its splits.
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
        self.available = tuple(source.splits)
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

    A directory may contain parquet files or webdataset-style tar shards, whose names or folders name their split, one
    folder per split with one folder of images per class, or what `save_to_disk` of the datasets library wrote. Image
    files are read in place, those that are not read are reported in one warning; parquet files and tar shards go
    through the cache of the datasets library.

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
        source, unread = find_source(name, data_dir, category_level, entry, streaming, requested)
    else:
        source, unread = source_of_rows(rows), UnreadFiles()
    source = source._replace(splits={split: cache(load) for split, load in source.splits.items()})
    available, files = source.splits, source.streamed
    used = {part: requested[part] or split for part, split in default_splits(available, entry, eval_split).items()}
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
    chosen: dict[str, Any] = {part: rows for part, (rows, _) in loaded.items()}
    spans = {part: spans for part, (_, spans) in loaded.items()}

    values = None
    if any(isinstance(rows.features["label"], datasets.Value) for rows in chosen.values()):
        # The training images define the classes, even if only the evaluation images are loaded. A stream cannot be
        # searched for its classes; then the evaluation images define them.
        has_train = files is None and "train" in used and pieces_of(used["train"], available) is not None
        reference = chosen.get("train") or (load(used["train"], "train_split")[0] if has_train else chosen["eval"])
        values, class_names = values_of_classes(reference, entry, name)
        chosen = {part: with_class_names(rows, values, class_names, name) for part, rows in chosen.items()}
    if files is not None and "train" in splits:
        pieces = _pieces_of_stream(used["train"], available, name)
        label = chosen["eval"].features["label"] if "eval" in chosen else None
        train_files = [file for piece in pieces for file in files[piece.split]]
        stream: Any = _stream(train_files, columns, entry, label, values, name)
        chosen["train"] = stream
        spans["train"] = [_Span(source.locations.get(piece.split, piece.split), 0, None) for piece in pieces]
    if "train" in chosen and "eval" in chosen:
        order = class_names_of(chosen["train"])
        chosen["eval"] = in_the_order_of(order, chosen["eval"], name, (used["train"], used["eval"]))
    if "train" in chosen and entry is None:
        check_number_of_classes(chosen["train"], name, used["train"])
    if source.layout == IMAGE_FOLDERS:
        pieces = [piece for part in chosen for piece in pieces_of(used[part], available) or ()]
        folders = [Path(folder) for piece in pieces for folder in source.locations[piece.split]]
        list_beside(Path(source.place), folders, unread)
    unread.warn()
    _warn_of_sizes(name, entry, {part: len(rows) for part, rows in chosen.items() if requested[part] is None})

    images = LoadedImages(name, source)
    images.unread = unread
    if holds_out and eval_fraction > 0:
        whole = chosen["train"]
        kept, held_out = hold_out(labels_in(whole), eval_fraction, seed)
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
    warn_of_classes_not_trained(chosen, used)
    for part in splits:
        if part in chosen:
            images.splits[part] = "+".join(map(str, pieces_of(used[part], available) or ()))
            images[part] = _subset(chosen[part], limits[part], seed)
    return images


def _subset(
    rows: datasets.Dataset | StreamedImages, limit: int | None, seed: int
) -> datasets.Dataset | StreamedImages:
    if limit is None or limit >= len(rows):
        return rows
    if isinstance(rows, StreamedImages):
        return rows.take(limit)
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:limit])


# --- where the images are ----------------------------------------------------------------------------------------


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
    label = features[label_column]
    classes: dict[int | str, int] | None = None
    if not isinstance(label, datasets.ClassLabel):
        if eval_label is None:
            raise UserError(
                f"{name!r}: the labels of the streamed files have no names, so the classes must come from the "
                "evaluation images; load both splits, or use streaming: false"
            )
        label, values = eval_label, eval_values or eval_label.names
        classes = {value: index for index, value in enumerate(values)}
    images = StreamedImages(
        files,
        datasets.Features({"image": datasets.Image(decode=False), "label": label}),
        image_column=image_column,
        label_column=label_column,
        classes=classes,
    )
    check_class_names_of_shards(files, images.schemas)
    return images


# --- splits and columns ------------------------------------------------------------------------------------------


def _pieces_of_stream(split: str, available: Splits, name: str) -> list[Piece]:
    pieces = existing_pieces(split, "train_split", available, name)
    if sliced := [str(piece) for piece in pieces if piece.rows]:
        raise UserError(
            f"train_split is {sliced[0]!r}, and a stream is read whole: name whole splits, limit them with "
            "max_train_samples, or use streaming: false"
        )
    return pieces


def _nothing_else_to_evaluate_on(used: Mapping[str, str], available: Splits) -> bool:
    """Whether the default evaluation split is missing, or is trained on as a whole."""
    pieces = pieces_of(used["eval"], available)
    return pieces is None or set(pieces) <= set(pieces_of(used["train"], available) or ())


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
    for piece in existing_pieces(split, option, source.splits, name):
        rows = _with_two_columns(source.splits[piece.split](), columns, entry, name)
        start, end = _bounds(piece, len(rows), option)
        parts.append(rows.select(range(start, end)) if piece.rows else rows)
        location = source.locations.get(piece.split)
        spans.append(_Span(tuple(map(os.path.realpath, location)) if location else piece.split, start, end))
    for i, part in enumerate(parts[1:], 1):
        if all(isinstance(rows.features["label"], datasets.ClassLabel) for rows in (parts[0], part)):
            parts[i] = in_the_order_of(class_names_of(parts[0]), part, name, (str(parts[0].split), str(part.split)))
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
    released: dict[str, int] = dict(zip(("train", "eval"), entry.released_sizes or ()))
    odd = [
        f"{count:,} images in {part}, expected {expected[part]:,}"
        for part, count in counts.items()
        if count not in (expected[part], released.get(part))
    ]
    if odd:
        logger.warning(
            "%s: %s; this copy of the dataset is incomplete, or holds extra images", name, " and ".join(odd)
        )
