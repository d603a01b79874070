"""folders.py: folders of classes as torchvision reads them, and the names of shards."""

import builtins
import io
import logging
import os
import random
from pathlib import Path

import pytest
from PIL import Image
from support.images import write_image
from torchvision.datasets import ImageFolder

from hf_deit.data.folders import (
    UnreadFiles,
    find_image_folders,
    find_shards,
    read_image_folders,
    sort_classes,
    split_named,
)


def samples(folder, train_folder=None):
    found = read_image_folders(folder, train_folder)
    return [
        (os.path.relpath(path, folder), found.class_names[label]) for path, label in zip(found.images, found.labels)
    ]


def test_folders_are_read_as_torchvision_reads_them(tmp_path):
    for name in ("n02/b.JPEG", "n02/a.jpg", "n01/x.PNG", "n01/deep/er/y.webp", "n10/z.Jpg", "n10/10.jpg", "n10/9.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "n01" / "notes.txt").write_text("not an image")
    theirs = ImageFolder(tmp_path)
    ours = read_image_folders(tmp_path)
    assert ours.class_names == theirs.classes
    assert sorted(zip(ours.images, ours.labels)) == sorted(theirs.samples)
    assert ours.labels == theirs.targets


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path):
    for name in ("cat/1.jpg", "cat/._1.jpg", "cat/.thumbs/1.jpg", ".ipynb_checkpoints/1.jpg", "dog/1.jpg"):
        write_image(tmp_path / "train" / name)
    write_image(tmp_path / ".cache" / "cat" / "1.jpg")
    assert list(find_image_folders(tmp_path)) == ["train"]
    assert samples(tmp_path / "train") == [("cat/1.jpg", "cat"), ("dog/1.jpg", "dog")]


def test_an_empty_class_folder_is_no_class_and_one_warning(tmp_path, caplog):
    write_image(tmp_path / "cat" / "1.jpg")
    write_image(tmp_path / "dog" / "1.jpg")
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / ".gitkeep").touch()
    assert read_image_folders(tmp_path).class_names == ["cat", "dog"]
    assert "1 class folders hold no files" in caplog.text and repr(str(tmp_path / "bird")) in caplog.text


def test_a_class_missing_in_val_keeps_its_place(tmp_path):
    for name in ("train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "val/a/1.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "val" / "b").mkdir()
    folders = find_image_folders(tmp_path)
    found = read_image_folders(folders["val"], folders["train"])
    assert (found.class_names, found.labels) == (["a", "b", "c"], [0, 2])


def test_a_class_only_val_has_is_refused(tmp_path):
    for name in ("train/a/1.jpg", "val/a/1.jpg", "val/z/1.jpg"):
        write_image(tmp_path / name)
    with pytest.raises(
        ValueError, match="1 classes that .*train.* has no images of, such as z; both folders need the same"
    ):
        read_image_folders(tmp_path / "val", tmp_path / "train")


def test_folders_named_by_numbers_are_in_the_order_of_the_numbers(tmp_path):
    for name in ("10", "9", "0", "100"):
        write_image(tmp_path / name / "1.jpg")
    found = read_image_folders(tmp_path)
    assert found.class_names == ["0", "9", "10", "100"]
    assert [Path(path).parent.name for path in found.images] == ["0", "9", "10", "100"]
    assert found.labels == [0, 1, 2, 3]
    assert sort_classes(["10", "9", "x"]) == ["10", "9", "x"]  # words among them: the alphabet
    assert sort_classes(["2", "01", "1"]) == ["01", "1", "2"]


def test_a_class_folder_may_be_a_link(tmp_path):
    write_image(tmp_path / "elsewhere" / "1.jpg")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    assert samples(tmp_path / "train") == [("cat/1.jpg", "cat")]


def test_split_folders_keep_their_names(tmp_path):
    for name in ("train/a/1.jpg", "val/a/1.jpg", "test/1.jpg", "docs/figure.png"):
        write_image(tmp_path / name)
    (tmp_path / "dev").mkdir()
    folders = find_image_folders(tmp_path)
    assert sorted(folders) == ["test", "train", "val"]
    with pytest.raises(ValueError, match="holds images but no folder per class; expected test/<class>/<image>.jpg"):
        read_image_folders(folders["test"], folders["train"])


def test_classes_without_split_folders_are_for_training(tmp_path):
    write_image(tmp_path / "cat" / "1.jpg")
    assert find_image_folders(tmp_path) == {"train": tmp_path}
    assert find_image_folders(tmp_path / "cat") == {}


