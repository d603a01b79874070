"""loading.py and sources.py: finding sets by name, directory or Hub id, and their two columns."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hf_deit import load_image_dataset
from hf_deit.data.decoding import decode_image
from hf_deit.data.labels import hold_out
from hf_deit.data.registry import REGISTRY
from hf_deit.errors import UserError


def test_digits_are_the_files_that_pillow_writes():
    images = load_image_dataset("digits", splits=("eval",))["eval"]["image"]
    for image in images:
        pixels = Image.open(io.BytesIO(image["bytes"]))
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(buffer, "BMP")
        assert buffer.getvalue() == image["bytes"]
    of_scikit_learn = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert {np.asarray(Image.open(io.BytesIO(image["bytes"]))).tobytes() for image in images} <= {
        image.tobytes() for image in of_scikit_learn
    }


def test_digits_come_without_network():
    images = load_image_dataset("digits")
    assert (len(images["train"]), len(images["eval"])) == (1437, 360)
    assert images["train"].features["label"].names == [str(digit) for digit in range(10)]
    assert decode_image(images["eval"][0]["image"]).shape == (8, 8, 3)
    together = {row["image"]["bytes"] for split in images.values() for row in split}
    assert len(together) == 1797  # nothing is in both


def test_a_subset_is_random_and_repeatable():
    first = load_image_dataset("digits", max_train_samples=100, max_eval_samples=10)
    again = load_image_dataset("digits", max_train_samples=100, max_eval_samples=10)
    assert (len(first["train"]), len(first["eval"])) == (100, 10)
    assert first["train"]["label"][:] == again["train"]["label"][:]
    assert len(set(first["train"]["label"])) == 10


@pytest.fixture
def picture():
    def encode(color=(200, 30, 60), size=(20, 12), format="PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", size, color).save(buffer, format)
        return buffer.getvalue()

    return encode


def test_a_folder_of_classes_is_a_set(tmp_path, picture):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number}.png").write_bytes(picture((number, 0, 0)))
    images = load_image_dataset(str(tmp_path))
    assert (len(images["train"]), len(images["eval"])) == (8, 4)
    assert images["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    "names", [("train.parquet", "test.parquet"), ("train-00000-of-00001.parquet", "test/0000.parquet")]
)
def test_parquet_files_are_a_set(tmp_path, picture, names):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for name, count in zip(names, (6, 4), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = {"img": [{"bytes": picture(), "path": None}] * count, "label": [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / name))
    images = load_image_dataset(str(tmp_path))
    assert (len(images["train"]), len(images["eval"])) == (6, 4)
    assert images["train"].column_names == ["image", "label"]


def test_integer_labels_get_names(tmp_path, picture):
    for split in ("train", "test"):
        rows = {"picture": [{"bytes": picture(), "path": None}] * 3, "kind": [7, 9, 7]}
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / f"{split}.parquet"))
    images = load_image_dataset(str(tmp_path), label_column="kind")
    assert images["train"].features["label"].names == ["7", "9"]
    assert images["train"]["label"][:] == [0, 1, 0]


def test_a_directory_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images found in .*expected parquet files such as train.parquet"):
        load_image_dataset(str(tmp_path))
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match="no images found"):
        load_image_dataset(str(tmp_path))


def test_a_name_that_is_nothing_is_refused():
    with pytest.raises(ValueError, match="'nobody/nothing' could not be loaded.*Give the path of a directory"):
        load_image_dataset("nobody/nothing")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_column": "picture"}, "no column 'picture': 'digits' has the columns image, label; set image_column"),
        ({"label_column": "kind"}, "no column 'kind'"),
        (
            {"train_split": "training"},
            "'digits' has no split 'training'; it has train, test: choose one with train_split",
        ),
        ({"max_eval_samples": 0}, "max_eval_samples is 0"),
        ({"splits": ("test",)}, "splits is .'test',.; expected 'train', 'eval' or both"),
    ],
)
def test_bad_arguments_are_refused_with_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset("digits", **arguments)


def test_cifar10_loads_from_parquet(shared_data):
    images = load_image_dataset(str(shared_data / "cifar10"), max_eval_samples=100)
    assert len(images["train"]) == 50_000 and images["train"].features["label"].names[3] == "cat"
    assert decode_image(images["eval"][0]["image"]).shape == (32, 32, 3)


# --- labels ------------------------------------------------------------------------------------------------------


def write_parquet(directory, picture, labels, **more):
    """`labels` is `{split: values}`; the type of the column is inferred."""
    directory.mkdir(exist_ok=True)
    for split, values in labels.items():
        columns = {"image": [{"bytes": picture(), "path": None}] * len(values), "label": values}
        rows = datasets.Dataset.from_dict(columns | {name: [value] * len(values) for name, value in more.items()})
        rows.cast_column("image", datasets.Image()).to_parquet(str(directory / f"{split}.parquet"))
    return str(directory)


@pytest.mark.parametrize("kind", (int, str))
def test_numbers_as_labels_keep_their_order(tmp_path, picture, kind):
    values = [kind(value) for value in (10, 2, 0, 10)]
    images = load_image_dataset(write_parquet(tmp_path, picture, {"train": values, "test": values}))
    assert images["train"].features["label"].names == ["0", "2", "10"]  # sorted as words: 0, 10, 2
    assert images["train"]["label"][:] == images["eval"]["label"][:] == [2, 1, 0, 2]


def test_both_splits_have_the_classes_of_the_training_images(tmp_path, picture):
    path = write_parquet(tmp_path, picture, {"train": ["cat", "dog", "ant"], "test": ["dog", "cat"]})
    names = ["ant", "cat", "dog"]
    for splits in (("train", "eval"), ("eval",)):
        images = load_image_dataset(path, splits=splits)
        assert list(images) == list(splits)
        assert images["eval"].features["label"].names == names
        assert images["eval"]["label"][:] == [2, 1]


def test_a_class_nobody_trains_on_is_refused(tmp_path, picture):
    path = write_parquet(tmp_path, picture, {"train": [0, 1], "test": [0, 1, 5, 7]})
    with pytest.raises(ValueError, match="test has 2 classes that the training images don't have, such as 5, 7"):
        load_image_dataset(path)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, None], "image number 1 of the split train has the label None, which is none"),
        (["a", "b", None], "image number 2 of the split train has the label None, which is none"),
        (["a", "", "b"], "image number 1 of the split train has the label '', which is none"),
        (["a", "b", " "], "image number 2 of the split train has the label ' ', which is none"),
        ([0.5, 1.5], "image number 0 .* has the label 0.5, of the type float64; expected whole numbers or words"),
        ([0, 1, -1], "image number 2 .* has the label -1, and a negative number usually means that there is none"),
        ([b"cat", b"dog"], "image number 0 .* has the label b'cat', of the type binary"),
    ],
)
def test_labels_that_are_none_are_refused_with_the_first_row(tmp_path, picture, labels, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(write_parquet(tmp_path, picture, {"train": labels, "test": labels}))


def test_labels_are_kept_as_they_are(tmp_path, picture):
    for number, (labels, names) in enumerate(
        [
            ([True, False], ["False", "True"]),
            (["it is a cat", "dog "], ["dog ", "it is a cat"]),
            (["10", "9"], ["9", "10"]),
            ([3, 2**40], ["3", str(2**40)]),
        ]
    ):
        path = write_parquet(tmp_path / str(number), picture, {"train": labels, "test": labels})
        images = load_image_dataset(path)
        for rows in images.values():
            assert [rows.features["label"].names[label] for label in rows["label"]] == list(map(str, labels))
        assert images["train"].features["label"].names == names


def test_a_registered_set_has_all_its_classes_whatever_is_seen(tmp_path, picture):
    path = write_parquet(tmp_path, picture, {"train": [9, 2], "test": [3]})
    images = load_image_dataset("fashion-mnist", data_dir=path)
    assert images["train"]["label"][:] == [9, 2] and images["eval"]["label"][:] == [3]
    assert images["eval"].features["label"].names[9] == "Ankle boot"
    images = load_image_dataset("cars", data_dir=path)
    assert images["eval"].features["label"].names == [str(i) for i in range(196)]


def test_labelling_does_not_write_the_images_again(tmp_path, picture):
    path = write_parquet(tmp_path, picture, {"train": [3, 1], "test": [1]})
    images = load_image_dataset(path)
    loaded = datasets.load_dataset("parquet", data_files={"train": [f"{path}/train.parquet"]}, split="train")
    assert images["train"].cache_files == loaded.cache_files != []  # what datasets made of the parquet file, no more


# --- directories -------------------------------------------------------------------------------------------------


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("label", ("cls", "json", "both"))
def test_tar_shards_are_a_set(tmp_path, picture, label):
    number = 0
    for split, shards in (("train", 2), ("validation", 1)):
        for shard in range(shards):
            samples = {}
            for _ in range(6):
                samples[f"{number:04d}.JPEG"] = picture((number, 0, 0))
                if label != "json":
                    samples[f"{number:04d}.cls"] = str(number % 12).encode()
                if label != "cls":
                    samples[f"{number:04d}.json"] = json.dumps({"label": number % 12, "width": 20}).encode()
                number += 1
            write_tar(tmp_path / "shards" / f"set-{split}-{shard:04d}.tar", samples)
    images = load_image_dataset(str(tmp_path))
    assert (len(images["train"]), len(images["eval"])) == (12, 6)
    assert images["train"].features["label"].names == [str(i) for i in range(12)]
    assert images["train"]["label"][:] == list(range(12)) and images["eval"]["label"][:] == list(range(6))
    assert decode_image(images["eval"][1]["image"])[0, 0, 0] == 13


def test_image_files_are_read_where_they_are(tmp_path, picture):
    for name in ("train/a/1.png", "train/b/2.PNG", "val/b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    images = load_image_dataset(str(tmp_path))
    assert [row["image"] for row in images["train"]] == [
        {"bytes": None, "path": str(tmp_path / "train" / name)} for name in ("a/1.png", "b/2.PNG")
    ]
    assert not images["train"].cache_files
    assert images["eval"]["label"][:] == [1] and images["eval"].features["label"].names == ["a", "b"]


def test_images_beside_a_leftover_archive_are_found(tmp_path, picture):
    write_folders(tmp_path, picture, "train/a,train/b,val/a")
    (tmp_path / "train.tar").write_bytes(b"half a download")
    assert len(load_image_dataset(str(tmp_path))["train"]) == 2


# --- registered sets ---------------------------------------------------------------------------------------------


def test_flowers_train_on_what_is_not_held_out(tmp_path, picture):
    path = write_parquet(tmp_path, picture, {"train": [0, 1], "validation": [2], "test": [3, 4, 5]})

    def sizes(**splits):
        return [len(rows) for rows in load_image_dataset("flowers102", data_dir=path, **splits).values()]

    assert sizes() == [3, 3]  # train+validation, as Table 6
    assert sizes(eval_split="validation") == [2, 1]
    assert sizes(train_split="train") == [2, 3]
    assert sizes(train_split="train+test", eval_split="validation") == [5, 1]


def test_the_copy_may_name_its_splits_as_it_likes(tmp_path, picture):
    path = write_parquet(tmp_path, picture, {"train": [0, 1], "val": [1]})
    images = load_image_dataset("imagenet-1k", data_dir=path)
    assert len(images["eval"]) == len(load_image_dataset(path, eval_split="validation", splits=["eval"])["eval"]) == 1


def test_columns_of_the_registry_need_no_naming(tmp_path, picture):
    path = write_parquet(tmp_path / "a", picture, {"train": [0], "test": [1]}, fine_label=7)
    images = load_image_dataset("cifar100", data_dir=path)
    assert images["train"]["label"][:] == [7] and images["train"].features["label"].num_classes == 100


def test_a_size_that_disagrees_is_one_warning(tmp_path, picture, caplog, monkeypatch):
    def warnings(**options):
        caplog.clear()
        load_image_dataset("inat19", data_dir=path, **options)
        return [record.getMessage() for record in caplog.records]

    path = write_parquet(tmp_path, picture, {"train": [0, 1, 2], "validation": [1, 1]})
    (message,) = warnings(max_train_samples=1)
    assert "inat19: 3 images in train, expected 265,240 and 2 images in eval, expected 3,003" in message
    entry = REGISTRY["inat19"]
    monkeypatch.setitem(REGISTRY, "inat19", replace(entry, train_size=3, eval_size=2))
    assert warnings(max_eval_samples=1) == []
    monkeypatch.setitem(REGISTRY, "inat19", replace(entry, released_sizes=(3, 2)))  # the competition's own files
    assert warnings() == []
    monkeypatch.setitem(REGISTRY, "inat19", replace(entry, eval_size=2))
    (message,) = warnings()
    assert "train" in message and "eval" not in message
    assert warnings(train_split="train") == []  # whoever names a split means it


@pytest.mark.parametrize("name", ("imagenet-v2", "imagenet-real"))
def test_an_evaluation_set_is_not_trained_on(name):
    with pytest.raises(ValueError, match=f"'{name}' is only for evaluation, .*train on 'imagenet-1k', or .*'eval',"):
        load_image_dataset(name)


def test_a_gated_set_says_where_to_accept_its_terms():
    with pytest.raises(ValueError) as error:
        load_image_dataset("imagenet-1k")
    for part in ("https://huggingface.co/datasets/ILSVRC/imagenet-1k", "`hf auth login`", "data_dir", "train/<wnid>/"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gated_set_nobody_registered_says_so_too(monkeypatch):
    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/body' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match="accept the terms at https://huggingface.co/datasets/some/body and run `hf auth"
    ):
        load_image_dataset("some/body")


@pytest.mark.parametrize("name", [name for name, entry in REGISTRY.items() if not entry.hub_id and name != "digits"])
def test_a_set_without_a_copy_on_the_hub_says_what_to_get_from_where(name):
    with pytest.raises(ValueError) as error:
        load_image_dataset(name, splits=("eval",))
    for part in ("can only be read from a directory", REGISTRY[name].layout.description, REGISTRY[name].page):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        (
            "nobody/nothing",
            {"data_dir": "."},
            "data_dir is the directory of a registered dataset .*give the directory as dataset_name",
        ),
        ("cifar10", {"data_dir": "no/where"}, "data_dir is 'no/where', which is not a directory"),
        (
            "cifar10",
            {"category_level": "genus"},
            "category_level is only for inat18 and inat19; .* 'cifar10', which has one level",
        ),
        (
            "inat18",
            {"category_level": "genus", "data_dir": "{}"},
            "category_level needs the official files, .*train2018",
        ),
        ("flowers102", {"data_dir": "{}"}, "no images found .*, or the official layout: jpg/image_00001.jpg"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(tmp_path, name, arguments, message):
    arguments = {key: value.format(tmp_path) for key, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        load_image_dataset(name, **arguments)


def write_named(file, picture, names, labels):
    """A parquet file whose classes have names of one letter; the red of each image is this letter."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [{"bytes": picture((ord(names[label]) if label >= 0 else 0, 0, 0)), "path": None} for label in labels]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(str(file))


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_in_another_order_are_matched_by_name(tmp_path, picture, streaming):
    write_named(tmp_path / "train.parquet", picture, ["a", "b", "c"], [0, 1, 2, 0])
    write_named(tmp_path / "test.parquet", picture, ["c", "a", "b"], [0, 1, 2, 2])
    images = load_image_dataset(str(tmp_path), streaming=streaming)
    assert images["eval"]["label"][:] == [2, 0, 1, 1]
    for rows in images.values():
        names = rows.features["label"].names
        assert names == ["a", "b", "c"]
        assert all(names[row["label"]] == chr(decode_image(row["image"])[0, 0, 0]) for row in rows)


