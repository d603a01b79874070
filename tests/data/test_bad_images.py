"""bad_images.py: each damaged image is listed once, by all ranks and after a resumption, up to a limit."""

import logging

import pytest

from hf_deit.data.bad_images import BadImages


def lines(directory):
    return (directory / "_bad_images.txt").read_text().splitlines()


def test_each_image_is_listed_once(tmp_path):
    ledger = BadImages(tmp_path / "new", 1000, 0.01)
    assert len(ledger) == 0 and not (tmp_path / "new").exists()
    ledger.record([(7, "a/7.jpg", "empty: 0 bytes"), (9, None, "no image"), (7, "a/7.jpg", "empty: 0 bytes")])
    ledger.record([(9, None, "no image")])
    assert lines(tmp_path / "new") == ["index\tpath\treason", "7\ta/7.jpg\tempty: 0 bytes", "9\t\tno image"]
    assert len(ledger) == 2


def test_ranks_and_resumed_runs_share_the_list(tmp_path):
    first, second = (BadImages(tmp_path, 1000, 0.01) for _ in range(2))
    first.record([(1, None, "x")])
    second.record([(2, None, "x")])
    first.record([(2, None, "x"), (3, None, "x")])
    BadImages(tmp_path, 1000, 0.01).record([(3, None, "x"), (4, None, "x")])
    assert [line.split("\t")[0] for line in lines(tmp_path)] == ["index", "1", "2", "3", "4"]
    assert len(first) == len(second) == 4


def test_a_line_is_a_line(tmp_path):
    ledger = BadImages(tmp_path, 10, 1)
    ledger.record([(1, "a\tb\nc\x85d\udcff", "two\r\nlines"), (2, None, "x")])
    assert len(BadImages(tmp_path, 10, 1)) == 2
    assert (tmp_path / "_bad_images.txt").read_text("utf-8").split("\n")[1].split("\t") == [
        "1",
        "a b c\\x85d\\udcff",
        "two lines",
    ]


def test_only_the_first_is_a_warning(tmp_path, caplog):
    ledger = BadImages(tmp_path, 10, 1)
    with caplog.at_level(logging.WARNING, "hf_deit.data.bad_images"):
        ledger.record([(1, "a.jpg", "empty: 0 bytes"), (2, "b.jpg", "x")])
        ledger.record([(3, "c.jpg", "x")])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "number 1 (path a.jpg) is damaged: empty: 0 bytes" in warning and "bad_images.txt" in warning


@pytest.mark.parametrize("share, allowed", [(0.002, 2), (0, 0)])
def test_more_than_the_share_stops_the_run(tmp_path, share, allowed):
    ledger = BadImages(tmp_path, 1000, share)
    for index in range(allowed):
        ledger.record([(index, None, "x")])
    message = f"{allowed + 1} of 1000 training images .* max_bad_images = {share}.*bad_images.txt"
    with pytest.raises(ValueError, match=message):
        ledger.record([(allowed, None, "x")])
    with pytest.raises(ValueError, match=message):  # resumed with the same limit
        BadImages(tmp_path, 1000, share).record([(allowed, None, "x")])
    BadImages(tmp_path, 1000, 1).record([(allowed, None, "x")])


def test_a_new_run_forgets(tmp_path):
    ledger = BadImages(tmp_path, 10, 1)
    ledger.record([(1, None, "x")])
    ledger.forget()
    ledger.forget()
    assert len(ledger) == 0
    ledger.record([(1, None, "y")])
    assert lines(tmp_path)[1:] == ["1\t\ty"]
