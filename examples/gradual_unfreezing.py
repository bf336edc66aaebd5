"""Gradual unfreezing with lower rates below: first the head, then the last block with it, each deeper stage slower."""

import numpy as np

from examples import drawn
from jaxft import model, optim, task
from jaxft.data import Inputs, folds
from jaxft.finetune import finetune
from jaxft.phase import Phase, unfreeze
from jaxft.runs import Run


def main(folder: str = "runs/gradual_unfreezing") -> list[str]:
    """Returns what each phase left frozen."""
    data = drawn.shapes()
    train, test = folds.split(data.groups, 0, 4)  # whole groups
    start = model.load("vgg16", 3, weights="none", fc=False)
    groups, schedules = optim.by_depth(start.net, optim.Constant(1e-3), factor=1 / 2.6)
    phases = unfreeze(start.net, Phase(1, schedules, groups=groups, momentum="carry"), ["block5"])
    sides = (Inputs(data, np.asarray(part), drawn.SIZE, batch_size=4) for part in (train, test))
    finetune(start, task.classification(), *sides, phases, Run(folder))
    return [phase.frozen for phase in phases]


if __name__ == "__main__":
    print(main())
