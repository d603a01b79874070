"""Records of teacher outputs: answers that are replayed train the very weights that asking would have trained."""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from support.runs import ConvTeacher, streamed, student, trainer
from torch import nn
from transformers import TrainerCallback

from hf_deit import (
    DistillationTrainer,
    EvalViews,
    Mixing,
    TrainViews,
    build_eval_transform,
    build_train_transform,
    load_teacher,
)
from hf_deit.data.decoding import decode_image
from hf_deit.teachers.fingerprint import fingerprint_of_images
from hf_deit.teachers.record import BATCH
from hf_deit.teachers.recording import RecordingTeacher
from hf_deit.teachers.replaying import ReplayedTeacher


STEPS = 6  # of an epoch: 48 images in batches of 8


def same_weights(one, other):
    weights = other.model.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in one.model.state_dict().items())


class StopAt(TrainerCallback):
    """As if the run were killed behind its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def steps_recorded(record):
    return json.loads((record / "record.json").read_text())["steps"]


def decisions(record, epoch, views=48, row=(("decision", "<u2"),)):
    """Class + 1 of each view, read with nothing of ours."""
    return np.fromfile(record / f"answers-{epoch:05d}.bin", np.dtype(list(row)), views)["decision"]


# What is trained


@pytest.mark.parametrize(
    "fields",
    [
        {"distillation_type": "hard", "dataloader_num_workers": 2},
        {"distillation_type": "soft"},
        pytest.param(
            {"distillation_type": "soft", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
            marks=pytest.mark.slow,
        ),
        pytest.param({"distillation_type": "hard", "stream": True}, marks=pytest.mark.slow),
    ],
    ids=["hard, two workers", "soft", "accumulated", "streamed"],
)
def test_recorded_and_replayed_runs_cut_in_mid_epoch_have_the_weights_of_an_online_one(tiny_images, tmp_path, fields):
    fields = {"num_train_epochs": 2, "shuffle_buffer_size": 16, "drop_path": 0.2} | fields
    model = {"drop_path_rate": fields.pop("drop_path")}
    images = streamed(tiny_images(), tmp_path) if fields.pop("stream", False) else tiny_images()
    online = trainer(images, tmp_path / "online", student(**model), **fields)
    online.train()
    record = tmp_path / "record"
    for name, teacher in (("teacher_record", "convnet"), ("teacher_replay", None)):
        settings = fields | {name: str(record), "save_strategy": "steps", "save_steps": 4}
        cut = trainer(images, tmp_path / name, student(**model), teacher, callbacks=[StopAt(8)], **settings)
        cut.train()
        if name == "teacher_record":
            assert cut.state.global_step == steps_recorded(record) == 8 and not same_weights(online, cut)
        resumed = trainer(images, tmp_path / name, student(**model), teacher, **settings)
        resumed.train(resume_from_checkpoint="auto")
        assert resumed.state.global_step == 12 and same_weights(online, resumed)
        assert steps_recorded(record) == 12


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_another_student_replays_the_record(tiny_images, tmp_path, kind):
    fields = {"distillation_type": kind, "teacher_record": str(tmp_path / "record"), "num_train_epochs": 2}
    trainer(tiny_images(), tmp_path / "first", **fields).train()
    other = {"distillation_type": kind, "distillation_alpha": 0.7, "distillation_temperature": 2.0, "ema_decay": 0.9}
    other |= {"learning_rate": 2e-3, "label_smoothing_factor": 0.0, "seed": 9, "data_seed": 42}

    def run(name, teacher, **replay):
        model = student(hidden_size=48, num_attention_heads=3, drop_path_rate=0.3)
        done = trainer(tiny_images(), tmp_path / name, model, teacher, **other, **replay)
        done.train()
        return done

    online = run("online", "convnet")
    replayed = run("replayed", None, teacher_replay=str(tmp_path / "record"))
    assert same_weights(online, replayed) and replayed.teacher.classifier is None


def test_a_hard_run_replays_the_decisions_of_a_soft_record(tiny_images, tmp_path):
    record = str(tmp_path / "record")
    trainer(tiny_images(), tmp_path / "soft", distillation_type="soft", teacher_top_k=1, teacher_record=record).train()
    runs = [
        trainer(tiny_images(), tmp_path / "online"),
        trainer(tiny_images(), tmp_path / "replay", teacher=None, teacher_replay=record),
    ]
    for run in runs:
        run.train()
    assert same_weights(*runs)


def test_a_teacher_that_is_replayed_is_asked_in_the_evaluation_only(tiny_images, tmp_path, capsys):
    record = str(tmp_path / "record")
    asked = trainer(tiny_images(), tmp_path / "asked", teacher_record=record).train_and_save()
    assert f"recorded in {record}" in capsys.readouterr().out
    run = trainer(tiny_images(), tmp_path / "replayed", teacher_replay=record)
    calls = []
    run.teacher.classifier.register_forward_hook(lambda *_: calls.append(run.state.global_step))
    metrics = run.train_and_save()
    assert metrics["teacher_top1"] == asked["teacher_top1"] and calls == [STEPS] * 3  # 20 images in batches of 8
    assert "decisions replayed from" in capsys.readouterr().out
    assert "its decisions replayed from the record of an earlier run" in (tmp_path / "replayed/README.md").read_text()
    alone = trainer(tiny_images(), tmp_path / "alone", teacher=None, teacher_replay=record)
    assert "teacher_top1" not in alone.train_and_save()
    assert "ConvTeacher" in (tmp_path / "alone/README.md").read_text() and "not in memory" in capsys.readouterr().out


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from support.runs import trainer
images = conftest.tiny_images.__wrapped__()()
fields = {{"num_train_epochs": 2, "per_device_train_batch_size": 4, "distillation_type": "soft"}}
trainer(images, {output!r} + "/recording", teacher_record={output!r} + "/record", **fields).train()
run = trainer(images, {output!r} + "/replaying", teacher=None, teacher_replay={output!r} + "/record", **fields)
run.train()
run.save_model()
"""


