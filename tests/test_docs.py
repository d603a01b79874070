"""What the documents promise exists: files, make targets, commands, Python, links, messages."""

import ast
import json
import re
import shlex
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_sample_image

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    UserError,
    build_eval_transform,
    build_image_processor,
    parse_recipe,
)
from hf_deit.__main__ import COMMANDS
from hf_deit.commands import export
from hf_deit.data.registry import REGISTRY


ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted(path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists())
RECIPE_FILES = sorted(path for path in ROOT.glob("recipes/**/*") if path.suffix in {".yaml", ".md", ".py"})
DOCS = sorted(ROOT.glob("docs/**/*.md"))
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
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


def commands_of(path: Path) -> list[str]:
    """The lines of a document that call one of our commands, by `hf-deit` or by a script of a checkout."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        spans = re.findall(r"`((?:hf-deit|python|accelerate launch) [^`]+)`", text)
        blocks = re.findall(r"^ *```(?:bash|sh)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        text = "\n".join(["".join(blocks), *spans])
    text = re.sub(r"\s*\\\n\s*", " ", text)  # a command that goes on in the next line
    lines = [re.sub(r"^#\s+(Command:\s+)?", "", line.strip()) for line in text.splitlines()]
    calls = re.compile(
        r"(\w+=\S+ )*(hf-deit|(python|accelerate launch|torchrun)( -\S+ \S+)* (-m hf_deit|recipes/\w+\.py)) ?(?!<)"
    )
    return [line.split("  ")[0] for line in lines if calls.match(line)]


def recipes_of(text: str) -> dict[str, str]:
    """Recipes that a page shows whole: blocks of YAML whose first line is a comment with the file's name."""
    return dict(re.findall(r"^```yaml\n# (my_\w+\.yaml)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def parse_command(line: str, folder: Path, page: str = "") -> None:
    """Parse a command line as its command does; a recipe of the reader is the one that `page` shows, or empty."""
    words = shlex.split(re.sub(r"\s\[[^\]]*\]|\s\.\.\.", "", line), comments=True)
    words = words[
        next(place for place, word in enumerate(words) if re.search(r"hf[-_]deit$|recipes/\w+\.py$", word)) :
    ]
    scripts = {"run_analysis": "analyze", "convert_checkpoint": "convert", "export_model": "export"}
    scripts |= {"check_data": "check", "pack_dataset": "pack", "publish_record": "record"}
    name = words.pop(0) if words[0].endswith(".py") else words[1]
    if name.endswith(".py"):
        name = scripts.get(Path(name).stem, Path(name).stem.removeprefix("run_"))
    else:
        del words[:2]
    if name in ("--help", "options") or "..." in line or "DATA" in line:
        return
    assert name in COMMANDS, line
    command = import_module(f"hf_deit.commands.{name}")
    if not words:  # named in a sentence
        return
    if "--help" in words or "--help-all" in words or "..." in words or any("<" in word for word in words):
        return
    if hasattr(command, "KINDS"):
        recipe = words.pop(0) if words and not words[0].startswith("-") else None
        known = ["--use_cpu", "true"] if name in ("distill", "teacher") else []
        if recipe is not None and "my_" in recipe:  # the reader's: a copy of ours, or their own
            ours, recipe = ROOT / "recipes" / Path(recipe).name, str(folder / "recipe.yaml")
            shown = recipes_of(page).get(ours.name, "")
            Path(recipe).write_text(ours.read_text("utf-8") if ours.exists() else shown)
        parse_recipe(command.KINDS, [*([recipe] if recipe else []), *words, *known])
    elif not (name == "check" and "my_run.yaml" in line):
        (command.parse if name == "table" else command.parse_arguments)(words)


COMMAND_LINES = {
    (relative(path), line)
    for path in [*GUIDES, *DOCS, *ROOT.glob("recipes/*.yaml"), ROOT / "recipes" / "README.md"]
    for line in commands_of(path)
}


@pytest.mark.parametrize("path, line", sorted(COMMAND_LINES))
def test_a_command_of_the_documents_parses(path, line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_command(line, tmp_path, (ROOT / path).read_text("utf-8"))


def test_the_readme_shows_the_recipe_for_own_photos_as_it_is():
    recipe = (ROOT / "recipes" / "my_photos.yaml").read_text("utf-8").split("\n\n", 1)[1]
    assert recipe in (ROOT / "README.md").read_text("utf-8")
    assert len([line for line in recipe.splitlines() if line]) <= 10


def test_the_readme_lists_every_command():
    text = (ROOT / "README.md").read_text("utf-8")
    table = text[text.index("## Commands") :].split("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name.split()[0] for cell in first for name in re.findall(r"`([^`]+)`", cell)} == set(COMMANDS)


def test_what_users_expect_is_here_and_each_line_says_where():
    text = (ROOT / "docs" / "comparison.md").read_text("utf-8")
    table = text[text.index("## What users of such software expect") :].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 11 and all(row[1].strip().startswith("yes") for row in rows)
    shown = [row[-1] for row in rows]
    assert all(re.search(r"`[^`]+`|\]\(", where) for where in shown)
    assert missing_paths("\n".join(shown)) == []


def test_a_wrong_command_of_a_document_does_not_parse(tmp_path):
    with pytest.raises(UserError, match="num_train_epochs"):
        parse_command("hf-deit distill quickstart --epochs 3", tmp_path)
    with pytest.raises(AssertionError, match="hf-deit distil"):
        parse_command("hf-deit distil quickstart", tmp_path)


@pytest.mark.parametrize("path", [*GUIDES, *DOCS, *ROOT.glob("recipes/**/*.md")], ids=relative)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"", path.read_text("utf-8"))
    local = [one or other for one, other in links if not re.match(r"[a-z]+:|#", one or other)]
    assert [link for link in local if not (path.parent / link.split("#")[0]).exists()] == []


def test_the_scan_finds_commands_and_recipes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nA=1 torchrun -n 2 recipes/run_eval.py \\\n  --models a  # why\nls recipes\nhf-deit init my_run\n"
        "```\n```yaml\n# my_run.yaml\nimage_size: 32\n```\nhf-deit prose\n"
    )
    assert commands_of(page) == ["A=1 torchrun -n 2 recipes/run_eval.py --models a", "hf-deit init my_run"]
    assert recipes_of(page.read_text()) == {"my_run.yaml": "image_size: 32\n"}


def messages_of_the_source() -> list[str]:
    """Every text in src/, with blanks for what a formatted one fills in."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "src").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    plain = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    formatted = [
        "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return plain + formatted


def unknown_messages(text: str, source: list[str]) -> list[str]:
    """The quoted messages, at the start of a list item and before a colon, that no text of the source matches."""
    quoted = [
        name
        for line in re.findall(r"^- (`[^:]*(?:`|`.*?`)): ", text, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", line)
    ]
    pieces = {
        name: [re.escape(piece.strip()) for piece in name.split("…") if piece.strip(" :;,()")] for name in quoted
    }
    return [
        name for name in quoted if not any(re.search(".*".join(pieces[name]), known, re.DOTALL) for known in source)
    ]


def test_messages_that_the_troubleshooting_page_quotes_exist():
    source = messages_of_the_source()
    assert unknown_messages("- `no images found in …`: x\n- `nobody says … this`: x\n", source) == [
        "nobody says … this"
    ]
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    assert len(re.findall(r"^- `", text, re.MULTILINE)) > 40
    assert unknown_messages(text, source) == []


def test_every_page_is_in_the_navigation():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for item in (entry.values() if isinstance(entry, dict) else entry) for page in pages(item)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    written = [path.relative_to(ROOT / "docs") for path in DOCS]
    tables = [
        path for path in written if len(path.parts) == 3 and path.name != "README.md"
    ]  # made by run_table.py: docs/results/<scale>/
    assert sorted(pages(navigation)) == sorted(str(path) for path in written if path not in tables)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebooks_are_committed_without_output(path):
    code = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        ast.parse("".join(cell["source"]))
        assert not cell["outputs"] and cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebooks_run(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "outputs" / "my_first" / "report.png").exists()


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
    for words in re.findall(r"^python recipes/export_model.py (\S+) (\S+)$", text, re.MULTILINE):
        export.main(list(words))
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
