"""Every example runs, and does what its first line says."""

import importlib
import pathlib

import pytest
from tiny import cache, kept_programs, no_pictures  # noqa: F401

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in ("__init__", "drawn"))
QUICK = ("bottleneck_svm", "own_backbone", "own_loop")
EXPECTED = {
    "own_loop": lambda loss: 0 < loss < 100,
    "bottleneck_svm": lambda accuracy: accuracy > 0.5,  # chance is a third
    "gradual_unfreezing": lambda frozen: frozen == ["all-but-head", "through:block4"],
    "custom_head": lambda layers: layers == 3,
    "custom_loss": lambda largest: 0 < largest <= 1,
    "multi_label": lambda figures: "macro_f1" in figures and figures["loss"] > 0,
    "regression": lambda figures: 0 < figures["mae"] < 1,
    "k_folds": lambda accuracies: len(accuracies) == 3 and all(0 <= each <= 1 for each in accuracies),
    "own_backbone": lambda accuracy: accuracy > 0.5,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_it_runs(name, tmp_path, monkeypatch, no_pictures, cache):  # noqa: F811
    """Bug: what people copy first does not work."""
    monkeypatch.chdir(tmp_path)
    assert EXPECTED[name](importlib.import_module(f"examples.{name}").main())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short(name):
    """Bug: an example that must be studied."""
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 65 and lines[0].startswith('"""')