@pytest.mark.slow
def test_two_ranks_record_and_replay_what_one_does(tiny_images, tmp_path):
    """One process that accumulates two batches asks the same; its record is the same, byte for byte."""
    (tmp_path / "script.py").write_text(TWO_RANKS.format(tests=str(Path(__file__).parents[1]), output=str(tmp_path)))
    subprocess.run(
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
            str(tmp_path / "script.py"),
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        check=True,
        timeout=300,
    )
    fields = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "distillation_type": "soft"}
    fields["gradient_accumulation_steps"] = 2
    trainer(tiny_images(), tmp_path / "one", teacher_record=str(tmp_path / "of one"), **fields).train()
    names = sorted(path.name for path in (tmp_path / "record").iterdir())
    assert names == ["answers-00000.bin", "answers-00001.bin", "record.json"]
    for name in names:
        assert (tmp_path / "record" / name).read_bytes() == (tmp_path / "of one" / name).read_bytes(), name
    # and the record of two ranks trains the weights of one process that asks
    online = trainer(tiny_images(), tmp_path / "online", **fields)
    replayed = trainer(tiny_images(), tmp_path / "r", teacher=None, teacher_replay=str(tmp_path / "record"), **fields)
    for run in (online, replayed):
        run.train()
    assert same_weights(online, replayed)


# What is written


