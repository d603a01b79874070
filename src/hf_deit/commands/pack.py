"""Pack a dataset into parquet files made for streaming, with a card and dataset.json beside them, and push it."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import DataArguments, option, words
from ..errors import UserError, clear_hub_errors, some_of
from ..files import write_whole
from ..options.recipe import parse_recipe


if TYPE_CHECKING:
    from ..data.loading import LoadedImages
    from ..data.packing import PackedSplit, PackSettings


NAME_IT_YOURS = "set push_to_hub to <your name>/<dataset>"


@dataclass
class PackArguments:
    """What is stored of the images, where, and how."""

    pack_dir: str = option(
        "",
        "Directory to write: new, or that of the same pack, interrupted.",
        heading="output",
        affects="machine",
    )
    max_side: int | None = option(
        None,
        "Reduce an image whose shorter side has more pixels to this shorter side, and store it as a JPEG. Default: "
        "every image keeps its bytes.",
        affects="views",
        heading="data",
    )
    quality: int | None = option(
        None, "Quality of these JPEGs, 1 to 100. Default: 90.", affects="views", heading="data"
    )
    leave_out_damaged: bool = option(
        False,
        "Leave out images that cannot be decoded. Default: they are listed, and the pack is refused.",
        affects="views",
        heading="data",
    )
    other_splits: list[str] = option(
        list,
        "Splits to pack beside those to train and to evaluate on, under their names; separate several with commas.",
        affects="machine",
        heading="data",
    )
    num_workers: int | None = option(
        None,
        "Threads that read, decode and encode. Default: one a core; more pay on a network disk.",
        affects="machine",
        heading="output",
    )
    push_to_hub: str | None = option(
        None,
        "Repository on the Hub to upload the pack to, <your name>/<dataset>.",
        affects="machine",
        heading="output",
    )
    hub_private_repo: bool = option(
        False, "Make the repository private, if it is made.", affects="machine", heading="output"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Pack the dataset that the command line names, and say what was packed and how it is loaded.

    Raises:
        ValueError: the dataset cannot be loaded, see [`load_image_dataset`], or not be packed, see [`pack_dataset`];
            the Hub refuses the name, which is tried first, or the upload.
    """
    data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from ..data.packing import PackSettings, pack_dataset, reduce_image
    from ..data.summary import summarize
    from ..data.views import difference_of_views

    if args.quality is not None and args.max_side is None:
        raise UserError("quality is that of reduced images, and max_side is not set: set it, such as --max_side 256")
    settings = PackSettings(args.max_side, leave_out_damaged=args.leave_out_damaged)
    if args.quality is not None:
        settings = replace(settings, quality=args.quality)
    logging.getLogger("hf_deit.data.packing").setLevel(logging.INFO)
    logging.basicConfig(format="%(message)s")
    if args.push_to_hub:
        _create_repository(args)
    images, splits = _load(data_args, words(args.other_splits))
    summary = summarize(images)
    place = images.place if Path(images.place).is_dir() else ""

    def write_beside(packed: dict[str, PackedSplit]) -> None:
        facts = _facts(packed, settings, summary.facts(), list(summary.class_names))
        if settings.max_side is not None:
            rows = next(iter(splits.values()))
            difference = difference_of_views(rows, lambda data: reduce_image(data, settings), data_args.image_size)
            facts["difference_of_views"] = {name: round(value, 3) for name, value in difference.items()}
            facts["views_compared_at"] = data_args.image_size
        folder = Path(args.pack_dir)
        write_whole(folder / "README.md", _card(args, facts, packed, summary.sentences(), data_args.dataset_name))
        write_whole(folder / "dataset.json", json.dumps(facts, indent=1))
        print(*_report(facts), sep="\n", flush=True)

    pack_dataset(splits, args.pack_dir, settings, place=place, num_workers=args.num_workers, finish=write_beside)
    print(f"load it with --dataset_name {shlex.quote(args.pack_dir)}, and stream it with --streaming true")
    if args.push_to_hub:
        _push(args)


def parse_arguments(argv: Sequence[str]) -> tuple[DataArguments, PackArguments]:
    """Parse the command line: the dataset and the directory to write, then options."""
    given = list(argv)
    if not {"-h", "--help", "--help-all"} & set(given):
        if len(given) < 2 or given[0].startswith("-") or given[1].startswith("-"):
            raise UserError("pack needs a dataset and a directory to write: hf-deit pack SOURCE DIR [--key value ...]")
        if given[0].endswith((".yaml", ".yml")):
            raise UserError(f"pack takes a dataset, and {given[0]!r} is a recipe: give its dataset_name")
        given[:2] = ["--dataset_name", given[0], "--pack_dir", given[1]]
    data_args, args = parse_recipe((DataArguments, PackArguments), given, usage="SOURCE DIR")
    return data_args, args


