"""Tables of probabilities for tests: nets that are more or less wrong about the same images."""

import numpy as np

from jaxft.ensemble import Probabilities


def table(values, labels):
    count, classes = values.shape
    names = tuple(f"img{i}.jpg" for i in range(count))
    return Probabilities(
        names, tuple(f"c{c}" for c in range(classes)), values, labels, tuple(f"p{i % 7}" for i in range(count))
    )


def tables(count, classes, noise, seed=0):
    """For each of `noise` a net whose logits are the truth and so much noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    found = []
    for level in noise:
        logits = 2 * np.eye(classes)[labels] + level * rng.normal(size=(count, classes))
        values = np.exp(logits)
        found.append(table(values / values.sum(1, keepdims=True), labels))
    return found


def noise(count, classes, seed=0):
    """A net that says nothing: equal probabilities, labels by chance."""
    return table(np.full((count, classes), 1 / classes), np.random.default_rng(seed).integers(0, classes, count))
