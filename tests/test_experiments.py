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
from experiments import solar_cells, solar_cells_steps, standin
from jaxft.data import elpv
from jaxft.runs import Run


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


@pytest.mark.slow
def test_solar_cells_of_several_splits(tmp_path, monkeypatch, capsys):
    """Bug: views of a held-out cell are trained on; a table is of other cells; a second call trains again."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    cells = drawn_cells(48)
    monkeypatch.setattr(solar_cells.elpv, "prepare", lambda cache: cells)
    trained, whole = [], solar_cells_steps.finetune

    def finetune(model, task, train, held_out, *rest):
        trained.append((set(train.dataset.groups[i] for i in train.indices), set(held_out.indices % len(cells))))
        return whole(model, task, train, held_out, *rest)

    monkeypatch.setattr(solar_cells_steps, "finetune", finetune)
    settings = solar_cells.Settings(weights="none", freeze="all-but-head", image_size=32, epochs=1, splits=2)
    for _ in range(2):
        solar_cells.main(settings, Run(tmp_path / "run", keep="last", pictures=False))
    assert len(trained) == 2
    for groups, held_out in trained:
        assert len(groups) == 36 and len(held_out) == 12 and not groups & {cells.groups[i] for i in held_out}
    rows = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert {name: len(found) for name, found in rows.items()} == dict.fromkeys(
        ("logistic", "svm", "net", "net and svm"), 2
    )
    assert np.mean([row["accuracy"] for row in rows["svm"]]) > 0.8
    assert (tmp_path / "run" / "results.png").stat().st_size > 5000
    assert "±" in capsys.readouterr().out


def drawn_cells(count: int) -> elpv.SolarCells:
    """Grey noise, and a dark half where the cell is defective."""
    rng = np.random.default_rng(0)
    probabilities = np.asarray(elpv.PROBABILITIES, np.float32)[np.arange(count) % 4]
    images = rng.integers(100, 256, (count, 32, 32, 1)).repeat(3, -1).astype(np.uint8)
    images[probabilities > 0.5, :16] //= 3
    names = tuple(f"cell{i}.png" for i in range(count))
    labels = (probabilities >= 0.5).astype(np.int32)
    columns = dict(name="drawn", images=list(images), labels=labels, groups=names, names=names, classes=elpv.CLASSES)
    types = tuple(elpv.TYPES[i // 4 % 2] for i in range(count))
    return elpv.SolarCells(**columns, probabilities=probabilities, types=types)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vgg16_statefarm", ("80", "0.03", "first:10", "stand-in")),
        ("inception_v3_statefarm", ("299", "inception_v3_v02")),
        ("cifar10", ("resnet50", "--no-subset")),
        ("vgg16_elpv", ("300", "--head-epochs")),
        ("solar_cells", ("224", "through:block4", "--splits")),
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
