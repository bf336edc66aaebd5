"""A loss of your own is a field of a task."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from examples import drawn
from jaxft import model, optim, task
from jaxft.data import Inputs
from jaxft.finetune import finetune
from jaxft.phase import Phase
from jaxft.runs import Run


def squared_hinge(logits, targets):
    """Logits and targets [B, C] → [B], one loss for each image."""
    return jnp.square(jnp.maximum(0, 1 - logits * (2 * targets - 1))).sum(-1)


def main(folder: str = "runs/custom_loss") -> float:
    """Returns the training loss of the last epoch."""
    data = drawn.shapes()
    hinge = dataclasses.replace(task.classification(), losses=squared_hinge)
    start = model.load("vgg16", 3, weights="none", fc=False)
    sides = (Inputs(data, part, drawn.SIZE, batch_size=4) for part in (np.arange(36), np.arange(36, 48)))
    phase = Phase(2, optim.Constant(1e-2), frozen="all-but-head")
    trained, _ = finetune(start, hinge, *sides, [phase], Run(folder))
    opened = model.open(folder)  # predicts with the task's own functions; a loss is needed only to train
    assert opened.task is not None and trained.task is not None
    lines = (opened.predict(data).outputs, trained.predict(data).outputs)
    assert (lines[0] == lines[1]).all()
    return float(np.abs(lines[0]).max())


if __name__ == "__main__":
    main()
