"""K folds of whole groups: every image is judged once, by a net that never saw its group."""

import pathlib

import numpy as np

from examples import drawn
from jaxft import crossval, ensemble, model, optim, task
from jaxft.data import Inputs, folds
from jaxft.phase import Phase
from jaxft.runs import Run


def main(folder: str = "runs/k_folds", count: int = 3) -> list[float]:
    """Returns the accuracy of each fold."""
    data = drawn.shapes()
    start = model.load("vgg16", 3, weights="none", fc=False)  # used again by every fold: it stays as it is
    inputs = Inputs(data, np.arange(len(data)), drawn.SIZE, batch_size=4)
    fold_of = folds.group_folds(data.groups, count, labels=data.labels)
    phases = [Phase(2, optim.Constant(1e-2), frozen="all-but-head")]
    run = Run(pathlib.Path(folder), pictures=False)  # each fold in a folder of its own
    found = [table for _, table in crossval.folds(start, task.classification(), inputs, fold_of, phases, run)]
    accuracies = [table.figures()["accuracy"] for table in found]
    print(f"accuracy {np.mean(accuracies):.1%} ± {np.std(accuracies, ddof=1):.1%} (standard deviation over folds)")
    whole = ensemble.join(found)  # every image once
    cooler = ensemble.cross_fitted(ensemble.fit_temperature, whole, whole.groups)
    print(f"log loss {whole.figures()['loss']:.3f}, at a fitted temperature {cooler.figures()['loss']:.3f}")
    return accuracies


if __name__ == "__main__":
    main()
