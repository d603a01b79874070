"""A checkpoint is whole or not there, and what was damaged later is told from what is whole."""

import json
import os
from types import SimpleNamespace

import pytest

from hf_deit.training import checkpoints
from hf_deit.training.checkpoints import (
    CheckpointError,
    checkpoint_to_resume,
    claim_output_dir,
    committed,
    last_good_checkpoint,
    verify_checkpoint,
)


def write(folder, step, content=b"weights", **facts):
    aside = folder / "_unfinished" / f"checkpoint-{step}"
    with committed(folder, aside.name, facts):
        (aside / "shards").mkdir(parents=True)
        (aside / "model.safetensors").write_bytes(content)
        (aside / "shards" / "optimizer.pt").write_bytes(b"moments")
    return folder / aside.name


def test_a_checkpoint_comes_whole_to_its_place(tmp_path):
    checkpoint = write(tmp_path, 8, processes=2)
    assert verify_checkpoint(checkpoint) is None
    assert checkpoints.facts_of(checkpoint) == {"processes": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-8"]
    assert last_good_checkpoint(tmp_path) == checkpoint


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Renaming comes after every file and folder is flushed; the name is flushed last."""
    events = []
    flush, rename = os.fsync, checkpoints.Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or flush(fd))
    monkeypatch.setattr(checkpoints.Path, "rename", lambda *paths: events.append("rename") or rename(*paths))
    write(tmp_path, 8)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    aside = str(tmp_path / "_unfinished" / "checkpoint-8")
    names = ("", "/model.safetensors", "/shards", "/shards/optimizer.pt", "/manifest.json")
    assert {aside + name for name in names} == set(before)
    assert after == [str(tmp_path)]


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda path: os.truncate(path / "model.safetensors", 3), "model.safetensors has 3 bytes, expected 7"),
        (lambda path: (path / "model.safetensors").write_bytes(b"wEights"), "its SHA-256 differs"),
        (lambda path: (path / "shards" / "optimizer.pt").unlink(), "shards/optimizer.pt is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: os.truncate(path / "manifest.json", 20), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage, problem):
    good = write(tmp_path, 8)
    damage(write(tmp_path, 16))
    assert last_good_checkpoint(tmp_path) == good
    assert problem in caplog.text and "checkpoint-16" in caplog.text


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    for step in (100, 8, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_good_checkpoint(tmp_path).name == "checkpoint-100"


def test_what_a_killed_run_was_writing_is_no_checkpoint(tmp_path):
    (tmp_path / "_unfinished" / "checkpoint-9").mkdir(parents=True)
    assert last_good_checkpoint(tmp_path) is None
    checkpoints.remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_others_and_no_trace(tmp_path):
    good = write(tmp_path, 8)
    with (
        pytest.raises(CheckpointError, match="checkpoint-16.*No space left.*checkpoint-8 is complete"),
        committed(tmp_path, "checkpoint-16", {}),
    ):
        (tmp_path / "_unfinished" / "checkpoint-16").mkdir(parents=True)
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"] and verify_checkpoint(good) is None


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 8)
    checkpoint = write(tmp_path, 8, content=b"later")
    assert (checkpoint / "model.safetensors").read_bytes() == b"later" and verify_checkpoint(checkpoint) is None


def test_which_checkpoint_a_run_resumes_from(tmp_path, caplog):
    assert checkpoint_to_resume(tmp_path, "auto") is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint_to_resume(tmp_path, "True")
    first, second = write(tmp_path, 8), write(tmp_path, 16)
    assert checkpoint_to_resume(tmp_path, "auto") == checkpoint_to_resume(tmp_path, "True") == second
    assert checkpoint_to_resume(tmp_path / "other", str(first)) == first
    with pytest.raises(CheckpointError, match="not a directory"):
        checkpoint_to_resume(tmp_path, str(tmp_path / "nowhere"))

    (second / "model.safetensors").write_bytes(b"x")
    assert checkpoint_to_resume(tmp_path, "auto") == first
    with pytest.raises(CheckpointError, match="checkpoint-16' is damaged: model.safetensors has 1 bytes"):
        checkpoint_to_resume(tmp_path, str(second))
    (first / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints in .* are damaged"):
        checkpoint_to_resume(tmp_path, "auto")


def test_a_finished_run_is_not_resumed_by_itself(tmp_path):
    checkpoint = write(tmp_path, 8)
    (tmp_path / "trainer_state.json").write_text("{}")
    assert checkpoints.is_finished(tmp_path)
    with pytest.raises(CheckpointError, match="holds a finished run.*--resume_from_checkpoint .*checkpoint-8"):
        checkpoint_to_resume(tmp_path, "auto")
    assert checkpoint_to_resume(tmp_path, "true") == checkpoint
    checkpoints.mark_unfinished(tmp_path)
    assert checkpoint_to_resume(tmp_path, "auto") == checkpoint


def test_checkpoints_of_stock_transformers_are_accepted_with_a_warning(tmp_path, caplog):
    (tmp_path / "checkpoint-5").mkdir()
    assert checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-5")) == tmp_path / "checkpoint-5"
    assert "cannot be verified" in caplog.text


def test_the_manifest_is_plain_json(tmp_path):
    content = json.loads((write(tmp_path, 8) / "manifest.json").read_text())
    assert content["files"]["shards/optimizer.pt"]["bytes"] == 7


def test_a_directory_is_claimed_before_anything_is_loaded(tmp_path):
    def options(name, **fields):
        defaults = {"resume_from_checkpoint": None, "overwrite_output_dir": False}
        return SimpleNamespace(output_dir=str(tmp_path / name), **(defaults | fields))

    with pytest.raises(CheckpointError, match="is not a name in UTF-8"):
        claim_output_dir(options("caf\udce9"))
    claim_output_dir(options("run"))
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a finished run"):
        claim_output_dir(options("run"))
    claim_output_dir(options("run", overwrite_output_dir=True))
    claim_output_dir(options("run", resume_from_checkpoint="true"))
