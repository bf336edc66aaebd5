"""Folds as runs, joined datasets, and stages that are made once."""

import dataclasses

import drawn_tables
import numpy as np
import pytest
import tiny

from jaxft import crossval, ensemble, optim, task
from jaxft.data import Dataset, Inputs, folds
from jaxft.phase import Phase
from jaxft.runs import Run


def classes(count=24, name="drawn", first=0):
    rng = np.random.default_rng(first)
    images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(count)]
    names = tuple(f"{name}{i}" for i in range(count))
    labels = np.arange(count) % 3
    return Dataset(name, images, labels, tuple(f"p{i % 6}" for i in range(count)), names, ("a", "b", "c"))


def test_each_image_is_judged_by_a_net_that_never_saw_its_group(tmp_path):
    """Bug: a fold is trained on its own images; folds write into one folder; the held-out side is augmented."""
    data = classes()
    fold_of = folds.group_folds(data.groups, 3)
    inputs = Inputs(data, np.arange(24), (8, 8), 4, weights=np.ones(24))
    seen = []

    def changed(fold, train):
        seen.append((fold, set(train.indices.tolist())))
        return train

    run = Run(tmp_path, pictures=False)
    found = list(
        crossval.folds(
            tiny.model(),
            task.classification(),
            inputs,
            fold_of,
            [Phase(1, optim.Constant(0.1))],
            run,
            changed=changed,
        )
    )
    assert [fold for fold, _ in seen] == [0, 1, 2]
    for fold, trained in seen:
        assert trained == set(np.flatnonzero(fold_of != fold).tolist())
        assert (tmp_path / f"fold{fold}" / "predictions.csv").exists()
        assert not list((tmp_path / f"fold{fold}").glob("*.png"))
    joined = ensemble.join([table for _, table in found])
    divided = np.arange(24) // 12
    start, goal, phases = tiny.model(), task.classification(), [Phase(1, optim.Constant(0.1))]
    with pytest.raises(ValueError, match="p0 is in the folds 0 and 1"):
        next(crossval.folds(start, goal, inputs, divided, phases, Run(tmp_path / "divided")))
    leaky = crossval.folds(start, goal, inputs, divided, phases, Run(tmp_path / "d", pictures=False), divided=True)
    assert len(next(leaky)[1]) == 12
    assert sorted(joined.names) == sorted(data.names)
    with pytest.raises(ValueError, match="fold 2 has no image"):
        next(crossval.folds(tiny.model(), task.classification(), inputs, fold_of + (fold_of == 2) * 2, [], run))


def test_a_group_in_two_folds_is_named():
    """Bug: a driver in two folds makes the score too good, without a word."""
    with pytest.raises(ValueError, match="p1 is in the folds 0 and 1"):
        folds.check_folds(("p0", "p1", "p1"), np.array([0, 0, 1]))
    folds.check_folds(("p0", "p1", "p1"), np.array([0, 1, 1]))


def test_joined_datasets_are_both(monkeypatch):
    """Bug: an index of the second reads the first; each image is read again for its digest."""
    first, second = classes(5), classes(4, "more", 1)
    expected = first.digests + second.digests
    monkeypatch.setattr(Dataset, "_digest", lambda *_: pytest.fail("read again"))
    both = crossval.joined(first, second, "both")
    assert both.digests == expected and both.names == first.names + second.names
    np.testing.assert_array_equal(both.images[6], second.images[1])
    np.testing.assert_array_equal(both.images[4], first.images[4])
    with pytest.raises(ValueError, match="drawn0"):
        crossval.joined(first, first, "both")
    with pytest.raises(ValueError, match="same classes"):
        crossval.joined(first, dataclasses.replace(second, classes=("a", "b", "x")), "both")


def test_a_stage_is_made_once_and_other_settings_are_refused(tmp_path):
    """Bug: a half-finished solution goes on under other settings; a stage is made again."""
    table = drawn_tables.tables(10, 3, [1.0])[0]
    stages = crossval.Stages(tmp_path / "s", {"folds": 3, "net": {"name": "vgg16"}})
    first = stages.once("a/b", lambda: table)
    again = crossval.Stages(tmp_path / "s", {"folds": 3, "net": {"name": "vgg16"}})
    second = again.once("a/b", lambda: pytest.fail("made again"))
    np.testing.assert_array_equal(first.values, second.values)
    assert again.has("a/b") and not again.has("a/b", "c")
    with pytest.raises(ValueError, match="(?s)stages of other settings.*folds: 3 → 5"):
        crossval.Stages(tmp_path / "s", {"folds": 5, "net": {"name": "vgg16"}})
