"""The wheel, in an environment of its own, as `pip install` would put it there."""

import os
import pathlib
import subprocess
import sys
import tarfile
import venv
import zipfile

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_runs_elsewhere(tmp_path):
    """Bug: the wheel lacks a template or a dependency that every checkout and every test environment has."""
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)  # the wheel is built from the sdist
    (sdist,), (wheel,) = (sorted((tmp_path / "dist").glob(kind)) for kind in ("*.tar.gz", "*.whl"))
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "NOTICE", "CHANGELOG.md", "docs/index.md", "examples/own_loop.py", "tests/test_vgg.py"} <= held
    parts = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {part for part in parts if not part.endswith(".dist-info")} == {"jaxft", "experiments"}

    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    for kind, value in {"dark": 40, "light": 200}.items():
        (photos / kind).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(value - 30, value + 30, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(photos / kind / f"{i}.png")
    venv.create(tmp_path / "empty", with_pip=True)
    own = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin")
    run(own / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"JAXFT_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    shape = ["--weights", "none", "--image-size", "32", "--batch-size", "4", "--head-epochs", "1", "--epochs", "1"]
    elsewhere = {"cwd": tmp_path, "env": clean}
    run(own / "jaxft", "finetune", photos, "--net", "vgg16", *shape, **elsewhere)
    assert "light" in (tmp_path / "runs" / "photos-vgg16" / "report.html").read_text(encoding="utf-8")
    run(own / "jaxft", "predict", tmp_path / "runs" / "photos-vgg16", photos, "--out", "told.csv", **elsewhere)
    assert len((tmp_path / "told.csv").read_text(encoding="utf-8").splitlines()) == 13
