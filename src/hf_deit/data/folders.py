"""List the images and classes of a directory of class folders, and the shard files of a dataset.

A file is an image by its suffix; a file with another suffix, or with none, by its first bytes. What is not read is
counted and reported, and no class disappears without a word.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, some_of
from .decoding import FORMATS


logger = logging.getLogger(__name__)

HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
) | (HEIF_SUFFIXES if "HEIF" in FORMATS else frozenset())
# Camera raw files: most begin like a TIFF, and what Pillow reads of them is a thumbnail.
RAW_SUFFIXES = frozenset(
    (".3fr", ".arw", ".cr2", ".cr3", ".dng", ".iiq", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".sr2", ".srw")
)
# First bytes of the formats that decoding.py reads; the two with a short signature are recognised by more than that.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II\*\0|MM\0\*|II\+\0|MM\0\+|RIFF....WEBP|....ftypavi[fs]"
    rb"|\xff\x4f\xff\x51|\0\0\0\x0cjP  |BM.{4}\0\0\0\0.{2}\0\0[\x0c\x28\x34\x38\x40\x6c\x7c]\0|P[1-6]\s+[\d#]",
    re.DOTALL,
)

# What a folder or file name means as a split. Of several that could be evaluated on, the first one here is.
SPLIT_MEANINGS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    "test": "test",
    **dict.fromkeys(("evaluation", "eval"), "validation"),
    "testing": "test",
}
SPLIT_NAMES = tuple(SPLIT_MEANINGS)
# Names that are splits even if nothing beside them means training, and even for the directory itself.
_SURE_SPLITS = ("train", "validation", "val", "valid", "dev", "test")
_SPLIT_FOLDER = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:[-_ ]?(?:set|data|images|imgs))?")
IMAGE_FOLDERS = "image folders"  # the name of the layout
_MAX_DEPTH = 16  # of wrapping folders: a link may lead back to its own folder


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


class UnreadFiles:
    """Collects the files of a directory of class folders that are not read, for one warning.

    Attributes:
        counts: number of files for each reason: a suffix, "without suffix", "hidden", ...
        paths: these files.
        beside: other files outside the class folders, such as README.md. Nobody takes them for images of a class.
        folders: folders outside the splits that are not searched: a third split, hidden folders, ...
        empty: class folders without any file.
    """

    def __init__(self, files: Iterable[tuple[str, str]] = ()):
        self.counts: Counter[str] = Counter()
        self.paths: list[str] = []
        self.beside: list[str] = []
        self.folders: list[str] = []
        self.empty: list[str] = []
        self.add(files)

    def add(self, files: Iterable[tuple[str, str]]) -> None:
        """Add `(path, reason)` of several files."""
        for path, reason in sorted(files):
            self.paths.append(path)
            self.counts[reason] += 1

    def __str__(self) -> str:
        return some_of([f"{count} {reason}" for reason, count in self.counts.most_common()], 8)

    @property
    def advice(self) -> str:
        """What to do with the files."""
        if HEIF_SUFFIXES & self.counts.keys():
            return "install pillow-heif to read .heic and .heif, or convert the files to JPEG or PNG"
        return "convert what should be read to JPEG or PNG"

    def warn(self) -> None:
        """Log one warning about the files, and one about empty class folders."""
        if self.paths:
            count, kinds, names = len(self.paths), str(self), some_of([repr(path) for path in self.paths])
            logger.warning("%d files are not read as images (%s): %s; %s", count, kinds, names, self.advice)
        if self.empty:
            count, names = len(self.empty), some_of([repr(path) for path in self.empty])
            logger.warning(
                "%d class folders hold no files: %s; no class is made of them. Add images, or remove the folders",
                *(count, names),
            )


def split_named(name: str) -> str | None:
    """Return the split that a folder means: "train" for `Train` or `train_set`, "eval" for `EVAL`; None for others."""
    match = _SPLIT_FOLDER.fullmatch(name.lower())
    return match[1] if match else None


def find_image_folders(directory: Path, chosen: Mapping[str, str | None] | None = None) -> dict[str, Path]:
    """Return `{split: folder}` of `<split>/<class>/<image>`; only "train" if `directory` holds the classes itself.

    Splits are named like their folders, as [`split_named`] spells them. A split without a folder per class is listed
    too, so that reading the split raises an error that explains the expected layout. A folder that holds nothing but
    one folder of folders is passed through, above and below the splits, and one line of the log says so.

    Args:
        chosen: the user's choice of "train" and "eval", if any. Without a choice, two folders that mean the same are
            refused.

    Raises:
        ValueError: two folders mean the same split.
    """
    root = directory
    splits = _split_folders(root, chosen or {})
    for _ in range(_MAX_DEPTH):
        inner = None if splits else _wrapped(root)
        if inner is None:
            break
        root = inner
        splits = _split_folders(root, chosen or {})
    if not splits:
        if not any(_has_image(entry.path) for entry in _folders(root)):
            return {}
        splits = {"train": root}
    found = {name: _unwrap(folder) for name, folder in splits.items()}
    if passed := [repr(str(folder)) for name, folder in found.items() if root != directory or folder != splits[name]]:
        logger.warning("the class folders of %r are in %s", str(directory), some_of(passed))
    return found


def _split_folders(root: Path, chosen: Mapping[str, str | None]) -> dict[str, Path]:
    named = [(split, entry) for entry in _folders(root) if (split := split_named(entry.name)) is not None]
    named = [(split, entry) for split, entry in named if _has_image(entry.path) or _holds_files_of_classes(entry.path)]
    # "testing" beside "production" is a class; "Testing" beside "Training" is not
    if not any(entry.name in _SURE_SPLITS or SPLIT_MEANINGS[split] == "train" for split, entry in named):
        named_entries = {entry.name for _, entry in named}
        if any(entry.name not in named_entries and _has_image(entry.path) for entry in _folders(root)):
            return {}
    for i, (split, entry) in enumerate(named):
        for other, before in named[:i]:
            part = "train" if SPLIT_MEANINGS[split] == "train" else "eval"
            if split == other or (SPLIT_MEANINGS[split] == SPLIT_MEANINGS[other] and not chosen.get(part)):
                fix = "" if split == other else f", or choose one with {part}_split"
                raise UserError(
                    f"{str(root)!r} has two folders that mean the same split, {before.name!r} and {entry.name!r}; "
                    f"expected one: rename or merge them{fix}"
                )
    return {split: Path(entry.path) for split, entry in named}


def _unwrap(folder: Path) -> Path:
    for _ in range(_MAX_DEPTH):
        inner = _wrapped(folder)
        if inner is None:
            break
        folder = inner
    return folder


def _wrapped(folder: Path) -> Path | None:
    """Return the only folder in `folder` that holds files, if it holds folders of images; None otherwise."""
    holding = (Path(entry.path) for entry in _folders(folder) if _holds_files(entry.path))
    inner = list(itertools.islice(holding, 2))  # a directory may hold thousands of classes
    if len(inner) != 1 or any(_loose_images(inner[0])):
        return None
    return inner[0] if any(_has_image(entry.path) for entry in _folders(inner[0])) else None


def list_beside(directory: Path, folders: Iterable[Path], unread: UnreadFiles) -> None:
    """Add to `unread` what lies between `directory` and the class folders, without searching other folders.

    Args:
        directory: as given to [`find_image_folders`].
        folders: those of the splits in use, which [`read_image_folders`] reports on.
    """
    used = {os.path.abspath(folder) for folder in folders}
    passed = {parent for folder in used for parent in map(str, Path(folder).parents)}
    to_list = [] if os.path.abspath(directory) in used else [os.path.abspath(directory)]
    while to_list:
        for entry in _entries(to_list.pop()):
            if not entry.is_dir():
                _add_outside(entry, unread)
            elif entry.path in passed and entry.path not in used:
                to_list.append(entry.path)
            elif entry.path not in used:
                unread.folders.append(entry.path)


def _add_outside(entry: os.DirEntry, unread: UnreadFiles) -> None:
    if _why_no_image(entry) is None:
        unread.add([(entry.path, "outside the class folders")])
    else:
        unread.beside.append(entry.path)


def read_image_folders(
    folder: Path, train_folder: Path | None = None, unread: UnreadFiles | None = None
) -> LocalImages:
    """Read the images of `<folder>/<class>/...`, at any depth below the class, sorted by path.

    The classes are the folders of `train_folder` (default: `folder`) that hold an image, in the order of
    [`sort_classes`]: torchvision's order, except that numbers are sorted as numbers ("10" after "2").

    Args:
        unread: collects the files that are not read; without it, they are reported here, in one warning.

    Raises:
        ValueError: `folder` has no folder per class, has a class that `train_folder` lacks, or a class folder holds
            files but no image; or the name of a class is not UTF-8.
    """
    report = UnreadFiles() if unread is None else unread
    found: dict[str, list[str]] = {}
    without: dict[str, list[tuple[str, str]]] = {}
    for entry in _folders(folder):
        images, others = _contents(os.path.abspath(entry.path))
        if images:
            found[entry.name] = images
            report.add(others)
        elif any(reason != HIDDEN for _, reason in others):
            without[entry.name] = others
        else:
            report.empty.append(entry.path)
            report.add(others)
    if without:
        _refuse_folders_without_images(folder, without)
    if not found:
        got = "holds images but no folder per class" if any(_loose_images(folder)) else "holds no folder of images"
        raise UserError(
            f"{str(folder)!r} {got}; expected {folder.name}/<class>/<image>.jpg. For "
            "ImageNet's flat validation folder use dataset_name: imagenet-1k with data_dir"
        )
    for entry in _entries(os.path.abspath(folder)):
        if not entry.is_dir():
            _add_outside(entry, report)
        elif entry.name.startswith("."):
            report.folders.append(entry.path)
    names = sort_classes(found) if train_folder in (None, folder) else _class_folders(train_folder)
    found = {name: found[name] for name in sort_classes(found)}
    for name in (*names, *found):
        _check_class_name(name, folder)
    if unknown := [name for name in found if name not in set(names)]:
        raise UserError(
            f"{str(folder)!r} has {len(unknown)} classes that {str(train_folder)!r} has no images of, such as "
            f"{', '.join(unknown[:3])}; both folders need the same classes"
        )
    if train_folder in (None, folder):
        _check_level(folder, names)
    number = {name: label for label, name in enumerate(names)}
    images = [path for paths in found.values() for path in paths]
    labels = [number[name] for name, paths in found.items() for _ in paths]
    if unread is None:
        report.warn()
    return LocalImages(images, labels, names)


def _refuse_folders_without_images(folder: Path, without: Mapping[str, list[tuple[str, str]]]) -> None:
    files = UnreadFiles(file for others in without.values() for file in others)
    names = some_of([repr(name) for name in without])
    raise UserError(
        f"{str(folder)!r} has {len(without)} class folders with files but without an image that can be read, {names} "
        f"({files}); expected images such as 1.jpg or 1.png: {files.advice}, or move folders that are no class away"
    )


def _check_class_name(name: str, folder: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the class folder {name!r} in {str(folder)!r} has a name that is not UTF-8; class names are text: "
            "rename the folder"
        ) from None


def _check_level(folder: Path, names: list[str]) -> None:
    """Refuse splits below the classes, and warn if the classes seem to be one level deeper."""
    inside = []
    for name in names:
        if any(_loose_images(folder / name)):
            return
        inside.append({entry.name for entry in _folders(_unwrap(folder / name))})
    if all(inner and all(map(split_named, inner)) for inner in inside):
        split = min(inside[0])
        raise UserError(
            f"{str(folder)!r} holds splits inside its classes, such as {f'{names[0]}/{split}'!r}, which would be read "
            f"as one split; expected {f'{split}/{names[0]}'!r}: move the folders"
        )
    if len(names) > 1 and len(inside[0]) > 1 and all(inner == inside[0] for inner in inside):
        logger.warning(
            "the classes of %r are %s, and each of them holds the same folders %s: if these are the classes, name the "
            "folders above them train and val",
            *(
                str(folder),
                some_of([repr(name) for name in names]),
                some_of([repr(name) for name in sorted(inside[0])]),
            ),
        )


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
        split = next((word for word in map(str.lower, words) if word in SPLIT_NAMES), None)
        if split is None and (file.parent != directory or directory.name in _SURE_SPLITS):
            split = split_named(file.parent.name)
        if split is None and suffix == ".tar":
            continue
        if split is None:
            split = file.parent.name if words[0].isdigit() and file.parent != directory else words[0]
        shards.setdefault(split, []).append(str(file))
    return shards


# --- files -------------------------------------------------------------------------------------------------------

HIDDEN = "hidden"


def _entries(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def visible_entries(folder: str | Path) -> list[os.DirEntry]:
    """List the entries of a folder sorted by name, without names that begin with a dot."""
    return [entry for entry in _entries(folder) if not entry.name.startswith(".")]


def image_paths(folder: str | Path) -> list[str]:
    """List the absolute paths of all images in a folder, at any depth, sorted."""
    return _contents(os.path.abspath(folder))[0]


def unread_files(folder: str | Path) -> UnreadFiles:
    """Return all files below a folder that are no images."""
    return UnreadFiles(_contents(os.path.abspath(folder))[1])


def _contents(folder: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the sorted paths of the images below a folder, and `(path, reason)` of all other files."""
    images, others = [], []
    for path, reason in _walk(folder):
        if reason is None:
            images.append(path)
        else:
            others.append((path, reason))
    return sorted(images), others


