"""Where a record is read from: a directory of this machine, or a dataset repository of the Hub.

A record on the Hub is read at one commit, whatever happens to its branch meanwhile, and stays in the cache of
huggingface_hub. record.json is fetched at once, the file of an epoch when that epoch is near: while one is being
replayed, the next is fetched in the background. So a run begins after seconds, needs no more disk than it has trained,
and one that stops early has not fetched the rest.

On each host one process fetches a file and verifies all of it, and the others find it in the cache. Not here: how a
record is published (commands/record.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from accelerate import PartialState
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from ..arguments import HUB_ID
from ..data.streaming import with_retries
from ..errors import UserError, first_line
from ..files import MEBIBYTE
from .record import HEADER, Header, answers_file, problem_in, size_problem


T = TypeVar("T")

ON_HUB = re.compile(rf"({HUB_ID.pattern})(?:@(\w[\w./-]*))?")
REFUSALS = (
    RepositoryNotFoundError,
    RevisionNotFoundError,
    EntryNotFoundError,
    OfflineModeIsEnabled,
    HFValidationError,
)
PAGE = "https://huggingface.co/datasets/"


class RecordSource(Protocol):
    """What is needed of the place that a record is read from.

    Attributes:
        name: as `teacher_replay` says it.
        commit: of a record on the Hub, 40 hexadecimal digits; else None.
        shown: for messages: the name, and of a record on the Hub the commit.
        advice: what to do about a file that is damaged on this machine.
    """

    name: str
    commit: str | None
    shown: str
    advice: str

    def header(self) -> Header:
        """Read record.json."""
        ...

    def check_files(self, header: Header) -> None:
        """Refuse a record that lacks a file of the epochs that record.json promises, or has one of another size."""
        ...

    def begin(self, header: Header, first: int, last: int) -> None:
        """Get ready to replay the epochs from `first` to `last`; every rank calls this."""
        ...

    def file(self, epoch: int) -> Path:
        """Return the file of one epoch, once it is on this machine."""
        ...


def source_of(record: str | os.PathLike, commit: str | None = None) -> RecordSource:
    """Return where a record is: a directory goes before a repository of the same name.

    Args:
        record: a directory, or `owner/name` of a dataset on the Hub, perhaps with `@<branch, tag or commit>`.
        commit: known commit of a record on the Hub, which nobody is asked for then.

    Raises:
        ValueError: there is neither a directory nor a repository of this name, or the Hub cannot be reached.
    """
    name = str(record)
    if Path(name).is_dir() or not ON_HUB.fullmatch(name):
        return LocalRecord(name)
    return HubRecord(name, commit)


class LocalRecord:
    """A record in a directory."""

    commit: str | None = None
    advice = "Copy the record again, or record anew"

    def __init__(self, name: str):
        self.name = self.shown = name

    def header(self) -> Header:
        """Read record.json."""
        return Header.read(Path(self.name))

    def check_files(self, header: Header) -> None:
        """Refuse a record that lacks a file, or has one of another size."""
        for epoch in range(header.num_epochs):
            if problem := size_problem(self.file(epoch), header):
                raise UserError(f"{str(self.file(epoch))!r} {problem}. {self.advice}")

    def begin(self, header: Header, first: int, last: int) -> None:
        """Do nothing: all files are here."""

    def file(self, epoch: int) -> Path:
        """Return the file of one epoch."""
        return answers_file(Path(self.name), epoch)


class HubRecord:
    """A record on the Hub, at one commit.

    Args:
        name: `owner/name` of a dataset repository, perhaps with `@<branch, tag or commit>`.
        commit: known commit; by default the Hub is asked for that of the revision.

    Raises:
        ValueError: the Hub has no such repository or revision, it holds no record, or it cannot be reached.
    """

    advice = "Start the same command again: the file is fetched anew"

    def __init__(self, name: str, commit: str | None = None):
        self.name = name
        self.repository, _, revision = name.partition("@")
        self.commit = commit
        if commit is None:
            found: Any = self._ask(HEADER, lambda: self._download(HEADER, revision or None, dry_run=True))
            if found.file_size is not None and found.file_size > MEBIBYTE:
                raise UserError(f"{HEADER} of {self.repository!r} on the Hub has {found.file_size:,} bytes: no record")
            commit = str(found.commit_hash)
            self.commit = commit
        self.shown = f"{self.repository} at commit {commit[:7]}"
        self._published = (
            f"It was published so: tell its owner, or name another revision, {self.repository}@<branch, tag or commit>"
        )
        self._header: Header | None = None
        self._last = -1
        self._fetches: dict[int, _InBackground] = {}

    def header(self) -> Header:
        """Fetch and read record.json."""
        return Header.read(self._fetch(HEADER).parent)

    def check_files(self, header: Header) -> None:
        """Refuse a repository that lacks a file, or has one of another size; one request, if not all is cached."""
        names = [answers_file(Path(), epoch).name for epoch in range(header.num_epochs)]
        if all(self._in_cache(name) for name in names) or constants.is_offline_mode():
            return
        api = HfApi()
        entries = self._ask(
            "its list of files",
            lambda: list(api.list_repo_tree(self.repository, revision=self.commit, repo_type="dataset")),
        )
        sizes = {entry.path: getattr(entry, "size", None) for entry in entries}
        for name in names:
            if name not in sizes:
                raise UserError(f"{self.shown} holds no {name!r}, which {HEADER} promises. {self._published}")
            if sizes[name] != header.bytes_per_epoch:
                raise UserError(
                    f"{name!r} of {self.shown} has {sizes[name]:,} bytes, expected {header.bytes_per_epoch:,}: the "
                    f"file is damaged. {self._published}"
                )

    def begin(self, header: Header, first: int, last: int) -> None:
        """Know what will be asked for, and fetch the first of it in the background.

        Args:
            header: of the record.
            first, last: epochs.
        """
        self._header, self._last = header, last
        self._start(first)

    def file(self, epoch: int) -> Path:
        """Return the file of one epoch, fetched and verified; then the next is fetched in the background."""
        self._start(epoch)
        fetch = self._fetches.get(epoch)
        try:
            path = fetch.result() if fetch is not None else self._fetch_epoch(epoch)
        except BaseException:
            self._fetches.pop(epoch, None)  # whoever asks again may be luckier
            raise
        self._start(epoch + 1)
        return path

    def _start(self, epoch: int) -> None:
        """Fetch a file in the background: on one process of each host, so that nothing is fetched twice."""
        if epoch <= self._last and epoch not in self._fetches and PartialState().is_local_main_process:
            self._fetches[epoch] = _InBackground(lambda: self._fetch_epoch(epoch))

    def _fetch_epoch(self, epoch: int) -> Path:
        """Fetch the file of an epoch and verify it; a copy that is not what the Hub has is fetched again, once."""
        name = answers_file(Path(), epoch).name
        path = self._fetch(name)
        if self._header is None or not PartialState().is_local_main_process:
            return path  # it is verified batch by batch
        problem = self._problem_in(path, epoch)
        if problem is not None and not _is_as_published(path):
            path = self._fetch(name, force_download=True)
            problem = self._problem_in(path, epoch)
        if problem is not None:
            raise UserError(f"{name!r} of {self.shown} is damaged: {problem}. {self._published}")
        return path

    def _problem_in(self, path: Path, epoch: int) -> str | None:
        assert self._header is not None
        return size_problem(path, self._header) or problem_in(path, self._header, epoch)

    def _in_cache(self, name: str) -> bool:
        return isinstance(
            try_to_load_from_cache(self.repository, name, revision=self.commit, repo_type="dataset"), str
        )

    def _fetch(self, name: str, **options: Any) -> Path:
        return Path(self._ask(name, lambda: self._download(name, self.commit, **options)))

    def _download(self, name: str, revision: str | None, **options: Any) -> Any:
        try:
            return hf_hub_download(
                self.repository, name, revision=revision, repo_type="dataset", tqdm_class=_NoBar, **options
            )
        except (LocalEntryNotFoundError, ValueError) as error:
            # huggingface_hub's name for every failure to connect; the cause says whether to try again.
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None

    def _ask(self, what: str, action: Callable[[], T]) -> T:
        """Ask the Hub for something, patiently; what goes wrong becomes one line."""

        def once() -> T:
            try:
                return action()
            except REFUSALS as error:
                raise UserError(self._why_not(what, error)) from error
            except OSError as error:
                if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
                    raise
                place = getattr(error, "filename", None) or constants.HF_HUB_CACHE
                raise UserError(f"{str(place)!r} cannot be written: {error.strerror}. Free some space") from error

        try:
            return with_retries(f"{self.repository}/{what}", once)
        except UserError:
            raise
        except Exception as error:  # httpx, xet and huggingface_hub have dozens of unrelated types
            raise UserError(
                f"cannot fetch {what} of teacher_replay {self.name!r} from the Hub: {first_line(error)}. Start the "
                "same command again when the network is back"
            ) from error

    def _why_not(self, what: str, error: Exception) -> str:
        said, at = f"teacher_replay {self.name!r}", f": {self.commit}" if self.commit else ""
        if isinstance(error, OfflineModeIsEnabled):
            return (
                f"{said} is no directory, and {what} of it is not in the cache, while HF_HUB_OFFLINE is set: unset it"
            )
        if isinstance(error, HFValidationError):
            return f"{said} is no directory, and no name of a dataset on the Hub: {first_line(error)}"
        if isinstance(error, GatedRepoError):
            return f"{said}: accept the terms at {PAGE}{self.repository} and run `hf auth login`"
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"{said} is no directory, and the Hub has no dataset {self.repository!r} that you may read: check the "
                "name; for a private one run `hf auth login`, or set HF_TOKEN"
            )
        if isinstance(error, RevisionNotFoundError):
            return f"{said}: {self.repository!r} on the Hub has no such branch, tag or commit{at}"
        if what == HEADER:
            return (
                f"{said}: the dataset {self.repository!r} on the Hub holds no {HEADER}, so it is no record of teacher "
                "outputs: name one that `hf-deit record push` has published"
            )
        return f"{said}: {self.repository!r} on the Hub holds no {what!r} at commit {self.commit}"


class _InBackground:
    """A call in a thread that does not keep the process alive: a run that ends does not wait for a slow server."""

    def __init__(self, action: Callable[[], Path]):
        self._action, self._path, self._error = action, None, None
        self._thread = threading.Thread(target=self._run, name="fetch teacher outputs", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._path = self._action()
        except BaseException as error:
            self._error = error

    def result(self) -> Path:
        """Wait for the end of the call; return what it returned, or raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path


class _NoBar(tqdm):
    """No bar for files that are fetched while the bar of the training stands there."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.pop("name", None)
        super().__init__(*args, **(kwargs | {"disable": True}))


def _is_as_published(path: Path) -> bool:
    """Whether a file of the cache has the SHA-256 that the Hub gave, by which huggingface_hub names large files."""
    name = path.resolve().name
    if not re.fullmatch("[0-9a-f]{64}", name):
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(MEBIBYTE):
            digest.update(chunk)
    return digest.hexdigest() == name
