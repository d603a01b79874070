"""durable.py: what is flushed is the file or the folder itself, and its descriptor is closed."""

import os

import pytest

from hf_deit.durable import flush


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
