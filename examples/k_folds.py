"""K folds of whole groups: every image is judged once, by a net that never saw its group."""

import pathlib
from functools import partial

import numpy as np

from examples import drawn
from jaxft import model, optim, task
from jaxft.data import Inputs, folds
from jaxft.finetune import finetune
from jaxft.phase import Phase
from jaxft.runs import Run


def main(folder: str = "runs/k_folds", count: int = 3) -> list[float]:
    """Returns the accuracy of each fold."""
    data, goal = drawn.shapes(), task.classification()
    start = model.load("vgg16", 3, weights="none", fc=False)  # used again by every fold: it stays as it is
    sized = partial(Inputs, data, image_size=drawn.SIZE, batch_size=4)
    phase = Phase(2, optim.Constant(1e-2), frozen="all-but-head")
    accuracies = []
    for fold in range(count):
        train, test = folds.split(data.groups, fold, count)
        run = Run(pathlib.Path(folder) / f"fold{fold}")
        _, predictions = finetune(start, goal, sized(train), sized(test), [phase], run)
        accuracies.append(goal.metrics(predictions)["accuracy"])
    print(f"accuracy {np.mean(accuracies):.1%} ± {np.std(accuracies, ddof=1):.1%} (standard deviation over folds)")
    return accuracies


if __name__ == "__main__":
    main()
