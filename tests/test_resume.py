"""The experiment as a user runs it: a process of its own, stopped, killed, and started again."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import standin

ROOT = Path(__file__).parent.parent
SMALL = (
    "--weights none --head gap --image-size 32 --batch-size 4 --epochs 3 --folds 2 --freeze through:block4 --lr 0.01"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return standin.render(tmp_path_factory.mktemp("data") / "standin", drivers=4, images_per_driver=10, seed=3)


@pytest.fixture
def environment(tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"  # shared: the records of the data are built once
    return os.environ | {"JAXFT_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}


def start(data, workdir, environment, *options):
    command = [sys.executable, "-m", "experiments.vgg16_statefarm", "--data-dir", str(data), "--workdir", str(workdir)]
    return subprocess.Popen(
        [*command, *SMALL.split(), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(process, pattern):
    """Reads the process's lines up to the one that matches."""
    for line in process.stdout:
        if re.search(pattern, line):
            return
    pytest.fail(f"the process ended without {pattern!r}: {process.communicate()[1]}")


@pytest.mark.slow  # minutes: four processes; tests/crash kills smaller runs each time
def test_a_run_that_is_stopped_and_killed_ends_as_one_that_is_not(data, tmp_path, environment):
    """Bug: anything of the run's state is outside the checkpoint; or a kill while a checkpoint is written spoils it."""
    code, out, err = finish(start(data, tmp_path / "whole", environment))
    assert code == 0, err
    assert out.startswith(standin_note := "STAND-IN DATA") and out.rstrip().splitlines()[-1].startswith(standin_note)

    parts = tmp_path / "parts"
    process = start(data, parts, environment)
    wait_for(process, r"^epoch +1 ")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGTERM, err
    assert re.search(r"step \d+ is saved; run the same command again", err)

    process = start(data, parts, environment)
    wait_for(process, r"^epoch +2 ")
    process.kill()
    finish(process)

    code, out, err = finish(start(data, parts, environment))
    assert code == 0, err
    assert (parts / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()
    whole, resumed = (json.loads((tmp_path / run / "summary.json").read_text("utf-8")) for run in ("whole", "parts"))
    assert whole["metrics"] == resumed["metrics"] and whole["kept"] == resumed["kept"]

    code, _, err = finish(start(data, parts, environment, "--batch-size", "8"))
    assert code == 1 and "batch_size: 4 → 8" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fold", "7"], "fold"),
        (["--freeze", "first:99"], "first:99"),
        (["--batch-size", "500"], "batch_size 500"),
        (["--data-dir", "/nonexistent"], "/nonexistent"),
        (["--weights", "/nonexistent.h5"], "nonexistent.h5"),
        (["--head", "fancy"], "fancy"),
    ],
)
def test_bad_arguments_end_with_one_message(data, tmp_path, environment, options, message):
    """Bug: a traceback, a fallback to the stand-in from an explicit folder, or a workdir that is left behind."""
    code, out, err = finish(start(data, tmp_path / "run", environment, *options))
    assert code == 1 and message in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()