@pytest.mark.parametrize(
    "files, suffix, expected",
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-0.parquet"], ".parquet", "train test"),
        (["train/0000.parquet", "validation/0000.parquet"], ".parquet", "train validation"),
        (["train/part-0.parquet", "val/part-0.parquet"], ".parquet", "train val"),
        (["data/one.parquet", ".hidden/train.parquet", "._train.parquet"], ".parquet", "one"),
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], ".tar", "train validation"),
        (["ILSVRC2012_img_train.tar", "images.tar", "devkit.tar"], ".tar", "train"),
    ],
)
def test_shards_are_grouped_by_their_split(tmp_path, files, suffix, expected):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    shards = find_shards(tmp_path, suffix)
    assert sorted(shards) == sorted(expected.split())
    assert all(paths == sorted(paths) for paths in shards.values())


def test_deep_shards_are_found_when_asked_for(tmp_path):
    (tmp_path / "default" / "train").mkdir(parents=True)
    (tmp_path / "default" / "train" / "0000.parquet").touch()
    assert find_shards(tmp_path, ".parquet") == {}
    assert list(find_shards(tmp_path, ".parquet", everywhere=True)) == ["train"]


# What is an image, and what becomes of the other files

MAGIC_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000")


def image_bytes(format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 90)).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", MAGIC_FORMATS)
@pytest.mark.parametrize("name", ["picture", "picture.dat", "0123.45"])
def test_without_a_known_suffix_the_first_bytes_decide(tmp_path, format, name, caplog):
    write_image(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / name).write_bytes(image_bytes(format))
    assert len(read_image_folders(tmp_path).images) == 2 and not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"BM",
        b"BMW and other cars, a list",
        b"P6",
        b"P3rl",
        b"II",
        b"RIFF1234WAVEfmt ",
        b"\0\0\0\x18ftypheic",
        b"GIF",
    ],
)
def test_what_only_begins_like_an_image_is_none(tmp_path, content):
    write_image(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "notes").write_bytes(content)
    unread = UnreadFiles()
    assert len(read_image_folders(tmp_path, unread=unread).images) == 1
    assert dict(unread.counts) == {"without suffix": 1}


def test_a_raw_photograph_is_not_read_as_its_thumbnail(tmp_path):
    write_image(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "2.NEF").write_bytes(image_bytes("TIFF"))
    unread = UnreadFiles()
    assert len(read_image_folders(tmp_path, unread=unread).images) == 1
    assert dict(unread.counts) == {".nef": 1}


def test_a_file_with_a_known_suffix_is_not_opened(tmp_path, monkeypatch):
    write_image(tmp_path / "cat" / "1.png")
    monkeypatch.setattr(builtins, "open", lambda *args, **options: pytest.fail("opens a file"))
    assert len(read_image_folders(tmp_path).images) == 1


