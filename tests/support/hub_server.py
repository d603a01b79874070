"""A Hugging Face Hub on this machine: the part of its HTTP API that the real clients use, and faults on demand.

`HubServer` serves models and datasets from memory to huggingface_hub, datasets, transformers and HfFileSystem: new
repositories, uploads (regular and LFS), listings, downloads by range, tokens, private and gated repositories. Clients
run in processes of their own with `env=hub.environment`, because a process reads its endpoint once, at import.
Not spoken: xet, pull requests, tags, Spaces, buckets, search. They get a 404, and stand in `requests` like the rest.

Source: the endpoints, fields and headers of huggingface_hub 2.4: `hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`, `utils/_http.py` (error codes).
"""

from __future__ import annotations

import base64
import hashlib
import json
import operator
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import cached_property, reduce
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml


Kind = Literal["model", "dataset"]
DATE = "2024-01-01T00:00:00.000Z"
# What goes through LFS: these names, and whatever is large.
LFS_NAMES = re.compile(r".*\.(arrow|bin|ckpt|gz|jpe?g|npy|npz|onnx|parquet|pkl|png|pt|pth|safetensors|tar|tgz|zip)")
LFS_BYTES = 10_000_000
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "openrail", "other")


class Request(NamedTuple):
    """An answered request. `path` has no query, and is a whole URL where another host was meant."""

    method: str
    path: str
    range: str | None
    status: int  # 0: the connection was closed without an answer
    sent: int  # bytes of the body


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class Refusal(Exception):
    """An answer with an error status; the code decides which exception the client raises."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, json.dumps({"error": message}).encode(), headers)


def as_json(content: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (size > LFS_BYTES or LFS_NAMES.fullmatch(path.lower()) is not None)


def card_errors(card: str) -> list[str]:
    """What the Hub would refuse in the front matter of a model's card: the part of its rules that our cards touch."""
    found = re.match(r"---\r?\n(.*?)\n---\r?\n", card, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"the front matter is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the front matter is no mapping"]
    errors = []
    if data.get("license", "other") not in LICENSES:
        errors.append(f'"license" must be one of {LICENSES}')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics"):
        if not all(isinstance(item, str) and len(item) <= 100 for item in data.get(key) or ()):
            errors.append(f'"{key}" must be an array of strings')
    for key in ("base_model", "datasets"):
        names = data.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", str(name)):
                errors.append(f'"{key}" with value "{name}" is not valid. Use an id from the Hub')
    for model in data.get("model-index", ()):
        for result in model["results"] if {"name", "results"} <= model.keys() else [{}]:
            parts = [result.get("task"), result.get("dataset"), *result.get("metrics", [None])]
            needed = [{"type"}, {"type", "name"}] + [{"type", "value"}] * (len(parts) - 2)
            if not all(part and keys <= part.keys() for part, keys in zip(parts, needed, strict=True)):
                errors.append('"model-index" must hold name and results, and these task, dataset and metrics')
    return errors


class File:
    """The bytes of one file and the names by which the Hub knows them."""

    def __init__(self, path: str, data: bytes):
        self.data, self.is_lfs = data, is_lfs(path, len(data))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id


class Commit(NamedTuple):
    id: str
    title: str
    files: dict[str, File]

    def entries(self) -> list[dict]:
        """Files and folders as the API lists them."""
        entries = {}
        for path, file in self.files.items():
            for folder in [str(parent) for parent in Path(path).parents][:-1]:
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            size = len(file.data)
            lfs = {"lfs": {"oid": file.sha256, "size": size, "pointerSize": 130}} if file.is_lfs else {}
            entries[path] = {"type": "file", "path": path, "oid": file.git_id, "size": size, **lfs}
        return [entries[path] for path in sorted(entries)]


