"""From the name of a dataset to where its images are, and which splits there are: nothing is loaded yet.

A name is a registry's, a local directory's or a Hub id. A directory holds the official files of a registered dataset,
parquet files, tar shards, folders of images, or what `save_to_disk` of the datasets library wrote.

Not here: loading the parts of a run (loading.py) and the search of folders (folders.py).
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from ..arguments import DataArguments, check_places
from ..errors import UserError, first_line
from ..files import check_tar, read_json
from .decoding import check_paths, storable_path
from .folders import (
    IMAGE_FOLDERS,
    SPLIT_MEANINGS,
    LocalImages,
    UnreadFiles,
    find_image_folders,
    find_shards,
    read_image_folders,
    split_named,
    unread_files,
)
from .registry import REGISTRY, RegisteredDataset
from .streaming import read_schema


logger = logging.getLogger(__name__)

T = TypeVar("T")

# A file that save_to_disk of the datasets library leaves in a directory: of the splits of a dataset, or of one.
SAVED = ("dataset_dict.json", "state.json")

# Splits to evaluate on if eval_split is unset, best first.
EVAL_SPLITS = tuple(name for name, meaning in SPLIT_MEANINGS.items() if meaning != "train")

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


def is_image_dataset(candidate: object) -> bool:
    """Whether this is a dataset, or are the splits of one, of the datasets library, with a column of images."""
    splits = candidate.values() if isinstance(candidate, Mapping) else [candidate]
    features = [split.features for split in splits if isinstance(split, datasets.Dataset)]
    return bool(features) and all(
        any(isinstance(column, datasets.Image) for column in columns.values()) for columns in features
    )


def source_of_rows(rows: datasets.Dataset | Mapping[str, datasets.Dataset]) -> Source:
    """The source that a dataset of the datasets library is, held in memory or mapped from disk."""
    # The caller has made these datasets in this process: their paths are the caller's own.
    splits = rows if isinstance(rows, Mapping) else {"train": rows}
    loaders = {str(name): partial(_as_is, split) for name, split in splits.items()}
    return Source("memory", "a dataset of the datasets library", loaders, {})


def _as_is(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.with_format(None)


def find_source(
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
    check_places(DataArguments(dataset_name=name, data_dir=data_dir))
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
    if any((directory / file).is_file() for file in SAVED):
        if streaming:
            raise UserError(
                f"{str(directory)!r} was written by save_to_disk of the datasets library and is read from disk as it "
                "is; only parquet files are streamed: use streaming: false"
            )
        rows = _saved(directory)
        for split in rows.values():
            _check_paths_of_rows(split, place)
        splits = {split: partial(_as_is, rows[split]) for split in rows}
        return Source(place, "a dataset saved by the datasets library", splits, {})
    # The cheap searches come first: a directory may contain a million images.
    files = find_shards(directory, ".parquet")
    if not files and (folders := find_image_folders(directory, requested)):
        pieces = pieces_of(requested["train"] or "train", folders)
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


def _saved(directory: Path) -> dict[str, datasets.Dataset]:
    """Open what save_to_disk wrote: a dataset, which is to be trained on, or the splits of one."""
    # The names of the Arrow files stand in JSON files, and could lead anywhere.
    for state in [directory / "state.json", *sorted(directory.glob("*/state.json"))]:
        content = read_json(state) if state.is_file() else {}
        files = content.get("_data_files") or [] if isinstance(content, Mapping) else [None]
        names = [file.get("filename") if isinstance(file, Mapping) else None for file in files]
        if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
            raise UserError(f"{str(state)!r} is damaged: expected the names of Arrow files beside it")
    try:
        rows = datasets.load_from_disk(str(directory))
    except Exception as error:  # datasets, pyarrow and JSON each raise their own type for damaged files
        raise UserError(f"the saved dataset {str(directory)!r} cannot be read: {first_line(error)}") from error
    return {str(split): rows[split] for split in rows} if isinstance(rows, datasets.DatasetDict) else {"train": rows}


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
            check_class_names_of_shards(paths, list(threads.map(_schema_or_none, paths)))
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


def check_class_names_of_shards(paths: Sequence[str], schemas: Sequence[pa.Schema | None]) -> None:
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


# --- names of splits -----------------------------------------------------------------------------------------------


def default_splits(available: Splits, entry: RegisteredDataset | None, eval_split: str | None) -> dict[str, str]:
    """Return the registry's splits if the source has all of them, else the usual splits."""
    if entry is not None:
        wanted = {"train": entry.train_split, "eval": entry.eval_split}
        wanted = {part: split for part, split in wanted.items() if split is not None}
        if all(pieces_of(split, available) for split in wanted.values()):
            if eval_split is not None and "train" in wanted:  # do not train on the evaluation images
                held_out = pieces_of(eval_split, available) or []
                kept = [part for part in wanted["train"].split("+") if pieces_of(part, available)[0] not in held_out]
                wanted["train"] = "+".join(kept) or "train"
            return wanted
    lower = {name.lower(): name for name in reversed(available)}
    held_out = next((lower[split] for split in EVAL_SPLITS if split in lower), EVAL_SPLITS[0])
    return {"train": "train", "eval": next((split for split in EVAL_SPLITS if split in available), held_out)}


_SLICED = re.compile(r"(.*?)\s*((?:\[[^\[\]]*\](?:\(\w+\))?)?)", re.DOTALL)


def pieces_of(split: str, available: Mapping[str, Any]) -> list[Piece] | None:
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


def existing_pieces(split: str, option: str, available: Splits, name: str) -> list[Piece]:
    """The pieces of a split that an option names.

    Raises:
        UserError: the source does not have it.
    """
    pieces = pieces_of(split, available)
    if pieces is None:
        raise UserError(f"{name!r} has no split {split!r}; it has {', '.join(available)}: choose one with {option}")
    return pieces
