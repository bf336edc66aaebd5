"""Orders of an epoch and weights of classes."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from jaxft.data import Dataset, order

LABELS = np.array([0] * 50 + [1] * 7 + [2] * 13 + [-1] * 4)


def dataset(labels=LABELS) -> Dataset:
    names = tuple(map(str, range(len(labels))))
    return Dataset("uneven", [b""] * len(labels), np.asarray(labels), names, names, tuple("abcd"))


DATA, ALL = dataset(), np.arange(len(LABELS))


def test_shuffling_is_pinned():
    """Bug: a new version draws another order, and runs begun with the old one resume elsewhere."""
    found = order.shuffled(dataset([0] * 20), np.arange(20), 0, 0)
    assert found.tolist() == [11, 3, 13, 2, 15, 1, 18, 19, 17, 8, 6, 0, 7, 14, 4, 10, 12, 16, 5, 9]
    assert sorted(order.shuffled(DATA, ALL[::2], 4, 1)) == ALL[::2].tolist()


@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_classes_are_equally_frequent(epoch):
    """Bug: a rare class stays rare, unknown labels are drawn, or an epoch has another length."""
    found = order.balanced(DATA, ALL, 3, epoch)
    assert found.dtype == np.int64 and len(found) == len(ALL)
    counts = np.bincount(DATA.labels[found], minlength=3)
    assert counts.sum() == 74 and counts.max() - counts.min() <= 1
    assert (DATA.labels[found] >= 0).all()


def test_a_class_is_used_up_before_an_example_comes_again():
    """Bug: a common class is drawn with replacement, so that some of its examples are never seen."""
    for members in (ALL[:50], ALL[50:57], ALL[57:70]):
        drawn = {}
        for epoch in range(12):
            for index in order.balanced(DATA, ALL, 1, epoch).tolist():
                drawn[index] = drawn.get(index, 0) + 1
            counts = [drawn.get(index, 0) for index in members]
            assert max(counts) - min(counts) <= 1, epoch


def test_balanced_orders_depend_on_seed_epoch_and_indices_alone():
    """Bug: a resumed run draws other examples; epochs repeat; classes come in blocks."""
    first = order.balanced(DATA, ALL, 0, 5)
    np.testing.assert_array_equal(first, order.balanced(DATA, ALL, 0, 5))
    assert not np.array_equal(first, order.balanced(DATA, ALL, 1, 5))
    assert not np.array_equal(first, order.balanced(DATA, ALL, 0, 6))
    assert set(order.balanced(DATA, ALL[45:60], 0, 0)) <= set(ALL[45:60])
    assert (np.diff(DATA.labels[first]) != 0).mean() > 0.4


def test_a_balanced_order_is_pinned():
    """Bug: a new version draws another order, and runs begun with the old one resume elsewhere."""
    found = order.balanced(dataset([0, 0, 0, 0, 0, 1, 1, 2]), np.arange(8), 7, 3)
    assert found.tolist() == [2, 5, 7, 6, 5, 3, 0, 7]


def test_class_weights_are_those_of_scikit_learn():
    """Bug: the weights are counted over the held-out examples too, or absent classes divide by zero."""
    indices = np.concatenate([ALL[30:60], ALL[68:]])
    weights = order.class_weights(DATA, indices)
    assert weights.dtype == np.float32 and weights.shape == (74,)
    known = LABELS[indices][LABELS[indices] >= 0]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=known)
    np.testing.assert_allclose(weights[[0, 50, 57]], expected, rtol=1e-6)
    assert (weights[-4:] == 1).all()
    sums = [weights[indices][LABELS[indices] == label].sum() for label in range(3)]
    np.testing.assert_allclose(sums, len(known) / 3, rtol=1e-5)
    only = order.class_weights(DATA, ALL[:10])
    assert (only == 1).all()


def test_classes_are_needed():
    """Bug: columns of several labels are taken for classes, or a mask for the examples 0 and 1."""
    several = replace(DATA, labels=np.ones((74, 4), int), target="labels")
    with pytest.raises(ValueError, match="order.balanced needs one class an image, .* draw with order.shuffled"):
        order.balanced(several, ALL, 0, 0)
    with pytest.raises(ValueError, match="target 'labels'; give Inputs.weights of your own"):
        order.class_weights(several, ALL)
    with pytest.raises(ValueError, match=r"booleans.*np.flatnonzero\(indices\)"):
        order.class_weights(DATA, ALL > 4)
    with pytest.raises(ValueError, match="none of the 4 labels is known; use order.shuffled"):
        order.balanced(DATA, ALL[-4:], 0, 0)
