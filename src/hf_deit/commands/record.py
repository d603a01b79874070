"""Publish recorded teacher outputs as a dataset on the Hub: `hf-deit record push DIR owner/name`.

DIR is what a run with `teacher_record: DIR` has written. It is verified whole before anything is uploaded: every
recorded view, every checksum. Whoever has the same images then trains with `teacher_replay: owner/name`, without the
teacher. An upload that breaks off goes on with what is missing: start the same command again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import HUB_ID
from ..errors import UserError, clear_hub_errors, printable


if TYPE_CHECKING:
    from ..teachers.record import Header

KINDS_OF_OUTPUTS = {
    "decisions": "the teacher's decision, 2 bytes a view",
    "logits": "all logits of the teacher, float32, and its decision",
}
# What a repository may hold beside a record.
OTHER_FILES = {".gitattributes", "README.md"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a name that is none of the Hub ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["push"])
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("name", metavar="owner/name")
    parser.add_argument("--private", action="store_true", help="for you alone; by default everyone can read it")
    parser.add_argument("--license", help="of the teacher's outputs; default: what the teacher's model card says")
    parser.add_argument("--partial", action="store_true", help="also if the record ends within an epoch")
    args = parser.parse_args(argv)
    if not HUB_ID.fullmatch(args.name):
        parser.error(f"{args.name!r} is no name on the Hub: expected <owner>/<name>")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Publish the record that the command line names."""
    args = parse_arguments(argv)
    # Slow imports come after parsing, so that a wrong command line is reported at once.
    from ..teachers.record import Header

    header = Header.read(args.directory)
    check_whole(args.directory, header, partial=args.partial)
    commit = push_record(args.directory, header, args.name, license=args.license, private=args.private)
    size = header.num_epochs * header.bytes_per_epoch / 1e6
    print(f"https://huggingface.co/datasets/{args.name}: {header.epochs(header.steps)}, {size:,.1f} MB")
    print(f"to train with it: teacher_replay: {args.name}, or for good: teacher_replay: {args.name}@{commit}")


def check_whole(directory: Path, header: Header, *, partial: bool = False) -> None:
    """Refuse a record that misses views or is damaged, before any of it is published; it is read whole.

    Args:
        directory: of the record.
        header: its record.json.
        partial: whether the record may end within an epoch.

    Raises:
        ValueError: no step is recorded; the recording run goes on or was cut off; a file or a block is damaged.
    """
    from ..teachers.record import answers_file, problem_in, size_problem

    name, resume = str(directory), "resume the recording run until its end"
    if not header.steps:
        raise UserError(f"{name!r} holds no step yet: {resume}")
    if answers_file(directory, header.num_epochs).exists():
        raise UserError(
            f"{name!r} is incomplete: record.json promises {header.epochs(header.steps)}, and there are outputs of "
            f"later ones, so the recording run goes on or was cut off: {resume}"
        )
    if header.steps % header.steps_per_epoch and not partial:
        raise UserError(
            f"{name!r} is incomplete: it ends within an epoch, after {header.epochs(header.steps)}: {resume}, or say "
            "--partial to publish what there is"
        )
    for epoch in range(header.num_epochs):
        file = answers_file(directory, epoch)
        if problem := size_problem(file, header) or problem_in(file, header, epoch):
            raise UserError(f"{str(file)!r} is not published: {problem}. Copy the record again, or record anew")