class Repository:
    """The commits of one model or dataset, by branch, oldest first; each knows all its files."""

    def __init__(self, kind: Kind, id: str, private: bool, gated: bool):
        self.kind, self.id, self.private, self.gated = kind, id, private, gated
        self.owner = id.split("/")[0]
        self.branches: dict[str, list[Commit]] = {"main": []}
        self.commit({}, "initial commit")

    def commit(self, changes: Mapping[str, bytes | None], title: str = "change", branch: str = "main") -> Commit:
        """Add or replace files; None deletes one."""
        commits = self.branches[branch]
        files = dict(commits[-1].files) if commits else {}
        for path, data in changes.items():
            if data is None:
                files.pop(path, None)
            else:
                files[path] = File(path, data)
        content = [self.kind, self.id, branch, len(commits), title, {path: file.etag for path, file in files.items()}]
        commits.append(Commit(hashlib.sha1(json.dumps(content).encode()).hexdigest(), title, files))
        return commits[-1]

    def at(self, revision: str) -> Commit:
        """The commit that a branch or a commit id names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for commit in reduce(operator.iadd, self.branches.values(), []):
            if commit.id == revision:
                return commit
        raise Refusal(404, "Invalid rev id", "RevisionNotFound")


class HubServer:
    """The server and all it holds: `with HubServer() as hub: subprocess.run(..., env=hub.environment)`.

    Attributes:
        token: of the user `user`, who owns `user/...`. More users: `tokens`, a name by token.
        requests: what was asked, in the order of the answers.
        latency: seconds before each answer.
        down: whether to close every connection without an answer.
        page_size: entries in one answer to a listing.
    """

    def __init__(self):
        self.repositories: dict[tuple[Kind, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # the LFS store, by SHA-256
        self.token = "hf_user"
        self.tokens = {"hf_user": "user", "hf_stranger": "stranger"}
        self.requests: list[Request] = []
        self.latency = 0.0
        self.down = False
        self.page_size = 1000
        self.failures: list[tuple[int, str]] = []
        self.cuts: list[tuple[int, str]] = []
        self.cut_requests: list[tuple[int, str]] = []
        self.stalls: list[tuple[int, str]] = []
        self.shortened: list[tuple[int, str]] = []
        self.stall_seconds = 5.0
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        self.home = tempfile.TemporaryDirectory(prefix="hub-client-", ignore_cleanup_errors=True)
        self.http = HubListener(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # To a client another host: so it sends no token there, and reads what it needs from the redirection.
        self.store = f"http://localhost:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.home.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a client, without a token: add `HF_TOKEN` to be somebody.

        The server is the client's proxy, too: what is meant for another host (the dataset viewer, say) is refused and
        recorded here, instead of going out or waiting for a name server.
        """
        ours = re.compile(r"HF_|HUGGING|TRANSFORMERS_OFFLINE|\w+_PROXY$", re.IGNORECASE)
        proxies = {"HTTP_PROXY": self.url, "HTTPS_PROXY": self.url, "NO_PROXY": "127.0.0.1,localhost"}
        return {name: value for name, value in os.environ.items() if not ours.match(name)} | {
            **proxies,
            **{name.lower(): value for name, value in proxies.items()},
            "HF_ENDPOINT": self.url,
            "HF_HOME": self.home.name,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }

    def add_repo(
        self, kind: Kind, id: str, files: Mapping[str, bytes] | Path, private: bool = False, gated: bool = False
    ) -> Repository:
        """A new repository `owner/name` of these files, or of those of a directory; its `commit()` changes it."""
        if isinstance(files, Path):
            found = (file for file in files.rglob("*") if file.is_file())
            files = {file.relative_to(files).as_posix(): file.read_bytes() for file in found}
        if (kind, id) in self.repositories:
            raise ValueError(f"{kind} {id} exists: change it with its commit()")
        repository = self.repositories[kind, id] = Repository(kind, id, private, gated)
        repository.commit(files, "add files")
        return repository

    def files(self, kind: Kind, id: str) -> dict[str, bytes]:
        """The content of the branch `main`."""
        return {path: file.data for path, file in self.repositories[kind, id].at("main").files.items()}

    def fail_next(self, count: int, status: int, containing: str = "") -> None:
        """Answer the next `count` requests whose path contains a text with an error status."""
        self.failures += [(status, containing)] * count

    def cut_after(self, size: int, containing: str = "", count: int = 1) -> None:
        """Break the connection after `size` bytes of the next `count` bodies that are longer."""
        self.cuts += [(size, containing)] * count

    def stall_after(self, size: int, containing: str = "", count: int = 1) -> None:
        """Send `size` bytes of the next `count` bodies that are longer, then nothing for `stall_seconds`."""
        self.stalls += [(size, containing)] * count

    def shorten(self, size: int, containing: str = "", count: int = 1) -> None:
        """Answer with the first `size` bytes of the next `count` bodies that are longer, as if they were all."""
        self.shortened += [(size, containing)] * count

    def cut_upload_after(self, size: int, containing: str = "", count: int = 1) -> None:
        """Break the connection after `size` bytes of the next `count` bodies sent here that are longer."""
        self.cut_requests += [(size, containing)] * count

    def take(self, faults: list[tuple[int, str]], path: str, below: float = float("inf")) -> int | None:
        """Use up the first of the faults that befalls this path."""
        with self.lock:
            for fault in faults:
                if fault[1] in path and fault[0] < below:
                    faults.remove(fault)
                    return fault[0]
        return None


class HubListener(ThreadingHTTPServer):
    request_queue_size = 128  # ranks x workers x threads connect at once