def test_a_missing_label_stays_missing_in_another_order(tmp_path, picture):
    write_named(tmp_path / "train.parquet", picture, ["a", "b"], [0, 1])
    write_named(tmp_path / "test.parquet", picture, ["b", "a"], [0, -1, 1])
    assert load_image_dataset(str(tmp_path))["eval"]["label"][:] == [1, -1, 0]


def test_joined_splits_are_matched_by_name(tmp_path, picture):
    write_named(tmp_path / "train.parquet", picture, ["a", "b"], [0, 1])
    write_named(tmp_path / "val.parquet", picture, ["b", "a"], [0, 0, 1])
    images = load_image_dataset(str(tmp_path), train_split="train+val", eval_split="val")
    assert images["train"]["label"][:] == [0, 1, 1, 1, 0] and images["eval"]["label"][:] == [1, 1, 0]
    with pytest.raises(ValueError, match="numbers the classes of the column 'label' differently"):
        load_image_dataset(str(tmp_path), train_split="train+val", eval_split="val", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_of_one_split_that_number_classes_differently_are_refused(tmp_path, picture, streaming):
    write_named(tmp_path / "train-0.parquet", picture, ["a", "b"], [0, 1])
    write_named(tmp_path / "train-1.parquet", picture, ["b", "a"], [0, 1])
    write_named(tmp_path / "test-0.parquet", picture, ["a", "b"], [0, 1])
    with pytest.raises(ValueError, match="train-1.parquet' numbers the classes .* from .*train-0.parquet'"):
        load_image_dataset(str(tmp_path), streaming=streaming)


def test_class_names_that_differ_between_the_splits_are_refused(tmp_path, picture):
    write_named(tmp_path / "train.parquet", picture, ["a", "b", "c"], [0])
    write_named(tmp_path / "test.parquet", picture, ["b", "a", "x"], [0])
    message = (
        "classes of train .3. and test .3. differ; both splits need the same classes: train has 1 classes that test "
        "lacks, 'c' and test has 1 classes that train lacks, 'x'"
    )
    with pytest.raises(ValueError, match=message):
        load_image_dataset(str(tmp_path))


def test_numbers_and_names_are_matched_only_if_the_names_are_numbers(tmp_path, picture):
    write_named(tmp_path / "a" / "train.parquet", picture, ["2", "1"], [0, 1])
    write_parquet(tmp_path / "a", picture, {"test": [1, 2, 2]})
    assert load_image_dataset(str(tmp_path / "a"))["eval"]["label"][:] == [1, 0, 0]
    write_named(tmp_path / "b" / "train.parquet", picture, ["x", "y"], [0, 1])
    write_parquet(tmp_path / "b", picture, {"test": [0, 1]})
    with pytest.raises(ValueError, match="the labels of test are int64, but the classes are called x, y"):
        load_image_dataset(str(tmp_path / "b"))


@pytest.mark.parametrize("feature", [datasets.Value("int64"), datasets.ClassLabel(names=["a", "b"])])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("splits", [("train", "eval"), ("eval",)])
def test_several_labels_an_image_are_refused(tmp_path, picture, feature, streaming, splits):
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(feature)})
    rows = {"image": [{"bytes": picture(), "path": None}] * 2, "labels": [[0, 1], [1]]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(ValueError, match="one label an image is needed; column 'labels' of .* holds lists"):
        load_image_dataset(str(tmp_path), streaming=streaming, splits=splits)


@pytest.mark.parametrize("name", ["g[12]", "g*", "g?", "[a-z]", "g[!2]", "**", "a{b,c}", "100% #1"])
def test_a_directory_named_like_a_pattern_is_itself(tmp_path, picture, name):
    for folder, values in ((name, ["a", "b"]), ("g1", ["c", "d", "e"]), ("gg", ["f"]), ("g", ["x", "y"])):
        write_parquet(tmp_path / folder, picture, {"train": values, "test": values})
    images = load_image_dataset(str(tmp_path / name))
    assert images["train"].features["label"].names == ["a", "b"] and len(images["eval"]) == 2
    samples = {"0.png": picture(), "0.cls": b"1", "1.png": picture(), "1.cls": b"2"}
    for split in ("train", "test"):
        write_tar(tmp_path / name / "tars" / f"{split}-0.tar", samples)
    assert len(load_image_dataset(str(tmp_path / name / "tars"))["train"]) == 2


def write_folders(root, picture, folders):
    for folder in folders.split(","):
        (root / folder).mkdir(parents=True)
        (root / folder / "1.png").write_bytes(picture())


@pytest.mark.parametrize("splits", ["Train Test", "TRAINING Validation", "training_set eval"])
def test_split_folders_in_any_case_are_loaded(tmp_path, picture, splits):
    train, held_out = splits.split()
    write_folders(tmp_path, picture, ",".join(f"{split}/{name}" for split in (train, held_out) for name in "ab"))
    for options in ({}, {"train_split": train, "eval_split": held_out}, {"eval_split": held_out.lower()}):
        images = load_image_dataset(str(tmp_path), **options)
        assert images["train"].features["label"].names == ["a", "b"]
        assert f"/{train}/" in images["train"][0]["image"]["path"]
        assert f"/{held_out}/" in images["eval"][0]["image"]["path"]


@pytest.mark.parametrize("layout", ["train/images,val/images", "train/a/b/c,val/a/b/c"])
def test_one_class_is_refused(tmp_path, picture, layout):
    write_folders(tmp_path, picture, layout)
    with pytest.raises(ValueError, match="1 class found in train: '.*'; at least 2 are needed"):
        load_image_dataset(str(tmp_path))
    assert len(load_image_dataset(str(tmp_path), splits=("eval",))["eval"]) == 1


def test_files_that_are_not_read_are_one_warning_for_both_splits(tmp_path, picture, caplog):
    write_folders(tmp_path, picture, "train/a,train/b,val/a,val/b")
    for split in ("train", "val"):
        (tmp_path / split / "a" / "2.heic").touch()
    load_image_dataset(str(tmp_path))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "2 files are not read as images (2 .heic)" in warning


def test_a_directory_of_unreadable_images_says_what_it_holds(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.heic").touch()
    with pytest.raises(ValueError, match=r"no images found .*\(1 .heic\): install pillow-heif"):
        load_image_dataset(str(tmp_path))


def test_file_names_that_are_not_utf8_are_loaded(tmp_path, picture):
    write_folders(tmp_path, picture, "train/a,train/b,val/a")
    with open(os.fsencode(tmp_path) + b"/train/a/caf\xe9.png", "wb") as file:
        file.write(picture((77, 0, 0)))
    rows = load_image_dataset(str(tmp_path))["train"]
    assert len(rows) == 3 and rows[0]["image"]["path"] == str(tmp_path / "train" / "a" / "1.png")
    assert [decode_image(row["image"])[0, 0, 0] for row in rows] == [200, 77, 200]


# Streams


def parquet_set(folder, picture, labels, feature):
    """train in two files and test in one; the images are told apart by their colour."""
    features = datasets.Features({"photo": datasets.Image(), "label": feature})
    for name, rows in (("train-00000", labels[:3]), ("train-00001", labels[3:]), ("test", labels)):
        images = [{"bytes": picture((number, 0, len(name))), "path": None} for number in range(len(rows))]
        datasets.Dataset.from_dict({"photo": images, "label": rows}, features).to_parquet(
            str(folder / f"{name}.parquet")
        )


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, 1, 1, 0, 1], datasets.ClassLabel(names=["cat", "dog"])),
        ([10, 2, 2, 10, 7], datasets.Value("int64")),
        (["dog", "cat", "dog", "dog", "cat"], datasets.Value("string")),
    ],
    ids=["named", "numbers", "words"],
)
def test_a_streamed_directory_is_the_loaded_one(tmp_path, picture, labels, feature):
    parquet_set(tmp_path, picture, labels, feature)
    loaded, streamed = (load_image_dataset(str(tmp_path), streaming=streaming) for streaming in (False, True))
    assert type(streamed["train"]).__name__ == "StreamedImages" and list(streamed) == ["train", "eval"]
    for part in ("train", "eval"):
        assert list(streamed[part]) == list(loaded[part])
        assert streamed[part].features["label"].names == loaded[part].features["label"].names
    cut = load_image_dataset(str(tmp_path), streaming=True, max_train_samples=4, max_eval_samples=2)
    assert (len(cut["train"]), len(cut["eval"])) == (4, 2)
    assert [cut["train"][index] for index in range(4)] == [loaded["train"][index] for index in range(4)]