def test_decisions_on_disk_are_those_of_views_built_by_hand(tiny_images, tmp_path):
    images, record = tiny_images(), tmp_path / "record"
    run = trainer(images, tmp_path / "run", teacher_record=str(record), num_train_epochs=2, data_seed=5)
    run.train()
    transform, teacher = run.train_dataset.transform, ConvTeacher().eval()
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    mix = Mixing(3, mean.tolist(), std.tolist())
    for epoch in range(2):
        order = np.random.default_rng([5, epoch]).permutation(48)
        expected = []
        for start in range(0, 48, 8):
            pixels, labels, seeds = [], [], []
            for position in range(start, start + 8):
                row = images["train"][int(order[position // 3])]
                rng = random.Random(5 << 96 | epoch << 64 | position)
                seeds.append(rng.getrandbits(63))
                view = transform(decode_image(row["image"]), rng)
                pixels.append((torch.tensor(view) / 255 - mean) / std)
                labels.append(row["label"])
            mixed, _ = mix(torch.stack(pixels).permute(0, 3, 1, 2), torch.tensor(labels), np.array(seeds))
            expected += (teacher(mixed).argmax(dim=1) + 1).tolist()
        assert decisions(record, epoch).tolist() == expected and len(set(expected)) > 1
    assert (record / "answers-00000.bin").stat().st_size == 2 * 48 + 8 * 6  # rows, then a checksum for each batch


class Answers(nn.Module):
    """A teacher that answers with given logits."""

    name, sha256, num_parameters = "given", "0123456789abcdef", 1

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, pixel_values):
        return self.logits


def record_and_replay(directory, logits, kind="soft", top_k=100):
    """What comes back of the logits of one batch."""
    views = np.stack([np.zeros(len(logits), int), np.arange(len(logits))], axis=1)
    same = {"kind": kind, "batch_size": len(logits)}

    def fingerprint():
        return {"classes": logits.shape[1]} | dict.fromkeys(("images", "views of a step", BATCH), len(logits))

    options = {"directory": directory, "top_k": top_k, "device": torch.device("cpu")}
    recording = RecordingTeacher(Answers(logits), fingerprint, **options, **same)
    assert recording(None, views) is logits
    recording.commit(1)
    return ReplayedTeacher(fingerprint, record=directory, **same)(torch.empty(1), views)


def test_the_rest_of_the_probability_is_spread_evenly(tmp_path, caplog):
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) * 4
    replayed = record_and_replay(tmp_path / "record", logits, top_k=3)
    for row, got in zip(logits.double().tolist(), replayed.tolist(), strict=True):
        largest = sorted(range(9), key=lambda c: -row[c])[:3]
        rest = sum(math.exp(value) for c, value in enumerate(row) if c not in largest)
        for c in range(9):
            assert got[c] == pytest.approx(row[c] if c in largest else math.log(rest / 6), abs=1e-5)
    assert torch.equal(replayed.gather(1, logits.topk(3).indices), logits.topk(3).values)
    assert (tmp_path / "record/answers-00000.bin").stat().st_size == 5 * (6 * 3 + 6) + 8
    assert sum("3 largest logits of 9" in line for line in caplog.messages) == 2  # of each run, once


@pytest.mark.parametrize("top_k", [9, 100])
def test_all_logits_come_back_bit_for_bit(tmp_path, caplog, top_k):
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).nextafter(torch.tensor(9.0))
    assert torch.equal(record_and_replay(tmp_path, logits, top_k=top_k), logits) and not caplog.records


def test_every_class_fits_into_two_bytes_up_to_65535(tmp_path):
    logits = torch.zeros(2, 65_535)
    logits[:, -1] = 1
    assert record_and_replay(tmp_path / "fits", logits, kind="hard").tolist() == [65_534] * 2
    assert record_and_replay(tmp_path / "soft", logits, top_k=2).argmax(dim=1).tolist() == [65_534] * 2
    with pytest.raises(ValueError, match="there are 65,536 classes; a record holds at most 65,535"):
        record_and_replay(tmp_path / "more", torch.zeros(2, 65_536), kind="hard")


# What is refused


@pytest.fixture(scope="module")
def record(tiny_images, tmp_path_factory):
    """Of two steps; not to be changed."""
    folder = tmp_path_factory.mktemp("recorded")
    trainer(tiny_images(), folder / "run", teacher_record=str(folder / "record"), max_steps=2).train()
    return folder / "record"