class HubHandler(BaseHTTPRequestHandler):
    """One connection; every request goes through `handle_request`."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        """Silence: `requests` is the log."""

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        other_host = not self.path.startswith("/")
        path = self.path if other_host else unquote(url.path)
        self.query = parse_qs(url.query)
        size = int(self.headers["Content-Length"] or 0)
        cut = self.hub.take(self.hub.cut_requests, path, below=size)
        self.body = self.rfile.read(size if cut is None else cut)
        time.sleep(self.hub.latency)
        if self.hub.down or cut is not None:
            self.hub.requests.append(Request(self.command, path, self.headers["Range"], 0, 0))
            return self.hang_up()
        try:
            if status := self.hub.take(self.hub.failures, path):
                raise Refusal(status, "failing on demand")
            if other_host:
                raise Refusal(403, "no other host can be reached from here")
            answer = self.route(*[unquote(part) for part in url.path.strip("/").split("/")])
        except Refusal as refusal:
            answer = refusal.answer
        body = b"" if self.command == "HEAD" else answer.body
        short = self.hub.take(self.hub.shortened, path, below=len(body))
        body, whole = body[:short], answer.body[:short]
        stall = self.hub.take(self.hub.stalls, path, below=len(body))
        cut = stall if stall is not None else self.hub.take(self.hub.cuts, path, below=len(body))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(whole))}.items():
            self.send_header(name, value)
        self.end_headers()
        # First the note, then the bytes: whoever has an answer finds it recorded.
        body = body[:cut]
        self.hub.requests.append(Request(self.command, path, self.headers["Range"], answer.status, len(body)))
        self.wfile.write(body)
        if stall is not None:
            self.wfile.flush()
            time.sleep(self.hub.stall_seconds)
        if cut is not None:
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = handle_request

    def hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def route(self, *parts: str) -> Answer:
        match (self.command, *parts):
            # The store: its addresses are secrets, so nobody shows a token.
            case ("GET" | "HEAD", "store", sha256, *_) if sha256 in self.hub.objects:
                return self.content(self.hub.objects[sha256], {"ETag": f'"{sha256}"'})
            case ("PUT", "store", sha256) if hashlib.sha256(self.body).hexdigest() == sha256:
                self.hub.objects[sha256] = self.body
                return as_json({})
            case ("GET", "api", "whoami-v2"):
                return as_json({"type": "user", "name": self.user(required=True), "orgs": []})
            case ("POST", "api", "validate-yaml"):
                errors = [{"message": message} for message in card_errors(json.loads(self.body)["content"])]
                return as_json({"errors": errors, "warnings": []}, status=400 if errors else 200)
            case ("POST" | "DELETE", "api", "repos", "create" | "delete"):
                return self.create_or_delete(**json.loads(self.body))
            case (_, "api", "models" | "datasets" as kinds, owner, name, *rest):
                return self.route_in(kinds[:-1], f"{owner}/{name}", rest)
            case (_, "datasets", owner, name, *rest):
                return self.route_in("dataset", f"{owner}/{name}", rest)
            case (_, owner, name, *rest) if owner != "api":
                return self.route_in("model", f"{owner}/{name}", rest)
        raise Refusal(404, "This server does not know that request")

    def route_in(self, kind: Kind, id: str, rest: list[str]) -> Answer:
        write = self.command == "POST" and "paths-info" not in rest
        repository = self.repository(kind, id.removesuffix(".git"), write)
        match rest:
            case []:
                return self.info(repository, repository.at("main"))
            case ["revision", revision]:
                return self.info(repository, repository.at(revision))
            case ["tree", revision, *path]:
                return self.tree(repository.at(revision), "/".join(path))
            case ["paths-info", revision]:
                paths = parse_qs(self.body.decode()).get("paths", [])
                return as_json([entry for entry in repository.at(revision).entries() if entry["path"] in paths])
            case ["resolve", revision, *path]:
                return self.resolve(repository, repository.at(revision), "/".join(path))
            case ["auth-check", *action]:
                self.repository(kind, repository.id, write="write" in action)
                return as_json({})
            case ["branch", name]:
                return self.branch(repository, name, **json.loads(self.body))
            case ["preupload", revision]:
                return self.preupload(repository.at(revision), json.loads(self.body)["files"])
            case ["info", "lfs", "objects", "batch"]:
                return self.lfs_batch(json.loads(self.body)["objects"])
            case ["commit", branch]:
                return self.commit(repository, branch, [json.loads(line) for line in self.body.splitlines()])
        raise Refusal(404, "This server does not know that request to a repository")

    # Who asks, and for what?

    def user(self, required: bool = False) -> str | None:
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in self.hub.tokens and (token or required):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repository(self, kind: Kind, id: str, write: bool) -> Repository:
        user = self.user()
        repository = self.hub.repositories.get((kind, id))
        if repository is None or (repository.private and repository.owner != user):
            # The same for both: who may not see a repository does not learn that it exists.
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and repository.owner != user:
            raise Refusal(403 if user else 401, "You don't have the rights to change this repository")
        return repository

    # Reading

    def content(self, body: bytes, headers: dict[str, str]) -> Answer:
        """A file or the range of it that was asked for."""
        size, headers = len(body), headers | {"Accept-Ranges": "bytes"}
        first, last = re.fullmatch(r"(?:bytes=(\d*)-(\d*))?", self.headers["Range"] or "").groups()
        if not first and not last:
            return Answer(200, body, headers)
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
        return Answer(206, body[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def info(self, repository: Repository, commit: Commit) -> Answer:
        facts = {"id": repository.id, "author": repository.owner, "sha": commit.id, "private": repository.private}
        facts |= {"gated": "auto" if repository.gated else False, "disabled": False, "tags": []}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return as_json({**facts, "lastModified": DATE, "createdAt": DATE, "siblings": siblings})

    def tree(self, commit: Commit, folder: str) -> Answer:
        prefix = f"{folder}/" if folder else ""
        entries = [entry for entry in commit.entries() if entry["path"].startswith(prefix)]
        if folder and not entries:
            raise Refusal(404, "Folder not found", "EntryNotFound")
        query = {name: values[0] for name, values in self.query.items()}
        if query.get("recursive", "").lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        start = int(query.get("cursor", 0))
        stop = start + self.hub.page_size
        more = f"{self.hub.url}{urlsplit(self.path).path}?{urlencode(query | {'cursor': stop})}"
        return as_json(entries[start:stop], **({"Link": f'<{more}>; rel="next"'} if stop < len(entries) else {}))

    def resolve(self, repository: Repository, commit: Commit, path: str) -> Answer:
        """The content of a file or, for one under LFS, its address in the store."""
        if repository.gated and (user := self.user()) != repository.owner:
            raise Refusal(403 if user else 401, "Access to this repository is restricted", "GatedRepo")
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        file = commit.files[path]
        if not file.is_lfs:
            return self.content(file.data, headers | {"ETag": f'"{file.etag}"'})
        self.hub.objects[file.sha256] = file.data
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return Answer(302, b"", headers | {"Location": f"{self.hub.store}/store/{file.sha256}/{quote(path)}"})

    # Writing

    def url_of(self, kind: Kind, id: str) -> str:
        return f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{id}"

    def create_or_delete(
        self, name: str, organization: str | None = None, type: Kind = "model", visibility: str = "public"
    ) -> Answer:
        user = self.user(required=True)
        id = f"{organization or user}/{name}"
        if self.command == "DELETE":
            self.repository(type, id, write=True)
            del self.hub.repositories[type, id]
            return as_json({})
        if organization not in (None, user):
            raise Refusal(403, "You don't have the rights to create a repository under this name")
        with self.hub.lock:
            exists = (type, id) in self.hub.repositories
            if not exists:
                self.hub.add_repo(type, id, {}, private=visibility == "private")
        error = {"error": "You already created this repo"} if exists else {}
        return as_json({"url": self.url_of(type, id), **error}, status=409 if exists else 200)

    def branch(self, repository: Repository, name: str, startingPoint: str = "main") -> Answer:
        if name in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[name] = [repository.at(startingPoint)]
        return as_json({})

    def preupload(self, commit: Commit, files: list[dict]) -> Answer:
        """For each announced file: how to send it, and which content is there already."""
        ways = []
        for path, size in [(file["path"], file["size"]) for file in files]:
            oid = commit.files[path].etag if path in commit.files else None
            mode = "lfs" if is_lfs(path, size) else "regular"
            ways.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": ways})

    def lfs_batch(self, objects: list[dict]) -> Answer:
        """For each announced object: where to put it, unless it is there."""
        for new in [item for item in objects if item["oid"] not in self.hub.objects]:
            new["actions"] = {"upload": {"href": f"{self.hub.store}/store/{new['oid']}"}}
        return as_json({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, branch: str, actions: list[dict]) -> Answer:
        if branch not in repository.branches or "create_pr" in self.query:
            raise Refusal(400, "This server commits to existing branches only")
        with self.hub.lock:
            head, header = repository.at(branch), actions[0]["value"]
            if header.get("parentCommit", head.id) != head.id:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            changes = {}
            for action, value in [(line["key"], line["value"]) for line in actions[1:]]:
                path = value["path"]
                if action == "file":
                    changes[path] = base64.b64decode(value["content"])
                elif action == "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise Refusal(400, "An LFS object was not uploaded")
                    changes[path] = self.hub.objects[value["oid"]]
                elif action == "deletedFile":
                    changes[path] = None
                elif action == "deletedFolder":
                    changes |= {name: None for name in head.files if name.startswith(path.rstrip("/") + "/")}
            commit = repository.commit(changes, header["summary"], branch)
        url = f"{self.url_of(repository.kind, repository.id)}/commit/{commit.id}"
        return as_json({"success": True, "commitOid": commit.id, "commitUrl": url})