def test_streamed_labels_without_names_need_the_evaluation_images(tmp_path, picture):
    parquet_set(tmp_path, picture, ["a", "b", "a", "b", "a"], datasets.Value("string"))
    with pytest.raises(ValueError, match="labels of the streamed files have no names.*load both splits"):
        load_image_dataset(str(tmp_path), streaming=True, splits=("train",))


def test_image_files_are_read_where_they_are_streamed_or_not(tmp_path, picture):
    write_folders(tmp_path, picture, "train/cat,train/dog,val/cat")
    images = load_image_dataset(str(tmp_path), streaming=True)
    assert images["train"][0]["image"] == {"bytes": None, "path": str(tmp_path / "train" / "cat" / "1.png")}


def test_tar_shards_cannot_be_streamed(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}-0000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="holds tar shards.*only parquet files are streamed"):
        load_image_dataset(str(tmp_path), streaming=True)


def test_a_missing_shard_is_one_warning(tmp_path, caplog):
    rows = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (8, 8), (10 * n, 0, 0)) for n in range(2)], "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)}),
    )
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00001"):
        rows.to_parquet(tmp_path / f"{name}.parquet")
    images = load_image_dataset(str(tmp_path))
    assert len(images["train"]) == 4
    (warning,) = (record.getMessage() for record in caplog.records if "missing" in record.getMessage())
    assert warning.startswith("1 of 3 shard files are missing, such as ") and "train-00001-of-00003.parquet" in warning


