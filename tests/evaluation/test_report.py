"""The report: lists in arguments, the table and the JSON of run_eval.py, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image as PillowImage
from support.evaluation import (
    COLOURS,
    ID2LABEL,
    SHAPE,
    drawn,
    save,
)
from transformers import ViTConfig, ViTForImageClassification

from hf_deit import parse_recipe
from hf_deit.arguments import words
from hf_deit.errors import run_script
from hf_deit.evaluation.report import EvaluationArguments, evaluation_table
from hf_deit.paper.analysis import AnalysisArguments


def test_the_table_and_the_json_say_the_same(script, stock, dataset, tmp_path, capsys):
    vit = save(drawn(ViTForImageClassification(ViTConfig(**SHAPE, id2label=ID2LABEL))), tmp_path / "vit")
    arguments = ["--models", f"{stock[1]},{vit}", "--dataset_name", dataset, "--image_size", "16", "32"]
    arguments += ["--num_workers", "0", "--heads", "class, softmax", "--output", str(tmp_path / "new" / "report")]
    report = script.main(arguments)
    assert report == json.loads((tmp_path / "new" / "report.json").read_text())
    table = (tmp_path / "new" / "report.md").read_text()
    assert table.strip() in capsys.readouterr().out

    results = report["results"]
    sizes = [(result["model"], result["image_size"]) for result in results]
    assert sizes == [(stock[1], 16), (stock[1], 32), (vit, 16), (vit, 32)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    expected = [(result, head) for result in results for head in result["heads"] if head in ("class", "softmax")]
    assert [row[3] for row in rows[1:]] == ["class", "softmax", "class", "softmax", "class", "class"]
    for row, (result, head) in zip(rows[1:], expected, strict=True):
        measured = result["heads"][head]
        assert row[4:7] == [
            f"{100 * measured['top1']:.2f}",
            "-",  # top-5 of three classes
            f"{measured['loss']:.4f}",
        ]
        assert result["images"] == 19 and result["parameters"] > 0
    assert rows[1][:3] == [stock[1], "16", "1"] and "19 images" in table
    assert {"torch", "transformers", "timm", "hf_deit"} <= report["versions"].keys()
    assert "--dataset_name" in report["command"] and report["dataset"]["classes"] == 3


def test_the_table_says_what_was_not_counted_and_how_classes_were_matched(script):
    heads = {"class": {"top1": 0.5, "top5": 1.0, "loss": 1.0}}
    result = {"model": "m", "image_size": 224, "crop_ratio": 0.875, "images": 50_000, "images_without_label": 3_163}
    result |= {"images_per_second": 1234.5, "own_head": "class", "heads": heads, "classes_matched": "by position: why"}
    table = evaluation_table({"dataset": {"name": "imagenet-real"}, "results": [result]}, ["softmax"])
    assert "50,000 images of imagenet-real, 3,163 of them without a label and not counted" in table
    assert "| m | 224 | 0.875 | class | 50.00 | 100.00 | 1.0000 | 1,234 |" in table
    assert "classes of m: by position: why" in table and "softmax" not in table


def test_imagenet_real_is_read_from_its_official_files(script, tmp_path):
    (tmp_path / "real" / "val").mkdir(parents=True)
    for number, colour in enumerate([*COLOURS, "white"], start=1):
        image = PillowImage.new("RGB", (16, 16), colour)
        image.save(tmp_path / "real" / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "real" / "real.json").write_text(json.dumps([list(range(1000)), [], [], [7]]))
    names = {number: f"thing {number}" for number in range(1000)}
    model = drawn(ViTForImageClassification(ViTConfig(**SHAPE, id2label=names)))
    model.classifier.bias.data[3] = 1e3  # whatever it sees
    arguments = ["--models", save(model, tmp_path / "vit"), "--dataset_name", "imagenet-real", "--num_workers", "0"]
    arguments += ["--data_dir", str(tmp_path / "real"), "--output", str(tmp_path / "report")]
    result = script.main(arguments)["results"][0]
    assert (result["images"], result["images_without_label"]) == (4, 2)
    assert result["classes_matched"] == "by position: the dataset has no class names"
    assert result["heads"]["class"]["top1"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "models is not set"),
        (["--models", "{none}"], "'.*/nowhere' does not exist"),
        (["--models", "timm:deit_tinny"], "timm has no model 'deit_tinny'"),
        (["--models", "{stock}", "--heads", "fused"], "heads has 'fused'; the heads are class, distillation"),
        (["--models", "{stock}", "--image_size", "large"], "image_size has 'large'"),
        (["--models", "{stock}", "--image_size", "18"], "could not read a blank 18x18 image .*multiple of patch"),
        (["--models", "{stock}", "--crop_ratio", "2"], "crop_ratio must be above 0 and at most 1, got 2"),
        (["--models", "{stock}", "--dataset_name", "digits"], r"has 3 classes \(red.*the dataset has 10 \(0, 1"),
        (["--models", "{stock}", "--modles", "x"], "did you mean 'models'"),
    ],
)
def test_bad_input_ends_in_one_line(script, stock, dataset, tmp_path, arguments, message):
    fill = {"stock": stock[1], "none": str(tmp_path / "nowhere")}
    base = ["--dataset_name", dataset, "--num_workers", "0", "--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match="^error: .*" + message) as end:
        run_script(lambda: script.main([*base, *(argument.format(**fill) for argument in arguments)]))
    assert "\n" not in str(end.value) and not (tmp_path / "report.json").exists()


def test_a_recipe_may_write_its_lists_as_yaml_does(script, stock, dataset, tmp_path):
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(f"models: [{stock[1]}]\ndataset_name: {dataset}\nimage_size: 16\ncrop_ratio: [1, 0.5]\n")
    report = script.main([str(recipe), "--num_workers", "0", "--output", str(tmp_path / "report")])
    assert [(result["image_size"], result["crop_ratio"]) for result in report["results"]] == [(16, 1.0), (16, 0.5)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        ("a,b", ["a", "b"]),
        (" a , b,, c ,", ["a", "b", "c"]),
        (["a", "b"], ["a", "b"]),  # separate words, as argparse gives them
        (["a,b", "c"], ["a", "b", "c"]),
        ("my models/a, b", ["my models/a", "b"]),
        (["my models/a"], ["my models/a"]),
        ([16, 32], ["16", "32"]),  # a list in a recipe
    ],
)
def test_lists_are_written_with_commas_and_keep_blanks_inside_a_word(value, expected):
    assert words(value) == expected


def test_every_list_of_models_keeps_the_blanks_of_a_path():
    assert EvaluationArguments(models=["my models/a, b"]).models == ["my models/a", "b"]
    assert AnalysisArguments(models=["my models/a, b", "c"]).models == ["my models/a", "b", "c"]
    assert parse_recipe((AnalysisArguments,), ["--models", "my models/a", "b"])[0].models == ["my models/a", "b"]


def test_the_worst_classes_are_named_where_classes_are_uneven(script, stock, tmp_path):
    """The means over classes and over images are both made of the classes' accuracies."""
    rng = np.random.default_rng(3)
    for colour, count in zip(COLOURS, (6, 2, 3), strict=True):
        (tmp_path / "uneven" / "test" / colour).mkdir(parents=True)
        for number in range(count):
            image = PillowImage.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image.save(tmp_path / "uneven" / "test" / colour / f"{number}.png")
    arguments = ["--models", stock[1], "--dataset_name", str(tmp_path / "uneven"), "--eval_split", "test"]
    arguments += ["--num_workers", "0", "--output", str(tmp_path / "report")]
    result = script.main(arguments)["results"][0]
    of_class = {name: (measured["accuracy"], measured["images"]) for name, measured in result["classes"].items()}
    assert {name: images for name, (_, images) in of_class.items()} == {"red": 6, "green": 2, "blue": 3}
    accuracies = [accuracy for accuracy, _ in of_class.values()]
    measured = result["heads"][result["own_head"]]
    assert accuracies == sorted(accuracies) and len(set(accuracies)) > 1
    assert measured["balanced_accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert measured["top1"] == pytest.approx(sum(accuracy * images for accuracy, images in of_class.values()) / 11)
    (line,) = (
        line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("the classes are")
    )
    assert f"balanced accuracy (the mean of the classes' top-1) of {stock[1]} at 16" in line
    assert f"worst classes: {next(iter(of_class))} " in line
