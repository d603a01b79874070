"""streaming.py: row groups read as their images are asked for give the images of the files, exactly once each."""

import hashlib
import json
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from hf_deit import TrainViews, build_train_transform
from hf_deit.augmentation.repeated_augmentation import RepeatedAugmentationSampler
from hf_deit.data import streaming as streaming_module
from hf_deit.data.streaming import StreamedImages
from hf_deit.data.views import collate_views


FEATURES = datasets.Features(
    {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
)


def write_shards(folder, images, sizes, row_group_size):
    """The rows of `images` in files of `sizes` rows each."""
    files, start = [], 0
    for number, size in enumerate(sizes):
        files.append(str(folder / f"train-{number:05d}-of-{len(sizes):05d}.parquet"))
        pq.write_table(images.data.table.slice(start, size), files[-1], row_group_size=row_group_size)
        start += size
    return files


BLOCKS = [5, 5, 5, 5, 5, 5, 1, 5, 5, 5, 2]  # files of 20, 11 and 17 images in row groups of 5


@pytest.fixture
def shards(tmp_path, tiny_images):
    """48 images, and the three files they are in."""
    images = tiny_images()["train"]
    return images, write_shards(tmp_path, images, [20, 11, 17], 5)


def stream(files):
    return StreamedImages(files, FEATURES, image_column="image", label_column="label")


def test_a_stream_is_the_files_in_order(shards):
    images, files = shards
    streamed = stream(files)
    assert len(streamed) == 48 and streamed.block_sizes == BLOCKS
    for index in (*range(48), -1):
        assert streamed[index] == images[index]
    assert streamed.__getitems__([47, 3, 3, 20]) == [images[index] for index in (47, 3, 3, 20)]
    with pytest.raises(IndexError):
        streamed[48]


def test_a_stream_can_be_cut_short(shards):
    images, files = shards
    streamed = stream(files).take(23)
    assert len(streamed) == 23 == sum(streamed.block_sizes)
    assert streamed[22] == images[22]
    with pytest.raises(IndexError):
        streamed[23]
    assert len(stream(files).take(1000)) == 48


def test_a_stream_survives_the_way_to_a_worker(shards):
    images, files = shards
    copy = pickle.loads(pickle.dumps(stream(files)))
    assert copy[30] == images[30]


def test_image_bytes_without_a_path_and_labels_by_name(tmp_path, tiny_images):
    rows = [tiny_images()["train"][index] for index in range(6)]
    table = pa.table(
        {
            "jpg": [row["image"]["bytes"] for row in rows],
            "kind": [FEATURES["label"].int2str(row["label"]) for row in rows],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    options = {"image_column": "jpg", "label_column": "kind"}
    streamed = StreamedImages(
        [str(tmp_path / "a.parquet")], FEATURES, classes={"red": 0, "green": 1, "blue": 2}, **options
    )
    assert [row["label"] for row in streamed] == [row["label"] for row in rows]
    assert streamed[2]["image"] == {"bytes": rows[2]["image"]["bytes"], "path": None}
    unknown = StreamedImages([str(tmp_path / "a.parquet")], FEATURES, classes={"red": 0, "green": 1}, **options)
    with pytest.raises(ValueError, match="label 'blue', which is none of the 2 classes"):
        unknown[2]


def test_files_that_cannot_be_read_are_named(tmp_path, shards):
    _, files = shards
    with pytest.raises(ValueError, match="cannot read '.*nowhere.parquet': FileNotFoundError"):
        stream([str(tmp_path / "nowhere.parquet")])
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="cannot read '.*text.parquet': ArrowInvalid"):
        stream([*files, str(tmp_path / "text.parquet")])


def loader(images, num_workers=0, epoch=0, shuffle_buffer_size=16, num_repeats=3):
    views = TrainViews(images, build_train_transform(16, crop="random_resized"), seed=5)
    sampler = RepeatedAugmentationSampler(
        len(views), num_repeats, 5, 8, block_sizes=BLOCKS, shuffle_buffer_size=shuffle_buffer_size
    )
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, 8, drop_last=True)
    return DataLoader(views, batch_sampler=batches, collate_fn=collate_views, num_workers=num_workers)


def same(some, others):
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])
        assert (one["view_seeds"] == other["view_seeds"]).all()