@pytest.mark.parametrize(
    "fields, refusal",
    [
        ({"num_repeats": 1}, "num_repeats is 1, recorded with 3"),
        ({"data_seed": 7}, "view_seed is 7, recorded with 42"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size is 0, recorded with 16384"),
        ({"per_device_train_batch_size": 4}, "views of a device's batch is 4, recorded with 8"),
        ({"gradient_accumulation_steps": 2}, "views of a step is 16, recorded with 8"),
        ({"auto_augment": "none"}, "auto_augment is 'none', recorded with 'rand-m9-mstd0.5-inc1'"),
        ({"color_jitter": 0.1}, "color_jitter is 0.1, recorded with 0.3"),
        ({"horizontal_flip": 0}, "horizontal_flip is 0, recorded with 0.5"),
        ({"random_crop": "random_resized"}, "random_crop is 'random_resized', recorded with None"),
        ({"min_crop_scale": 0.5}, "min_crop_scale is 0.5, recorded with 0.08"),
        ({"random_erasing_prob": 0}, "random_erasing_prob is 0, recorded with 0.25"),
        ({"random_erasing_prob": 0}, "noise of erasing is None, recorded with 'cpu'"),
        ({"mixup_alpha": 0}, "mixup_alpha is 0, recorded with 0.8"),
        ({"cutmix_alpha": 0}, "cutmix_alpha is 0, recorded with 1.0"),
        ({"mix_prob": 0.5}, "mix_prob is 0.5, recorded with 1.0"),
        ({"mix_switch_prob": 0.1}, "mix_switch_prob is 0.1, recorded with 0.5"),
        ({"distillation_type": "soft"}, "holds the teacher's decisions only: use 'hard'"),
    ],
)
def test_another_setting_is_refused_by_name(tiny_images, tmp_path, record, fields, refusal):
    with pytest.raises(ValueError, match=refusal):
        trainer(tiny_images(), tmp_path, teacher=None, teacher_replay=str(record), **fields)
    if "distillation_type" not in fields:
        with pytest.raises(
            ValueError, match=f"holds the record of another run: .*{refusal}.*Choose another directory"
        ):
            trainer(tiny_images(), tmp_path, teacher_record=str(record), **fields)


def other_pixels(images):
    rows = list(images["train"])
    return images | {"train": [rows[-1] | {"label": rows[0]["label"]}, *rows[1:]]}


def other_label(images):
    rows = list(images["train"])
    return images | {"train": [*rows[:20], rows[20] | {"label": 0}, *rows[21:]]}


@pytest.mark.parametrize(
    "change, refusal",
    [
        (lambda images: images | {"train": images["train"].select(range(40))}, "images is 40, recorded with 48"),
        (
            lambda images: images | {"train": images["train"].select([*range(1, 48), 0])},
            "labels and images is",
        ),
        (other_pixels, "labels and images is '[0-9a-f]{16}', recorded with"),
        (other_label, "labels and images is"),
    ],
    ids=["fewer", "another order", "other pixels", "another label"],
)
def test_another_dataset_is_refused(tiny_images, tmp_path, record, change, refusal):
    with pytest.raises(ValueError, match=refusal):
        trainer(change(dict(tiny_images())), tmp_path, teacher=None, teacher_replay=str(record))


@pytest.mark.parametrize(
    "change, refusal",
    [
        ({"mean": (0.5, 0.5, 0.5)}, r"mean is \[0.5, 0.5, 0.5\], recorded with \[0.485"),
        ({"std": (0.5, 0.5, 0.5)}, r"std is \[0.5, 0.5, 0.5\], recorded with \[0.229"),
        ({"seed": 1}, "seed of the views is 1, recorded with 42"),
        ({"transform": {"image_size": 8}}, "transform.image_size is 8, recorded with 16"),
        ({"transform": {"ratio": (1, 1)}}, r"transform.ratio is '\(1, 1\)', recorded with '\(0.75, 1.33"),
        (
            {"transform": {"auto_augment": "rand-m8"}},
            r"transform.policies is .\(RandAug.*\.\.\. \([0-9a-f]{16}\)., rec",
        ),
        ({"names": {0: "red", 1: "blue", 2: "green"}}, "class names is"),
        ({"names": dict(enumerate("abcd"))}, "classes is 4, recorded with 3"),
        ({"train": [0]}, "the training set is a list, but teacher outputs .* for TrainViews only"),
    ],
)
def test_other_pieces_are_refused(tiny_images, tmp_path, record, change, refusal):
    images = tiny_images()
    args = trainer(images, tmp_path, teacher=None, teacher_replay=str(record)).args
    transform = build_train_transform(**({"image_size": 16} | args.transform_options() | change.get("transform", {})))
    views = TrainViews(images["train"], transform, change.get("seed", 42))
    pixels = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    pixels |= {name: value for name, value in change.items() if name in pixels}
    model = student(id2label=change["names"]) if "names" in change else student()
    with pytest.raises(ValueError, match=refusal):
        DistillationTrainer(
            *(model, args),
            train_dataset=change.get("train", views),
            eval_dataset=EvalViews(images["eval"], build_eval_transform(16)),
            **pixels,
        )


def test_the_hash_of_a_set_is_that_of_its_images_wherever_they_lie(tiny_images, tmp_path):
    train = tiny_images()["train"]
    files = [tmp_path / f"{index}.png" for index in range(48)]
    for file, row in zip(files, train, strict=True):
        file.write_bytes(row["image"]["bytes"])
    on_disk = [
        {"image": {"bytes": None, "path": str(file)}, "label": row["label"]}
        for file, row in zip(files, train, strict=True)
    ]
    assert fingerprint_of_images(on_disk) == fingerprint_of_images(train) == fingerprint_of_images(list(train))
    renamed = train.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))
    assert fingerprint_of_images(renamed) == fingerprint_of_images(train)  # names are a field of their own
    files[0].unlink()
    assert fingerprint_of_images(on_disk) != fingerprint_of_images(train)


