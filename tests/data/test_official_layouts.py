"""official_layouts.py: folders of classes beside torchvision's reader, names of shards, layouts that are broken."""

import gzip
import json
import os
import pickle
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from support.images import write_image

from hf_deit.data import official_layouts
from hf_deit.errors import UserError


# --- folders of classes ------------------------------------------------------------------------------------------


# --- shards ------------------------------------------------------------------------------------------------------


# --- official layouts that are not whole -------------------------------------------------------------------------


def test_a_layout_is_found_in_a_directory_or_just_below_it(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert official_layouts.FLOWERS102.find(tmp_path) is None
    (tmp_path / "a" / "setid.mat").touch()
    assert (
        official_layouts.FLOWERS102.find(tmp_path)
        == tmp_path / "a"
        == official_layouts.FLOWERS102.find(tmp_path / "a")
    )


class Bomb:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize(
    "layout, folder, meta, fix",
    [
        (official_layouts.CIFAR10, "cifar-10-batches-py", "batches.meta", "cifar-10-binary.tar.gz"),
        (official_layouts.CIFAR100, "cifar-100-python", "meta", "cifar-100-binary.tar.gz"),
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
    with pytest.raises(ValueError, match="test_batch.bin' has 3078 bytes, no multiple of 3073: the file is truncated"):
        official_layouts.CIFAR10.read(tmp_path, "test")
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\3" + b"\0\0\0\2" * 3 + bytes(7)))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte.gz' is not a complete idx file"):
        official_layouts.FASHION_MNIST.read(tmp_path, "test")


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="data_batch_1.bin' is missing; the dataset is incomplete"):
        official_layouts.CIFAR10.read(tmp_path, "train")
    with pytest.raises(ValueError, match="cars_test_annos_withlabels.mat' or .* is missing"):
        official_layouts.CARS.read(tmp_path, "test")
    savemat(tmp_path / "setid.mat", {"tstid": np.array([[2]])})
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[1, 2]])})
    with pytest.raises(ValueError, match="image_00002.jpg' is missing"):
        official_layouts.FLOWERS102.read(tmp_path, "test")


def test_a_flat_imagenet_image_without_a_label_is_refused(tmp_path):
    write_image(tmp_path / "val" / "ILSVRC2012_val_00000007.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1 2 3 4\n")
    with pytest.raises(ValueError, match="00000007.JPEG' has no label: neither its folder nor"):
        official_layouts.IMAGENET.read(tmp_path, "validation")


def test_real_labels_follow_the_number_of_the_image_in_any_folder(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[1], [2, 3], []]))
    for name in (
        "n02/ILSVRC2012_val_00000001.JPEG",
        "n01/ILSVRC2012_val_00000003.JPEG",
        "n01/ILSVRC2012_val_00000002.JPEG",
    ):
        write_image(tmp_path / "val" / name)
    found = official_layouts.IMAGENET_REAL.read(tmp_path, "validation")
    assert [Path(path).stem[-1] for path in found.images] == ["1", "2", "3"]
    assert found.labels == [[1], [2, 3], []]
    write_image(tmp_path / "val" / "n01" / "ILSVRC2012_val_00000004.JPEG")
    with pytest.raises(ValueError, match="holds 4 images named .* real.json holds 3 lists of labels"):
        official_layouts.IMAGENET_REAL.read(tmp_path, "validation")


# --- official files that are damaged, or written by a stranger ---------------------------------------------------


def flowers(root, **changed):
    files = {"setid.mat": {"tstid": [[1]]}, "imagelabels.mat": {"labels": [[1, 2]]}} | changed
    for name, content in files.items():
        if isinstance(content, bytes):
            (root / name).write_bytes(content)
        else:
            savemat(root / name, {key: np.array(value) for key, value in content.items()})
    write_image(root / "jpg" / "image_00001.jpg")


def cars(root, fname="1.jpg", number=1, names=("a", "b"), meta=None):
    (root / "devkit").mkdir(exist_ok=True)
    rows = np.array([(fname, number)], dtype=[("fname", "O"), ("class", "O")])
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": rows})
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    if meta is not None:
        (root / "devkit" / "cars_meta.mat").write_bytes(meta)
    write_image(root / "cars_test" / "1.jpg")


def inaturalist(root, **changed):
    listing = {
        "annotations": [{"image_id": 5, "category_id": 7}],
        "images": [{"id": 5, "file_name": "train_val2018/a/b/1.jpg"}],
    }
    files = {
        "categories.json": [{"id": 7, "name": "moth"}],
        "train2018.json": listing,
        "val2018.json": listing,
    } | changed
    for name, content in files.items():
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (root / name).write_bytes(content)
    write_image(root / "train_val2018/a/b/1.jpg")


