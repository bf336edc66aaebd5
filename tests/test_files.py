import csv
import json
import math
import pathlib
import threading

import pytest

from jaxft import command, files


def test_a_failure_leaves_what_was_there(tmp_path):
    """Bug: a write that fails midway leaves half a file under the final name, or its part beside it."""
    path = tmp_path / "history.csv"
    path.write_bytes(b"before")

    def fail(partial):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        files.write_whole(path, fail)
    assert [found.name for found in tmp_path.iterdir()] == ["history.csv"]
    assert path.read_bytes() == b"before"


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_named_with_the_file(tmp_path, capsys):
    """Bug: "No space left on device" without a path, or without what to do."""

    def write(partial):
        partial.symlink_to("/dev/full")
        partial.write_bytes(b"x" * 100_000)

    with pytest.raises(OSError, match="No space left on device: '.*history.csv'"):
        files.write_whole(tmp_path / "history.csv", write)
    with pytest.raises(SystemExit) as ended, command.exits():
        files.write_whole(tmp_path / "history.csv", write)
    assert "history.csv'; make room" in str(ended.value.code) and "run the same command again" in str(ended.value.code)
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_name(tmp_path):
    """Bug: two processes (here threads) that write one name share its part: one renames it away from the other."""
    path, together = tmp_path / "config.json", threading.Barrier(2)
    parts, errors = [], []

    def write(text):
        def fill(partial):
            partial.write_text(text, encoding="utf-8")
            parts.append(partial.name)
            together.wait(10)

        try:
            files.write_whole(path, fill)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(set(parts)) == 2
    assert path.read_text(encoding="utf-8") in ("one", "two")
    assert [found.name for found in tmp_path.iterdir()] == ["config.json"]


def test_json_is_strict(tmp_path):
    """Bug: `Infinity` and `NaN` in a record, which no strict reader of JSON takes."""
    path = tmp_path / "config.json"
    files.write_json(path, {"clip": math.inf, "loss": [1.0, (math.nan, -math.inf)], "name": "naïve → größer", "n": 3})

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(path.read_bytes().decode(), parse_constant=refuse)
    assert found == {"clip": None, "loss": [1.0, [None, None]], "name": "naïve → größer", "n": 3}
    assert files.read_json(path) == found


def test_damaged_json_is_named(tmp_path):
    """Bug: a damaged record ends in a message that does not say which file it is."""
    (tmp_path / "config.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"config.json is not JSON .*delete it"):
        files.read_json(tmp_path / "config.json")
    for content, kind in ((b"[]", "list"), (b"null", "NoneType")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"config.json holds a {kind}, not an object"):
            files.read_json(tmp_path / "config.json")


def test_csv(tmp_path):
    """Bug: a column that begins in a later epoch is lost, blank lines between rows, or a column left out silently."""
    path = tmp_path / "history.csv"
    files.write_csv(path, [{"epoch": 1}, {"epoch": 2, "größe": "→"}])
    assert path.read_bytes().decode() == "epoch,größe\r\n1,\r\n2,→\r\n"
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"epoch": "1", "größe": ""}, {"epoch": "2", "größe": "→"}]
    with pytest.raises(ValueError, match="lost"):
        files.write_csv(path, [{"epoch": 1, "lost": 2}, {"epoch": 2}])
    with pytest.raises(ValueError, match="history.csv: a table needs at least one row"):
        files.write_csv(path, [])
    assert [found.name for found in tmp_path.iterdir()] == ["history.csv"]


def test_no_cell_is_a_formula(tmp_path):
    """Bug: an image called =HYPERLINK(…) does something when a spreadsheet opens the predictions."""
    path = tmp_path / "predictions.csv"
    names = ["=1+1", "+1", "-cmd", "@x", "\tx", "-2.5", "a=b"]
    files.write_csv(path, [{"file": name, "=p": -0.5} for name in names])
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "'=p"]
    assert rows[1:] == [[cell, "-0.5"] for cell in ("'=1+1", "+1", "'-cmd", "'@x", "'\tx", "-2.5", "a=b")]
