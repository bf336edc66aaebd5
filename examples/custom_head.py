"""A head of your own: hidden layers, dropout, and rates of their own; for any other head see own_backbone.py."""

import numpy as np

from examples import drawn
from jaxft import model, optim, task
from jaxft.data import Inputs
from jaxft.finetune import finetune
from jaxft.phase import Phase
from jaxft.runs import Run


def main(folder: str = "runs/custom_head") -> int:
    """Returns the number of layers that were trained."""
    data = drawn.shapes()
    start = model.load("vgg16", 3, weights="none", fc=False, hidden=(64, 32), dropout=0.5)
    print("new to the task:", start.net.head_layers())  # hidden1, hidden2, predictions
    phase = Phase(
        epochs=1,
        schedule={"trainable": optim.Constant(1e-2), "hidden": optim.Constant(1e-3)},
        groups={"hidden": "hidden[12]"},  # a pattern of names
        frozen="all-but-head",
    )
    sides = (Inputs(data, part, drawn.SIZE, batch_size=4) for part in (np.arange(36), np.arange(36, 48)))
    trained, _ = finetune(start, task.classification(), *sides, [phase], Run(folder))
    return len(trained.variables["params"]) - len(trained.net.frozen)


if __name__ == "__main__":
    print(main(), "layers were trained")