# What is evaluated on


def write_split(root, picture, split, counts):
    """`counts` is `{class: images}`; each image has a colour of its own."""
    for number, (name, count) in enumerate(counts.items()):
        (root / split / name).mkdir(parents=True)
        for image in range(count):
            (root / split / name / f"{image:03d}.png").write_bytes(picture((number, image, len(split))))


def paths(rows):
    return [row["image"]["path"] for row in rows]


def test_without_a_split_to_evaluate_on_a_share_of_each_class_is_held_out(tmp_path, picture):
    counts = {"a": 40, "b": 10, "c": 3, "d": 2, "e": 1}
    write_split(tmp_path, picture, "train", counts)
    images = load_image_dataset(str(tmp_path))
    assert images.held_out == (len(images["eval"]), 56)
    assert not set(paths(images["train"])) & set(paths(images["eval"]))
    assert len(images["train"]) + len(images["eval"]) == 56
    held_out = [images["eval"]["label"][:].count(label) for label in range(5)]
    assert held_out == [6, 2, 1, 1, 0]  # 15 %, at least one, and one stays to train on
    # the same for every subset, every part and every call
    for options in ({"max_train_samples": 5}, {"splits": ("eval",)}, {"eval_fraction": 0.15}):
        assert paths(load_image_dataset(str(tmp_path), **options)["eval"]) == paths(images["eval"])
    assert paths(load_image_dataset(str(tmp_path), splits=("train",))["train"]) == paths(images["train"])
    assert [len(rows) for rows in load_image_dataset(str(tmp_path), eval_fraction=0.5).values()] == [28, 28]
    assert list(load_image_dataset(str(tmp_path), eval_fraction=0)) == ["train"]