@pytest.mark.parametrize("shuffle_buffer_size", [0, 16, 1000])
def test_views_of_a_stream_are_those_of_the_set_on_disk(shards, shuffle_buffer_size):
    images, files = shards
    options = {"shuffle_buffer_size": shuffle_buffer_size}
    same(loader(stream(files), **options), loader(images, **options))


@pytest.mark.parametrize("num_workers", [1, 4])
def test_batches_of_a_stream_do_not_depend_on_the_workers(shards, num_workers):
    _, files = shards
    same(loader(stream(files)), loader(stream(files), num_workers))


def test_epochs_of_a_stream_differ(shards):
    _, files = shards
    first, second = (torch.cat([b["pixel_values"] for b in loader(stream(files), epoch=epoch)]) for epoch in (0, 1))
    assert (first == second).flatten(1).all(dim=1).sum() == 0


@pytest.mark.parametrize("num_repeats", [1, 3])
def test_each_block_is_read_once_an_epoch_and_few_are_open(tmp_path, tiny_images, monkeypatch, num_repeats):
    images = tiny_images(train=600)["train"]
    streamed = stream(write_shards(tmp_path, images, [300, 300], 10))
    reads, most_open = Counter(), 0
    read_block = StreamedImages._read_block

    def counted(self, number):
        reads[number] += 1
        return read_block(self, number)

    monkeypatch.setattr(StreamedImages, "_read_block", counted)
    sampler = RepeatedAugmentationSampler(
        600, num_repeats, 0, 20, block_sizes=streamed.block_sizes, shuffle_buffer_size=120
    )
    for batch in BatchSampler(sampler, 20, drop_last=True):
        streamed.__getitems__([int(view) for view in batch])
        most_open = max(most_open, len(streamed._open_blocks))
    assert len(reads) <= 60 / num_repeats + 2 * sampler.turns and sum(reads.values()) <= 1.05 * len(reads)
    assert most_open <= 30  # lanes of 15 images and the block they end in, and what has just been read


def test_a_server_that_is_away_for_a_while_is_waited_for(shards, monkeypatch):
    images, files = shards
    calls = Counter()

    class Flaky:
        def open(self, path, mode, **options):
            calls["opened"] += 1
            if 2 <= calls["opened"] <= 4:
                raise ConnectionError("503")
            return open(path, mode)

    monkeypatch.setattr(streaming_module.fsspec.core, "url_to_fs", lambda url: (Flaky(), url.removeprefix("hub://")))
    monkeypatch.setattr(streaming_module.time, "sleep", lambda seconds: calls.update(waited=seconds))
    streamed = stream([f"hub://{files[0]}"])
    assert streamed[3] == images[3]
    assert calls["waited"] == 1 + 2 + 4
    monkeypatch.setattr(Flaky, "open", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("gone")))
    with pytest.raises(ValueError, match="cannot read 'hub://.*': ConnectionError: gone"):
        streamed[10]
    assert calls["waited"] == 7 + sum(streaming_module.RETRY_WAITS)


@pytest.mark.parametrize(("status", "tries"), [(403, 1), (404, 1), (429, 2), (503, 2)])
def test_a_refusal_is_not_asked_again(shards, monkeypatch, status, tries):
    _, files = shards
    opened = []

    class Refusing:
        def open(self, path, mode, **options):
            opened.append(path)
            if len(opened) == 1:
                error = OSError("no")
                error.response = SimpleNamespace(status_code=status)
                raise error
            return open(path, mode)

    monkeypatch.setattr(
        streaming_module.fsspec.core, "url_to_fs", lambda url: (Refusing(), url.removeprefix("hub://"))
    )
    monkeypatch.setattr(streaming_module.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="cannot read") if tries == 1 else nullcontext():
        stream([f"hub://{files[0]}"])
    assert len(opened) == tries


# Over HTTP