def test_a_stream_is_known_by_its_blocks_and_images(tiny_images, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (streamed(tiny_images(), tmp_path / name)["train"] for name in "ab")
    assert fingerprint_of_images(one) == fingerprint_of_images(other) != fingerprint_of_images(other.take(47))
    assert not one._open_blocks  # no image is kept in memory, and in that of each worker


def test_a_longer_run_is_refused_and_both_lengths_named(tiny_images, tmp_path, record):
    run = trainer(tiny_images(), tmp_path, teacher=None, teacher_replay=str(record), num_train_epochs=3)
    with pytest.raises(
        ValueError, match=r"takes 18 steps = 3 epochs, but .* holds 2 steps = 0.3333 epochs: shorten this"
    ):
        run.train()
    trainer(tiny_images(), tmp_path, teacher=None, teacher_replay=str(record), max_steps=1).train()


def test_another_teacher_is_refused(tiny_images, tmp_path, record):
    other = ConvTeacher()
    nn.init.zeros_(other.head.bias)
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    other = load_teacher(other, id2label=None, image_size=16, **statistics)
    with pytest.raises(
        ValueError, match="teacher 'ConvTeacher' has the weights .* set teacher to the recorded one, or leave it out"
    ):
        trainer(tiny_images(), tmp_path, teacher=other, teacher_replay=str(record))
    with pytest.raises(ValueError, match=f"the teacher's sha256 is '{other.sha256}', recorded with"):
        trainer(tiny_images(), tmp_path, teacher=other, teacher_record=str(record))
    with pytest.raises(ValueError, match="kind is 'soft', recorded with 'hard'; top_k is 3, recorded with None"):
        trainer(tiny_images(), tmp_path, teacher_record=str(record), distillation_type="soft")


def test_a_run_that_did_not_record_from_its_start_is_refused(tiny_images, tmp_path):
    trainer(tiny_images(), tmp_path / "run", save_strategy="steps", save_steps=4).train()
    resumed = trainer(tiny_images(), tmp_path / "run", teacher_record=str(tmp_path / "record"))
    with pytest.raises(
        ValueError, match="resumes from step 4, but .* holds teacher outputs of the first 0 steps only"
    ):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


@pytest.fixture
def copied(record, tmp_path):
    """A copy of the record, to be damaged, and a trainer that replays it."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in record.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change_header(folder, **fields):
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


TEACHER = {"sha256": "0" * 16, "num_parameters": 1, "device": "cpu"}


def write_row(folder, position, value, forge=False):
    """Change a row, and with `forge` the checksum of its batch, as whoever wants to write a record can."""
    path = folder / "answers-00000.bin"
    data = bytearray(path.read_bytes())
    data[2 * position : 2 * position + 2] = value.to_bytes(2, "little")
    if forge:
        first = position // 8 * 8
        text = f"0 {first} ".encode() + bytes(data[2 * first : 2 * first + 16])
        data[96 + first : 96 + first + 8] = hashlib.blake2b(text, digest_size=8).digest()
    path.write_bytes(data)


def flip_bit(folder, at):
    path = folder / "answers-00000.bin"
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def swap_batches(folder):
    path = folder / "answers-00000.bin"
    data = path.read_bytes()
    path.write_bytes(data[16:32] + data[:16] + data[32:96] + data[104:112] + data[96:104] + data[112:])


@pytest.mark.parametrize(
    "damage, refusal",
    [
        (lambda d: os.truncate(d / "answers-00000.bin", 40), "has 40 bytes, expected 144: the file is damaged"),
        (lambda d: (d / "answers-00000.bin").unlink(), "answers-00000.bin' cannot be read .No such file"),
        (
            lambda d: (d / "record.json").unlink(),
            "holds no record.json: name a directory that was written by teacher_record",
        ),
        (lambda d: (d / "record.json").write_bytes(b"\xff{"), "record.json' cannot be read: 'utf-8'"),
        (lambda d: (d / "record.json").write_text("[" * 100_000), "record.json' cannot be read"),
        (lambda d: (d / "record.json").write_text("[1]"), "record.json' cannot be read"),
        (lambda d: (d / "record.json").write_bytes(bytes(2_000_000)), "record.json' cannot be read"),
        (lambda d: change_header(d, format=1), "its format is 1, and this version of hf_deit reads 2: record anew"),
        (lambda d: change_header(d, steps=-1), "record.json' is damaged"),
        (lambda d: change_header(d, steps=10**9), "answers-00001.bin' cannot be read"),
        (lambda d: change_header(d, kind="soft", top_k=10**9), "record.json' is damaged"),
        (lambda d: change_header(d, kind="soft", top_k=9), "is damaged: top_k is 9, above the number of classes"),
        (lambda d: change_header(d, kind="other"), "record.json' is damaged"),
        (lambda d: change_header(d, teacher={"name": "x"}), "record.json' cannot be read: 'num_parameters'"),
        (lambda d: change_header(d, fingerprint={}), "record.json' cannot be read: 'images'"),
        (lambda d: change_header(d, more=1), "record.json' cannot be read: .*more"),
        (lambda d: write_row(d, 13, 0), "has no teacher outputs for position 13 of epoch 0: resume the recording run"),
        (lambda d: flip_bit(d, 27), "the checksum of positions 8 to 15 of epoch 0 is another"),
        (lambda d: flip_bit(d, 96 + 8 + 3), "the checksum of positions 8 to 15 of epoch 0 is another"),
        (lambda d: swap_batches(d), "the checksum of positions 0 to 7 of epoch 0 is another"),
        (lambda d: write_row(d, 13, 4, forge=True), "a row from position 8 on has a class above 2"),
        (lambda d: change_header(d, teacher=TEACHER | {"name": "a\x1b[2J"}), "record.json' is damaged"),
        (lambda d: change_header(d, steps=6), "has no teacher outputs for position 16 of epoch 0"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tiny_images, tmp_path, copied, damage, refusal):
    damage(copied)
    steps = 3 if "16" in refusal else 2
    with pytest.raises(ValueError, match=refusal):
        trainer(tiny_images(), tmp_path, teacher=None, teacher_replay=str(copied), max_steps=steps).train()


def test_nothing_is_written_through_a_link(tiny_images, tmp_path, copied):
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(96))
    (copied / "answers-00000.bin").unlink()
    (copied / "answers-00000.bin").symlink_to(victim)
    with pytest.raises(
        ValueError, match="holds the link 'answers-00000.bin', and the run would write where the link points"
    ):
        trainer(tiny_images(), tmp_path, teacher_record=str(copied))
    (copied / "answers-00000.bin").unlink()
    run = trainer(tiny_images(), tmp_path, teacher_record=str(copied), max_steps=2)
    (copied / "answers-00000.bin").symlink_to(victim)  # later than it was looked for
    with pytest.raises(ValueError, match="teacher_record .* cannot be written"):
        run.train()
    assert victim.read_bytes() == bytes(96)


def test_a_directory_of_other_files_is_left_alone(tiny_images, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds 'thesis.tex' and no record.json: choose a directory that is empty"):
        trainer(tiny_images(), tmp_path / "run", teacher_record=str(tmp_path))
    with pytest.raises(ValueError, match="cannot be written .Not a directory."):
        trainer(tiny_images(), tmp_path / "run", teacher_record=str(tmp_path / "thesis.tex" / "record"))


def test_a_truncated_file_is_not_recorded_over(tiny_images, tmp_path, copied):
    os.truncate(copied / "answers-00000.bin", 40)
    with pytest.raises(ValueError, match="has 40 bytes, expected 144: the file is damaged. Delete the directory"):
        trainer(tiny_images(), tmp_path, teacher_record=str(copied), max_steps=2).train()


def test_a_batch_that_is_cut_otherwise_is_refused(tiny_images, tmp_path, record):
    run = trainer(tiny_images(), tmp_path, teacher=None, teacher_replay=str(record))
    views = np.stack([np.zeros(8, int), np.arange(8, 16)], axis=1)
    assert run.teacher(torch.empty(1), views).dtype == torch.int64
    for wrong in (views[:4], views + np.array([0, 1]), views[::-1], views + np.arange(8)[:, None] * [1, 0]):
        with pytest.raises(ValueError, match="expected 8 views in a row from a multiple of 8"):
            run.teacher(torch.empty(1), wrong)
    with pytest.raises(ValueError, match="the batch has no view_ids"):
        run.teacher(torch.empty(1), None)


def test_other_versions_are_one_warning(tiny_images, tmp_path, copied, caplog):
    change_header(copied, versions={"Pillow": "1.0"})
    trainer(tiny_images(), tmp_path, teacher=None, teacher_replay=str(copied))
    assert [line for line in caplog.messages if "Pillow" in line and "1.0" in line and "differ by 1 of 255" in line]


def test_answers_of_a_step_that_is_stopped_are_not_written(tiny_images, tmp_path):
    record = tmp_path / "record"
    run = trainer(tiny_images(), tmp_path / "run", teacher_record=str(record))
    with torch.no_grad():
        run.teacher.classifier.models[0].head.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="contain NaN"):
        run.train()
    assert [path.name for path in record.iterdir()] == ["record.json"] and steps_recorded(record) == 0


# The command line


@pytest.mark.slow
def test_the_command_line_records_and_replays(tmp_path):
    """The quickstart's student, whose recipe would train a teacher first if one were needed."""
    script = [sys.executable, str(Path(__file__).parents[2] / "recipes" / "run_distill.py")]
    short = ["--max_steps", "12", "--max_train_samples", "256", "--max_eval_samples", "40", "--eval_strategy", "no"]
    (tmp_path / "given_teacher.py").write_text(
        "import torch\n\ndef make():\n    torch.manual_seed(1)\n"
        "    nn = torch.nn\n    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))\n"
    )
    source = str(Path(__file__).parents[2] / "src")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), source]), "ACCELERATE_USE_CPU": "true"}

    def run(*words):
        command = [*script, *short, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    first = run("--teacher", "python:given_teacher:make", "--teacher_record", "record", "--output_dir", "first")
    assert first.returncode == 0, first.stderr
    second = run("--teacher_replay", "record", "--output_dir", "second")
    assert second.returncode == 0, second.stderr
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1] and not (tmp_path / "outputs").exists()
    card = (tmp_path / "second" / "README.md").read_text()
    assert "Teacher: python:given_teacher:make" in card and "its decisions replayed" in card
    refused = run("--teacher_replay", "record", "--output_dir", "third", "--num_repeats", "1")
    assert refused.returncode == 1 and refused.stderr.strip().splitlines()[-1].startswith("error: teacher_replay")


