"""folders.py: folders of classes as torchvision reads them, and the names of shards."""

import os
from pathlib import Path

import pytest
from support.images import write_image
from torchvision.datasets import ImageFolder

from hf_deit.data.folders import find_image_folders, find_shards, read_image_folders, sort_classes


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


def test_a_class_folder_without_images_is_no_class(tmp_path):
    write_image(tmp_path / "cat" / "1.jpg")
    write_image(tmp_path / "dog" / "1.jpg")
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "readme.txt").write_text("to come")
    assert read_image_folders(tmp_path).class_names == ["cat", "dog"]


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
