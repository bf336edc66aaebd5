"""A linear classifier on features, in one call."""

import numpy as np
import pytest
import tiny

from jaxft import probe as probes


@pytest.mark.parametrize("classifier", ["logistic", "svm"])
def test_it_learns_from_features_and_not_from_the_test_images(classifier):
    """Bug: rows of training and test are exchanged; columns are not those of the classes."""
    data, train, test = tiny.dataset(60), np.arange(40), np.arange(40, 60)
    options = {"stages": ["body", "mean"], "classifier": classifier, "pools": ("mean", "max"), "image_size": (8, 8)}
    found = probes.probe(tiny.model(), data, train, test, penalty=100.0, **options)
    assert found.names == data.names[40:] and found.classes == data.classes
    assert found.figures()["accuracy"] > 0.8
    backwards = probes.probe(tiny.model(), data, train, test[::-1], penalty=100.0, **options)
    np.testing.assert_allclose(backwards.values[::-1], found.values, atol=1e-4)


def test_what_cannot_be_probed():
    """Bug: an unknown label is a class; a stage of another net."""
    data = tiny.dataset(30)
    options = {"image_size": (8, 8)}
    with pytest.raises(ValueError, match="logistic or svm"):
        probes.probe(tiny.model(), data, np.arange(9), np.arange(9, 12), stages="body", classifier="tree", **options)
    with pytest.raises(ValueError, match="'block9' is not a stage"):
        probes.probe(tiny.model(), data, np.arange(9), np.arange(9, 12), stages="block9", **options)
    with pytest.raises(ValueError, match="one known class"):
        unknown = tiny.dataset(30, labels=np.full(30, -1))
        probes.probe(tiny.model(), unknown, np.arange(9), np.arange(9, 12), stages="body", **options)
    with pytest.raises(ValueError, match="image_size"):
        probes.probe(tiny.model(), data, np.arange(9), np.arange(9, 12), stages="body")