def _load(data_args: DataArguments, other_splits: Sequence[str]) -> tuple[LoadedImages, dict[str, Any]]:
    """Load the dataset as a run would, and return its images also by the names of the packed splits."""
    from ..data.folders import SPLIT_MEANINGS
    from ..data.loading import load_image_dataset
    from ..data.registry import REGISTRY

    entry = REGISTRY.get(data_args.dataset_name)
    parts = ("eval",) if entry is not None and entry.train_split is None else ("train", "eval")
    images = load_image_dataset(**data_args.loading(), splits=parts)
    splits: dict[str, Any] = {}
    if "train" in images:
        splits["train"] = images["train"]
    if "eval" in images:
        own = images.splits["eval"].lower()
        is_its_name = images.held_out is None and SPLIT_MEANINGS.get(own, "train") != "train"
        splits[own if is_its_name else "validation"] = images["eval"]
    names = next(iter(splits.values())).features["label"].names
    for split in other_splits:
        name = split.lower()
        if name in splits or not re.fullmatch(r"\w+", name):
            raise UserError(
                f"other_splits has {split!r}; expected further splits of the source beside {', '.join(splits)}, each "
                f"by its name (the source has {', '.join(images.available)})"
            )
        loading = data_args.loading() | {"eval_split": split, "max_eval_samples": None}
        rows = load_image_dataset(**loading, splits=("eval",))["eval"]
        if rows.features["label"].names != names:  # numbered otherwise: both together are matched by name
            rows = load_image_dataset(**loading, splits=parts)["eval"]
        splits[name] = rows
    used = {re.sub(r"\[.*", "", piece) for split in images.splits.values() for piece in split.split("+")}
    if left := [split for split in images.available if split not in used and split not in other_splits]:
        print(f"not packed: {', '.join(left)}; pack more splits with --other_splits {','.join(left)}", flush=True)
    return images, splits


def _facts(
    packed: Mapping[str, PackedSplit], settings: PackSettings, source: dict, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return the content of dataset.json: what is packed, and what was found in the source."""
    return {
        "class_names": class_names,
        "splits": {
            split: {
                "images": each.num_images,
                "bytes": each.num_bytes,
                "files": len(each.files),
                "reduced_images": each.num_reduced,
                "damaged_images_left_out": each.num_left_out,
                "images_by_class": dict(zip(class_names, each.counts, strict=True)),
            }
            for split, each in packed.items()
        },
        "max_side": settings.max_side,
        "quality": settings.quality if settings.max_side is not None else None,
        "source": source,
    }


def _report(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    for split, each in facts["splits"].items():
        line = f"{split}: {each['images']:,} images in {each['files']} files, {each['bytes'] / 1e6:,.1f} MB"
        if facts["max_side"] is not None:
            line += f"; {each['reduced_images']:,} reduced to a shorter side of {facts['max_side']} pixels"
        if each["damaged_images_left_out"]:
            line += f"; {each['damaged_images_left_out']:,} damaged ones left out, listed in _bad_images.txt"
        lines.append(line)
    if difference := facts.get("difference_of_views"):
        lines.append(
            f"views of {facts['views_compared_at']} pixels differ from the source's by {difference['evaluation']:.2f} "
            f"levels of 255 on average (evaluation; at most {difference['evaluation, largest']:.2f} for an image) and "
            f"by {difference['training']:.2f} (training crops; at most {difference['training, largest']:.2f})"
        )
    return lines


# --- the Hub -----------------------------------------------------------------------------------------------------


def _card(
    args: PackArguments,
    facts: Mapping[str, Any],
    packed: Mapping[str, PackedSplit],
    sentences: Sequence[str],
    dataset_name: str,
) -> str:
    """Return the dataset's card: the front matter that tells the Hub which files are which split, and facts."""
    from ..data.registry import REGISTRY

    entry = REGISTRY.get(dataset_name)
    terms = f"Source: {entry.page}; licence: {entry.licence}." if entry else "The licence is that of the source."
    files = "".join(f"  - split: {split}\n    path: {split}-*\n" for split in packed)
    name = args.push_to_hub or Path(args.pack_dir).name
    stored = "Every image file is stored byte for byte."
    if facts["max_side"] is not None:
        stored = (
            f"Images with a shorter side of more than {facts['max_side']} pixels are reduced to it (bicubic, "
            f"antialiased) and stored as JPEGs of quality {facts['quality']}; all others byte for byte."
        )
    lines = "\n".join(f"- {line}" for line in [*_report(facts), *sentences])
    names = some_of([repr(name) for name in facts["class_names"]], 20)
    return f"""---
task_categories:
- image-classification
tags:
- hf_deit
configs:
- config_name: default
  data_files:
{files}---

# {name.rpartition("/")[2]}

Labelled images, packed for streaming by `hf-deit pack`. {stored} The column `sha256` is the digest of the image's
source file. {terms}

{lines}

Classes ({len(facts["class_names"])}): {names}

```python
from hf_deit import load_image_dataset

images = load_image_dataset({name!r}, streaming=True)
```
"""


def _create_repository(args: PackArguments) -> None:
    """Create the repository and check write access to it, before hours are spent on packing."""
    from huggingface_hub import auth_check, create_repo

    name = args.push_to_hub or ""
    with clear_hub_errors(name, lambda: "Nothing has been packed: fix this first", NAME_IT_YOURS):
        create_repo(name, repo_type="dataset", private=args.hub_private_repo, exist_ok=True)
        auth_check(name, repo_type="dataset", write=True)


def _push(args: PackArguments) -> None:
    from huggingface_hub import upload_folder

    name = args.push_to_hub or ""
    command = ["hf", "upload", name, args.pack_dir, ".", "--repo-type", "dataset", "--exclude", "_*"]
    advice = f"The pack is whole in {args.pack_dir}; upload it again: {shlex.join(command)}"
    with clear_hub_errors(name, lambda: advice, NAME_IT_YOURS):
        upload_folder(
            repo_id=name,
            folder_path=args.pack_dir,
            repo_type="dataset",
            ignore_patterns=["_*"],
            commit_message="Packed by hf-deit pack",
        )
    print(f"pushed to https://huggingface.co/datasets/{name}")
