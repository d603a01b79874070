"""Records on the Hub, there and back: what is published, what is fetched and when, what is refused, what it trains."""

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.hub_client import RECIPE, Client, environment, run

from hf_deit import UserError
from hf_deit.commands.record import build_card, check_whole, license_of_teacher, parse_arguments
from hf_deit.teachers.record import BATCH, Header
from hf_deit.teachers.record_source import HubRecord, LocalRecord, source_of
from hf_deit.teachers.recording import RecordingTeacher


CLASSES, BATCH_SIZE, STEP = 5, 4, 8


def write_record(folder: Path, epochs: float = 3, seed: int = 0, **views) -> Path:
    """A record of random decisions: 3 steps of 8 views an epoch, 4 on a device."""
    generator = torch.Generator().manual_seed(seed)
    facts = {"classes": CLASSES, "images": 3 * STEP, "views of a step": STEP, BATCH: BATCH_SIZE, "view_seed": 42}

    class Teacher:
        name, sha256, num_parameters = "/home/me/models/big_teacher", "0123456789abcdef", 7

        def __call__(self, pixel_values):
            return torch.rand(BATCH_SIZE, CLASSES, generator=generator)

    same = {"kind": "hard", "top_k": 1, "batch_size": BATCH_SIZE, "device": torch.device("cpu")}
    data = {"dataset_name": "digits", "image_size": 16}
    recording = RecordingTeacher(Teacher(), lambda: facts | views, directory=folder, data=data, **same)
    steps = round(3 * epochs)
    for number in range(2 * steps):
        epoch, first = divmod(number * BATCH_SIZE, 3 * STEP)
        recording(None, np.stack([np.full(BATCH_SIZE, epoch), np.arange(first, first + BATCH_SIZE)], axis=1))
    recording.commit(steps)
    return folder


def damage(folder: Path, epoch: int = 1, at: int = 9) -> None:
    path = folder / f"answers-{epoch:05d}.bin"
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def other_answers(data: bytes, epoch: int, views: int, size: int) -> bytes:
    """An epoch as another teacher would have answered it, with checksums of its own; nothing here is ours."""
    rows = np.frombuffer(data, "<u2", views)
    assert len(set(rows.tolist())) > 1
    rows = (rows % 10 + 1).astype("<u2")
    blocks = [rows[first : first + size].tobytes() for first in range(0, views, size)]
    texts = [f"{epoch} {size * number} ".encode() + block for number, block in enumerate(blocks)]
    return rows.tobytes() + b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)


# What is published


@pytest.mark.parametrize(
    "make, refusal",
    [
        (lambda d: write_record(d, 0), "holds no step yet: resume the recording run"),
        (lambda d: write_record(d, 7 / 3), "ends within an epoch, after 7 steps = 2.333 epochs: .* --partial"),
        (lambda d: (write_record(d) / "answers-00003.bin").touch(), "there are outputs of later ones"),
        (
            lambda d: damage(write_record(d)),
            "answers-00001.bin' is not published: the checksum of positions 4 to 7 of",
        ),
        (lambda d: os.truncate(write_record(d) / "answers-00002.bin", 9), "answers-00002.bin' .* has 9 bytes, expec"),
        (lambda d: (write_record(d) / "answers-00000.bin").unlink(), "answers-00000.bin' .* cannot be read"),
        (
            lambda d: (write_record(d) / "answers-00001.bin").write_bytes(bytes(3 * STEP * 2 + 6 * 8)),
            "not published: no teacher outputs for position 0 of epoch 1",
        ),
    ],
    ids=["no step", "within an epoch", "later files", "flipped bit", "cut", "missing", "zeros"],
)
def test_a_record_that_is_incomplete_or_damaged_is_not_published(tmp_path, make, refusal):
    make(tmp_path)
    with pytest.raises(UserError, match=refusal):
        check_whole(tmp_path, Header.read(tmp_path))


