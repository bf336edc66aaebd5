"""Programs on a machine whose locale is plain ASCII, as containers and cluster jobs often are."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONWARNDEFAULTENCODING": "1", "PYTHONPATH": str(ROOT)}

FILES = r"""
import csv, locale, pathlib, sys
from jaxft import files
assert locale.getencoding().lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646"), locale.getencoding()
folder = pathlib.Path(sys.argv[1])
names = {"Käfer": 1, "→ größer": "日本"}
files.write_json(folder / "config.json", names)
assert files.read_json(folder / "config.json") == names
files.write_csv(folder / "history.csv", [names, names])
files.write_text(folder / "note.txt", "Käfer →\n")
"""


def run(program, folder, *options):
    # The program comes by a file, because the command line itself is read in the locale's encoding.
    (folder / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *options, str(folder / "program.py"), str(folder)],
        env=os.environ | ASCII,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="the locale of Windows is not set by a variable")
def test_files_are_utf8_in_any_locale(tmp_path):
    """Bug: class names with umlauts or arrows fail after training, or are written so that others cannot read them."""
    run(FILES, tmp_path, "-W", "error::EncodingWarning")
    assert json.loads((tmp_path / "config.json").read_bytes()) == {"Käfer": 1, "→ größer": "日本"}
    assert (tmp_path / "history.csv").read_bytes().decode() == "Käfer,→ größer\r\n1,日本\r\n1,日本\r\n"
    assert (tmp_path / "note.txt").read_bytes().decode() == "Käfer →\n"
