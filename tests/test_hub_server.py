"""The Hub of the tests against the real clients: what they upload, list, stream and download is what it holds."""

import io
import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def client(hub, program: str, token: str = "") -> object:
    """Run a program as a client of the hub; returns what its last line says in JSON."""
    command = [sys.executable, "-c", "import json\n" + textwrap.dedent(program)]
    environment = hub.environment | {"HF_TOKEN": token}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def parquet(numbers: np.ndarray, rows_per_group: int) -> bytes:
    """A file of these numbers and, with each, 1,000 bytes that do not compress."""
    noise = np.random.default_rng(0)
    table = pa.table({"number": numbers, "payload": [noise.bytes(1000) for _ in numbers]})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=rows_per_group)
    return file.getvalue()


def test_datasets_reads_every_row_streamed_and_not(hub):
    shards = np.arange(60).reshape(3, 20)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: learn\n    path: shards/*\n---\n"
    files = {f"shards/{index}.parquet": parquet(numbers, 10) for index, numbers in enumerate(shards)}
    hub.add_repo("dataset", "user/numbers", {"README.md": card.encode(), "other.parquet": b"?", **files})
    streamed, shard_count, loaded, splits = client(
        hub,
        """
        import datasets
        stream = datasets.load_dataset("user/numbers", streaming=True)
        table = datasets.load_dataset("user/numbers")
        builder = datasets.load_dataset_builder("user/numbers")
        numbers = [row["number"] for row in stream["learn"]]
        splits = list(builder.config.data_files)
        print(json.dumps([numbers, stream["learn"].num_shards, table["learn"]["number"][:], splits]))
        """,
    )
    assert streamed == loaded == list(range(60))
    assert shard_count == 3 and splits == ["learn"]
    # Streaming is reading ranges; and of other hosts it asks the dataset viewer alone.
    ranges = [request for request in hub.requests if request.status == 206 and request.path.startswith("/store/")]
    assert {request.path.rsplit("/", 1)[1] for request in ranges} == {"0.parquet", "1.parquet", "2.parquet"}
    strangers = {request.path.split("/")[2] for request in hub.requests if not request.path.startswith("/")}
    assert strangers <= {f"datasets-server.127.0.0.1:{hub.port}"}


def test_reading_one_row_group_moves_its_bytes_and_the_footer(hub):
    content = parquet(np.arange(800), 100)
    group = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(5)
    needed = sum(group.column(index).total_compressed_size for index in range(group.num_columns))
    hub.add_repo("dataset", "user/groups", {"data/train.parquet": content, "README.md": b"Numbers."})
    seen = client(
        hub,
        """
        import pyarrow.parquet as pq
        from huggingface_hub import HfFileSystem
        files = HfFileSystem()
        path, = files.glob("datasets/user/groups/**/*.parquet")
        with files.open(path, cache_type="none") as file:
            numbers = pq.ParquetFile(file).read_row_group(5, use_threads=False)["number"].to_pylist()
        names = files.ls("datasets/user/groups", detail=False)
        print(json.dumps([path, files.info(path)["size"], numbers, names]))
        """,
    )
    names = ["datasets/user/groups/README.md", "datasets/user/groups/data"]
    assert seen == ["datasets/user/groups/data/train.parquet", len(content), list(range(500, 600)), names]
    parts = [request for request in hub.requests if request.path.startswith("/store/")]
    assert all(request.status == 206 for request in parts)
    for part in parts:
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", part.range).groups()
        assert part.sent == int(last) + 1 - int(first)
    moved = sum(part.sent for part in parts)
    assert needed <= moved < needed + 100_000 < len(content) / 4  # pyarrow reads 64 KB for the footer


def test_an_uploaded_folder_comes_back_byte_for_byte(hub, tmp_path):
    weights = os.urandom(300_000)
    files = {"config.json": b'{"a": 1}', "deep/er/model.safetensors": weights, "empty.txt": b"", "ü.md": b"!"}
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    hub.page_size = 2  # listings of several pages
    program = f"""
        from pathlib import Path
        from huggingface_hub import HfApi
        api, folder = HfApi(), {str(tmp_path)!r}
        api.create_repo("user/folder", repo_type=KIND, private=True)
        first, again = [api.upload_folder(repo_id="user/folder", repo_type=KIND, folder_path=folder) for _ in "12"]
        back = Path(api.snapshot_download("user/folder", repo_type=KIND))
        same = [Path(folder, path).read_bytes() == (back / path).read_bytes() for path in {list(files)}]
        pinned = api.hf_hub_download("user/folder", "config.json", repo_type=KIND, revision=first.oid)
        api.delete_file("empty.txt", "user/folder", repo_type=KIND)
        listed = api.list_repo_files("user/folder", repo_type=KIND)
        private = api.repo_info("user/folder", repo_type=KIND).private
        print(json.dumps([same, first.oid == again.oid, open(pinned).read(), sorted(listed), private]))
        """
    left = {path: data for path, data in files.items() if path != "empty.txt"}
    for kind in ("model", "dataset"):
        seen = client(hub, program.replace("KIND", repr(kind)), hub.token)
        assert seen == [[True] * 4, True, '{"a": 1}', sorted(left), True]
        assert hub.files(kind, "user/folder") == left
        assert len(hub.repositories[kind, "user/folder"].at("main").id) == 40
    # The store keeps an object once, so the large file went up once.
    assert [request.status for request in hub.requests if request.method == "PUT"] == [200]


def test_what_transformers_and_datasets_publish_loads_by_its_name(hub):
    seen = client(
        hub,
        """
        import datasets, torch
        from transformers import AutoModelForImageClassification, DeiTConfig, DeiTForImageClassification
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = DeiTForImageClassification(DeiTConfig(image_size=32, **size))
        model.push_to_hub("user/deit")
        model.push_to_hub("user/deit", revision="v2")
        same = []
        for revision in ("main", "v2"):
            copy = AutoModelForImageClassification.from_pretrained("user/deit", revision=revision)
            same += [torch.equal(a, b) for a, b in zip(model.state_dict().values(), copy.state_dict().values())]
        datasets.Dataset.from_dict({"number": range(9)}).push_to_hub("user/rows", split="eval", num_shards=2)
        rows = datasets.load_dataset("user/rows", split="eval")["number"][:]
        print(json.dumps([all(same), len(same) > 2, rows]))
        """,
        hub.token,
    )
    assert seen == [True, True, list(range(9))]
    assert {"config.json", "model.safetensors"} <= set(hub.files("model", "user/deit"))
    assert sum(path.endswith(".parquet") for path in hub.files("dataset", "user/rows")) == 2


def test_refusals_are_the_exceptions_of_the_client(hub):
    hub.add_repo("model", "user/open", {"a.txt": b"a"})
    hub.add_repo("model", "user/gated", {"a.txt": b"a"}, gated=True)
    hub.add_repo("model", "user/private", {"a.txt": b"a"}, private=True)
    seen = client(
        hub,
        """
        import tempfile
        from huggingface_hub import HfApi
        seen = []
        def attempt(action):
            try:
                action()
                seen.append("fine")
            except Exception as error:
                seen.append([type(error).__name__, error.response.status_code])
        def download(token, repository, file="a.txt", revision=None):
            # A cache of its own: the client answers from what it has, if the Hub refuses.
            place = {"revision": revision, "cache_dir": tempfile.mkdtemp()}
            attempt(lambda: HfApi(token=token).hf_hub_download(repository, file, **place))
        for repository in ("user/open", "user/gated", "user/private", "user/missing"):
            for token in ("hf_user", "hf_stranger", False, "hf_wrong"):
                download(token, repository)
        download(False, "user/open", file="b.txt")
        download(False, "user/open", revision="v3")
        stranger = HfApi(token="hf_stranger")
        attempt(lambda: stranger.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="user/open"))
        attempt(lambda: stranger.create_repo("user/mine"))
        attempt(lambda: stranger.delete_repo("user/open"))
        attempt(lambda: stranger.delete_repo("user/private"))
        attempt(lambda: HfApi(token="hf_user").create_repo("user/open"))
        attempt(lambda: HfApi(token="hf_wrong").whoami())
        print(json.dumps(seen))
        """,
    )
    wrong_token, not_yours = ["HfHubHTTPError", 401], ["HfHubHTTPError", 403]
    gate, nothing = "GatedRepoError", "RepositoryNotFoundError"
    assert seen[:16] == [
        *("fine", "fine", "fine", wrong_token),
        *("fine", [gate, 403], [gate, 401], wrong_token),
        *("fine", [nothing, 404], [nothing, 401], wrong_token),
        *([nothing, 404], [nothing, 404], [nothing, 401], wrong_token),
    ]
    assert seen[16:18] == [["RemoteEntryNotFoundError", 404], ["RevisionNotFoundError", 404]]
    assert seen[18:] == [not_yours, not_yours, not_yours, [nothing, 404], ["HfHubHTTPError", 409], wrong_token]
    assert set(hub.files("model", "user/open")) == {"a.txt"}


def test_readers_of_ranges_survive_faults_that_metadata_does_not(hub):
    content = os.urandom(100_000)
    hub.add_repo("dataset", "user/set", {"a.bin": content})
    hub.fail_next(1, 503, containing="/store/")
    hub.cut_after(1000, containing="/store/")
    program = """
        import hashlib
        from huggingface_hub import HfApi, HfFileSystem
        data = HfFileSystem().cat_file("datasets/user/set/a.bin", 0, 100_000)
        print(json.dumps(hashlib.sha256(data).hexdigest()))
        """
    assert client(hub, program) == hub.repositories["dataset", "user/set"].at("main").files["a.bin"].sha256
    parts = [(request.status, request.sent) for request in hub.requests if request.path.startswith("/store/")]
    assert [status for status, _ in parts] == [503, 206, 206]
    assert [sent for _, sent in parts[1:]] == [1000, 100_000]

    program = """
        from huggingface_hub import HfApi
        try:
            HfApi().dataset_info("user/set")
        except Exception as error:
            print(json.dumps(type(error).__name__))
        """
    hub.fail_next(1, 503, containing="/api/datasets/")
    assert client(hub, program) == "HfHubHTTPError"
    hub.down = True
    assert client(hub, program) == "RemoteProtocolError"
    assert hub.requests[-1].status == 0