def test_one_replaced_image_or_label_is_another_set(tiny_images, tmp_path):
    """Also where the bytes are as many as before."""
    rows = [dict(row) for row in tiny_images()["train"]]
    before = fingerprint_of_images(rows)
    for index in range(len(rows)):
        data = bytearray(rows[index]["image"]["bytes"])
        data[-20] ^= 1
        image = {"bytes": bytes(data), "path": None}
        assert fingerprint_of_images([*rows[:index], rows[index] | {"image": image}, *rows[index + 1 :]]) != before
    assert fingerprint_of_images([*rows[:7], rows[7] | {"label": 2}, *rows[8:]]) != before


def test_of_a_large_set_every_size_and_label_counts(tiny_images, monkeypatch):
    monkeypatch.setattr("hf_deit.teachers.fingerprint.HASHED_BYTES", 0)
    rows = [dict(row) for row in tiny_images()["train"]]
    before = fingerprint_of_images(rows)
    longer = {"bytes": rows[5]["image"]["bytes"] + b"\0", "path": None}
    assert fingerprint_of_images([*rows[:5], rows[5] | {"image": longer}, *rows[6:]]) != before
    assert fingerprint_of_images(tiny_images()["train"]) == before


def test_one_replaced_label_or_image_of_a_stream_is_noticed(tiny_images, tmp_path):
    images, rows = tiny_images(), list(tiny_images()["train"])
    digests = set()
    for number, change in enumerate(({}, {"label": 2}, {"image": rows[20]["image"]})):
        (tmp_path / str(number)).mkdir()
        changed = [*rows[:9], rows[9] | change, *rows[10:]]
        train = datasets.Dataset.from_list(changed, features=images["train"].features)
        digests.add(fingerprint_of_images(streamed(dict(images) | {"train": train}, tmp_path / str(number))["train"]))
    assert len(digests) == 3


