"""The architecture: who may import whom, one door per heavy dependency, one test file per module, machine files."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import hf_deit


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "hf_deit"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
SCRIPTS = sorted([*ROOT.glob("recipes/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])

# A room imports itself, the front hall (the files of `src/hf_deit`) and the rooms before it; the hall imports itself.
ROOMS = (
    "options",
    "augmentation",
    "plots",
    "models",
    "data",
    "teachers",
    "evaluation",
    "training",
    "paper",
    "commands",
)
# The one file through which each heavy dependency comes in. (Benchmarks compare with peers, tests with references.)
DOORS = {
    "timm": "models/",
    "albumentations": "augmentation/",
    "datasets": "data/",
    "evaluate": "evaluation/metrics.py",
    "matplotlib": "plots/",
}
# Tests of the repository rather than of one module.
REPOSITORY_TESTS = {
    *("transformers_common", "recipes", "model_cards", "layout", "docs", "hub_server", "ecosystem", "scaling"),
    *("bad_input", "security", "types", "folder_trees", "fuzz", "benchmarks"),
}

# Modules whose tests stand with another's, and with which.
TESTED_WITH = {
    "augmentation/random_draws.py": "augmentation/policies.py",
    "data/sources.py": "data/loading.py",
    "evaluation/accuracy.py": "evaluation/metrics.py",
    "training/searching.py": "options/trials.py",
    # Commands with what they run.
    "commands/analyze.py": "paper/analysis.py",
    "commands/convert.py": "models/checkpoint_conversion.py",
    "commands/eval.py": "evaluation/report.py",
    "commands/export.py": "models/export.py",
    "commands/table.py": "paper/sweep.py",
    "commands/throughput.py": "paper/throughput.py",
    "teachers/teacher_outputs.py": "teachers/record.py",
    "teachers/fingerprint.py": "teachers/record.py",
    "teachers/recording.py": "teachers/record.py",
    "teachers/replaying.py": "teachers/record.py",
    # A record on its way through the Hub, there and back.
    "teachers/record_source.py": "commands/record.py",
}


def imports(path: Path, with_types: bool = True) -> set[str]:
    """Every dotted name a file imports, wherever the statement stands, relative ones as `hf_deit....`.

    So is `hf_deit.x` where it is used: it is imported then. What stands under TYPE_CHECKING may be left out.
    """
    names, typed = set(), set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typed |= {id(statement) for statement in node.body}
        if id(node) in typed and not with_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["hf_deit", *path.relative_to(PACKAGE).parts[:-1]] if node.level else []
            module = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            # Of `from package import x`, x matters; elsewhere the module does.
            is_package = module == "hf_deit" or module.removeprefix("hf_deit.") in ROOMS
            names |= {f"{module}.{alias.name}" for alias in node.names} if is_package else {module}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_deit":
            names.add(f"hf_deit.{node.attr}")
    return names


def test_the_scan_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "file.py"
    file.write_text(
        "import timm.data as t\nfrom ..losses import a\nfrom . import views\nfrom ..models.export import c\n"
        "from .. import __version__\nfrom hf_deit.data import b\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_deit import DeiTModel\n"
        "def f():\n    import matplotlib.pyplot\n    hf_deit.Teacher\n"
    )
    ours = {"losses", "data.views", "models.export", "__version__", "data.b", "DeiTModel", "Teacher"}
    assert imports(file) == {f"hf_deit.{name}" for name in ours} | {"timm.data", "typing", "matplotlib.pyplot"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def modules() -> set[str]:
    """Every module as its dotted name without `hf_deit.`."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES}


def ours_imported_by(path: Path, with_types: bool = True) -> set[str]:
    """Modules of the package as dotted names without `hf_deit.`, names of modules only."""
    return {
        name.removeprefix("hf_deit.") for name in imports(path, with_types) if name.startswith("hf_deit.")
    } & modules()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_front_hall_and_rooms_before_it(path):
    own = room(path)
    assert own == "" or own in ROOMS, f"{own} is in no place of ROOMS: decide where it stands"
    allowed = {"", *ROOMS[: ROOMS.index(own) + 1]} if own else {""}
    foreign = {name for name in ours_imported_by(path) if (name.split(".")[0] if "." in name else "") not in allowed}
    assert not foreign, f"{path.relative_to(PACKAGE)} may not import {sorted(foreign)}"


