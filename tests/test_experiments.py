"""The experiments that no other test runs, on a few drawn images; `test_resume.py` and `test_cifar10.py` run theirs."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tyro

from experiments import inception_v3_statefarm as experiment
from jaxft.data import standin


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The experiment on 5 drivers × 10 images of 32 pixels, with further arguments."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    folder = standin.render(tmp_path / "drawn", drivers=5, images_per_driver=10, seed=0)
    fixed = ["--data-dir", str(folder), "--workdir", str(tmp_path / "run"), "--weights", "none", "--image-size", "32"]

    def call(*arguments):
        experiment.main(tyro.cli(experiment.Settings, args=[*fixed, "--batch-size", "8", "--epochs", "1", *arguments]))
        return json.loads((tmp_path / "run" / "summary.json").read_text())

    return call


def test_the_second_walk_through_takes_other_nets_and_resumes(run, capsys):
    """Bug: a net of the zoo that the script cannot make; no word that the data are drawn; another run in the folder."""
    first = run("--net", "googlenet")
    shown = capsys.readouterr().out
    assert shown.startswith("STAND-IN DATA") and shown.rstrip().splitlines()[-1].startswith("STAND-IN DATA")
    assert first["images"] == {"train": 40, "held_out": 10} and np.isfinite(first["log_loss"])
    assert run("--net", "googlenet")["log_loss"] == first["log_loss"]
    with pytest.raises(ValueError, match="(?s)another configuration.*lr"):
        run("--net", "googlenet", "--lr", "0.5")


def test_a_net_without_a_published_file(run):
    """Bug: silent random weights, or an error that does not say what to do."""
    with pytest.raises(ValueError, match="no published Keras file without classifier for googlenet; give the path"):
        run("--net", "googlenet", "--weights", "imagenet")


def test_images_below_the_smallest_size_of_the_net(run):
    """Bug: the run fails in the middle of a compilation."""
    with pytest.raises(ValueError, match="at least 75×75 pixels, not 32×32"):
        run("--net", "inception_v3_v02")


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc for large pages")
@pytest.mark.parametrize(
    "already, starts",
    [({}, ["", "glibc.malloc.hugetlb=1"]), ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, ["glibc.malloc.check=0"])],
    ids=["by default", "unless the user has asked for something"],
)
def test_a_command_starts_again_once_to_ask_for_large_pages(tmp_path, already, starts):
    """Bug: the command starts itself forever or never, loses an argument, or overrides the user's own setting."""
    log = tmp_path / "starts"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nprint(os.environ.get('GLIBC_TUNABLES', ''), file=open({str(log)!r}, 'a'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-u", "-m", "experiments.cifar10", "--help"],
        env=environment | already | {"PYTHONPATH": str(tmp_path)},
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage: " in done.stdout
    assert log.read_text().splitlines() == starts