def push_record(
    directory: Path, header: Header, name: str, *, license: str | None = None, private: bool = False
) -> str:
    """Upload a record: first the card's rules are checked, then the outputs go up, and record.json last.

    So whoever finds a record.json on the Hub finds all that it promises.

    Args:
        directory: of the record, which [`check_whole`] has verified.
        header: its record.json.
        name: `owner/name` of the dataset; it is made if it is not there.
        license: of the outputs, one of the Hub's identifiers. None: that of the teacher's model card.
        private: whether a new dataset is for its owner alone.

    Returns:
        The commit of the published record, 40 hexadecimal digits.

    Raises:
        ValueError: the Hub refuses; the dataset exists and is another record, longer, or no record, or is public and
            `private` is set.
    """
    from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi, auth_check

    from ..teachers.record import HEADER, answers_file

    public = replace(header, teacher=header.teacher | {"name": _public_teacher(header)})
    card = DatasetCard(build_card(public, name, license or license_of_teacher(header.teacher["name"])))
    names = [answers_file(Path(), epoch).name for epoch in range(header.num_epochs)]
    files = {"README.md": str(card), HEADER: json.dumps(asdict(public), indent=1)}
    api, owner = HfApi(), "name it <your name>/<record>"
    again = "Nothing is lost: the same command goes on with what is missing"
    with clear_hub_errors(name, lambda: again, owner):
        _check_card(card)
        api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        auth_check(name, repo_type="dataset", write=True)
        _check_what_is_there(name, header, private)
        api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=directory,
            allow_patterns=names,
            commit_message=f"Teacher outputs of {header.num_epochs:,} epochs",
        )
        operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
        done = api.create_commit(name, operations, commit_message="Record and card", repo_type="dataset")
    return str(done.oid)


