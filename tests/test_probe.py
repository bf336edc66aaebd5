"""A linear classifier on features, in one call."""

from functools import partial

import numpy as np
import pytest
import tiny

from jaxft import probe as probes


@pytest.mark.parametrize("classifier", ["logistic", "svm", "rbf"])
def test_it_learns_from_features_and_not_from_the_test_images(classifier):
    """Bug: rows of training and test are exchanged; columns are not those of the classes."""
    data, train, test = tiny.dataset(60), np.arange(40), np.arange(40, 60)
    options = {"stages": ["body", "mean"], "classifier": classifier, "pools": ("mean", "max"), "image_size": (8, 8)}
    found = probes.probe(tiny.model(), data, train, test, penalty=100.0, **options)
    assert found.names == data.names[40:] and found.classes == data.classes
    assert found.figures()["accuracy"] > 0.8
    backwards = probes.probe(tiny.model(), data, train, test[::-1], penalty=100.0, **options)
    np.testing.assert_allclose(backwards.values[::-1], found.values, atol=1e-4)


def test_a_penalty_is_chosen_on_the_training_images():
    """Bug: the first penalty is taken, or the test images choose it."""
    data, train, test = tiny.dataset(60), np.arange(40), np.arange(40, 60)
    rows = np.random.default_rng(0).normal(size=(60, 5))
    rows[:, :3] += 4.0 * np.eye(3)[data.labels]
    classify = partial(probes.on_features, rows, data, train, classifier="rbf")
    several = classify(test, penalty=(1e-3, 400.0))
    np.testing.assert_array_equal(several.values, classify(test, penalty=400.0).values)
    assert several.figures()["accuracy"] > 0.8 > classify(test, penalty=1e-3).figures()["accuracy"]
    np.testing.assert_array_equal(classify(test[:5], penalty=(1e-3, 400.0)).values, several.values[:5])


def test_what_cannot_be_probed():
    """Bug: an unknown label is a class; a stage of another net."""
    data = tiny.dataset(30)
    options = {"image_size": (8, 8)}
    with pytest.raises(ValueError, match="logistic, svm or rbf"):
        probes.probe(tiny.model(), data, np.arange(9), np.arange(9, 12), stages="body", classifier="tree", **options)
    with pytest.raises(ValueError, match="'block9' is not a stage"):
        probes.probe(tiny.model(), data, np.arange(9), np.arange(9, 12), stages="block9", **options)
    with pytest.raises(ValueError, match="one known class"):
        unknown = tiny.dataset(30, labels=np.full(30, -1))
        probes.probe(tiny.model(), unknown, np.arange(9), np.arange(9, 12), stages="body", **options)
    with pytest.raises(ValueError, match="image_size"):
        probes.probe(tiny.model(), data, np.arange(9), np.arange(9, 12), stages="body")
    with pytest.raises(ValueError, match=r"rows have shape \[29, 2\]; expected \[30, F\]"):
        probes.on_features(np.zeros((29, 2)), data, np.arange(9), np.arange(9, 12))
    lone = np.flatnonzero(data.labels == 0).tolist() + np.flatnonzero(data.labels == 1)[:1].tolist()
    with pytest.raises(ValueError, match="a class of one training image"):
        probes.on_features(np.zeros((30, 2)), data, np.asarray(lone), np.arange(2), classifier="svm")