def test_held_out_images_are_drawn_at_random():
    labels = np.repeat(np.arange(4), 100)
    kept, first = hold_out(labels, 0.2)
    assert sorted([*kept, *first]) == list(range(400)) and np.bincount(labels[first]).tolist() == [20] * 4
    assert not np.array_equal(first, hold_out(labels, 0.2, seed=1)[1])
    assert 30 < np.mean(first % 100) < 70  # neither the first nor the last of each class
    shuffled = np.random.default_rng(0).permutation(labels)
    assert np.bincount(shuffled[hold_out(shuffled, 0.2)[1]]).tolist() == [20] * 4


def test_parquet_files_without_a_test_split_hold_out_too(tmp_path, picture):
    path = write_parquet(tmp_path, picture, {"train": ["dog", "cat"] * 10})
    images = load_image_dataset(path)
    assert [len(rows) for rows in images.values()] == [16, 4] and images["eval"]["label"][:].count(0) == 2
    with pytest.raises(ValueError, match="of a stream no images are held out: set eval_split"):
        load_image_dataset(path, streaming=True)


@pytest.mark.parametrize(
    "fraction, message", [(1, "at least 0 and below 1"), (-0.1, "eval_fraction"), (float("nan"), "eval_fraction")]
)
def test_an_impossible_share_is_refused(fraction, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset("digits", eval_fraction=fraction)


def test_nothing_to_hold_out_or_to_evaluate_on_is_refused(tmp_path, picture):
    write_split(tmp_path, picture, "train", {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="no class of train has two images"):
        load_image_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="no split to evaluate on, and eval_fraction is 0"):
        load_image_dataset(str(tmp_path), eval_fraction=0, splits=("eval",))


def test_a_split_that_is_trained_on_is_not_evaluated_on_by_default(tmp_path, picture):
    write_split(tmp_path, picture, "validation", {"a": 10, "b": 10})
    images = load_image_dataset(str(tmp_path), train_split="validation")
    assert images.held_out == (4, 20) and not set(paths(images["train"])) & set(paths(images["eval"]))


@pytest.mark.parametrize(
    "rows, expected",
    [
        ("[:80%]", range(0, 16)),
        ("[80%:]", range(16, 20)),
        ("[5:12]", range(5, 12)),
        ("[-20%:]", range(16, 20)),
        ("[:-3]", range(0, 17)),
        ("[3:50]", range(3, 20)),
        ("", range(0, 20)),
    ],
)
@pytest.mark.parametrize("name", ["train", "Train", "TRAIN "])
def test_slices_are_those_of_the_datasets_library(tmp_path, picture, rows, expected, name):
    path = write_parquet(tmp_path, picture, {"train": [0, 1] * 10, "test": [0, 1]})
    whole = datasets.load_dataset("parquet", data_files={"train": f"{path}/train.parquet"}, split=f"train{rows}")
    images = load_image_dataset(path, train_split=name + rows)
    assert len(images["train"]) == len(whole) == len(expected)
    assert images["train"]["label"][:] == whole["label"][:] == [number % 2 for number in expected]
    assert images.splits["train"] == f"train{rows}"


def test_slices_can_be_joined_and_divide_a_split(tmp_path, picture):
    write_split(tmp_path, picture, "train", {"a": 10, "b": 10})
    images = load_image_dataset(str(tmp_path), train_split="train[:5] + train[10:15]", eval_split="train[-5:]")
    assert [len(rows) for rows in images.values()] == [10, 5] and images.trained_on == 0
    assert len(set(paths(images["train"])) | set(paths(images["eval"]))) == 15
    assert not images.unread.paths


@pytest.mark.parametrize("split", ["train[a:b]", "train[:80%](upwards)", "train[1:2", "train[:200%]", "train[]"])
def test_a_slice_that_is_none_is_refused(split):
    with pytest.raises(ValueError, match=r"train_split|has no split"):
        load_image_dataset("digits", train_split=split)
    with pytest.raises(ValueError, match="holds no images"):
        load_image_dataset("digits", train_split="train[5:5]")


def test_a_stream_is_not_sliced(tmp_path, picture):
    parquet_set(tmp_path, picture, [0, 1, 1, 0, 1], datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match="train_split is 'train.:3.', and a stream is read whole"):
        load_image_dataset(str(tmp_path), streaming=True, train_split="train[:3]")
    images = load_image_dataset(str(tmp_path), streaming=True, eval_split="train[1:3]")
    assert images.trained_on == len(images["eval"]) == 2


@pytest.mark.parametrize(
    "options, shared",
    [
        ({"eval_split": "train"}, 20),
        ({"eval_split": "Train"}, 20),
        ({"train_split": "train[:80%]", "eval_split": "train[60%:]"}, 4),
        ({"train_split": "train+test", "eval_split": "test"}, 4),
        ({"train_split": "train[:80%]", "eval_split": "train[80%:]"}, 0),
        ({}, 0),
    ],
)
def test_evaluating_on_training_images_is_one_warning(tmp_path, picture, caplog, options, shared):
    path = write_parquet(tmp_path, picture, {"train": [0, 1] * 10, "test": [0, 1] * 2})
    images = load_image_dataset(path, **options)
    assert images.trained_on == shared
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(shared)
    if shared:
        assert f"{shared} of the {len(images['eval'])} evaluation images are training images too" in messages[0]


def test_one_directory_under_two_names_is_the_same_images(tmp_path, picture, caplog):
    write_split(tmp_path, picture, "train", {"a": 3, "b": 3})
    (tmp_path / "val").symlink_to(tmp_path / "train")
    assert load_image_dataset(str(tmp_path)).trained_on == 6
    assert "6 of the 6 evaluation images are training images too" in caplog.text


def test_classes_left_out_by_a_slice_are_one_warning(tmp_path, picture, caplog):
    write_split(tmp_path, picture, "train", {"a": 10, "b": 10, "c": 10})
    load_image_dataset(str(tmp_path), train_split="train[:60%]", eval_split="train[60%:]")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "1 classes of train[60%:] have no image in train[:60%], such as 'c'" in message


def test_one_class_with_images_is_refused_whatever_the_names(tmp_path, picture):
    write_named(tmp_path / "train.parquet", picture, ["a", "b", "c"], [1, 1])
    write_named(tmp_path / "test.parquet", picture, ["a", "b", "c"], [0, 1])
    with pytest.raises(ValueError, match="1 class found in train: 'b'; at least 2 are needed"):
        load_image_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["a[1]", "[x-z]*", "b?", "{c}"])
