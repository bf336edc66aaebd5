"""`kill.py`, in part; docs/crash.md has the table of a thousand kills."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).with_name("kill.py")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")


def kill(tmp_path, *words):
    """(exit status, the chains, all that it printed)."""
    out = tmp_path / "kills.jsonl"
    words = [sys.executable, PROGRAM, *words, "--out", out]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False, cwd=tmp_path)
    chains = [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []
    return done.returncode, chains, done.stdout + done.stderr


def test_runs_that_are_killed_end_as_those_that_are_not(tmp_path):
    """Bug: a kill at some moment loses an update, repeats one, or leaves what cannot be gone on from."""
    status, chains, said = kill(tmp_path, "--kinds", "cached", "phases", "--kills", "8")
    assert status == 0, said
    assert {chain["kind"] for chain in chains} == {"cached", "phases"}
    assert sum(len(chain["kills"]) for chain in chains) >= 8 and not any(chain["wrong"] for chain in chains)


@pytest.mark.slow
def test_a_thousand_kills(tmp_path):
    """As above, of every kind, two processes that are one run included."""
    status, chains, said = kill(tmp_path, "--kills", "1000")
    assert status == 0 and sum(len(chain["kills"]) for chain in chains) >= 1000, said


def test_another_result_is_noticed(tmp_path):
    """Bug: the comparison passes whatever a killed run leaves."""
    status, chains, said = kill(tmp_path, "--kinds", "plain", "--kills", "1", "--jobs", "1", "--without", "seed")
    assert status == 1 and any("predictions" in chain["wrong"] for chain in chains), said