def test_a_teacher_that_answers_in_the_same_memory_is_recorded_batch_by_batch(tmp_path):
    logits = torch.zeros(4, 3)
    views = np.stack([np.zeros(8, int), np.arange(8)], axis=1)

    def fingerprint():
        return {"classes": 3, "images": 8, "views of a step": 8, BATCH: 4}

    same = {"kind": "soft", "batch_size": 4}
    options = {"directory": tmp_path / "record", "top_k": 3, "device": torch.device("cpu")}
    recording = RecordingTeacher(Answers(logits), fingerprint, **options, **same)
    for number in range(2):
        logits.fill_(number)
        recording(None, views[4 * number : 4 * number + 4])
    recording.commit(1)
    replayed = ReplayedTeacher(fingerprint, record=tmp_path / "record", **same)
    for number in range(2):
        assert (replayed(torch.empty(1), views[4 * number : 4 * number + 4]) == number).all()


def test_what_a_killed_first_write_left_is_no_obstacle(tiny_images, tmp_path):
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "record.jsonx1y2z3").write_text("{")
    trainer(tiny_images(), tmp_path / "run", teacher_record=str(tmp_path / "record"), max_steps=1).train()
    assert sorted(path.name for path in (tmp_path / "record").iterdir()) == ["answers-00000.bin", "record.json"]