def _check_card(card: Any) -> None:
    """Ask the Hub whether it would take the card, before hours of uploading."""
    try:
        card.validate(repo_type="dataset")
    except ValueError as error:
        try:
            said = "; ".join(str(each["message"]) for each in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            said = str(error)
        raise UserError(
            f"the Hub refuses the card: {printable(said)}. Nothing was uploaded: mend --license"
        ) from error


def _check_what_is_there(name: str, header: Header, private: bool) -> None:
    """Refuse to write over anything but an earlier part of the same record."""
    from huggingface_hub import HfApi, hf_hub_download

    from ..teachers.record import HEADER, Header, differences

    info: Any = HfApi().dataset_info(name)
    if private and not info.private:
        raise UserError(f"{name!r} exists on the Hub and is public: make it private there, or choose another name")
    there = {entry.rfilename for entry in info.siblings or ()}
    if HEADER not in there:
        others = sorted(path for path in there - OTHER_FILES if not re.fullmatch(r"answers-\d+\.bin", path))
        if others:
            raise UserError(
                f"{name!r} on the Hub holds {printable(others[0])!r} and no {HEADER}: choose a new name, so that "
                "nothing of it is replaced"
            )
        return
    before = Header.read(Path(hf_hub_download(name, HEADER, revision=info.sha, repo_type="dataset")).parent)
    if changes := differences(before.answers_of, header.answers_of):
        raise UserError(f"{name!r} on the Hub is the record of another run: {changes}. Choose another name")
    if before.steps > header.steps:
        raise UserError(
            f"{name!r} on the Hub holds more of this record, {before.epochs(before.steps)}, than here, "
            f"{header.epochs(header.steps)}: choose another name"
        )


# --- the card --------------------------------------------------------------------------------------------------------


def build_card(header: Header, name: str, license: str | None) -> str:
    """Return README.md of the dataset: what was recorded, for which images, by which teacher, and how to replay it.

    Args:
        header: of the record.
        name: `owner/name` of the dataset.
        license: of the teacher's outputs; None: not known.
    """
    from huggingface_hub import DatasetCardData

    from ..training.model_card import as_text

    teacher, views = header.teacher, header.fingerprint
    front = DatasetCardData(
        license=license,
        pretty_name=f"Teacher outputs: {as_text(teacher['name'])}",
        task_categories=["image-classification"],
        tags=["hf_deit", "knowledge-distillation", "teacher-outputs"],
        viewer=False,  # rows of a fixed size, which the Hub's viewer cannot show
    )
    what = KINDS_OF_OUTPUTS.get(header.what, f"the {header.top_k} largest logits, the log of the sum of the rest")
    size = header.num_epochs * header.bytes_per_epoch / 1e6
    images = as_text(str((header.data or {}).get("dataset_name") or "images without a name"))
    stated = f"`{as_text(license)}`" if license else "unknown: state it with `--license`"
    processes = views["views of a step"] // views["views of a device's batch"]
    rows = "\n".join(f"| {as_text(key)} | {as_text(json.dumps(value))} |" for key, value in sorted(views.items()))
    versions = ", ".join(f"{as_text(key)} {as_text(str(value))}" for key, value in header.versions.items())
    return f"""---
{front.to_yaml()}
---

# Teacher outputs of {as_text(teacher["name"])}

What a teacher answered to every augmented view of {header.epochs(header.steps)}, recorded with
[hf_deit](https://github.com/hf-deit/hf_deit). Whoever has the same images trains a student with them as if the teacher
were there, with the same weights as the result, and needs neither the teacher nor its time.

- Recorded: {what} ({header.kind} distillation), {header.views_per_epoch:,} views an epoch, {size:,.1f} MB in
  {header.num_epochs:,} files
- Images: {views["images"]:,} of {images}, {views["classes"]:,} classes; fingerprint of images and labels `{
        as_text(str(views.get("labels and images")))
    }`. The images are not here.
- Seed of order and augmentation: {as_text(str(views.get("view_seed", "not known")))}
- Teacher: {as_text(teacher["name"])}, {teacher["num_parameters"]:,} parameters, weights `{
        teacher["sha256"]
    }` (start of their
  SHA-256), run on {as_text(teacher["device"])}
- Licence of the teacher: {stated}

## Replay it

In a recipe of `hf-deit distill`:

```yaml
{_recipe(header, name)}```

The number of processes x `gradient_accumulation_steps` must be {processes:,}. Which student it is, its loss weights,
temperature, learning rate, label smoothing and EMA are free; {
        _length(header)
    }. A run compares everything below with its
own, refuses what differs by name, verifies each batch by its checksum, fetches one epoch after the other, and stays
with the commit that it began with.

## What the outputs depend on

| | recorded with |
|---|---|
{rows}

Versions: {versions}. Others may change a pixel by 1 of 255, and are a warning.
"""


def _length(header: Header) -> str:
    epochs = header.steps / header.steps_per_epoch
    return f"`num_train_epochs` is at most {epochs:.4g}"


def _recipe(header: Header, name: str) -> str:
    """The keys of a recipe that ask for the recorded views, where they differ from the defaults; YAML."""
    import yaml

    from ..arguments import names_affecting
    from ..options.distillation_config import DistillationConfig

    views = header.fingerprint
    defaults = {key: item.default for key, item in DistillationConfig.__dataclass_fields__.items()}
    settings = [key for key in names_affecting(DistillationConfig, "views") if key in views]
    keys = {"teacher_replay": name, "distillation_type": header.kind, **(header.data or {})}
    keys |= {key: views[key] for key in settings if views[key] is not None and views[key] != defaults.get(key)}
    keys |= {"data_seed": views.get("view_seed"), "per_device_train_batch_size": views["views of a device's batch"]}
    return yaml.safe_dump({key: value for key, value in keys.items() if value is not None}, sort_keys=False)


def _public_teacher(header: Header) -> str:
    from ..training.model_card import public_name

    return public_name(header.teacher["name"]) or ""


def license_of_teacher(spec: str) -> str | None:
    """Return the licence that the model card of a teacher states, on this machine or on the Hub; None: not known.

    Args:
        spec: of the teacher; of several, joined by " + ", the licence that all of them have.
    """
    from huggingface_hub import HfApi, ModelCard

    found = set()
    for one in spec.split(" + "):
        try:
            if (Path(one) / "README.md").is_file():
                data: Any = ModelCard.load(Path(one) / "README.md").data
            else:
                timm = one.startswith("timm:") and "?" not in one
                data = HfApi().model_info(f"timm/{one[5:]}" if timm else one).card_data
            found.add(getattr(data, "license", None))
        except Exception:  # no card, no such model, no network: the licence is not known, and the card says so
            found.add(None)
    license = found.pop() if len(found) == 1 else None
    return license if isinstance(license, str) and re.fullmatch(r"[\w.-]{1,60}", license) else None