def test_a_whole_record_may_be_published_and_a_part_where_it_is_asked_for(tmp_path):
    check_whole(tmp_path / "whole", Header.read(write_record(tmp_path / "whole")))
    write_record(tmp_path / "part", 7 / 3)
    check_whole(tmp_path / "part", Header.read(tmp_path / "part"), partial=True)
    damage(tmp_path / "part", epoch=2, at=3)
    with pytest.raises(UserError, match="the checksum of positions 0 to 3 of epoch 2"):
        check_whole(tmp_path / "part", Header.read(tmp_path / "part"), partial=True)


def test_a_name_that_is_none_of_the_hub_is_refused_at_once(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["push", "my_answers", "no_owner"])
    assert "expected <owner>/<name>" in capsys.readouterr().err


def test_the_card_says_what_was_recorded_and_whose_licence_it_is(tmp_path):
    header = Header.read(write_record(tmp_path))
    text = build_card(header, "user/answers", None)
    assert "unknown: state it with `--license`" in text and "license:" not in text
    assert "24 of digits, 5 classes" in text and "9 steps = 3 epochs" in text and "view_seed | 42" in text
    assert "license: mit" in build_card(header, "user/answers", "mit")


def test_the_licence_is_that_of_the_teachers_card(tmp_path):
    for name, license in (("one", "mit"), ("other", "cc-by-4.0"), ("none", None)):
        (tmp_path / name).mkdir()
        front = f"license: {license}\n" if license else "tags: [a]\n"
        (tmp_path / name / "README.md").write_text(f"---\n{front}---\n# x\n")
    assert license_of_teacher(str(tmp_path / "one")) == "mit"
    assert license_of_teacher(f"{tmp_path / 'one'} + {tmp_path / 'one'}") == "mit"
    for several in ("one + other", "one + none", "none"):
        assert license_of_teacher(" + ".join(str(tmp_path / name) for name in several.split(" + "))) is None
    assert license_of_teacher("python:mine:make") is None


def test_a_directory_goes_before_a_dataset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "answers").mkdir(parents=True)
    assert isinstance(source_of("user/answers"), LocalRecord)
    found = source_of("user/other@v1", "0" * 40)  # a commit that is known needs no Hub
    assert isinstance(found, HubRecord) and found.repository == "user/other"
    assert isinstance(source_of("no/where/at/all"), LocalRecord) and isinstance(source_of("/a/b"), LocalRecord)


# Through the Hub

PIECES = """
    import contextlib, time
    from pathlib import Path
    from hf_deit.commands import record
    from hf_deit.teachers.record import Header
    from hf_deit.teachers.record_source import source_of
    time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))  # between two attempts

    def failure(action):
        try:
            action()
        except ValueError as error:
            return str(error)

    def read(name, epochs=(0, 1, 2), last=2):
        source = source_of(name)
        header = source.header()
        source.check_files(header)
        source.begin(header, epochs[0], last)
        return [source.file(epoch).read_bytes().hex() for epoch in epochs]

    def push(folder, name="user/answers", *words):
        record.main(["push", folder, name, *words])
"""


def fetched(hub, since: int = 0) -> list[str]:
    """The names of the files of answers whose bytes the server has sent, in order."""
    sent = [re.search(r"answers-\d+\.bin", request.path) for request in hub.requests[since:] if request.sent]
    gets = [request.method == "GET" for request in hub.requests[since:] if request.sent]
    return [found[0] for found, get in zip(sent, gets, strict=True) if found and get]