def test_no_modules_import_each_other_in_a_circle():
    """When they run: annotations may name each other. auto_classes.py imports the model late, by its name."""
    arrows = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ours_imported_by(path, with_types=False)
        for path in MODULES
    }
    while free := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, f"a circle among {sorted(arrows)}"


def test_rooms_are_small_and_the_front_hall_shows_at_one_glance():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 18
    assert {path.name for path in entries if path.is_dir()} == set(ROOMS)
    for name in ROOMS:
        # A module for each command of `hf-deit`; a source of images and a way to store them for each of theirs.
        most = {"commands": 14, "data": 11}.get(name, 10)
        assert len([path for path in MODULES if room(path) == name]) <= most, f"{name} wants a split"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_use_public_names_only(path):
    ours = {name for name in imports(path) if name.split(".")[0] == "hf_deit"}
    public = {f"hf_deit.{name}" for name in hf_deit.__all__} | {"hf_deit", "hf_deit.__version__"}
    public |= {f"hf_deit.{name}" for name in modules()}
    assert ours <= public, f"not public: {sorted(ours - public)}"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_deit"):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


@pytest.mark.parametrize("dependency", DOORS)
def test_a_heavy_dependency_has_one_door(dependency):
    users = {path for path in MODULES if dependency in {name.split(".")[0] for name in imports(path)}}
    assert all(str(path.relative_to(PACKAGE)).startswith(DOORS[dependency]) for path in users), users
    for path in [PACKAGE / "__init__.py", *ROOT.glob("recipes/**/*.py")]:
        assert dependency not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    "path", [*PACKAGE.rglob("*.py"), *SCRIPTS], ids=lambda path: "/".join(path.relative_to(ROOT).parts[-2:])
)
def test_a_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), f"{path} has no module docstring"


def test_the_tests_mirror_the_rooms():
    modules = {path.relative_to(PACKAGE) for path in MODULES}
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    tests = {path.parent / path.name.removeprefix("test_") for path in tests}
    assert {path for path in tests if path.stem not in REPOSITORY_TESTS} <= modules
    untested = {path for path in modules - tests if str(path) not in TESTED_WITH}
    assert not untested, f"no test file of their own: {sorted(map(str, untested))}"


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        words = {name.split(".")[-1] for name in imports(path)}
        assert not [name for name in words if name.startswith("test_")], path


def test_the_design_page_shows_these_rooms_and_doors():
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE) == list(ROOMS)
    sentence = text.partition("has one door: ")[2].partition(".\n")[0]
    assert dict(re.findall(r"(\w+)\s`([\w/]+(?:\.py)?)`", sentence)) == DOORS


def test_every_public_name_exists():
    for name in hf_deit.__all__:
        assert getattr(hf_deit, name) is not None


def test_what_is_imported_when():
    # In turn, in one fresh process: the package, a script that is asked for help, a module with heavy ones below it.
    steps = (
        "import hf_deit",
        "runpy.run_path('run_distill.py', run_name='__main__')",
        "import hf_deit.teachers.teacher",
    )
    program = f"""
import contextlib, json, runpy, sys
sys.argv, sys.path[0] = ["run_distill.py", "--help"], "."
for step in {steps}:
    with contextlib.suppress(SystemExit):
        exec(step)
    print(json.dumps(sorted(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT / "recipes", capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    package, script, module = (set(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("["))
    assert "hf_deit.models.auto_classes" in package
    assert not package & {"torch", "transformers", "numpy"}
    assert "usage: run_distill.py" in done.stdout
    assert not script & {*DOORS, "torch", "torchvision", "scipy"}
    assert "hf_deit.models.classifiers" in module
    assert not module & DOORS.keys()


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_machine_file(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    kind = config.distributed_type.value
    assert (config.num_processes > 1) == (kind != "NO")
    if path.stem == "cpu":
        assert config.use_cpu and config.mixed_precision == "no"
    else:
        assert not config.use_cpu and config.mixed_precision == "bf16"
