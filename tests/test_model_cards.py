"""model_cards/: each card is about a recipe, says whose its numbers are, and agrees with the paper and the model."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from support.hub_server import card_errors

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    build_eval_transform,
    build_image_processor,
    parse_recipe,
)
from hf_deit.commands import demo
from hf_deit.evaluation.report import EvaluationArguments


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "model_cards"
STATUS = re.compile(r"measured here$|the paper's, Table \d+$|published by the authors$|not run$")

# Typed from the paper: Table 5 (throughput, ImageNet, ReaL, V2) and Table 3 (class, distillation head).
TABLES_5_AND_3 = """
deit_tiny                       2536.5 72.2 80.1 60.4
deit_small                       940.4 79.8 85.7 68.5
deit_base                        292.3 81.8 86.7 71.5
deit_base_384                     85.9 83.1 87.7 72.4
deit_tiny_distilled             2529.5 74.5 82.1 62.9 73.9 74.6
deit_small_distilled             936.2 81.2 86.8 70.0 80.9 81.1
deit_base_distilled              290.9 83.4 88.3 73.2 83.0 83.1
deit_tiny_distilled_1000ep      2529.5 76.6 83.9 65.4
deit_small_distilled_1000ep      936.2 82.6 87.8 71.7
deit_base_distilled_1000ep       290.9 84.2 88.7 73.9
deit_base_distilled_384           85.8 84.5 89.0 74.8 84.2 84.4
deit_base_distilled_1000ep_384    85.8 85.2 89.3 75.2
"""
# Table 7; its rows are DeiT-B, DeiT-B↑384 and both distilled.
TABLE_7 = """
cifar10    99.1 99.1 99.1 99.2
cifar100   90.8 90.8 91.3 91.4
flowers102 98.4 98.5 98.8 98.9
cars       92.1 93.3 92.9 93.9
inat18     73.2 79.5 73.7 80.1
inat19     77.7 81.4 78.4 83.0
"""
# Table 6: train, test, classes.
TABLE_6 = {
    "cifar10": ("50,000", "10,000", "10"),
    "cifar100": ("50,000", "10,000", "100"),
    "flowers102": ("2,040", "6,149", "102"),
    "cars": ("8,144", "8,041", "196"),
    "inat18": ("437,513", "24,426", "8,142"),
    "inat19": ("265,240", "3,003", "1,010"),
}
# The authors' README_deit.md: checkpoint, top-1, top-5.
AUTHORS = {
    "deit_tiny": ("facebook/deit-tiny-patch16-224", "72.202", "91.124"),
    "deit_small": ("facebook/deit-small-patch16-224", "79.854", "94.968"),
    "deit_base": ("facebook/deit-base-patch16-224", "81.846", "95.594"),
    "deit_base_384": ("facebook/deit-base-patch16-384", "82.890", "96.222"),
    "deit_tiny_distilled": ("facebook/deit-tiny-distilled-patch16-224", "74.476", "91.920"),
    "deit_small_distilled": ("facebook/deit-small-distilled-patch16-224", "81.164", "95.376"),
    "deit_base_distilled": ("facebook/deit-base-distilled-patch16-224", "83.372", "96.482"),
    "deit_base_distilled_1000ep_384": ("facebook/deit-base-distilled-patch16-384", "85.224", "97.186"),
}


def typed(table: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in table.strip().splitlines()}


IMAGENET, TRANSFER = typed(TABLES_5_AND_3), typed(TABLE_7)
STEMS = [*IMAGENET, *TRANSFER]


def card(stem: str) -> ModelCard:
    return ModelCard.load(FOLDER / f"{stem}.md")


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables: rows of cells, the header's first, without the line of dashes."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [[[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()] for table in found]
    return [[head, *body] for head, _, *body in rows]


def recipe_path(stem: str) -> Path:
    return ROOT / "recipes" / ("transfer" if stem in TRANSFER else "imagenet") / f"{stem}.yaml"


def distilled(stem: str) -> bool:
    return stem in TRANSFER or "distilled" in stem


def image_size(stem: str) -> int:
    return 384 if stem.endswith("384") else 224


def test_the_cards_are_what_the_generator_writes():
    written = runpy.run_path(str(FOLDER / "make_cards.py"))["build_all"]()
    assert set(written) == {"README.md", *(f"{stem}.md" for stem in STEMS)}
    for name, text in written.items():
        assert (FOLDER / name).read_text("utf-8") == text, f"{name}: run python model_cards/make_cards.py"


@pytest.mark.parametrize("stem", STEMS)
def test_a_card_tells_of_its_recipe(stem):
    recipe, text = yaml.safe_load(recipe_path(stem).read_text("utf-8")), card(stem).text
    link = recipe_path(stem).relative_to(ROOT).as_posix()
    assert f"[{link}](../{link})" in text and re.search(rf"^accelerate launch .*{link}", text, re.MULTILINE)
    assert recipe.get("image_size", 224) == image_size(stem)
    assert recipe.get("use_distillation_token", True) == distilled(stem)
    assert recipe.get("dataset_name", "imagenet-1k") == (stem if stem in TRANSFER else "imagenet-1k")
    for key in {"teacher", "model_name_or_path"} & recipe.keys():
        assert f"`{recipe[key]}`" in text


def test_the_readme_lists_every_card_and_claims_no_measurement():
    (rows,) = tables((FOLDER / "README.md").read_text("utf-8"))
    expected = [
        *((stem, values[1], "5") for stem, values in IMAGENET.items()),
        *((stem, values[2], "7") for stem, values in TRANSFER.items()),
    ]
    listed = {row[0]: (row[1], *row[3:]) for row in rows[1:]}
    links = {stem: recipe_path(stem).relative_to(ROOT).as_posix() for stem in STEMS}
    assert listed == {
        f"[{stem}]({stem}.md)": (f"[{links[stem]}](../{links[stem]})", f"{top1} (Table {table})", "not run")
        for stem, top1, table in expected
    }


@pytest.mark.parametrize("stem", STEMS)
def test_the_front_matter_is_what_the_hub_reads_and_claims_no_result(stem):
    data = card(stem).data
    assert card_errors((FOLDER / f"{stem}.md").read_text("utf-8")) == []
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert data.license == "apache-2.0" and data.datasets != []
    assert data.tags[0] == ("deit" if distilled(stem) else "vit")
    # The Hub shows a model-index as results of the weights beside the card.
    assert data.eval_results is None and "model-index" not in data.to_dict() and data.metrics is None


@pytest.mark.parametrize("stem", STEMS)
def test_every_number_says_whose_it_is_and_no_accuracy_is_ours(stem):
    accuracy, model, *settings = tables(card(stem).text)
    for head, *rows in (accuracy, model):
        assert head[-1] == "whose number" and rows
        assert all(STATUS.match(row[-1]) for row in rows)
    assert not any("measured" in row[-1] for row in accuracy)
    assert [row[0] for row in model if row[-1] == "measured here"] == ["parameters", "tokens"]
    assert all(row[2:-1] == ["", ""] for row in accuracy if row[-1] == "not run")
    assert all(table[0][1:] == ["recipe", "Table 9"] for table in settings)


@pytest.mark.parametrize("stem", IMAGENET)
def test_the_numbers_of_imagenet_are_those_of_the_paper_and_the_authors(stem):
    accuracy, model = tables(card(stem).text)[:2]
    throughput, top1, real, v2, *heads = IMAGENET[stem]
    expected = [("validation", top1, "Table 5")]
    expected += [("validation", value, "Table 3") for value in heads]
    expected += [("validation, ReaL labels", real, "Table 5"), ("ImageNet V2, matched frequency", v2, "Table 5")]
    paper = [(row[1], row[2], row[4].split(", ")[1]) for row in accuracy if "paper" in row[4]]
    assert paper == expected and not any(row[3] for row in accuracy if "paper" in row[4])
    assert [row[1] for row in model if row[0].startswith("throughput, one V100")] == [f"{throughput} images/s"]
    published = [tuple(row[1:4]) for row in accuracy if row[4] == "published by the authors"]
    if stem in AUTHORS:
        hub_id, *values = AUTHORS[stem]
        assert published == [("validation, crop ratio 0.875", *values)]
        assert f"https://huggingface.co/{hub_id})" in card(stem).text
    else:
        assert published == [] and "facebook/deit" not in card(stem).text.split("## Weights")[1]


@pytest.mark.parametrize("stem", TRANSFER)
def test_the_numbers_of_a_transfer_are_those_of_tables_6_and_7(stem):
    accuracy = tables(card(stem).text)[0]
    names = ["DeiT-B", "DeiT-B↑384", "DeiT-B⚗", "DeiT-B⚗↑384"]
    rows = [(row[0], row[2]) for row in accuracy if row[4] == "the paper's, Table 7"]
    assert rows == list(zip(names, TRANSFER[stem], strict=True)) and len(accuracy) == 6
    train, test, classes = TABLE_6[stem]
    assert f"{train} to train on, {test} to evaluate, {classes} classes (the paper's, Table 6)" in card(stem).text


@pytest.mark.parametrize("stem", STEMS)
def test_parameters_and_tokens_are_those_of_the_architecture(stem):
    width = {"tiny": 192, "small": 384}.get(stem.split("_")[1] if stem in IMAGENET else "base", 768)
    patches, heads = (image_size(stem) // 16) ** 2, 1 + distilled(stem)
    classes = int(TABLE_6[stem][2].replace(",", "")) if stem in TRANSFER else 1000
    block = 12 * width**2 + 13 * width  # two norms, QKV and projection, feed-forward, with their biases
    embeddings = (16 * 16 * 3 + 1) * width + heads * width + (patches + heads) * width
    expected = 12 * block + embeddings + 2 * width + heads * (width + 1) * classes
    model = {row[0]: row[1] for row in tables(card(stem).text)[1]}
    assert model["parameters"] == f"{expected:,}"
    assert model["tokens"].startswith(f"{patches + heads} = ")

    (program,) = re.findall(r'python -c "(.*?)"\n', card(stem).text, re.DOTALL)
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    assert int(printed.getvalue()) == expected


@pytest.mark.parametrize("stem", STEMS)
def test_the_command_that_evaluates_is_one_that_run_eval_reads(stem):
    (line,) = re.findall(r"^accelerate launch recipes/run_eval.py (.+)$", card(stem).text, re.MULTILINE)
    (args,) = parse_recipe((EvaluationArguments,), line.split())
    assert args.dataset_name == (stem if stem in TRANSFER else "imagenet-1k")
    assert len(args.models) == 1 and f"`{args.models[0]}` is what the" in card(stem).text


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A plain and a distilled checkpoint of random weights, as a run leaves them, and a photo; in one directory."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model_class in (
        ("plain", DeiTForImageClassification),
        ("distilled", DeiTForImageClassificationWithTeacher),
    ):
        config = DeiTConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=64,
            id2label={0: "cat", 1: "dog"},
            use_distillation_token=name == "distilled",
        )
        model_class(config).save_pretrained(folder / name)
        build_image_processor(build_eval_transform(64)).save_pretrained(folder / name)
    Image.effect_noise((80, 100), 60).save(folder / "image.jpg")
    return folder


def usage() -> dict[str, set[str]]:
    """The Python blocks by library, with the directory of weights replaced by `plain` or `distilled`; once each."""
    code = {"stock": set(), "hf_deit": set()}
    for stem in STEMS:
        text = card(stem).text
        (directory,) = re.findall(r"^`(\S+)` is what the (?:conversion|recipe) writes", text, re.MULTILINE)
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            assert block.count(f'"{directory}"') == 1
            local = block.replace(directory, "distilled" if distilled(stem) else "plain")
            code["hf_deit" if "hf_deit" in local else "stock"].add(local)
    assert {library: len(blocks) for library, blocks in code.items()} == {"stock": 2, "hf_deit": 2}
    return code


def test_the_code_for_hf_deit_prints_a_label(checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    code = usage()
    for block in code["hf_deit"]:
        exec(block, {})
        assert capsys.readouterr().out.strip() in {"cat", "dog"}
    for block in code["stock"]:
        compile(block, "card", "exec")


@pytest.mark.slow
def test_the_code_for_stock_transformers_prints_a_label(checkpoints):
    program = "\n".join([*usage()["stock"], "import sys", "assert 'hf_deit' not in sys.modules"])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=checkpoints, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2 and set(done.stdout.split()) <= {"cat", "dog"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
    local = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if "{{" not in link and not (FOLDER / link).exists()] == []


# https://huggingface.co/docs/hub/spaces-config-reference
SPACE_COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def test_the_front_matter_of_the_space_is_what_the_hub_asks_for():
    _, front, text = (FOLDER / "space" / "README.md").read_text("utf-8").split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["sdk"] == "gradio" and (FOLDER / "space" / data["app_file"]).is_file()
    assert {data["colorFrom"], data["colorTo"]} <= SPACE_COLOURS
    assert len(data["short_description"]) <= 60 and data["license"] == "apache-2.0"
    assert data["models"] == ["my_name/my_deit"]
    (wanted,) = re.findall(r'^DEMO = \["gradio>=(\d+)"\]', (ROOT / "setup.py").read_text("utf-8"), re.MULTILINE)
    assert re.fullmatch(rf"{wanted}\.\d+\.\d+", data["sdk_version"])
    # Everything that the page needs besides gradio is installed with the package.
    (line,) = [line for line in (FOLDER / "space" / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert line.startswith("hf_deit @ git+https://") and line.split("git+")[1] in text


def test_the_space_serves_the_model_that_its_variables_name(tmp_path, monkeypatch):
    model = DeiTForImageClassificationWithTeacher(
        DeiTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    )
    model.save_pretrained(tmp_path / "my_deit")
    build_image_processor(build_eval_transform(16)).save_pretrained(tmp_path / "my_deit")
    served = []
    monkeypatch.setattr(demo, "build_page", lambda shown, title: (shown.student.model, shown.teacher, title))
    monkeypatch.setattr(demo, "serve", lambda *call: served.append(call))
    app = str(FOLDER / "space" / "app.py")
    monkeypatch.setenv("MODEL", str(tmp_path / "my_deit"))
    runpy.run_path(app, run_name="__main__")
    ((shown, teacher, title), host, port), *others = served
    assert (teacher, title, host, port, others) == (None, "my_deit", "0.0.0.0", 7860, [])
    for name, weights in shown.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name])

    monkeypatch.setenv("TEACHER", str(tmp_path / "my_deit"))
    runpy.run_path(app, run_name="__main__")
    assert served[1][0][1] is not None
    monkeypatch.delenv("MODEL")
    with pytest.raises(SystemExit, match="variable MODEL is not set"):
        runpy.run_path(app, run_name="__main__")
