"""dataset_registry.py: its numbers are the paper's, and each set loads from its official layout.

Every generated image holds its own number as its pixel value, so that images and labels can be told apart.
"""

import gzip
import json
import struct

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from hf_deit import load_image_dataset
from hf_deit.data.decoding import decode_image
from hf_deit.data.registry import REGISTRY


# arXiv 2012.12877, Table 6: train size, test size, classes
TABLE_6 = {
    "imagenet-1k": (1_281_167, 50_000, 1000),
    "inat18": (437_513, 24_426, 8_142),
    "inat19": (265_240, 3_003, 1_010),
    "flowers102": (2_040, 6_149, 102),
    "cars": (8_144, 8_041, 196),
    "cifar100": (50_000, 10_000, 100),
    "cifar10": (50_000, 10_000, 10),
}
# arXiv 1902.10811, 2006.07159, 1708.07747; scikit-learn's 1,797 digits less a fifth
OTHERS = {
    "imagenet-v2": (None, 10_000, 1000),
    "imagenet-real": (None, 50_000, 1000),
    "fashion-mnist": (60_000, 10_000, 10),
    "digits": (1_437, 360, 10),
}


def test_sizes_are_those_of_table_6():
    found = {name: (entry.train_size, entry.eval_size, entry.num_classes) for name, entry in REGISTRY.items()}
    assert found == TABLE_6 | OTHERS
    table, released = TABLE_6["inat19"], REGISTRY["inat19"].released_sizes
    assert sum(released) == sum(table[:2]) == 268_243 and released[1] == 3 * 1_010  # visipedia/inat_comp, 2019


def test_every_entry_is_complete():
    for name, entry in REGISTRY.items():
        assert entry.page.startswith("https://") and entry.licence and entry.layout.description
        assert (entry.train_split is None) == (entry.train_size is None)
        assert {entry.eval_split, *(entry.train_split or entry.eval_split).split("+")} <= set(entry.layout.splits)
        assert entry.class_names is None or len(set(entry.class_names)) == entry.num_classes
        assert entry.classes_of is None or REGISTRY[entry.classes_of].num_classes == entry.num_classes, name
        assert not entry.gated or entry.hub_id in entry.page
        assert entry.image_mean == (0.485, 0.456, 0.406) and entry.image_std == (0.229, 0.224, 0.225)
    columns = {entry.hub_id: (entry.image_column, entry.label_column) for entry in REGISTRY.values() if entry.hub_id}
    assert columns == {
        "ILSVRC/imagenet-1k": ("image", "label"),
        "uoft-cs/cifar10": ("img", "label"),
        "uoft-cs/cifar100": ("img", "fine_label"),
        "zalando-datasets/fashion_mnist": ("image", "label"),
        "tanganke/stanford_cars": ("image", "label"),
        "dpdl-benchmark/oxford_flowers102": ("image", "label"),
    }
    assert [name for name, entry in REGISTRY.items() if entry.gated] == ["imagenet-1k"]


def test_the_flowers_are_named_as_in_torchvision():
    assert list(REGISTRY["flowers102"].class_names) == Flowers102.classes


# --- official layouts, a few images each -------------------------------------------------------------------------


def write_image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (number, number, number)).save(path, "PNG")  # whatever the suffix: the pixels stay exact


def numbers(images):
    return [int(decode_image(row["image"])[0, 0, 0]) for row in images]


def imagenet_train(folder):
    for number, file in enumerate(("n02/n02_7.JPEG", "n01/n01_9.JPEG", "n01/n01_10.JPEG", "n10/n10_1.JPEG")):
        write_image(folder / file, number)
    # paths in the order of the alphabet, classes by WordNet id
    return [2, 1, 0, 3], [0, 0, 1, 2]


def imagenet_folders(root):
    for number, file in enumerate(("n10/ILSVRC2012_val_00000001.JPEG", "n01/ILSVRC2012_val_00000002.JPEG"), 10):
        write_image(root / "val" / file, number)
    return imagenet_train(root / "train"), ([11, 10], [0, 2]), ["n01", "n02", "n10"]


def flat_val(folder):
    for number in (1, 2, 3):
        write_image(folder / f"ILSVRC2012_val_{number:08d}.JPEG", 20 + number)
    return [21, 22, 23], [2, 0, 2]


