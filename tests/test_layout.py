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
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")
SCRIPTS = sorted([*ROOT.glob("recipes/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])

# A module may import modules of the rows above its own, and nothing else of ours.
LAYERS = (
    {
        *("configuration_deit", "losses", "mixing", "augmentation", "repeated_augmentation", "metrics"),
        *("recipe", "paper_tables", "model_card", "plots", "ema", "decoding", "bad_images", "local_layouts"),
        *("streaming", "checkpoints", "health", "preemption", "processes", "batch_norm_folding"),
    },
    {"auto_classes", "classifiers", "dataset_registry", "views", "distillation_config", "throughput"},
    {"checkpoint_conversion", "teachers", "data", "publishing", "sweep"},
    {"modeling_deit", "resuming", "teacher_record"},
    {"distillation_trainer", "evaluation", "analysis", "export"},
)
# The one file through which each heavy dependency comes in. (Benchmarks compare with peers, tests with references.)
DOORS = {
    "timm": "classifiers",
    "albumentations": "augmentation",
    "datasets": "data",
    "evaluate": "metrics",
    "matplotlib": "plots",
}
# Tests of the repository rather than of one module.
REPOSITORY_TESTS = {
    *("transformers_common", "recipes", "model_cards", "layout", "docs", "hub_server", "ecosystem", "scaling"),
    *("bad_input", "security"),
}


def imports(path: Path) -> set[str]:
    """Every dotted name a file imports, wherever the statement stands, relative ones as `hf_deit....`.

    So is `hf_deit.x` where it is used: it is imported then.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["hf_deit" if node.level else "", node.module]))
            # Of `from hf_deit import x`, x matters; elsewhere the module does.
            names |= {f"hf_deit.{alias.name}" for alias in node.names} if module == "hf_deit" else {module}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_deit":
            names.add(f"hf_deit.{node.attr}")
    return names


def test_the_scan_sees_every_kind_of_import(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import timm.data as t\nfrom .losses import a\nfrom . import metrics\nfrom hf_deit.data import b\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_deit import DeiTModel\n"
        "def f():\n    import matplotlib.pyplot\n    hf_deit.Teacher\n"
    )
    ours = {"hf_deit.losses", "hf_deit.metrics", "hf_deit.data", "hf_deit.DeiTModel", "hf_deit.Teacher"}
    assert imports(file) == ours | {"timm.data", "typing", "matplotlib.pyplot"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_rows_above_it(path):
    rows = [number for number, row in enumerate(LAYERS) if path.stem in row]
    assert rows, f"{path.stem} is in no row of LAYERS: decide where it stands"
    allowed = set().union(*LAYERS[: rows[0]])
    ours = {name.split(".")[1] if "." in name else name for name in imports(path) if name.split(".")[0] == "hf_deit"}
    assert ours <= allowed, f"{path.stem} may not import {sorted(ours - allowed)}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_use_public_names_only(path):
    ours = {name for name in imports(path) if name.split(".")[0] == "hf_deit"}
    public = {f"hf_deit.{name}" for name in hf_deit.__all__} | {"hf_deit", "hf_deit.__version__"}
    assert ours <= public, f"not public: {sorted(ours - public)}"


@pytest.mark.parametrize("dependency", DOORS)
def test_a_heavy_dependency_has_one_door(dependency):
    files = [PACKAGE / "__init__.py", *MODULES, *ROOT.glob("recipes/**/*.py")]
    users = {path.stem for path in files if dependency in {name.split(".")[0] for name in imports(path)}}
    assert users <= {DOORS[dependency]}


@pytest.mark.parametrize("path", [*MODULES, PACKAGE / "__init__.py", *SCRIPTS], ids=lambda path: str(path.name))
def test_a_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), f"{path} has no module docstring"


def test_modules_and_tests_stand_one_to_one():
    modules = {path.stem for path in MODULES}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert tests - REPOSITORY_TESTS == modules


def test_the_design_page_shows_these_layers_and_doors():
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    rows = re.findall(r"^\| \d \| (.+) \|$", text, re.MULTILINE)
    assert tuple(set(re.findall(r"`(\w+)`", row)) for row in rows[: len(LAYERS)]) == LAYERS
    sentence = text.partition("has one door: ")[2].partition(".\n")[0]
    assert dict(re.findall(r"(\w+)\s`(\w+)\.py`", sentence)) == DOORS


def test_every_public_name_exists():
    for name in hf_deit.__all__:
        assert getattr(hf_deit, name) is not None


def test_what_is_imported_when():
    # In turn, in one fresh process: the package, a script that is asked for help, a module with heavy ones below it.
    steps = (
        "import hf_deit",
        "runpy.run_path('run_distill.py', run_name='__main__')",
        "import hf_deit.teachers",
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
    assert "hf_deit.auto_classes" in package
    assert not package & {"torch", "transformers", "numpy"}
    assert "usage: run_distill.py" in done.stdout
    assert not script & {*DOORS, "transformers.modeling_utils", "transformers.trainer", "torchvision", "scipy"}
    assert "hf_deit.classifiers" in module
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
