"""The nearest images, exactly, and what averaging over them and over pieces of film does."""

import dataclasses

import drawn_tables
import numpy as np
import pytest

from jaxft import neighbours
from jaxft.neighbours import Average, Neighbours, Share


def films(count, length, width=24, seed=0, step=0.05):
    """Features of so many films, images of each near to one another, far from the origin, in random order."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 1, width)) + step * rng.normal(size=(count, length, width)) + 50
    order = rng.permutation(count * length)
    return rows.reshape(-1, width)[order].astype(np.float32), np.repeat(np.arange(count), length)[order]


def by_force(features, k):
    rows = features.reshape(len(features), -1).astype(np.float64)
    distance = np.sqrt(np.square(rows[:, None] - rows[None]).sum(-1))
    np.fill_diagonal(distance, -1)
    order = np.argsort(distance, 1, kind="stable")[:, :k]
    return order, np.take_along_axis(distance, order, 1).clip(0)


@pytest.mark.parametrize("rows_at_once", [1000, 37, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_search_is_exact_in_blocks_of_any_length(rows_at_once, dtype):
    """Bug: a block's edge, padding, or cancellation far from the origin gives another neighbour."""
    features = films(20, 4)[0][:75].astype(dtype).reshape(75, 2, 3, 4)
    found = neighbours.search(features, 6, block_bytes=rows_at_once * 24 * 4)
    index, distance = by_force(features, 6)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.distance, distance, atol=1e-5)
    assert found.index.dtype == np.int64 and (found.index[:, 0] == np.arange(75)).all()


def test_doubles_and_few_images():
    """Bug: a double takes the image's own place; k of all images fails."""
    features = np.repeat(films(3, 2)[0], 3, 0)
    found = neighbours.search(features, len(features))
    np.testing.assert_array_equal(found.index, by_force(features, len(features))[0])
    assert neighbours.search(features[:1], 1).index.tolist() == [[0]]
    for k in (0, len(features) + 1):
        with pytest.raises(ValueError, match="choose 1 to 18"):
            neighbours.search(features, k)
    features[4, 0] = np.nan
    with pytest.raises(ValueError, match="image 4 are not finite"):
        neighbours.search(features, 2)


def test_a_file_on_disk_is_searched_without_a_copy(tmp_path):
    """Bug: a memory-mapped array is loaded whole."""
    features = films(30, 4)[0]
    features.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.float32, "r", shape=features.shape)
    np.testing.assert_array_equal(neighbours.search(mapped, 5).index, neighbours.search(features, 5).index)


def test_the_nearest_never_weighs_nothing():
    """Bug: weights by distance less the least distance, which a public solution has."""
    distance = np.sort(np.random.default_rng(0).random((50, 8)), 1)
    for width in (1e-3, 1.0, 100.0):
        share = neighbours.weights(distance, width)
        np.testing.assert_allclose(share.sum(1), 1)
        assert (share[:, 0] >= share[:, 1:].max(1)).all() and share[:, 0].min() > 0
    assert np.isfinite(neighbours.weights(np.zeros((3, 4)), 1.0)).all()
    with pytest.raises(ValueError, match="above 0"):
        neighbours.weights(distance, 0.0)


def film_table(film, noise=1.5):
    labels = film % 4
    logits = 2 * np.eye(4)[labels] + noise * np.random.default_rng(1).normal(size=(len(film), 4))
    values = np.exp(logits)
    return drawn_tables.table(values / values.sum(1, keepdims=True), labels)


def test_averaging_over_a_film_helps_and_k_is_found():
    """Bug: neighbours of another image; a k that is worse than none is chosen."""
    features, film = films(40, 5)
    table, found = film_table(film), neighbours.search(features, 10)
    average = neighbours.fit_average([table], [found])
    assert average.k >= 5
    assert average(table, found).figures()["loss"] < 0.8 * table.figures()["loss"]
    np.testing.assert_allclose(Average(1, 1.0)(table, found).values, table.values)
    apart = neighbours.search(np.random.default_rng(2).normal(size=(200, 24)).astype(np.float32), 10)
    assert neighbours.fit_average([table], [apart]).k == 1
    with pytest.raises(ValueError, match="search among the same images"):
        average(table.at(np.arange(10)), found)
    with pytest.raises(ValueError, match="no label"):
        neighbours.fit_average([dataclasses.replace(table, labels=np.full(200, -1))], [found])


def test_segments_are_the_films():
    """Bug: a chain over everything; films of one image are lost."""
    features, film = films(40, 5, step=0.02)
    found = neighbours.segments(neighbours.search(features, 10), reach=2.0)
    pairs = found[:, None] == found[None]
    assert (pairs == (film[:, None] == film[None])).all()
    one = neighbours.segments(neighbours.search(features, 10), reach=1e6, most=3)
    assert len(np.unique(one)) == 200  # all in one is no film


def test_only_confident_and_consistent_segments_share():
    """Bug: a segment of contradictions gets the mean of them."""
    labels = np.zeros(4, int)
    values = np.array([[0.9, 0.1], [0.95, 0.05], [0.9, 0.1], [0.1, 0.9]])
    table = drawn_tables.table(values, labels)
    shared = Share(0.8, 0.8)(table, np.array([0, 0, 1, 1])).values
    np.testing.assert_allclose(shared[0], shared[1])
    np.testing.assert_allclose(shared[2:], values[2:])
    with pytest.raises(ValueError, match="one for each"):
        Share()(table, np.array([0, 0]))
    assert Neighbours(np.zeros((1, 1), int), np.zeros((1, 1))).index.shape == (1, 1)
