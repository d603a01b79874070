"""pack.py: from the command line to a directory that loads, its card and its dataset.json, and to the Hub."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hf_deit import load_image_dataset
from hf_deit.commands import pack


ROOT = Path(__file__).resolve().parents[2]


def write_photo(path, number, size=(90, 70)):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng(number).integers(0, 256, 3)
    pixels = np.linspace(0, 1, size[0])[None, :, None] * colour * np.ones((size[1], 1, 1))
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


@pytest.fixture
def photos(tmp_path):
    for split, count in (("train", 8), ("val", 4), ("test", 2)):
        for number in range(2 * count):
            write_photo(tmp_path / "photos" / split / ("cat", "dog")[number % 2] / f"{number}.jpg", number)
    return tmp_path / "photos"


def bytes_of(rows):
    images = [row["image"] for row in rows]
    return [image["bytes"] or Path(image["path"]).read_bytes() for image in images]


def test_a_directory_is_packed_with_a_card_and_its_facts(photos, tmp_path, capsys):
    folder = tmp_path / "packed"
    pack.main([str(photos), str(folder)])
    said = capsys.readouterr().out
    assert "not packed: test; pack more splits with --other_splits test" in said
    assert "train: 16 images in 1 files" in said and "val: 8 images" in said and str(folder) in said
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "dataset.json", *(f"{split}-00000-of-00001.parquet" for split in ("train", "val"))}
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert [item["split"] for item in front["configs"][0]["data_files"]] == ["train", "val"]
    assert str(tmp_path) not in card and "Every image file is stored byte for byte" in card
    facts = json.loads((folder / "dataset.json").read_text())
    assert facts["class_names"] == ["cat", "dog"]
    assert facts["splits"]["train"]["images_by_class"] == {"cat": 8, "dog": 8}
    assert facts["source"]["splits"]["eval"]["images"] == 8
    assert str(tmp_path) not in json.dumps(facts)
    source, loaded = load_image_dataset(str(photos)), load_image_dataset(str(folder), streaming=True)
    for part in ("train", "eval"):
        assert bytes_of(loaded[part][i] for i in range(len(loaded[part]))) == bytes_of(source[part])
    with pytest.raises(ValueError, match="holds a finished pack"):
        pack.main([str(photos), str(folder)])


def test_further_splits_keep_their_names_and_the_numbers_of_the_classes(photos, tmp_path, capsys):
    pack.main([str(photos), str(tmp_path / "packed"), "--other_splits", "test"])
    assert "not packed" not in capsys.readouterr().out
    loaded = load_image_dataset(str(tmp_path / "packed"), eval_split="test")
    assert bytes_of(loaded["eval"]) == bytes_of(load_image_dataset(str(photos), eval_split="test")["eval"])
    assert loaded["eval"]["label"][:] == [0, 0, 1, 1]
    for wrong in ("val", "test[:1]"):
        with pytest.raises(ValueError, match=r"other_splits has .*the source has .*test"):
            pack.main([str(photos), str(tmp_path / "other"), "--other_splits", wrong])
    with pytest.raises(ValueError, match="no split 'extra'"):
        pack.main([str(photos), str(tmp_path / "other"), "--other_splits", "extra"])


def test_what_is_held_out_stays_held_out(photos, tmp_path):
    source = load_image_dataset(str(photos / "train"), eval_fraction=0.25)
    pack.main([str(photos / "train"), str(tmp_path / "packed"), "--eval_fraction", "0.25"])
    loaded = load_image_dataset(str(tmp_path / "packed"))
    assert loaded.held_out is None and loaded.splits == {"train": "train", "eval": "validation"}
    for part, count in (("train", 12), ("eval", 4)):
        assert bytes_of(loaded[part]) == bytes_of(source[part]) and len(loaded[part]) == count


def test_reduced_images_are_announced_with_the_difference_of_their_views(photos, tmp_path, capsys):
    pack.main([str(photos), str(tmp_path / "packed"), "--max_side", "48", "--quality", "80", "--image_size", "40"])
    said = capsys.readouterr().out
    assert "16 reduced to a shorter side of 48 pixels" in said
    facts = json.loads((tmp_path / "packed" / "dataset.json").read_text())
    assert (facts["max_side"], facts["quality"], facts["views_compared_at"]) == (48, 80, 40)
    difference = facts["difference_of_views"]
    assert 0 < difference["evaluation"] <= difference["evaluation, largest"] < 4
    assert f"differ from the source's by {difference['evaluation']:.2f} levels" in said
    assert "quality 80" in (tmp_path / "packed" / "README.md").read_text()
    sizes = {Image.open(path).size for path in unpacked(tmp_path)}
    assert sizes == {(61, 48)}


def unpacked(tmp_path):
    rows = load_image_dataset(str(tmp_path / "packed"))["train"]
    for number, data in enumerate(bytes_of(rows)):
        (tmp_path / f"{number}.jpg").write_bytes(data)
        yield tmp_path / f"{number}.jpg"


def test_a_registered_set_is_packed_by_its_name(tmp_path):
    pack.main(["digits", str(tmp_path / "packed")])
    loaded = load_image_dataset(str(tmp_path / "packed"))
    assert loaded.splits == {"train": "train", "eval": "test"} and len(loaded["train"]) == 1437
    assert bytes_of(loaded["eval"]) == bytes_of(load_image_dataset("digits")["eval"])
    assert "licence: CC BY 4.0" in (tmp_path / "packed" / "README.md").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "pack needs a dataset and a directory to write"),
        (["digits", "--max_side", "3"], "pack needs a dataset and a directory to write"),
        (["recipe.yaml", "x"], "is a recipe: give its dataset_name"),
        (["digits", "x", "--max_sid", "3"], "did you mean 'max_side'"),
        (["digits", "x", "--quality", "80"], "max_side is not set"),
        (["digits", "x", "--max_side", "0"], "max_side is 0"),
        (["digits", "x", "--max_side", "8", "--quality", "0"], "quality is 0"),
        (["digits", "x", "--num_workers", "0"], "num_workers is 0"),
    ],
)
def test_wrong_words_are_one_line_and_write_nothing(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        pack.main(words)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def run(hub, *words):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=hub.environment | {"HF_TOKEN": hub.token, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_pack(hub, *words):
    return run(hub, "-m", "hf_deit", "pack", *words)


def test_a_pack_is_pushed_and_streams_from_the_hub(photos, tmp_path, hub):
    folder = tmp_path / "packed"
    done = run_pack(hub, photos, folder, "--push_to_hub", "user/photos", "--hub_private_repo", "true")
    assert done.returncode == 0, done.stderr[-2000:]
    repository = hub.repositories["dataset", "user/photos"]
    assert repository.private
    files = repository.at("main").files
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: file.data for name, file in files.items()
    }
    program = """
