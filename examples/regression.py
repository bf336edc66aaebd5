"""A number to predict: how bright an image is, between 0 and 1."""

import dataclasses

import numpy as np

from examples import drawn
from jaxft import model, optim, task
from jaxft.data import Inputs
from jaxft.finetune import finetune
from jaxft.phase import Phase
from jaxft.runs import Run


def main(folder: str = "runs/regression") -> dict[str, float]:
    """Returns the figures on the held-out images."""
    shapes = drawn.shapes()
    brightness = np.asarray([[image.mean() / 255] for image in shapes.images], np.float32)
    data = dataclasses.replace(shapes, labels=brightness, classes=("brightness",), target="values")
    goal = task.regression(range=(0, 1))
    start = model.load("vgg16", 1, weights="none", fc=False)
    sides = (Inputs(data, part, drawn.SIZE, batch_size=4) for part in (np.arange(36), np.arange(36, 48)))
    phase = Phase(2, optim.Constant(1e-2), optim.AdamW(), frozen="all-but-head")
    _, predictions = finetune(start, goal, *sides, [phase], Run(folder))
    return goal.metrics(predictions)


if __name__ == "__main__":
    print(main())