def test_files_and_classes_named_like_patterns_are_themselves(tmp_path, picture, name):
    for split in ("train", "val"):
        write_split(tmp_path, picture, split, {name: 2, "plain": 2})
        (tmp_path / split / name / "pic[1]*?.png").write_bytes(picture())
    images = load_image_dataset(str(tmp_path))
    assert sorted(images["train"].features["label"].names) == sorted([name, "plain"])
    assert [len(rows) for rows in images.values()] == [5, 5]
    path = write_parquet(tmp_path / "shards", picture, {"x" + name.replace("-", ""): [0, 1, 0], "test": [0, 1]})
    images = load_image_dataset(path, train_split="x" + name.replace("-", ""))
    assert [len(rows) for rows in images.values()] == [3, 2]


# --- what save_to_disk wrote ---------------------------------------------------------------------------------------


def saved(folder, picture, splits):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    rows = {
        split: datasets.Dataset.from_dict(
            {"image": [{"bytes": picture(), "path": None}] * len(labels), "label": labels}, features=features
        )
        for split, labels in splits.items()
    }
    (datasets.DatasetDict(rows) if len(rows) > 1 else rows["train"]).save_to_disk(folder)
    return str(folder)


def test_a_saved_dataset_is_read_from_disk(tmp_path, picture):
    """Both what DatasetDict and what Dataset save; one without other splits holds out."""
    both = load_image_dataset(saved(tmp_path / "both", picture, {"train": [1, 0, 1], "test": [0, 1]}))
    assert both.layout == "a dataset saved by the datasets library" and both.splits == {
        "train": "train",
        "eval": "test",
    }
    assert both["train"]["label"][:] == [1, 0, 1] and both["eval"]["label"][:] == [0, 1]
    one = saved(tmp_path / "one", picture, {"train": [0, 1] * 10})
    alone = load_image_dataset(one)
    assert [len(rows) for rows in alone.values()] == [16, 4] and alone.held_out == (4, 20)
    assert set(alone["train"][0]["image"]) == {"bytes", "path"}
    with pytest.raises(UserError, match="written by save_to_disk .* use streaming: false"):
        load_image_dataset(one, streaming=True)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "state.json").write_text("{"), "no valid JSON"),
        (
            lambda folder: (folder / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}'),
            "state.json' is damaged: expected the names of Arrow files beside it",
        ),
        (lambda folder: next(folder.glob("*.arrow")).write_bytes(b"ARROW1"), "saved dataset .* cannot be read"),
        (lambda folder: next(folder.glob("*.arrow")).unlink(), "saved dataset .* cannot be read"),
    ],
    ids=["no json", "a path that leads out", "cut short", "missing"],
)
def test_a_damaged_saved_dataset_is_one_line(tmp_path, picture, damage, message):
    folder = Path(saved(tmp_path / "one", picture, {"train": [0, 1] * 10}))
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_image_dataset(str(folder))
