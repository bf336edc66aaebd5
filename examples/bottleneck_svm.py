"""Bottleneck features and a support vector machine: no training of the net at all."""

import numpy as np
from sklearn.svm import LinearSVC

from examples import drawn
from jaxft import features, model
from jaxft.data import folds


def main() -> float:
    """Returns the accuracy on the held-out images."""
    data = drawn.shapes(96)
    train, test = folds.stratified_split(data.labels.tolist(), 0.75)
    start = model.load("vgg16", 3, weights="none", fc=False)
    found = features.of(start, "block3", data, image_size=drawn.SIZE)  # float32 [96, 256], one call
    scale = found[train].std(0) + 1e-6
    machine = LinearSVC(C=0.1, dual=True, max_iter=20_000, random_state=0)
    machine.fit(found[train] / scale, data.labels[train])
    accuracy = float(np.mean(machine.predict(found[test] / scale) == data.labels[test]))
    print(f"accuracy {accuracy:.0%}")
    return accuracy


if __name__ == "__main__":
    main()