def _walk(folder: str | Path) -> Iterator[tuple[str, str | None]]:
    """Yield all files below a folder, hidden folders last; with each file the reason why it is no image, or None."""
    folders, seen = deque([(os.fspath(folder), False)]), set()
    while folders:
        parent, hidden = folders.pop()
        try:
            place = os.stat(parent)
            if (place.st_dev, place.st_ino) in seen:  # a link to a folder that was already visited
                continue
            seen.add((place.st_dev, place.st_ino))
            with os.scandir(parent) as entries:
                for entry in entries:
                    name = entry.name
                    usual = not hidden and name[0] != "." and name[name.rfind(".") :].lower() in IMAGE_SUFFIXES
                    if usual and entry.is_file(follow_symlinks=False):  # most entries, of up to millions
                        yield entry.path, None
                    elif not entry.is_dir():
                        yield entry.path, HIDDEN if hidden else _why_no_image(entry)
                    elif hidden or entry.name.startswith("."):
                        folders.appendleft((entry.path, True))
                    else:
                        folders.append((entry.path, False))
        except PermissionError as error:
            raise UserError(
                f"the folder {parent!r} cannot be read ({error.strerror}); its images would be missing. Allow reading "
                "it, or move it away"
            ) from error


def _why_no_image(entry: os.DirEntry) -> str | None:
    """Return None for an image; only a file with an unknown suffix is opened."""
    if entry.name.startswith("."):
        return HIDDEN
    suffix = os.path.splitext(entry.name)[1].lower()
    # the target of a broken link may be on a disk that is missing: the image counts as damaged, not as absent
    if not entry.is_file() and not (entry.is_symlink() and not os.path.exists(entry.path)):
        return "no regular file"
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix not in HEIF_SUFFIXES and suffix not in RAW_SUFFIXES and _begins_like_an_image(entry.path):
        return None
    return ascii(suffix)[1:-1] or "without suffix"


def _begins_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return _MAGIC.match(file.read(16)) is not None
    except OSError:
        return False


def _folders(folder: str | Path) -> list[os.DirEntry]:
    return [entry for entry in visible_entries(folder) if entry.is_dir()]


def _loose_images(folder: str | Path) -> Iterator[str]:
    """Yield the absolute paths of the images that are directly in a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir() and _why_no_image(entry) is None:
                yield os.path.abspath(entry.path)


def _has_image(folder: str | Path) -> bool:
    return any(reason is None for _, reason in _walk(folder))


def _holds_files(folder: str | Path) -> bool:
    return any(reason != HIDDEN for _, reason in _walk(folder))


def _holds_files_of_classes(folder: str | Path) -> bool:
    return any(_holds_files(entry.path) for entry in _folders(folder))


def _class_folders(folder: Path) -> list[str]:
    """Return the class names of a folder without listing its images."""
    names, without = [], {}
    for entry in _folders(folder):
        if _has_image(entry.path):
            names.append(entry.name)
        elif _holds_files(entry.path):
            without[entry.name] = _contents(entry.path)[1]
    if without:
        _refuse_folders_without_images(folder, without)
    return sort_classes(names)
