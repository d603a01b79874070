"""files.py: what is read has a limit, a tar is whole, what is flushed is the file or the folder itself."""

import io
import os
import sys
import tarfile

import pytest

from hf_deit.files import check_tar, flush, read_file, read_json, read_text, write_whole


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


def test_only_regular_files_of_the_stated_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "device").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "file", 4) == read_file(tmp_path / "link", 4) == b"1234"
    with pytest.raises(ValueError, match=r"is larger than 3 bytes \(4\)"):
        read_file(tmp_path / "file", 3)
    for name in ("device", "pipe"):
        with pytest.raises(ValueError, match="is no regular file"):
            read_file(tmp_path / name, 4)
    assert read_file("/proc/self/cmdline", 1 << 20).count(b"\0") == len(sys.orig_argv)  # of no stated size, read whole
    with pytest.raises(ValueError, match="^'/proc/self/environ' cannot be read: is larger than 0 bytes"):
        read_text("/proc/self/environ", 0)  # says that it has no bytes


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\ud800", "9" * 5000])
def test_json_that_is_none_is_one_line_with_its_name(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"^'.*a.json' (is no valid JSON|cannot be read): .+$"):
        read_json(tmp_path / "a.json")


def pack(path, names, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(b"x" * 700))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_whole_or_refused_wherever_it_is_cut(tmp_path, format):
    path = tmp_path / "a.tar"
    long = [] if format == tarfile.USTAR_FORMAT else ["é" * 120]
    pack(path, ["1.jpg", "1.cls", *long], format)
    check_tar(path)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512  # of the last member
    for cut in range(512, end + 1024, 256):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="was cut: it ends at byte"):
            check_tar(path)
    path.write_bytes(whole[: end + 1024])
    check_tar(path)
    path.write_bytes(whole * 2)
    with pytest.raises(ValueError, match="holds more than one archive"):
        check_tar(path)
    path.write_bytes(whole[:1536] + b"?" + whole[1537:])
    with pytest.raises(ValueError, match="is damaged: no header of a member at byte 1,536"):
        check_tar(path)


def test_a_text_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    write_whole(path, "first")
    write_whole(path, "second")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(os, "fsync", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, "third")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]