def test_a_record_goes_up_once_and_is_fetched_epoch_by_epoch(hub, tmp_path):
    whole = write_record(tmp_path / "record")
    files = [whole / f"answers-{epoch:05d}.bin" for epoch in range(3)]
    contents = [file.read_bytes() for file in files]
    with Client(hub, tmp_path, hub.token) as client:
        client(PIECES)

        # An upload breaks off; the same command sends what is missing, and record.json comes last.
        hub.cut_upload_after(10, hashlib.sha256(contents[2]).hexdigest(), count=100)
        message = client("answer = failure(lambda: push('record', 'user/answers', '--private'))")
        hub.cut_requests.clear()
        assert message.endswith("the same command goes on with what is missing") and "\n" not in message
        assert "record.json" not in hub.files("dataset", "user/answers")
        since = len(hub.requests)
        assert client("answer = failure(lambda: push('record', 'user/answers', '--private'))") is None
        sent = [request for request in hub.requests[since:] if request.method == "PUT"]
        assert len(sent) == 1  # the third file; the others were there
        repository = hub.repositories["dataset", "user/answers"]
        there = hub.files("dataset", "user/answers")
        assert repository.private and there.keys() == {"README.md", "record.json", *(file.name for file in files)}
        assert [there[file.name] for file in files] == contents
        assert (
            not [name for name, data in there.items() if b"/home/me" in data] and b"big_teacher" in there["README.md"]
        )

        # One epoch ahead, none beyond the last that the run needs, nothing twice.
        since = len(hub.requests)
        assert client("answer = read('user/answers', (0,), last=0)") == [contents[0].hex()]
        assert fetched(hub, since) == ["answers-00000.bin"]
        client("source = source_of('user/answers'); source.begin(source.header(), 0, 2); source.file(0)")
        client("source._fetches[1].result()")
        assert fetched(hub, since) == ["answers-00000.bin", "answers-00001.bin"]
        assert client("answer = source.file(1).read_bytes().hex()") == contents[1].hex()
        client("source._fetches[2].result()")
        assert fetched(hub, since) == [file.name for file in files]
        before = len(hub.requests)
        assert client("answer = read('user/answers')") == [data.hex() for data in contents]
        assert not fetched(hub, before)

        # A copy that was damaged in the cache is fetched again, once.
        client("place = source.file(1).resolve(); place.write_bytes(bytes(place.stat().st_size))")
        before = len(hub.requests)
        assert client("answer = read('user/answers')") == [data.hex() for data in contents]
        assert fetched(hub, before) == ["answers-00001.bin"]

        # Over something else nothing is written.
        write_record(tmp_path / "other", view_seed=7)
        assert "view_seed is 7, recorded with 42" in client("answer = failure(lambda: push('other'))")
        write_record(tmp_path / "shorter", 1)
        assert "holds more of this record, 9 steps = 3 epochs" in client("answer = failure(lambda: push('shorter'))")
        hub.add_repo("dataset", "user/photos", {"train.parquet": b"photos", "README.md": b"Mine."})
        message = client("answer = failure(lambda: push('record', 'user/photos'))")
        assert "holds 'train.parquet' and no record.json: choose a new name" in message
        assert "is public" in client("answer = failure(lambda: push('record', 'user/photos', '--private'))")
        message = client("answer = failure(lambda: push('record', 'stranger/answers'))")
        assert "belongs to somebody else" in message and "name it <your name>/<record>" in message
        message = client("answer = failure(lambda: push('record', 'user/new', '--license', 'nonsense'))")
        assert '"license" must be one of' in message and ("dataset", "user/new") not in hub.repositories
        assert hub.files("dataset", "user/answers") == there
        # The same again is no new commit, a longer record of the same run is one.
        commits = len(repository.branches["main"])
        assert client("answer = failure(lambda: push('record'))") is None
        assert len(repository.branches["main"]) == commits
        write_record(tmp_path / "longer", 4)
        assert client("answer = failure(lambda: push('longer'))") is None
        assert json.loads(hub.files("dataset", "user/answers")["record.json"])["steps"] == 12