import hashlib, json
from hf_deit import load_image_dataset
images = load_image_dataset("user/photos", streaming=True)
rows = [images["train"][number] for number in range(len(images["train"]))]
digests = [hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in rows]
print(json.dumps([digests, [row["label"] for row in rows], len(images["eval"])]))
"""
    read = run(hub, "-c", program)
    assert read.returncode == 0, read.stderr[-2000:]
    source = load_image_dataset(str(photos))["train"]
    expected = [hashlib.sha256(data).hexdigest() for data in bytes_of(source)]
    assert json.loads(read.stdout.splitlines()[-1]) == [expected, source["label"][:], 8]


def test_a_name_that_may_not_be_pushed_to_is_refused_before_anything_is_packed(photos, tmp_path, hub):
    done = run_pack(hub, photos, tmp_path / "packed", "--push_to_hub", "stranger/photos")
    assert done.returncode == 1 and not (tmp_path / "packed").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "cannot push to 'stranger/photos'" in line and "push_to_hub to <your name>/<dataset>" in line
    assert line.endswith("Nothing has been packed: fix this first")


def test_an_upload_that_fails_loses_nothing_and_says_how_to_repeat_it(photos, tmp_path, hub):
    hub.failures += [(400, "/commit/main")]
    done = run_pack(hub, photos, tmp_path / "packed", "--push_to_hub", "user/photos")
    assert done.returncode == 1
    assert f"hf upload user/photos {tmp_path / 'packed'} . --repo-type dataset" in done.stderr.splitlines()[-1]
    assert len(load_image_dataset(str(tmp_path / "packed"))["train"]) == 16
