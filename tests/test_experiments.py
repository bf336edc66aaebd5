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
from experiments import standin


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The experiment on 5 drivers × 10 images of 32 pixels, with further arguments."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    folder = standin.render(tmp_path / "drawn", drivers=5, images_per_driver=10, seed=0)
    fixed = ["--data-dir", str(folder), "--folder", str(tmp_path / "run"), "--weights", "none", "--image-size", "32"]

    def call(*arguments):
        tyro.cli(experiment.main, args=[*fixed, "--batch-size", "8", "--epochs", "1", *arguments])
        return json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))

    return call


def test_the_second_walk_through_takes_other_nets_and_resumes(run, capsys):
    """Bug: a net of the zoo that the script cannot make; no word that the data are drawn; another run in the folder."""
    first = run("--net", "vgg19")
    shown = capsys.readouterr().out
    assert shown.startswith("STAND-IN DATA") and shown.rstrip().splitlines()[-1].startswith("STAND-IN DATA")
    assert first["images"] == {"train": 40, "held_out": 10} and np.isfinite(first["metrics"]["loss"])
    assert run("--net", "vgg19")["metrics"] == first["metrics"]
    assert "nothing is left to train" in capsys.readouterr().out
    with pytest.raises(ValueError, match="(?s)other settings.*schedule.lr: 0.001 → 0.5"):
        run("--net", "vgg19", "--lr", "0.5")


def test_a_net_without_a_published_file(run):
    """Bug: silent random weights, or an error that does not say what to do."""
    with pytest.raises(ValueError, match="no published Keras file without classifier for googlenet; give the path"):
        run("--net", "googlenet", "--weights", "imagenet")


def test_images_below_the_smallest_size_of_the_net(run):
    """Bug: the run fails in the middle of a compilation."""
    with pytest.raises(ValueError, match="at least 75×75 pixels, not 32×32"):
        run("--net", "inception_v3_v02")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vgg16_statefarm", ("80", "0.03", "first:10", "stand-in")),
        ("inception_v3_statefarm", ("299", "inception_v3_v02")),
        ("cifar10", ("resnet50", "--no-subset")),
        ("vgg16_elpv", ("300", "--head-epochs")),
        ("statefarm_solution", ("through:conv4_block6", "--confidence", "--seeds", "--regions")),
    ],
)
def test_help_lists_the_settings_and_their_defaults(name, expected, tmp_path):
    """Bug: a setting of a value (rate, folder) is no flag; the bare command's defaults are not the stand-in's."""
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for word in (*expected, "--folder", "--seed", "--save-every", "--keep", "--cache-features", "--coordinator"):
        assert word in done.stdout, word


def test_words_that_people_try_are_taken(tmp_path):
    """Bug: --learning-rate is refused without a word of --lr; --workdir, which old commands have, is lost."""
    code = "import sys; from jaxft import command\ndef main(lr: float = 0.1, folder: str = ''): print(lr, folder)\n"
    flags = ["--learning-rate=0.5", "--workdir", "there"]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}command.run(main)", *flags], capture_output=True, encoding="utf-8"
    )
    assert done.stdout.split() == ["0.5", "there"], done.stderr
