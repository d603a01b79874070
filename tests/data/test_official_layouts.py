"""official_layouts.py: folders of classes beside torchvision's reader, names of shards, layouts that are broken."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from support.images import write_image

from hf_deit.data import official_layouts


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