def test_what_the_hub_cannot_give_is_one_line(hub, tmp_path):
    good = write_record(tmp_path / "record")
    repository = hub.add_repo("dataset", "user/good", good)
    first = repository.at("main").id
    hub.add_repo("dataset", "stranger/hidden", good, private=True)
    hub.add_repo("dataset", "stranger/gated", good, gated=True)
    hub.add_repo("dataset", "user/photos", {"train.parquet": b"photos"})
    lacking = hub.add_repo("dataset", "user/lacking", good)
    lacking.commit({"answers-00002.bin": None})
    cut = hub.add_repo("dataset", "user/cut", good)
    cut.commit({"answers-00002.bin": b"123"})
    large = hub.add_repo("dataset", "user/large", {"record.json": b" " * (1 << 21)})
    damage(write_record(tmp_path / "damaged"))
    damaged = hub.add_repo("dataset", "user/damaged", tmp_path / "damaged").at("main").id
    refusals = {
        "user/nowhere": "is no directory, and the Hub has no dataset 'user/nowhere' that you may read",
        "stranger/hidden": "for a private one run `hf auth login`, or set HF_TOKEN",
        "stranger/gated": "accept the terms at https://huggingface.co/datasets/stranger/gated",
        "user/photos": "holds no record.json, so it is no record of teacher outputs",
        "user/good@v9": "has no such branch, tag or commit",
        "user/a--b": "no name of a dataset on the Hub",
        "user/lacking": "holds no 'answers-00002.bin', which record.json promises",
        "user/cut": "'answers-00002.bin' of user/cut at commit [0-9a-f]{7} has 3 bytes, expected 96",
        "user/large": "has 2,097,152 bytes: no record",
        "user/damaged": (
            f"'answers-00001.bin' of user/damaged at commit {damaged[:7]} is damaged: the checksum of positions 4 to "
            "7 of epoch 1 is another. It was published so: tell its owner, or name another revision"
        ),
    }
    assert large
    with Client(hub, tmp_path, hub.token) as client:
        client(PIECES)
        for name, refusal in refusals.items():
            message = client(f"answer = failure(lambda: read({name!r}))")
            assert message is not None and re.search(refusal, message) and "\n" not in message, (name, message)
        assert fetched(hub).count("answers-00001.bin") == 1  # what was published damaged is not asked for again
        repository.commit({"answers-00000.bin": b"changed"})
        assert len(client(f"answer = read('user/good@{first}', (0,))")) == 1

        # The network: tried again, and in the end one line.
        hub.fail_next(2, 503, "answers-00002.bin")
        hub.cut_after(10, "/store/", count=1)
        assert len(client(f"answer = read('user/good@{first}', (2,))")) == 1
        assert len(client(f"answer = read('user/good@{first}', (1,))")) == 1  # all three files are in the cache now
        hub.down = True
        message = client("answer = failure(lambda: read('user/other'))")
        assert message.startswith("cannot fetch record.json of teacher_replay 'user/other' from the Hub:")
        assert message.endswith("Start the same command again when the network is back") and "\n" not in message
        assert len(client(f"answer = read('user/good@{first}', (2,))")) == 1  # without a Hub from the cache
        assert "next try in" in (tmp_path / "stderr.txt").read_text()


