"""Bottleneck features and a support vector machine: no training of the net at all."""

from examples import drawn
from jaxft import model
from jaxft.data import folds
from jaxft.probe import probe


def main() -> float:
    """Returns the accuracy on the held-out images."""
    data = drawn.shapes(96)
    train, test = folds.stratified_split(data.labels.tolist(), 0.75)
    start = model.load("vgg16", 3, weights="none", fc=False)
    found = probe(start, data, train, test, stages="block3", classifier="svm", penalty=7.0, image_size=drawn.SIZE)
    accuracy = found.figures()["accuracy"]
    print(f"accuracy {accuracy:.0%}")
    return accuracy


if __name__ == "__main__":
    main()