def imagenet_kaggle(root):
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_image(data / "test" / "ILSVRC2012_test_00000001.JPEG", 99)
    rows = ["ImageId,PredictionString", "ILSVRC2012_val_00000002,n01 1 2 3 4 n01 5 6 7 8 "]
    rows += [f"ILSVRC2012_val_{number:08d},n10 111 108 441 193 " for number in (1, 3)]
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\nn10 toilet tissue\n")
    return imagenet_train(data / "train"), flat_val(data / "val"), ["n01", "n02", "n10"]


def imagenet_devkit(root):
    devkit = root / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    # The devkit numbers synsets its own way, and inner nodes of WordNet as well.
    synsets = [(1, "n10", 0), (2, "n01", 0), (3, "n02", 0), (4, "n99", 2)]
    dtype = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    savemat(devkit / "meta.mat", {"synsets": np.array(synsets, dtype).reshape(-1, 1)})
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n1\n")
    return imagenet_train(root / "train"), flat_val(root / "val"), ["n01", "n02", "n10"]


def imagenet_v2(root):
    for number, folder in enumerate(("10", "2", "0", "999")):
        write_image(root / "imagenetv2-matched-frequency-format-val" / folder / "a.jpeg", number)
    return None, ([2, 1, 0, 3], [0, 2, 10, 999]), [str(i) for i in range(1000)]


def imagenet_real(root):
    (root / "real.json").write_text(json.dumps([[5, 7], [], [999]]))
    flat_val(root / "val")
    return None, ([21, 22, 23], [[5, 7], [], [999]]), [str(i) for i in range(1000)]


def flowers102(root):
    for number in range(1, 7):
        write_image(root / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 77, 2, 1]], np.uint8)})
    parts = {"trnid": [[3, 1]], "valid": [[5]], "tstid": [[6, 2, 4]]}
    savemat(root / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in parts.items()})
    return ([3, 1, 5], [101, 76, 1]), ([6, 2, 4], [0, 0, 76]), Flowers102.classes


def cars(root):
    (root / "devkit").mkdir()
    boxes = [(f"bbox_{axis}", object) for axis in ("x1", "y1", "x2", "y2")]
    dtype = [*boxes, ("class", object), ("fname", object)]
    for split, file, rows in (
        ("train", "devkit/cars_train_annos.mat", [(14, "00001.jpg"), (3, "00002.jpg"), (14, "00003.jpg")]),
        ("test", "cars_test_annos_withlabels.mat", [(3, "00001.jpg")]),
    ):
        for number, (_, name) in enumerate(rows):
            write_image(root / f"cars_{split}" / name, number)
        savemat(root / file, {"annotations": np.array([(1, 1, 2, 2, *row) for row in rows], dtype).reshape(1, -1)})
    names = [f"Make Model {number}" for number in range(196)]
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array([names], object)})
    return ([0, 1, 2], [13, 2, 13]), ([0], [2]), names


def inaturalist(year):
    levels = ("kingdom", "phylum", "class", "order", "family", "genus") + (("supercategory",) if year == 2018 else ())

    def build(root):
        categories = [
            {"id": i, "name": f"species {i}"} | {level: f"{level} {i // 2}" for level in levels} for i in range(4)
        ]
        (root / "categories.json").write_text(json.dumps(categories))
        number = 0
        for split, classes in (("train", (3, 0, 2, 3)), ("val", (2, 3))):
            listing = {"images": [], "annotations": []}
            for of_class in classes:
                file = f"train_val{year}/Plants/{of_class}/{number}.jpg"
                write_image(root / file, number)
                listing["images"].append({"id": 100 + number, "file_name": file})
                listing["annotations"].append({"image_id": 100 + number, "category_id": of_class})
                number += 1
            (root / f"{split}{year}.json").write_text(json.dumps(listing))
        # the authors' order: as the training annotations mention them; species 1 has no image
        return ([0, 1, 2, 3], [0, 1, 2, 0]), ([4, 5], [2, 0]), ["species 3", "species 0", "species 2"]

    return build


def cifar_rows(labels, numbers):
    return b"".join(bytes(label) + bytes([number]) * 3072 for label, number in zip(labels, numbers, strict=True))


