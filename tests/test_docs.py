"""What the documents promise exists: files, make targets, Python that compiles, links."""

import ast
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from hf_deit import DeiTConfig, DeiTForImageClassificationWithTeacher, build_eval_transform, build_image_processor
from hf_deit.data.registry import REGISTRY


ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted(path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists())
RECIPE_FILES = sorted(path for path in ROOT.glob("recipes/**/*") if path.suffix in {".yaml", ".md", ".py"})
DOCS = sorted(ROOT.glob("docs/**/*.md"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))

# `recipes/x.yaml`, `tests/`, `.ci/run`; `<name>` marks a placeholder, `*` and `{a,b}` stand for several files.
PATH = re.compile(r"(?<![\w./<-])((?:\.ci|benchmarks|docs|model_cards|recipes|src|tests)/[\w./*{},<>-]*)")
# `losses.py` alone, as in a table of "where is what" or a tree; `[recipe.yaml]` is an argument.
BARE_FILE = re.compile(r"(?<![\w./*<>\[-])(\w[\w-]*\.(?:py|yaml))(?![\w/])")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def expand(pattern: str) -> list[str]:
    """`a/{b,c}.yaml` -> `a/b.yaml`, `a/c.yaml`."""
    pieces = re.split(r"\{([^}]*)\}", pattern)
    choices = [piece.split(",") if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return ["".join(choice) for choice in product(*choices)]


def exists(name: str) -> bool:
    folders = (ROOT / folder for folder in ("src", "recipes", "tests", "benchmarks"))
    return (ROOT / name).exists() or any(path for folder in folders for path in folder.rglob(name))


def missing_paths(text: str) -> list[str]:
    """The named files that do not exist. A reader's own begin with `my_`, `recipe.yaml` stands for any of them; the
    authors' are elsewhere."""
    text = re.sub(r"facebookresearch/deit [\w.]+", "", text)
    named = [name for match in PATH.findall(text) if "<" not in match for name in expand(match.rstrip(".,"))]
    missing = [name for name in named if "/my_" not in name and not any(ROOT.glob(name.rstrip("/")))]
    own = [name for name in BARE_FILE.findall(text) if not name.startswith("my_") and name != "recipe.yaml"]
    return missing + [name for name in own if not exists(name)]


def test_the_scan_finds_what_is_missing():
    text = (
        "`src/hf_deit/losses.py` recipes/accelerate/{cpu,no}.yaml, tests/test_*.py, `tests/test_<x>.py`, no.py, "
        "setup.py"
    )
    assert missing_paths(text) == ["recipes/accelerate/no.yaml", "no.py"]


@pytest.mark.parametrize("path", [*GUIDES, *RECIPE_FILES], ids=relative)
def test_named_files_exist(path):
    assert not missing_paths(path.read_text("utf-8"))


@pytest.mark.parametrize("path", [*GUIDES, *RECIPE_FILES, *DOCS, ROOT / ".ci/run"], ids=relative)
def test_named_make_targets_exist(path):
    # In prose "make" is a verb: only backticks, blocks of code and scripts count.
    text = path.read_text("utf-8")
    code = text if path.suffix == "" else "\n".join(re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL))
    named = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^\W*(?:step )?make ([a-z-]+)", code, re.MULTILINE)
    assert set(named) <= TARGETS


@pytest.mark.parametrize("path", [*GUIDES, *DOCS], ids=relative)
def test_python_blocks_compile(path):
    for block in re.findall(r"^```py(?:thon)?\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("path", [*GUIDES, *DOCS, *ROOT.glob("recipes/**/*.md")], ids=relative)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"", path.read_text("utf-8"))
    local = [one or other for one, other in links if not re.match(r"[a-z]+:|#", one or other)]
    assert [link for link in local if not (path.parent / link.split("#")[0]).exists()] == []


@pytest.mark.slow
def test_the_export_page_runs_as_printed(tmp_path, monkeypatch, capsys):
    """On an untrained model of the quickstart's shape; the preprocessing equals the image processor's."""
    text = (ROOT / "docs" / "export.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    names = {number: f"class {number}" for number in range(10)}
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(**sizes, id2label=names)).eval()
    processor = build_image_processor(build_eval_transform(16, crop_ratio=0.8))
    for part in (model, processor):
        part.save_pretrained("outputs/quickstart")
    image = Image.fromarray(load_sample_image("flower.jpg"))
    image.save("image.jpg", quality=100)
    monkeypatch.syspath_prepend(ROOT / "recipes")
    import export_model

    for words in re.findall(r"^python recipes/export_model.py (\S+) (\S+)$", text, re.MULTILINE):
        export_model.main(list(words))
    names, printed = {}, capsys.readouterr().out
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert printed.count("10 classes") == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] and lines[0].startswith("class ")
    assert [line.split(": ")[0] for line in lines[2:]] == ["PyTorch", "my_deit.onnx", "my_deit_int8.onnx"]
    assert lines[2].split(",")[0][9:] == lines[3].split(",")[0][14:]  # the same accuracy
    expected = processor(Image.open("image.jpg"), return_tensors="np")["pixel_values"]
    assert np.abs(names["pixel_values"] - expected).max() < 0.05  # a level of 255 is 0.02


def test_the_data_page_lists_every_registered_set():
    rows = [line.split("|") for line in (ROOT / "docs" / "data.md").read_text("utf-8").splitlines()]
    listed = {row[1].split()[0].strip("`"): row for row in rows if len(row) == 8 and row[1].strip().startswith("`")}
    assert list(listed) == list(REGISTRY)
    for name, (_, _, *sizes, hub, _, _) in listed.items():
        entry = REGISTRY[name]
        numbers = [int(size.replace(",", "")) if size.strip() else None for size in sizes]
        assert numbers == [entry.train_size, entry.eval_size, entry.num_classes], name
        assert (entry.hub_id or "") == hub.partition(",")[0].strip().strip("`")
        assert ("terms" in hub) == entry.gated