TRAIN_ON_A_STREAM = """
import json, sys
from pathlib import Path
import torch
from PIL import Image
from hf_deit import (
    DeiTConfig, DeiTForImageClassificationWithTeacher, DistillationConfig, DistillationTrainer, TrainViews,
    build_train_transform, load_image_dataset,
)

output = Path(sys.argv[1])


class Recorder(DistillationTrainer):
    def _prepare_inputs(self, inputs):
        self.seen.append(list(zip(inputs["labels"].tolist(), inputs["view_seeds"].tolist())))
        return super()._prepare_inputs(inputs)


for name, batch_size, num_repeats in {runs}:
    images = load_image_dataset(name, streaming=True)
    names = images["train"].features["label"].names
    config = DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8,
        id2label=dict(enumerate(names)),
    )
    arguments = DistillationConfig(
        output_dir=str(output / "run"), distillation_type="label", num_repeats=num_repeats, num_train_epochs=2,
        per_device_train_batch_size=batch_size, warmup_epochs=0, learning_rate=1e-3, dataloader_num_workers=2,
        eval_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, seed=5,
    )
    trainer = Recorder(
        DeiTForImageClassificationWithTeacher(config), arguments, mean=(0.5,) * 3, std=(0.5,) * 3,
        train_dataset=TrainViews(images["train"], build_train_transform(16, crop="random_resized"), seed=5),
    )
    trainer.seen = []
    trainer.train()
    record = output / f"{{name.split('/')[1]}}-{{num_repeats}}-{{arguments.process_index}}.json"
    record.write_text(json.dumps({{"seen": trainer.seen, "eval": len(images["eval"]), "classes": len(names)}}))
"""
RUNS = [("user/pictures", 6, 3), ("user/pictures", 6, 1), ("user/uneven", 1, 1)]


def every_image_its_own_class(folder, sizes, split="train"):
    rng, total = np.random.default_rng(0), sum(sizes)
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {n}" for n in range(total)])}
    )
    pictures = [Image.fromarray(pixels) for pixels in rng.integers(0, 256, (total, 16, 16, 3), dtype=np.uint8)]
    images = datasets.Dataset.from_dict({"picture": pictures, "label": list(range(total))}, features)
    folder.mkdir(parents=True)
    files, start = [], 0
    for number, size in enumerate(sizes):
        files.append(folder / f"{split}-{number:05d}-of-{len(sizes):05d}.parquet")
        images.select(range(start, start + size)).to_parquet(str(files[-1]), batch_size=4)
        start += size
    return files


def test_two_ranks_train_on_a_stream_over_http(hub, tmp_path):
    """2 gloo ranks x 2 loader workers on 5 shards; on 2 shards of 5 and 3 images, one image a rank and step."""
    shards = {"user/pictures": [11, 9, 8, 5, 3], "user/uneven": [5, 3]}
    local = {}
    for name, sizes in shards.items():
        folder = tmp_path / name
        local[name] = [str(file) for file in every_image_its_own_class(folder, sizes)]
        (folder / "test.parquet").write_bytes((folder / f"train-00000-of-{len(sizes):05d}.parquet").read_bytes())
        hub.add_repo("dataset", name, folder)
    script = tmp_path / "script.py"
    script.write_text(TRAIN_ON_A_STREAM.format(runs=RUNS))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            str(script),
            str(tmp_path),
        ],
        env=hub.environment | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("will be downloaded by") == len(RUNS)  # one warning per run: too few row groups

    for name, batch_size, num_repeats in RUNS:
        ranks = [
            json.loads((tmp_path / f"{name.split('/')[1]}-{num_repeats}-{rank}.json").read_text()) for rank in (0, 1)
        ]
        total = sum(shards[name])
        assert all(rank["classes"] == total and rank["eval"] == shards[name][0] for rank in ranks)
        steps = [sorted(map(tuple, one + other)) for one, other in zip(*(r["seen"] for r in ranks), strict=True)]
        per_epoch = total // (2 * batch_size)
        assert len(steps) == 2 * per_epoch
        # What one process makes of the same files on disk
        streamed = StreamedImages(local[name], FEATURES, image_column="picture", label_column="label")
        views = TrainViews(streamed, build_train_transform(16, crop="random_resized"), seed=5)
        sampler = RepeatedAugmentationSampler(total, num_repeats, 5, 2 * batch_size, block_sizes=streamed.block_sizes)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            seen = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
            for step, batch in zip(seen, BatchSampler(sampler, 2 * batch_size, drop_last=True), strict=True):
                assert step == sorted((row["labels"], row["view_seeds"]) for row in views.__getitems__(batch))
            counts = Counter(label for step in seen for label, _ in step)
            assert set(counts.values()) == {num_repeats}
            assert len(counts) == per_epoch * 2 * batch_size // num_repeats
        assert steps[:per_epoch] != steps[per_epoch:]
    # Of the training files ranges were asked for, never a whole one.
    train = [request for request in hub.requests if "/store/" in request.path and "train-" in request.path]
    assert train and all(request.range for request in train if request.method == "GET")


