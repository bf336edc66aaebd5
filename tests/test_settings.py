"""Settings of a command in a YAML file, beneath those of the command line."""

import dataclasses
import pathlib

import pytest
from tyro.conf import OmitArgPrefixes as Flat
from tyro.conf import Positional

from jaxft import command, settings


@dataclasses.dataclass(frozen=True)
class Size:
    """Group.

    Attributes:
        side: pixels.
        widths: of layers.
        flip: mirror.
        limit: or none.
    """

    side: int = 224
    widths: tuple[int, ...] = ()
    flip: bool = True
    limit: float | None = 1.0


SIZE = Size()
RUNS = pathlib.Path("runs")


def main(data: Positional[str], size: Flat[Size] = SIZE, folder: pathlib.Path = RUNS) -> None:
    """A command.

    Args:
        data: what.
        folder: where.
    """
    seen.append({"data": data, "size": size, "folder": folder})


def other(size: Flat[Size] = SIZE) -> None:
    """Another."""


seen = []


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*words, verbs=True):
        monkeypatch.setattr("sys.argv", ["jaxft", *map(str, words)])
        seen.clear()
        command.run({"main": main, "other": other} if verbs else main)
        return seen[0]

    return call


def test_what_is_written_is_read(tmp_path, call):
    """Bug: a tuple, None, a boolean or a path is another value after the way through the file."""
    given = {"data": "cells: 1", "size": Size(96, (256, 128), False, None), "folder": pathlib.Path("a b")}
    settings.write(tmp_path / "settings.yaml", settings.flattened(given))
    assert call("main", "--config", tmp_path / "settings.yaml") == given


def test_the_command_line_is_stronger(tmp_path, call):
    """Bug: a setting of the file cannot be changed for one run."""
    (tmp_path / "file.yaml").write_text("data: cells\nside: 96\nflip: false\n", encoding="utf-8")
    found = call("main", "photos", "--config", tmp_path / "file.yaml", "--side", 64)
    assert found["data"] == "photos" and found["size"] == Size(64, flip=False)


def test_underscores_are_dashes(tmp_path, call):
    """Bug: a file with the names of Python is refused."""
    (tmp_path / "file.yaml").write_text("side: 96\n", encoding="utf-8")
    assert call("main", "photos", "--config", tmp_path / "file.yaml")["size"].side == 96


def test_a_command_without_verbs_takes_a_file(tmp_path, call):
    """Bug: --config works for one kind of command alone."""
    (tmp_path / "file.yaml").write_text("side: 96\n", encoding="utf-8")
    assert call("photos", "--config", tmp_path / "file.yaml", verbs=False)["size"].side == 96


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds no settings"),
        ("a: [", "is not a YAML file"),
        ("sied: 3", "holds a setting that cannot be"),
        ("side: many", "holds a setting that cannot be"),
        ("side: {a: 1}", "give one value"),
        ("!!python/object/apply:os.system ['exit 3']", "is not a YAML file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, call, text, message):
    """Bug: a setting that cannot be is passed over, or a file runs a program."""
    (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=f"(?s)file.yaml.*{message}|{message}"):
        call("main", "photos", "--config", tmp_path / "file.yaml")


def test_a_missing_file_is_named(tmp_path, call):
    """Bug: a traceback."""
    with pytest.raises(SystemExit, match=r"absent\.yaml"):
        call("main", "photos", "--config", tmp_path / "absent.yaml")


def test_debug_shows_where_an_error_comes_from(tmp_path, call):
    """Bug: nobody can report where an error comes from."""
    with pytest.raises(OSError, match=r"absent\.yaml"):
        call("main", "photos", "--config", tmp_path / "absent.yaml", "--debug")


def test_version(call, capsys):
    """Bug: a report of a fault cannot say which version it is of."""
    import jaxft

    with pytest.raises(SystemExit) as done:
        call("--version")
    assert done.value.code == 0 and jaxft.__version__ in capsys.readouterr().out


def test_a_wrong_verb_is_a_bad_command_line(call, capsys):
    """Bug: exit status 0, or a traceback."""
    with pytest.raises(SystemExit) as done:
        call("mian")
    assert done.value.code == 2
