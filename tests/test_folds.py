"""Folds of whole groups, and stratified splits."""

import numpy as np
import pytest

from jaxft.data import folds

# Images of each of State Farm's 26 drivers, p002 to p081.
STATE_FARM = (
    725, 823, 876, 875, 1078, 1237, 1233, 1226, 1196, 848, 651, 605, 591,
    724, 835, 1011, 790, 920, 740, 794, 809, 820, 1034, 346, 814, 823,
)  # fmt: skip


def state_farm_groups() -> list[str]:
    groups = [f"p{driver:03}" for driver, count in enumerate(STATE_FARM) for _ in range(count)]
    return list(np.random.default_rng(0).permutation(groups))


@pytest.mark.parametrize("count", [2, 5, 10, 13, 26])
def test_drivers_stay_whole_and_every_fold_has_some(count):
    """Fails when a driver is divided between folds, or a fold is empty."""
    groups = state_farm_groups()
    fold_of = folds.group_folds(groups, count)
    assert fold_of.shape == (22_424,) and fold_of.dtype == np.int32
    assert len(set(zip(groups, fold_of.tolist(), strict=True))) == 26
    assert set(fold_of.tolist()) == set(range(count))


@pytest.mark.parametrize("seed", range(20))
def test_folds_are_balanced_by_images(seed):
    """Fails when folds are equal in drivers rather than in images, or the seed's blur unbalances them."""
    sizes = np.bincount(folds.group_folds(state_farm_groups(), 5, seed=seed))
    assert sizes.max() / sizes.min() < 1.12, sizes


def test_folds_depend_on_the_seed_and_not_on_the_order_of_examples():
    """Fails when the seed is ignored, a set's iteration order (hash randomisation) leaks in, or rows decide."""
    groups = state_farm_groups()
    first = dict(zip(groups, folds.group_folds(groups, 5, seed=0).tolist(), strict=True))
    again = dict(zip(groups[::-1], folds.group_folds(groups[::-1], 5, seed=0).tolist(), strict=True))
    assert first == again

    def partition(seed):
        fold_of = folds.group_folds(groups, 5, seed=seed)
        return {frozenset(g for g, f in zip(groups, fold_of.tolist(), strict=True) if f == fold) for fold in range(5)}

    assert partition(0) != partition(1)


def test_split_is_the_fold_and_its_complement():
    """Fails when train and test are swapped, overlap, or lose an example."""
    groups = ["a"] * 4 + ["b"] * 3 + ["a"] + ["c"] * 2
    tests = []
    for fold in range(3):
        train, test = folds.split(groups, fold, 3)
        assert sorted([*train, *test]) == list(range(10))
        assert len(train) > len(test) > 0 or len(test) == 5
        assert len({groups[i] for i in test}) == 1
        assert not {groups[i] for i in test} & {groups[i] for i in train}
        tests.extend(test.tolist())
    assert sorted(tests) == list(range(10))


@pytest.mark.parametrize(
    ("groups", "fold", "count", "message"),
    [
        (["a", "b", "c"], 3, 3, "fold 3 does not exist: 3 folds are numbered 0 to 2"),
        (["a", "b", "c"], -1, 3, "fold -1 does not exist"),
        (["a", "b", "c"], 0, 4, "4 folds of 3 groups: a fold with no group"),
        (["a", "b", "c"], 0, 1, "leaves nothing to train on"),
        (["a", "a"], 0, 2, "at least two groups, found 1: a"),
        ([], 0, 2, "at least two groups, found 0"),
    ],
)
def test_impossible_folds_are_refused(groups, fold, count, message):
    """Fails when an impossible fold gives an empty or a wrong set instead of an error."""
    with pytest.raises(ValueError, match=message):
        folds.split(groups, fold, count)


def test_stratified_split_has_the_exact_sizes_of_the_paper():
    """Fails when rounding in each stratum by itself gives 1,967 or 1,970 where the paper has 1,968 of 2,624."""
    rng = np.random.default_rng(0)
    strata = list(zip(rng.integers(0, 4, 2624).tolist(), rng.integers(0, 2, 2624).tolist(), strict=True))
    first, second = folds.stratified_split(strata, 0.75)
    assert (len(first), len(second)) == (1968, 656)
    assert sorted([*first, *second]) == list(range(2624))
    for stratum in set(strata):
        members = [i for i, s in enumerate(strata) if s == stratum]
        assert abs(len(set(members) & set(first.tolist())) - 0.75 * len(members)) < 1


def test_stratified_split_follows_its_seed():
    """Fails when the seed is ignored or the split is not deterministic."""
    strata = [0, 1] * 50
    one, same, other = (folds.stratified_split(strata, 0.5, seed)[0].tolist() for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, 0.01, 0.99])
def test_a_split_with_an_empty_part_is_refused(fraction):
    """Fails when a part comes out empty without a word."""
    with pytest.raises(ValueError, match="leaves a part empty"):
        folds.stratified_split([0] * 10, fraction)


def test_labels_are_balanced_as_well():
    """Bug: a fold without a rare class; labels decide nothing."""
    rng = np.random.default_rng(0)
    groups = [f"p{i}" for i in rng.integers(0, 26, 3000)]
    rare = np.isin(groups, ["p1", "p2", "p3", "p4", "p5", "p6"])  # a class of few drivers
    labels = np.where(rare & (rng.random(3000) < 0.3), 9, rng.integers(0, 9, 3000))
    spread = {}
    for name, given in (("with", labels), ("without", None)):
        fold_of = folds.group_folds(groups, 5, labels=given, seed=1)
        shares = [np.bincount(labels[fold_of == k], minlength=10) / np.bincount(labels) for k in range(5)]
        spread[name] = np.abs(np.stack(shares) - 0.2).max()
        folds.check_folds(groups, fold_of)
    assert spread["with"] < 0.13 and spread["with"] < 0.7 * spread["without"]
    with pytest.raises(ValueError, match="5 labels for 3000 examples"):
        folds.group_folds(groups, 5, labels=labels[:5])
    few = folds.group_folds(["a", "b", "c"], 3, labels=[0, 1, 1])
    assert sorted(few.tolist()) == [0, 1, 2]


def test_random_folds_have_every_label_in_proportion_and_divide_groups():
    """Bug: what is to show the leak keeps groups whole."""
    labels = np.arange(120) % 3
    fold_of = folds.random_folds(labels, 4)
    assert all((np.bincount(labels[fold_of == k]) == 10).all() for k in range(4))
    with pytest.raises(ValueError, match="is in the folds"):
        folds.check_folds([f"p{i % 6}" for i in range(120)], fold_of)
    assert not np.array_equal(fold_of, folds.random_folds(labels, 4, seed=1))
    with pytest.raises(ValueError, match="choose 2 to 120"):
        folds.random_folds(labels, 1)
