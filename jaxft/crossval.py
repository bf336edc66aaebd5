"""Cross-validation: a run for each fold, in a folder of its own, and what each says of images that it never saw."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft import ensemble
from jaxft.checkpoint import differences
from jaxft.data import Dataset, Inputs
from jaxft.data.folds import check_folds
from jaxft.ensemble import Probabilities
from jaxft.files import read_json, write_json
from jaxft.finetune import finetune
from jaxft.model import Model
from jaxft.phase import Phase
from jaxft.runs import Run
from jaxft.task import Task


def held_out(inputs: Inputs, indices: np.ndarray) -> Inputs:
    """The inputs of other images, as they are: without augmentation, mixing, targets and weights."""
    plain: Mapping[str, Any] = {"augment": None, "mix": None, "views": None, "plain_view": False}
    return dataclasses.replace(inputs, indices=indices, targets=None, weights=None, **plain)


def folds(
    start: Model,
    task: Task,
    inputs: Inputs,
    fold_of: np.ndarray,
    phases: Sequence[Phase],
    run: Run,
    *,
    changed: Callable[[int, Inputs], Inputs] = lambda fold, train: train,
    divided: bool = False,
) -> Iterator[tuple[Model, Probabilities]]:
    """Fine-tunes a net for each fold in `fold{k}` of the run's folder, from the same start.

    Args:
        start: stays as it is.
        task: of classes.
        inputs: of the training images, with what is done to them.
        fold_of: the fold of each example of the dataset, int [N]: from 0, or -1 for images that are trained on in every
            fold and judged in none.
        phases, run: as `finetune`; each fold resumes by itself.
        changed: (fold, its training inputs) → what it trains on, such as with targets of its own.
        divided: groups may be divided among folds, as by `folds.random_folds`, to show what that flatters.

    Yields:
        for each fold (the trained model, its probabilities of the fold's own images).

    Raises:
        ValueError: not one fold for each example, a fold without images, or a group in two folds; or as `finetune`.
    """
    fold_of = np.asarray(fold_of)
    if fold_of.shape != (len(inputs.dataset),):
        raise ValueError(f"fold_of has the shape {list(fold_of.shape)}, expected [{len(inputs.dataset)}]")
    mine = fold_of[inputs.indices]
    if missing := sorted(set(range(int(fold_of.max()) + 1)) - set(mine.tolist())):
        raise ValueError(f"fold {missing[0]} has no image among the inputs; give folds 0 to k - 1, each with images")
    if not divided:
        judged = inputs.indices[mine >= 0]
        check_folds([inputs.dataset.groups[i] for i in judged.tolist()], fold_of[judged])
    for fold in range(int(fold_of.max()) + 1):
        train = changed(fold, dataclasses.replace(inputs, indices=inputs.indices[mine != fold]))
        judged = held_out(inputs, inputs.indices[mine == fold])
        own = dataclasses.replace(run, folder=run.folder / f"fold{fold}")
        trained, predictions = finetune(start, task, train, judged, phases, own, config={"fold": fold})
        yield trained, ensemble.of(predictions, inputs.dataset)


def joined(first: Dataset, second: Dataset, name: str) -> Dataset:
    """Both datasets as one: the examples of the first, then those of the second.

    Raises:
        ValueError: they have other classes or another target, or an image of the same name.
    """
    if (first.classes, first.target) != (second.classes, second.target):
        raise ValueError(f"{first!r} and {second!r} do not have the same classes and target; join those that do")
    both = Dataset(
        name,
        _Both(first.images, second.images),
        np.concatenate([first.labels, second.labels]),
        first.groups + second.groups,
        first.names + second.names,
        first.classes,
        first.target,
    )
    both.__dict__["digests"] = first.digests + second.digests  # the cached property: each image is read once
    return both


class _Both:
    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int, /) -> Any:
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]


class Stages:
    """A folder of tables that are made one after another, each once: a process that is killed goes on with the next.

    Attributes:
        folder: of the tables; `settings.json` in it says what they depend on.

    Raises:
        ValueError: the folder holds stages of other settings; the message names them.
    """

    def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any]):
        """
        Args:
            folder: made if it is not there.
            settings: all that the tables depend on, as JSON values.
        """
        self.folder = folder
        if (folder / "settings.json").exists():
            if lines := differences(read_json(folder / "settings.json"), dict(settings)):
                raise ValueError(
                    f"{folder} holds stages of other settings (there → asked for):\n  "
                    + "\n  ".join(lines)
                    + "\nGive the same settings to go on, or another folder."
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)

    def has(self, *names: str) -> bool:
        """Whether all these tables are there."""
        return all(self._path(name).exists() for name in names)

    def once(self, name: str, make: Callable[[], Probabilities]) -> Probabilities:
        """The table `name`.csv, made if it is not there, and always read from it: the same in the first process."""
        if not self.has(name):
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
            ensemble.write(self._path(name), make())
        return self.read(name)

    def read(self, name: str) -> Probabilities:
        """A table that is there."""
        return ensemble.read(self._path(name))

    def _path(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.csv"