READ_A_STREAM = """
import hashlib, json, sys, time
import torch
from hf_deit import load_image_dataset
from hf_deit.data import streaming

sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 0.05))  # between the tries of the client, too
images = load_image_dataset("user/pictures", streaming=True, splits=("train",), eval_fraction=0)["train"]
open(sys.argv[3], "x").close()
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(int(sys.argv[1]))).tolist()
read, longest = [], 0.0
for _ in range(int(sys.argv[2])):
    for start in range(0, len(order), 4):
        begin = time.monotonic()
        images._open_blocks.clear()  # every batch is asked of the server
        for index, row in zip(order[start : start + 4], images.__getitems__(order[start : start + 4])):
            read.append((index, row["label"], hashlib.sha256(row["image"]["bytes"]).hexdigest()))
        longest = max(longest, time.monotonic() - begin)
print(json.dumps({"read": read, "longest": longest}))
"""


@pytest.mark.parametrize(
    ("num_readers", "epochs"), [(2, 1), pytest.param(8, 6, marks=pytest.mark.slow)], ids=["two", "eight, for longer"]
)
def test_readers_get_the_right_images_of_a_server_that_fails_in_every_way(hub, tmp_path, num_readers, epochs):
    """Errors, broken and stalled connections, short ranges, and another content of the same size behind the branch."""
    files = every_image_its_own_class(tmp_path / "pictures", [11, 9, 8])
    repository = hub.add_repo("dataset", "user/pictures", tmp_path / "pictures")
    hub.stall_seconds, hub.latency = 4.0, 0.005
    environment = hub.environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "OMP_NUM_THREADS": "1"}
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READ_A_STREAM, str(number), str(epochs), str(tmp_path / f"found-{number}")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(num_readers)
    ]
    rng, faults, begin = random.Random(0), Counter(), time.monotonic()
    while len(list(tmp_path.glob("found-*"))) < num_readers:  # all at one commit, before another
        assert all(reader.poll() is None for reader in readers)
        time.sleep(0.05)
    changed = bool(repository.commit({file.name: bytes(file.stat().st_size) for file in files}))
    while any(reader.poll() is None for reader in readers) and time.monotonic() - begin < 120:
        if not any(request.range for request in hub.requests):
            time.sleep(0.05)  # nothing is read yet
            continue
        if sum(faults.values()) == 12 * num_readers * epochs:
            break
        kind = rng.choice(("fail", "cut", "stall", "short"))
        faults[kind] += 1
        if kind == "fail":
            hub.fail_next(1, rng.choice((500, 502, 503, 429)), ".parquet")
        elif kind == "cut":
            hub.cut_after(rng.choice((0, 1, 100)), ".parquet")
        elif kind == "stall":
            hub.stall_after(rng.choice((0, 50)), ".parquet")
        elif kind == "short":
            hub.shorten(rng.choice((0, 1, 100)), ".parquet")
        time.sleep(0.1)
    try:
        ends = [reader.communicate(timeout=240) for reader in readers]
    finally:
        for reader in readers:
            reader.kill()
    assert [reader.returncode for reader in readers] == [0] * num_readers, [error[-1500:] for _, error in ends]
    local = StreamedImages([str(file) for file in files], FEATURES, image_column="picture", label_column="label")
    expected = {
        (index, row["label"], hashlib.sha256(row["image"]["bytes"]).hexdigest()) for index, row in enumerate(local)
    }
    longest = 0.0
    for out, _ in ends:
        result = json.loads(out)
        assert set(map(tuple, result["read"])) == expected and len(result["read"]) == 28 * epochs
        longest = max(longest, result["longest"])
    assert changed and longest < 120
    print(f"{num_readers} readers, faults {dict(faults)}, longest wait {longest:.1f} s")