def cifar10(root):
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(cifar_rows([[i], [9]], [i, 10 * i]))
    (folder / "test_batch.bin").write_bytes(cifar_rows([[3]], [200]))
    train = [1, 10, 2, 20, 3, 30, 4, 40, 5, 50], [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    return train, ([200], [3]), names


def cifar100(root):
    names = [f"fine{i}" for i in range(100)]
    (root / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    (root / "train.bin").write_bytes(cifar_rows([[19, 99], [0, 4]], [7, 8]))
    (root / "test.bin").write_bytes(cifar_rows([[1, 50]], [9]))
    return ([7, 8], [99, 4]), ([9], [50]), names


def fashion_mnist(root):
    for prefix, values, labels in (("train", (5, 6), (9, 0)), ("t10k", (7,), (3,))):
        images = struct.pack(">IIII", 2051, len(values), 28, 28) + b"".join(bytes([v]) * 784 for v in values)
        (root / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))
    return ([5, 6], [9, 0]), ([7], [3]), list(REGISTRY["fashion-mnist"].class_names)


LAYOUTS = [
    ("imagenet-1k", imagenet_folders),
    ("imagenet-1k", imagenet_kaggle),
    ("imagenet-1k", imagenet_devkit),
    ("imagenet-v2", imagenet_v2),
    ("imagenet-real", imagenet_real),
    ("flowers102", flowers102),
    ("cars", cars),
    ("inat18", inaturalist(2018)),
    ("inat19", inaturalist(2019)),
    ("cifar10", cifar10),
    ("cifar100", cifar100),
    ("fashion-mnist", fashion_mnist),
]


@pytest.mark.parametrize("name, build", LAYOUTS, ids=[f"{name}-{build.__name__}" for name, build in LAYOUTS])
def test_a_set_loads_from_its_official_layout(tmp_path, caplog, name, build):
    train, held_out, names = build(tmp_path)
    parts = {"train": train, "eval": held_out} if train else {"eval": held_out}
    images = load_image_dataset(name, data_dir=str(tmp_path), splits=tuple(parts))
    assert list(images) == list(parts)
    for part, (expected_numbers, expected_labels) in parts.items():
        rows = images[part]
        assert rows.column_names == ["image", "label"]
        assert numbers(rows) == expected_numbers
        assert rows["label"][:] == expected_labels
        label = rows.features["label"]
        assert (label.feature if name == "imagenet-real" else label).names == list(names)
    # The sizes disagree with the registry: one warning, both numbers.
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("hf_deit.data.")]
    (warning,) = [message for message in messages if "expected" in message]
    assert f"{len(held_out[0])} images in eval, expected {REGISTRY[name].eval_size:,}" in warning
    assert (f"expected {REGISTRY[name].train_size:,}" in warning) if train else ("in train" not in warning)


def test_digits_need_no_directory():
    images = load_image_dataset("digits")
    assert images["train"].features["label"].names == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="'digits' is scikit-learn's own copy and needs no data_dir"):
        load_image_dataset("digits", data_dir=".")


def test_every_entry_with_files_has_a_layout_here():
    assert {name for name, _ in LAYOUTS} | {"digits"} == set(REGISTRY)


@pytest.mark.parametrize("year", (2018, 2019))
@pytest.mark.parametrize("level", ("kingdom", "family", "genus", "supercategory"))
def test_category_levels_count_classes_as_the_authors_do(tmp_path, year, level):
    inaturalist(year)(tmp_path)
    if level == "supercategory" and year == 2019:
        with pytest.raises(ValueError, match="categories.json of 2019 has kingdom, phylum, .* genus, name"):
            load_image_dataset("inat19", data_dir=str(tmp_path), category_level=level)
        return
    images = load_image_dataset(f"inat{year - 2000}", data_dir=str(tmp_path), category_level=level)
    # facebookresearch/deit, datasets.py: first mention in the training annotations, label from the path
    classes = [3, 0, 2, 3]
    categories = json.loads((tmp_path / "categories.json").read_text())
    order = list(dict.fromkeys(categories[of_class][level] for of_class in classes))
    assert images["train"].features["label"].names == order == [f"{level} 1", f"{level} 0"]
    for rows in images.values():
        from_path = [order.index(categories[int(row["image"]["path"].split("/")[-2])][level]) for row in rows]
        assert rows["label"][:] == from_path


def test_inaturalist_loads_without_super_category_folders_as_the_authors_keep_it(tmp_path):
    _, held_out, _ = inaturalist(2018)(tmp_path)
    for folder in (tmp_path / "train_val2018" / "Plants").iterdir():
        folder.rename(tmp_path / "train_val2018" / folder.name)
    images = load_image_dataset("inat18", data_dir=str(tmp_path))
    assert (numbers(images["eval"]), images["eval"]["label"][:]) == held_out
