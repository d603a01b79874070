"""summary.py: what was found is counted right, told once, and names no directory of this machine."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from hf_deit import load_image_dataset
from hf_deit.data import summary as summary_module
from hf_deit.data.summary import summarize


def write(path, color, size=(20, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    for split, counts in (("train", {"ant": 4, "bee": 2, "cat": 3}), ("val", {"ant": 2, "cat": 1})):
        for number, (name, count) in enumerate(counts.items()):
            for image in range(count):
                write(tmp_path / split / name / f"{image}.png", (len(split), number, image))
    return tmp_path


def found(directory, **options):
    return summarize(load_image_dataset(str(directory), **options))


def lines(summary):
    return {line[:13].strip(): line[13:] for line in str(summary).splitlines()}


def test_images_and_classes_are_counted(photos):
    summary = found(photos)
    assert summary.parts["train"].counts == (4, 2, 3) and summary.parts["eval"].counts == (2, 0, 1)
    assert (summary.parts["train"].num_images, summary.parts["eval"].num_images) == (9, 3)
    said = lines(summary)
    assert said["dataset"] == f"image folders, {str(photos)!r}"
    assert said["to train"] == (
        "9 images of the split 'train'; 3 classes, 'ant' to 'cat'; fewest images 'bee' (2), most 'ant' (4)"
    )
    assert said["to evaluate"].startswith("3 images of the split 'val'")
    assert said["sample"] == "8 images: 20 x 12 pixels, RGB (8)"
    assert said["not read"] == "nothing: every file is an image in use"
    assert said["note"] == "classes with images to train on, but none to evaluate on: 1, 'bee'"
    assert summary.evaluates_on_new_images


def test_no_image_is_decoded_and_few_are_opened(photos, monkeypatch):
    for image in range(50):
        write(photos / "train" / "ant" / f"more{image}.png", (99, image, 0))
    images, opened = load_image_dataset(str(photos)), []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(args) or real(*args, **options))
    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("decodes an image"))
    summarize(images)
    assert len(opened) == 8


def test_sizes_and_modes_of_the_sample(tmp_path):
    for number, mode in enumerate(("RGB", "L", "RGB", "1")):
        for name in ("a", "b"):
            write(tmp_path / name / f"{number}.png", (number, 0, 0), size=(10 + number, 8), mode=mode)
    (tmp_path / "a" / "broken.png").write_bytes(b"not an image")
    summary = found(tmp_path, eval_fraction=0)
    assert len(summary.sample) == 7  # of 8, the damaged one is left out
    said = lines(summary)
    assert said["sample"].startswith("7 images: 10 x 8 to 13 x 8 pixels, RGB (") and "L (" in said["sample"]
    assert said["to evaluate"] == "nothing" and not summary.evaluates_on_new_images


def test_every_kind_of_file_that_is_not_read_is_listed(photos):
    for name in ("train/ant/x.heic", "train/ant/.DS_Store", "README.md", "test/ant/1.png", ".git/x", "loose.txt"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"x")
    (photos / "train" / "dodo").mkdir()
    said = lines(found(photos))["not read"]
    for part in (
        "files that are no image (1 hidden, 1 .heic): 2, such as 'train/ant/.DS_Store', 'train/ant/x.heic'",
        "files outside the class folders: 2, such as 'README.md', 'loose.txt'",
        "folders outside the splits in use: 2, such as '.git', 'test'",
        "empty class folders: 1, such as 'train/dodo'",
    ):
        assert part in said


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_identical_images_in_both_splits_are_counted(photos, copies):
    for number, name in enumerate(["ant/0", "ant/1", "cat/0"][:copies]):
        (photos / "val" / f"{name}.png").write_bytes((photos / "train" / "bee" / f"{number % 2}.png").read_bytes())
    summary = found(photos)
    assert summary.identical == copies and summary.evaluates_on_new_images == (copies == 0)
    expected = f"{copies} of the images to evaluate are training images too" if copies else "none of the images"
    assert lines(summary)["identical"].startswith(expected)


def test_what_would_take_long_is_said_to_be_not_compared(photos, monkeypatch):
    monkeypatch.setattr(summary_module, "MAX_FILES_COMPARED", 5)
    summary = found(photos)
    assert summary.identical is None and lines(summary)["identical"].startswith("not compared: there are too many")
    monkeypatch.setattr(summary_module, "MAX_FILES_COMPARED", 500)
    monkeypatch.setattr(summary_module, "MAX_BYTES_COMPARED", 5)
    assert found(photos).identical is None


def test_empty_files_are_a_note(photos):
    (photos / "train" / "ant" / "0.png").write_bytes(b"")
    (photos / "val" / "ant" / "0.png").write_bytes(b"")
    summary = found(photos)
    assert summary.identical == 0  # nothing equals nothing
    assert "empty image files, which count as damaged: 2, 'train/ant/0.png', 'val/ant/0.png'" in str(summary)


def test_class_names_that_nearly_agree_are_a_note(tmp_path):
    for name in ("cat", "Cat", "c at", "dog"):
        for number in range(2):
            write(tmp_path / name / f"{number}.png", (1, 2, 3))
    summary = found(tmp_path)
    assert [sorted(names) for names in summary.similar_class_names] == [["Cat", "c at", "cat"]]
    assert "differ only in upper and lower case or in blanks" in str(summary)


def test_a_set_in_memory_and_a_stream_say_what_they_know(tmp_path):
    digits = summarize(load_image_dataset("digits"))
    assert sum(digits.parts["train"].counts) == 1437 and digits.identical == 0 and digits.unread is None
    assert lines(digits)["sample"] == "8 images: 8 x 8 pixels, L (8)"
    images = load_image_dataset("digits", max_train_samples=40)
    assert sum(summarize(images).parts["train"].counts) == 40
    for split, rows in images.items():
        rows.to_parquet(str(tmp_path / f"{'train' if split == 'train' else 'test'}.parquet"))
    stream = found(tmp_path, streaming=True)
    assert stream.parts["train"].num_images == 40 and stream.parts["train"].counts is None
    said = lines(stream)
    assert said["to train"].endswith("images of each class: not known")
    assert said["sample"].startswith("not known") and said["identical"].startswith("not compared")


def test_the_file_and_the_card_hold_no_directory_of_this_machine(photos, tmp_path):
    (photos / "train" / "ant" / "new\nline.txt").write_bytes(b"x")
    os.rename(photos / "train" / "ant" / "1.png", os.fsencode(photos / "train" / "ant") + b"/caf\xe9.txt")
    with open(os.fsencode(photos / "train" / "ant") + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text")
    summary = found(photos)
    summary.write(tmp_path / "out")
    text = (tmp_path / "out" / "dataset.json").read_text("utf-8")
    facts = json.loads(text)
    assert facts["splits"]["train"]["images_by_class"] == {"ant": 3, "bee": 2, "cat": 3}
    assert facts["not_read"]["such_as"] == [r"train/ant/caf\udce9.txt", r"train/ant/new\nline.txt"]
    assert facts["not_read"]["files"] == {".txt": 2} and facts["dataset"] == photos.name
    for shown in (text, "\n".join(summary.sentences())):
        assert str(photos) not in shown
    assert all("\n" not in sentence and sentence.isprintable() for sentence in summary.sentences())
    assert all(line.isprintable() for line in str(summary).splitlines())


def test_what_is_held_out_is_said(tmp_path):
    for name in ("a", "b"):
        for number in range(10):
            write(tmp_path / name / f"{number}.png", (number, len(name), 0))
    summary = found(tmp_path)
    assert "4 images: 4 of the 20 of the split 'train' are held out" in lines(summary)["to evaluate"]
    assert summary.facts()["held_out_of_training_images"] == {"images": 4, "of": 20}
    assert not np.isnan(summary.identical)