def test_files_that_are_not_read_are_one_warning(tmp_path, caplog):
    for name in ("cat/1.jpg", "dog/1.jpg", "loose.jpg"):
        write_image(tmp_path / name)
    for name in ("cat/b.heic", "cat/a.HEIC", "cat/.DS_Store", "dog/.cache/x.jpg", "dog/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "README.md").write_text("beside the classes")
    read_image_folders(tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "6 files are not read" in warning and "\n" not in warning
    for part in ("2 .heic", "2 hidden", "1 .txt", "1 outside the class folders", "install pillow-heif"):
        assert part in warning
    assert warning.count(str(tmp_path)) == 3


@pytest.mark.parametrize(
    "suffix, advice", [(".heic", "install pillow-heif"), (".txt", "convert"), (".cr2", "convert")]
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_a_readable_image_is_refused_by_name(tmp_path, suffix, advice, split):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            write_image(tmp_path / part / name / "1.png")
    os.rename(tmp_path / split / "dog" / "1.png", tmp_path / split / "dog" / f"1{suffix}")
    (tmp_path / split / "dog" / f"1{suffix}").write_bytes(b"no image by its first bytes")
    for folder, train in ((split, "train"), ("val", "train") if split == "train" else ("val", None)):
        with pytest.raises(ValueError, match=rf"'dog' \(1 \{suffix}\).*{advice}"):
            read_image_folders(tmp_path / folder, train and tmp_path / train)


def test_a_pipe_is_no_image(tmp_path):
    write_image(tmp_path / "cat" / "1.png")
    for name in ("2.png", "3"):
        os.mkfifo(tmp_path / "cat" / name)
    os.symlink("/dev/zero", tmp_path / "cat" / "4")
    unread = UnreadFiles()
    assert len(read_image_folders(tmp_path, unread=unread).images) == 1
    assert dict(unread.counts) == {"no regular file": 3}


def test_a_class_name_that_is_not_utf8_is_refused(tmp_path):
    write_image(tmp_path / "cat" / "1.png")
    os.rename(tmp_path / "cat", os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(ValueError, match=r"'caf\\udce9' .* not UTF-8.*rename") as error:
        read_image_folders(tmp_path)
    str(error.value).encode()


@pytest.mark.parametrize("seed", range(12))
def test_every_file_of_a_random_tree_is_used_or_reported(tmp_path, seed):
    rng = random.Random(seed)
    names = (
        "1.png",
        "2.JPG",
        "3",
        "4.dat",
        "5.heic",
        ".6.png",
        "7.txt",
        "8.jpg.bak",
        "Thumbs.db",
        "9.tiff",
        "x y.webp",
    )
    written = []
    for cls in ("a", "b", "c"):
        write_image(tmp_path / cls / "always.png")
        written.append(str(tmp_path / cls / "always.png"))
        for _ in range(rng.randrange(12)):
            folder = tmp_path.joinpath(cls, *rng.choices(("deep", ".hidden", "er"), k=rng.randrange(3)))
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / rng.choice(names)
            path.write_bytes(rng.choice((image_bytes("PNG"), image_bytes("JPEG"), b"", b"some text")))
            written.append(str(path))
    unread = UnreadFiles()
    images = read_image_folders(tmp_path, unread=unread).images
    assert sorted(images + unread.paths) == sorted(set(written))
    assert sum(unread.counts.values()) == len(unread.paths)
    assert not any("/." in os.path.relpath(path, tmp_path.parent) for path in images)


# Where the classes are


@pytest.mark.parametrize(
    "train", ["train", "Train", "TRAIN", "training", "Training_Set", "train images", "train-data"]
)
@pytest.mark.parametrize("held_out", ["Test", "testing", "VAL", "Valid", "validation", "Dev", "eval", "Evaluation"])
def test_splits_have_many_names(tmp_path, train, held_out):
    for split in (train, held_out):
        write_image(tmp_path / split / "cat" / "1.png")
    folders = find_image_folders(tmp_path)
    assert {folder.name for folder in folders.values()} == {train, held_out}
    assert set(folders) == {split_named(train), held_out.lower()}


def test_words_that_could_be_classes_are_classes_without_a_training_split(tmp_path):
    for name in ("testing", "production"):
        write_image(tmp_path / name / "1.png")
    assert find_image_folders(tmp_path) == {"train": tmp_path}


@pytest.mark.parametrize(
    "names", [("train", "Train"), ("train", "training"), ("val", "validation"), ("Test", "testing")]
)
def test_two_folders_of_one_split_are_refused(tmp_path, names):
    for split in ("train", *names):
        write_image(tmp_path / split / "cat" / "1.png")
    with pytest.raises(ValueError, match="two folders that mean the same split") as error:
        find_image_folders(tmp_path)
    assert all(repr(name) in str(error.value) for name in names)
    if names == ("val", "validation"):
        assert set(find_image_folders(tmp_path, {"eval": "val"})) == {"train", "val", "validation"}


@pytest.mark.parametrize("above", ["", "data/", "set/data/"])
@pytest.mark.parametrize("below", ["", "/images", "/a/b"])
def test_a_folder_around_the_classes_is_passed_through(tmp_path, above, below, caplog):
    for split in ("train", "val"):
        for cls in ("ant", "bee"):
            write_image(tmp_path / f"{above}{split}{below}" / cls / "1.png")
    (tmp_path / "README.md").write_text("beside")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._data").touch()
    with caplog.at_level(logging.WARNING, "hf_deit.data.folders"):
        folders = find_image_folders(tmp_path)
    assert folders == {split: tmp_path / f"{above}{split}{below}" for split in ("train", "val")}
    assert len(caplog.records) == bool(above or below)
    assert read_image_folders(folders["train"]).class_names == ["ant", "bee"]


def test_a_folder_around_classes_without_splits_is_passed_through(tmp_path):
    for cls in ("ant", "bee"):
        write_image(tmp_path / "images" / cls / "1.png")
    assert find_image_folders(tmp_path) == {"train": tmp_path / "images"}


def test_a_folder_beside_the_wrapping_one_is_not_dropped(tmp_path):
    for name in ("train/images/ant/1.png", "train/images/bee/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "train" / "labels").mkdir()
    (tmp_path / "train" / "labels" / "1.txt").touch()
    with pytest.raises(ValueError, match="'labels' .1 .txt."):
        read_image_folders(find_image_folders(tmp_path)["train"])


def test_splits_inside_the_classes_are_refused(tmp_path):
    for name in ("ant/train/1.png", "ant/test/1.png", "bee/train/1.png", "bee/test/2.png"):
        write_image(tmp_path / name)
    with pytest.raises(ValueError, match="splits inside its classes, such as 'ant/test'.* expected 'test/ant'"):
        read_image_folders(find_image_folders(tmp_path)["train"])


def test_classes_that_seem_to_be_one_level_deeper_are_one_warning(tmp_path, caplog):
    for name in ("part1/ant/1.png", "part1/bee/1.png", "part2/ant/1.png", "part2/bee/1.png"):
        write_image(tmp_path / name)
    read_image_folders(find_image_folders(tmp_path)["train"])
    (record,) = caplog.records
    assert "'part1', 'part2', and each of them holds the same folders 'ant', 'bee'" in record.getMessage()
