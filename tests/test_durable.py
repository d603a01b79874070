"""durable.py: what is flushed is the file or the folder itself, and its descriptor is closed."""

import os

import pytest

from hf_deit.durable import flush, write_whole


def test_files_and_folders_are_flushed_by_a_descriptor_that_is_closed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append((number, os.fstat(number).st_ino)) or fsync(number))
    for path in (tmp_path / "file", tmp_path):
        flush(path)
        number, inode = flushed[-1]
        assert inode == path.stat().st_ino
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
    assert len(flushed) == 2
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "nothing")


def test_a_text_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    write_whole(path, "first")
    write_whole(path, "second")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(os, "fsync", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, "third")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]
