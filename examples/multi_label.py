"""Several labels an image: round, straight, large. Each is true, false or unknown by itself."""

import dataclasses

import numpy as np

from examples import drawn
from jaxft import model, optim, task
from jaxft.data import Inputs
from jaxft.finetune import finetune
from jaxft.phase import Phase
from jaxft.runs import Run

NAMES = ("round", "straight", "open")


def main(folder: str = "runs/multi_label") -> dict[str, float]:
    """Returns the figures on the held-out images."""
    shapes = drawn.shapes()
    table = np.asarray([[0, 1, 0], [1, 0, 0], [0, 1, 1]], np.int32)  # square, disc, cross
    labels = table[shapes.labels]
    labels[::9, 2] = -1  # nobody looked
    data = dataclasses.replace(shapes, labels=labels, classes=NAMES, target="labels")
    goal = task.multilabel()
    start = model.load("vgg16", len(NAMES), weights="none", fc=False)
    sides = (Inputs(data, part, drawn.SIZE, batch_size=4) for part in (np.arange(36), np.arange(36, 48)))
    phase = Phase(2, optim.Constant(1e-2), frozen="all-but-head")
    _, predictions = finetune(start, goal, *sides, [phase], Run(folder))
    return goal.metrics(predictions)


if __name__ == "__main__":
    print(main())