def listed(name):
    return {"annotations": [{"image_id": 5, "category_id": 7}], "images": [{"id": 5, "file_name": name}]}


def imagenet(root, truth=b"1", meta=b"MATLAB 5.0 MAT-file"):
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "meta.mat").write_bytes(meta)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_bytes(truth)


def kaggle(root, text):
    (root / "LOC_val_solution.csv").write_bytes(text)
    write_image(root / "val" / "ILSVRC2012_val_00000001.JPEG")


def real(root, text):
    (root / "real.json").write_text(text)
    write_image(root / "val" / "ILSVRC2012_val_00000001.JPEG")


def idx(root, images, labels=None):
    (root / "t10k-images-idx3-ubyte.gz").write_bytes(images)
    whole = gzip.compress(b"\0\0\x08\1" + (1).to_bytes(4, "big") + b"\3")
    (root / "t10k-labels-idx1-ubyte.gz").write_bytes(labels or whole)


IDX = b"\0\0\x08\3" + b"".join(number.to_bytes(4, "big") for number in (1, 2, 2)) + bytes(4)
PRISTINE = {
    "flowers": (official_layouts.FLOWERS102, flowers),
    "cars": (official_layouts.CARS, cars),
    "inaturalist": (official_layouts.INATURALIST_2018, inaturalist),
    "real": (official_layouts.IMAGENET_REAL, lambda root: real(root, "[[1]]")),
    "idx": (official_layouts.FASHION_MNIST, lambda root: idx(root, gzip.compress(IDX))),
    "kaggle": (
        official_layouts.IMAGENET,
        lambda root: kaggle(root, b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1\n"),
    ),
}


@pytest.mark.parametrize("layout, write", PRISTINE.values(), ids=PRISTINE)
def test_the_layouts_that_are_damaged_below_are_read_where_they_are_not(tmp_path, layout, write):
    write(tmp_path)
    assert len(layout.read(tmp_path, layout.splits[-1]).images) == 1


@pytest.mark.parametrize(
    "layout, write, file",
    [
        ("FLOWERS102", lambda root: flowers(root, **{"setid.mat": b"MATLAB 5.0 MAT-file, cut"}), "setid.mat"),
        ("FLOWERS102", lambda root: flowers(root, **{"setid.mat": b""}), "setid.mat"),
        ("FLOWERS102", lambda root: flowers(root, **{"setid.mat": b"<html>404</html>" * 20}), "setid.mat"),
        ("FLOWERS102", lambda root: flowers(root, **{"setid.mat": {"other": [1]}}), "setid.mat"),
        ("FLOWERS102", lambda root: flowers(root, **{"setid.mat": {"tstid": [[9]]}}), "imagelabels.mat"),
        ("FLOWERS102", lambda root: flowers(root, **{"setid.mat": {"tstid": [[0]]}}), "imagelabels.mat"),
        ("FLOWERS102", lambda root: flowers(root, **{"imagelabels.mat": {"labels": [[300, 1]]}}), "imagelabels.mat"),
        ("CARS", lambda root: cars(root, meta=b"\0" * 200), "cars_meta.mat"),
        ("CARS", lambda root: cars(root, number=3), "cars_test_annos_withlabels.mat"),
        ("CARS", lambda root: cars(root, fname="../../etc/passwd"), "cars_test_annos_withlabels.mat"),
        ("CARS", lambda root: cars(root, fname="/dev/zero"), "cars_test_annos_withlabels.mat"),
        ("INATURALIST_2018", lambda root: inaturalist(root, **{"categories.json": b"[{"}), "categories.json"),
        ("INATURALIST_2018", lambda root: inaturalist(root, **{"categories.json": [1]}), "categories.json"),
        ("INATURALIST_2018", lambda root: inaturalist(root, **{"train2018.json": []}), "train2018.json"),
        ("INATURALIST_2018", lambda root: inaturalist(root, **{"val2018.json": {"images": 3}}), "val2018.json"),
        ("INATURALIST_2018", lambda root: inaturalist(root, **{"val2018.json": b"[" * 100_000}), "val2018.json"),
        ("INATURALIST_2018", lambda root: inaturalist(root, **{"val2018.json": listed("/dev/zero")}), "val2018.json"),
        (
            "INATURALIST_2018",
            lambda root: inaturalist(root, **{"val2018.json": listed("../../p.jpg")}),
            "val2018.json",
        ),
        ("IMAGENET", imagenet, "meta.mat"),
        ("IMAGENET", lambda root: kaggle(root, b"\xff\xfe,"), "LOC_val_solution.csv"),
        ("IMAGENET", lambda root: kaggle(root, b"a,b\n1,2\n"), "LOC_val_solution.csv"),
        ("IMAGENET", lambda root: kaggle(root, b"ImageId,PredictionString\nx\n"), "LOC_val_solution.csv"),
        ("IMAGENET_REAL", lambda root: real(root, "[1]"), "real.json"),
        ("IMAGENET_REAL", lambda root: real(root, "[[1000]]"), "real.json"),
        ("IMAGENET_REAL", lambda root: real(root, '[["a"]]'), "real.json"),
        ("IMAGENET_REAL", lambda root: real(root, "<html>"), "real.json"),
        ("FASHION_MNIST", lambda root: idx(root, gzip.compress(IDX)[:-9]), "t10k-images-idx3-ubyte.gz"),
        ("FASHION_MNIST", lambda root: idx(root, b"no gzip"), "t10k-images-idx3-ubyte.gz"),
        ("FASHION_MNIST", lambda root: idx(root, gzip.compress(b"\0\0\x08\xff" + bytes(40))), "t10k-images-idx3"),
        ("FASHION_MNIST", lambda root: idx(root, gzip.compress(b"\0\0\x08\3" + b"\xff" * 12)), "t10k-images-idx3"),
        ("FASHION_MNIST", lambda root: idx(root, gzip.compress(IDX), gzip.compress(IDX)), "t10k-"),
        ("FASHION_MNIST", lambda root: idx(root, gzip.compress(bytes(300 << 20))), "t10k-images-idx3-ubyte.gz"),
    ],
)
def test_a_damaged_official_file_is_named_in_one_line(tmp_path, layout, write, file):
    layout = getattr(official_layouts, layout)
    write(tmp_path)
    with pytest.raises(UserError) as refusal:
        layout.read(tmp_path, layout.splits[-1])
    assert file in str(refusal.value) and str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_official_file_that_is_a_pipe_or_a_device_is_not_opened(tmp_path):
    inaturalist(tmp_path)
    for name, make in (("categories.json", os.mkfifo), ("train2018.json", lambda path: os.symlink("/dev/zero", path))):
        (tmp_path / name).unlink()
        make(tmp_path / name)
        with pytest.raises(UserError, match="is no regular file"):
            official_layouts.INATURALIST_2018.read(tmp_path, "train")
        (tmp_path / name).unlink()
        inaturalist(tmp_path)


@pytest.mark.parametrize("do_compression", [False, True])
def test_what_scipy_writes_is_read_as_it_was(tmp_path, do_compression):
    structure = np.array([("a.jpg", 3), ("bé.jpg", 300)], dtype=[("fname", "O"), ("class", "O")])
    numbers = {
        kind: np.arange(6, dtype=kind).reshape(2, 3) for kind in ("i1", "u1", "i2", "u2", "i4", "f4", "f8", "i8")
    }
    whole = numbers | {
        "rows": structure,
        "cells": np.array(["x", "yz"], dtype=object),
        "one": [[7]],
        "long_name": [[1]],
    }
    savemat(tmp_path / "a.mat", whole, do_compression=do_compression)
    read = official_layouts._load_mat(tmp_path / "a.mat")
    for kind, values in numbers.items():
        assert read[kind].dtype == kind and (read[kind] == values).all()
    assert [(row["fname"], int(row["class"])) for row in read["rows"]] == [("a.jpg", 3), ("bé.jpg", 300)]
    assert read["cells"] == ["x", "yz"] and int(read["one"]) == 7 and read["long_name"] == 1


def test_any_byte_of_a_matlab_file_may_be_wrong(tmp_path):
    """SciPy's reader crashes on some of these."""
    structure = np.array([("a.jpg", 3)], dtype=[("fname", "O"), ("class", "O")])
    savemat(tmp_path / "a.mat", {"tstid": [[1, 2]], "rows": structure})
    data = (tmp_path / "a.mat").read_bytes()
    for at in range(124, len(data)):
        for value in (0, 1, 97, 255):
            (tmp_path / "a.mat").write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            with suppress(UserError), official_layouts._damage_of(tmp_path / "a.mat"):
                official_layouts._load_mat(tmp_path / "a.mat")
