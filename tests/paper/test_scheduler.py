"""The scheduler: order of the runs, recorded teacher outputs, failures, and output that belongs to other settings."""

import sys
from pathlib import Path

import pytest
import yaml
from support.sweeps import FILES, made_up_sweep, write_recipes

from hf_deit.paper import scheduler
from hf_deit.paper.scheduler import Scheduler
from hf_deit.teachers.record import BATCH, Header


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    write_recipes(tmp_path)
    monkeypatch.chdir(tmp_path)
    return made_up_sweep


def test_output_of_other_settings_is_left_alone_and_a_finished_run_is_taken(sweep):
    run = sweep("little").runs[0]
    do = Scheduler(Path("recipes"), launcher="false").run
    with pytest.raises(ChildProcessError, match="ended with status 1"):
        do(run)
    output = Path(run.keys["output_dir"])
    (output / "trainer_state.json").write_text("{}")
    (output / "all_results.json").write_text('{"eval_top1": 0.5}')
    assert do(run) == {"eval_top1": 0.5}
    for others in ("seed: 77", None):
        (output / "recipe.yaml").write_text(others) if others else (output / "recipe.yaml").unlink()
        with pytest.raises(ChildProcessError, match="holds a run with other settings"):
            do(run)
        assert (output / "all_results.json").exists()


def test_one_run_records_and_the_others_replay(sweep, monkeypatch):
    began = []
    tuned = {"name": "tuned", "keys": {"learning_rate": 1, "num_train_epochs": 400}, "paper": [1.0, "-"]}
    rows = [{"name": "token", "paper": [1.0, "-"]}, tuned]
    table = {"title": "Table", "columns": FILES["tables/a"]["columns"], "rows": rows}
    for row in rows:
        row["recipe"] = "imagenet/deit_base_distilled"
    Path("recipes/tables/a.yaml").write_text(yaml.safe_dump(table))

    def call(command, **_):
        """Stand in for the script: write a record of the run's length, and its results."""
        keys = yaml.safe_load(Path(command[2]).read_text())
        option, directory = command[3:5]
        began.append((keys.get("num_train_epochs", 300), option, directory))
        if option == "--teacher_record":
            Path(directory).mkdir(parents=True, exist_ok=True)
            fingerprint = {"images": 100, "classes": 10, "views of a step": 10, BATCH: 10}
            teacher = {"name": "big", "sha256": "0" * 16, "num_parameters": 1, "device": "cpu"}
            Header("hard", None, 10 * began[-1][0], teacher, fingerprint, {}).write(Path(directory))
        Path(keys["output_dir"], "all_results.json").write_text('{"eval_top1": 0.5}')
        return 0

    monkeypatch.setattr(scheduler.subprocess, "call", call)
    paper = sweep("paper", [0])
    assert Scheduler(Path("recipes"), sys.executable, jobs=2).run_all([paper]) == []
    place = paper.runs[0].teacher_record
    assert began == [(400, "--teacher_record", place), (300, "--teacher_replay", place)]


def test_a_failed_run_is_reported_and_what_needs_it_is_left_out(sweep, monkeypatch):
    started = []

    def call(command, **_):
        keys = yaml.safe_load(Path(command[2]).read_text())
        started.append((keys["output_dir"], command[-4:]))
        Path(keys["output_dir"], "all_results.json").write_text('{"eval_top1": 0.5}')
        return int("teacher" in keys["output_dir"])

    monkeypatch.setattr(scheduler.subprocess, "call", call)
    little = sweep("little", [0])
    options = {"dataset_name": "here", "data_dir": None, "category_level": "name"}
    failed = Scheduler(Path("recipes"), sys.executable, options=options).run_all([little])
    assert len(failed) == 1 and "convnet_teacher-seed0 ended with status 1; see outputs/" in failed[0]
    done = {run.stem for run in little.runs if little.result(run) is not None}
    left_out = [run for run in little.runs if any("teacher" in needed.stem for needed in run.needs)]
    assert left_out and not done & {run.stem for run in left_out}
    assert len(done) == len(started) - 1 == len(little.runs) - 1 - len(left_out)
    assert all(words == ["--dataset_name", "here", "--category_level", "name"] for _, words in started)
