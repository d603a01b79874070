"""data.py: finding sets by name, directory or Hub id, and their two columns."""

import io

import datasets
import pytest
from PIL import Image

from hf_deit import load_image_dataset
from hf_deit.decoding import decode_image


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
    ],
)
def test_bad_arguments_are_refused_with_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset("digits", **arguments)


def test_cifar10_loads_from_parquet(shared_data):
    images = load_image_dataset(str(shared_data / "cifar10"), max_eval_samples=100)
    assert len(images["train"]) == 50_000 and images["train"].features["label"].names[3] == "cat"
    assert decode_image(images["eval"][0]["image"]).shape == (32, 32, 3)
