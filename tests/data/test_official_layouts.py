"""local_layouts.py: folders of classes beside torchvision's reader, names of shards, layouts that are broken."""

import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import ImageFolder

from hf_deit.data import official_layouts as local_layouts
from hf_deit.data.official_layouts import find_image_folders, find_shards, read_image_folders, sort_classes


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")


def samples(folder, train_folder=None):
    found = read_image_folders(folder, train_folder)
    return [
        (os.path.relpath(path, folder), found.class_names[label]) for path, label in zip(found.images, found.labels)
    ]


# --- folders of classes ------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="1 classes that .*train.* has no images of, such as z; both need the same"):
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


# --- shards ------------------------------------------------------------------------------------------------------


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


# --- official layouts that are not whole -------------------------------------------------------------------------


def test_a_layout_is_found_in_a_directory_or_just_below_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert local_layouts.FLOWERS102.find(tmp_path) is None
    (tmp_path / "a" / "setid.mat").touch()
    assert local_layouts.FLOWERS102.find(tmp_path) == tmp_path / "a" == local_layouts.FLOWERS102.find(tmp_path / "a")


class Bomb:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize(
    "layout, folder, meta, fix",
    [
        (local_layouts.CIFAR10, "cifar-10-batches-py", "batches.meta", "cifar-10-binary.tar.gz"),
        (local_layouts.CIFAR100, "cifar-100-python", "meta", "cifar-100-binary.tar.gz"),
    ],
)
def test_the_pickled_cifar_is_never_opened(tmp_path, layout, folder, meta, fix):
    (tmp_path / folder).mkdir()
    for name in (meta, "data_batch_1", "train", "test"):
        (tmp_path / folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=f"Python version, a pickle, .* never opened; get the binary version, {fix}"):
        layout.read(layout.find(tmp_path), "train")


def test_truncated_files_are_refused(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073 + 5))
    with pytest.raises(ValueError, match="test_batch.bin' has 3078 bytes, no multiple of 3073: truncated"):
        local_layouts.CIFAR10.read(tmp_path, "test")
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\3" + b"\0\0\0\2" * 3 + bytes(7)))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz' is no whole idx file"):
        local_layouts.FASHION_MNIST.read(tmp_path, "test")


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="data_batch_1.bin' is missing; the set is not complete"):
        local_layouts.CIFAR10.read(tmp_path, "train")
    with pytest.raises(ValueError, match="cars_test_annos_withlabels.mat' or .* is missing"):
        local_layouts.CARS.read(tmp_path, "test")
    savemat(tmp_path / "setid.mat", {"tstid": np.array([[2]])})
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[1, 2]])})
    with pytest.raises(ValueError, match="image_00002.jpg' is missing"):
        local_layouts.FLOWERS102.read(tmp_path, "test")


def test_a_flat_imagenet_image_without_a_label_is_refused(tmp_path):
    write_image(tmp_path / "val" / "ILSVRC2012_val_00000007.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1 2 3 4\n")
    with pytest.raises(ValueError, match="00000007.JPEG': neither its folder nor the list of labels says"):
        local_layouts.IMAGENET.read(tmp_path, "validation")


def test_real_labels_follow_the_number_of_the_image_in_any_folder(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[1], [2, 3], []]))
    for name in (
        "n02/ILSVRC2012_val_00000001.JPEG",
        "n01/ILSVRC2012_val_00000003.JPEG",
        "n01/ILSVRC2012_val_00000002.JPEG",
    ):
        write_image(tmp_path / "val" / name)
    found = local_layouts.IMAGENET_REAL.read(tmp_path, "validation")
    assert [Path(path).stem[-1] for path in found.images] == ["1", "2", "3"]
    assert found.labels == [[1], [2, 3], []]
    write_image(tmp_path / "val" / "n01" / "ILSVRC2012_val_00000004.JPEG")
    with pytest.raises(ValueError, match="holds 4 images named .* real.json 3 lists of labels"):
        local_layouts.IMAGENET_REAL.read(tmp_path, "validation")