ANSWERS = """
    import torch

    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 10))
"""
EPOCHS = 4
STEPS = 4 * EPOCHS  # 64 images in batches of 16


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where runs on the digits work: their recipe, and the code of their teacher."""
    (tmp_path / "small_teacher.py").write_text(textwrap.dedent(ANSWERS))
    recipe = RECIPE | {"max_steps": STEPS, "save_steps": 5, "eval_strategy": "no", "data_seed": 3}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def weights(folder: Path, name: str) -> bytes:
    return (folder / name / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_record_from_the_hub_trains_the_weights_of_the_run_with_the_teacher(hub, folder):
    """Recorded, published, replayed by the keys of its card in a fresh process and cache; then cut off and resumed."""
    distill = ["-m", "hf_deit", "distill"]
    teacher = ["--teacher", "python:small_teacher:make"]
    done = run(
        [*distill, "recipe.yaml", *teacher, "--teacher_record", "record", "--output_dir", "asked"],
        *(hub, folder, hub.token),
    )
    assert done.returncode == 0, done.stderr
    done = run(["-m", "hf_deit", "record", "push", "record", "user/answers"], hub, folder, hub.token)
    assert done.returncode == 0 and "teacher_replay: user/answers" in done.stdout, done.stderr
    repository = hub.repositories["dataset", "user/answers"]
    commit = repository.at("main").id
    card = hub.files("dataset", "user/answers")["README.md"].decode()
    assert "python:small_teacher:make" in card and "max_train_samples: 64" in card

    # The keys of the card, and nothing else that decides a view.
    (keys,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    student = {key: RECIPE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")}
    student |= {key: RECIPE[key] for key in ("drop_path_rate", "max_eval_samples", "learning_rate", "use_cpu")}
    student |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 5, "dataloader_num_workers": 0}
    (folder / "replay.yaml").write_text(yaml.safe_dump(student | yaml.safe_load(keys)))
    since = len(hub.requests)
    words = [*distill, "replay.yaml", "--output_dir", "replayed"]
    done = run(words, hub, folder, "", HF_HOME=str(folder / "fresh"))
    assert done.returncode == 0, done.stderr
    assert weights(folder, "replayed") == weights(folder, "asked")
    assert f"decisions replayed from user/answers at commit {commit[:7]}; not in memory" in done.stdout
    assert fetched(hub, since) == [f"answers-{epoch:05d}.bin" for epoch in range(EPOCHS)]
    assert f"replayed from [user/answers](https://huggingface.co/datasets/user/answers/tree/{commit})" in (
        (folder / "replayed" / "README.md").read_text()
    )

    with Client(hub, folder, "") as client:
        program = """
            from hf_deit import DistillationTrainer
            from hf_deit.commands import distill
            step, last = DistillationTrainer.training_step, None

            def until(self, *args, **kwargs):
                if self.state.global_step == last:
                    raise InterruptedError("killed")
                return step(self, *args, **kwargs)

            DistillationTrainer.training_step = until

            def train(output_dir, *words):
                try:
                    distill.main(["replay.yaml", "--output_dir", output_dir, *map(str, words)])
                except (InterruptedError, ValueError) as error:
                    return str(error)
        """
        client(program)
        since = len(hub.requests)
        # In the second epoch of four: of the fourth nothing has been fetched.
        assert client("last = 6; answer = train('cut')") == "killed"
        assert fetched(hub, since) == [f"answers-{epoch:05d}.bin" for epoch in range(3)]
        changed = "answers-00003.bin"
        data = other_answers(hub.files("dataset", "user/answers")[changed], 3, 64, 16)
        repository.commit({changed: data})
        assert client("last = None; answer = train('cut')") is None
        assert fetched(hub, since)[3:] == [changed]
        assert weights(folder, "cut") == weights(folder, "asked")
        # A new run takes what the branch says now, and its weights differ.
        assert client("answer = train('later')") is None
        assert weights(folder, "later") != weights(folder, "asked")

        # What differs is named, before a step.
        message = client("answer = train('seed', '--data_seed', 4)")
        assert "teacher outputs for other views: " in message and "view_seed is 4, recorded with 3" in message
        message = client("answer = train('images', '--max_train_samples', 80)")
        assert "images is 80, recorded with 64" in message and "\n" not in message
        assert "holds 16 steps = 4 epochs" in client("answer = train('long', '--max_steps', 20)")


TWO_RANKS = """
import hf_deit.commands.distill as distill
distill.main(["replay.yaml", "--output_dir", "two", "--teacher_replay", "user/two"])
"""


@pytest.mark.slow
def test_two_ranks_fetch_each_file_once(hub, folder):
    recipe = RECIPE | {"max_steps": 6, "save_strategy": "no", "eval_strategy": "no"}
    (folder / "replay.yaml").write_text(json.dumps(recipe))
    words = [
        "-m",
        "hf_deit",
        "distill",
        "replay.yaml",
        "--teacher",
        "python:small_teacher:make",
        "--output_dir",
        "one",
    ]
    words += ["--teacher_record", "record", "--gradient_accumulation_steps", "2"]
    done = run(words, hub, folder, hub.token)
    assert done.returncode == 0, done.stderr
    hub.add_repo("dataset", "user/two", folder / "record")
    (folder / "script.py").write_text(TWO_RANKS)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", "script.py"]
    done = subprocess.run(
        [sys.executable, *launcher],
        cwd=folder,
        env=environment(hub, folder, "") | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(fetched(hub)) == [f"answers-{epoch:05d}.bin" for epoch in range(3)]
