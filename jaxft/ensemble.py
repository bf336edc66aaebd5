"""Probabilities of many images from several nets: means, blends, and corrections that are fitted out of fold.

What is fitted (weights, biases, a temperature, a clip) is a small frozen value, a function of a table of probabilities
or of several. `cross_fitted` applies each to images that it was not fitted on, so that its worth is not flattered.
"""

import csv
import pathlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from jaxft.data import Dataset
from jaxft.files import write_whole
from jaxft.predict import Predictions
from jaxft.task import LOG_LOSS_CLIP

Kind = Literal["arithmetic", "geometric"]

CLIPS = tuple(float(clip) for clip in np.geomspace(1e-15, 0.1, 57))  # that `fit_clip` tries


@dataclass(frozen=True, eq=False)
class Probabilities:
    """What is known of n images: a probability for each class, and perhaps the label.

    Attributes:
        names: n distinct names of images.
        classes: C names, in the order of the columns.
        values: float64 [n, C], each row at least 0 and of sum 1, which small rounding may miss.
        labels: int [n], -1 where it is not known.
        groups: the group of each image, such as its driver; "" where it is not known.

    Raises:
        ValueError: columns of unequal length, an image listed twice, NaN, or a row that is no distribution.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    values: np.ndarray
    labels: np.ndarray
    groups: tuple[str, ...]

    def __post_init__(self):
        for column in ("names", "classes", "groups"):
            object.__setattr__(self, column, tuple(getattr(self, column)))
        object.__setattr__(self, "values", np.asarray(self.values, np.float64))
        object.__setattr__(self, "labels", np.asarray(self.labels, np.int64))
        count = len(self.names)
        if self.values.shape != (count, len(self.classes)) or not count == len(self.labels) == len(self.groups):
            raise ValueError(
                f"{count} names, {len(self.labels)} labels, {len(self.groups)} groups and probabilities of shape "
                f"{list(self.values.shape)} for {len(self.classes)} classes: give a row and a column for each"
            )
        seen: set[str] = set()
        for name in self.names:
            if name in seen:
                raise ValueError(f"{name} is listed twice; give each image once")
            seen.add(name)
        bad = ~np.isfinite(self.values).all(1)
        wrong = bad | (self.values < -1e-6).any(1) | (np.abs(self.values.sum(1) - 1) > 1e-3)
        if wrong.any():
            row = int(np.flatnonzero(bad if bad.any() else wrong)[0])
            what = "NaN or infinity among its probabilities" if bad.any() else "probabilities that do not sum to 1"
            raise ValueError(f"{self.names[row]} has {what}: {self.values[row].tolist()}; was the net trained well?")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def known(self) -> np.ndarray:
        """Which labels are known: bool [n]."""
        return self.labels >= 0

    def at(self, rows: np.ndarray) -> "Probabilities":
        """Some of the images: int [m] or bool [n]."""
        rows = np.arange(len(self))[rows]
        pick = rows.tolist()
        names, groups = tuple(self.names[i] for i in pick), tuple(self.groups[i] for i in pick)
        return Probabilities(names, self.classes, self.values[rows], self.labels[rows], groups)

    def ordered(self, names: Sequence[str]) -> "Probabilities":
        """The images in this order.

        Raises:
            ValueError: one of them is not among these, or one of these is left out.
        """
        place = {name: i for i, name in enumerate(self.names)}
        if missing := [name for name in names if name not in place]:
            raise ValueError(f"{len(missing)} images have no probabilities: {_some(missing)}; predict them as well")
        if extra := sorted(set(place) - set(names)):
            raise ValueError(f"{len(extra)} images are not asked for: {_some(extra)}; give the files they belong to")
        return self.at(np.asarray([place[name] for name in names], int))

    def losses(self) -> np.ndarray:
        """float64 [n]: -log of the label's probability, as Kaggle clips it; NaN where the label is not known."""
        found = np.full(len(self), np.nan)
        rows = np.flatnonzero(self.known)
        own = self.values[rows, self.labels[rows]] / self.values[rows].sum(1)
        found[rows] = -np.log(own.clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP))
        return found

    def figures(self) -> dict[str, float]:
        """Log loss and accuracy of the images with labels, and the standard deviation of both over groups."""
        rows = self.known
        losses, right = self.losses()[rows], (self.values.argmax(1) == self.labels)[rows]
        groups = np.asarray(self.groups)[rows]
        means = [(losses[groups == group].mean(), right[groups == group].mean()) for group in np.unique(groups)]
        spread = np.std(means, 0, ddof=1) if len(means) > 1 else (np.nan, np.nan)
        found = (losses.mean(), right.mean(), *spread) if len(losses) else (np.nan,) * 4
        return {
            name: float(figure)
            for name, figure in zip(("loss", "accuracy", "loss_spread", "accuracy_spread"), found, strict=True)
        }


def of(predictions: Predictions, dataset: Dataset) -> Probabilities:
    """The probabilities of a run's predictions, of a task of classes.

    Raises:
        ValueError: the dataset holds no classes; or as `Probabilities`.
    """
    if dataset.target != "class":
        raise ValueError(f"{dataset.name!r} holds {dataset.target!r} and not one class an image: nothing to blend")
    pick = predictions.index.tolist()
    return Probabilities(
        tuple(dataset.names[i] for i in pick),
        dataset.classes,
        predictions.outputs,
        np.where(predictions.known, predictions.label, -1),
        tuple(dataset.groups[i] for i in pick),
    )


def join(parts: Sequence[Probabilities]) -> Probabilities:
    """Folds put together: every image of any, once.

    Raises:
        ValueError: an image is in two of them, or their classes differ.
    """
    for part in parts[1:]:
        _same_classes(parts[0], part)
    names, groups = ([x for part in parts for x in getattr(part, column)] for column in ("names", "groups"))
    values, labels = (np.concatenate([getattr(part, column) for part in parts]) for column in ("values", "labels"))
    return Probabilities(tuple(names), parts[0].classes, values, labels, tuple(groups))


def write(path: pathlib.Path, table: Probabilities) -> None:
    """A csv: `img`, `label` (a class's name, blank if unknown), `group`, and a column for each class."""

    def put(partial: pathlib.Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["img", "label", "group", *table.classes])
            for name, label, group, row in zip(table.names, table.labels, table.groups, table.values, strict=True):
                out.writerow([name, table.classes[label] if label >= 0 else "", group, *(f"{v:.9g}" for v in row)])

    write_whole(path, put)


def read(path: pathlib.Path) -> Probabilities:
    """What `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a table; the message names file and line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if header[:3] != ["img", "label", "group"] or len(header) < 4:
            raise ValueError(f"{path} begins with {','.join(header)[:80]!r}, expected img,label,group and the classes")
        classes, names, labels, groups, values = tuple(header[3:]), [], [], [], []
        place = {name: i for i, name in enumerate(classes)} | {"": -1}
        for line in lines:
            try:
                name, label, group, *row = line
                names.append(name)
                labels.append(place[label])
                groups.append(group)
                values.append([float(value) for value in row])
                if len(row) != len(classes):
                    raise ValueError(f"{len(row)} probabilities for {len(classes)} classes")
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {lines.line_num}: {error!s}; delete the file to make it again"
                ) from None
    try:
        return Probabilities(
            tuple(names),
            classes,
            np.asarray(values, float).reshape(-1, len(classes)),
            np.asarray(labels, int),
            tuple(groups),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def mean(
    tables: Sequence[Probabilities], weights: Sequence[float] | None = None, kind: Kind = "geometric"
) -> Probabilities:
    """The weighted mean of what several nets say of the same images.

    Args:
        tables: of the same images and classes, in the same order.
        weights: one for each, at least 0; they are scaled to a sum of 1. None: equal ones.
        kind: of the probabilities ("arithmetic"), or of their logarithms, scaled to a sum of 1 ("geometric").

    Raises:
        ValueError: nothing to blend, other classes or images, or weights that cannot be.
    """
    check_alike(tables)
    share = np.ones(len(tables)) if weights is None else np.asarray(weights, float)
    if share.shape != (len(tables),) or not (np.isfinite(share) & (share >= 0)).all() or not share.any():
        raise ValueError(f"weights {share.tolist()} for {len(tables)} tables: give one for each, at least 0, not all 0")
    return replace(tables[0], values=_blended(_stacked(tables, kind), share / share.sum(), kind))


def check_alike(tables: Sequence[Probabilities]) -> None:
    """Refuses tables of other classes, of other images, or of the same in another order.

    Raises:
        ValueError: the message names the first class or image that differs.
    """
    if not tables:
        raise ValueError("there is nothing to blend: give the probabilities of at least one net")
    for number, table in enumerate(tables[1:], 2):
        _same_classes(tables[0], table, number)
        if tables[0].names != table.names:
            if other := sorted(set(tables[0].names) ^ set(table.names)):
                raise ValueError(
                    f"tables 1 and {number} are not of the same images: {_some(other)} in one alone; predict the same "
                    f"files with every net"
                )
            raise ValueError(
                f"tables 1 and {number} hold the same images in another order; bring them into one with .ordered(names)"
            )


def _same_classes(first: Probabilities, other: Probabilities, number: int = 2) -> None:
    if first.classes != other.classes:
        a, b = ", ".join(first.classes), ", ".join(other.classes)
        order = "another order" if sorted(first.classes) == sorted(other.classes) else "other classes"
        raise ValueError(f"tables 1 and {number} have {order} ({a}; {b}); predict with nets of one list of classes")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stacked(tables: Sequence[Probabilities], kind: Kind) -> np.ndarray:
    """[M, n, C]: probabilities, or their logarithms."""
    if kind not in ("arithmetic", "geometric"):
        raise ValueError(f"kind {kind!r}, expected 'arithmetic' or 'geometric'")
    values = np.stack([table.values for table in tables])
    return values if kind == "arithmetic" else np.log(values.clip(LOG_LOSS_CLIP))


def _blended(stacked: np.ndarray, share: np.ndarray, kind: Kind) -> np.ndarray:
    blend = np.tensordot(share, stacked, 1)
    return blend if kind == "arithmetic" else _softmax(blend)


def _softmax(logits: np.ndarray) -> np.ndarray:
    found = np.exp(logits - logits.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True)


def _logits(table: Probabilities) -> np.ndarray:
    return np.log(table.values.clip(LOG_LOSS_CLIP))


@dataclass(frozen=True)
class Blend:
    """A weighted mean, as `mean`."""

    weights: tuple[float, ...]
    kind: Kind = "geometric"

    def __call__(self, tables: Sequence[Probabilities]) -> Probabilities:
        """The mean of as many tables as there are weights."""
        return mean(tables, self.weights, self.kind)


def fit_blend(tables: Sequence[Probabilities], kind: Kind = "geometric") -> Blend:
    """The weights of least log loss on the images with labels, each at least 0, of sum 1.

    The loss is convex in the weights for both kinds of mean, so that there is one best value.

    Raises:
        ValueError: as `mean`; no label is known.
    """
    from scipy import optimize

    check_alike(tables)
    rows = _labelled(tables[0])
    stacked, labels = _stacked(tables, kind)[:, rows], tables[0].labels[rows]
    own = np.take_along_axis(stacked, labels[None, :, None], 2)[..., 0]  # of the label, [M, n]

    def loss(share: np.ndarray) -> tuple[float, np.ndarray]:
        blend = _blended(stacked, share, kind)
        label = np.take_along_axis(blend, labels[:, None], 1)[:, 0].clip(LOG_LOSS_CLIP)
        if kind == "arithmetic":
            return float(-np.log(label).mean()), -(own / label).mean(1)
        return float(-np.log(label).mean()), ((stacked * blend).sum(2) - own).mean(1)

    count = len(tables)
    found = optimize.minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda share: share.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-10, "maxiter": 500},
    )
    share = found.x.clip(0)
    return Blend(tuple((share / share.sum()).tolist()), kind)


@dataclass(frozen=True)
class PerClass:
    """For each class the mean of some of the nets alone, scaled to a sum of 1.

    Attributes:
        chosen: the places of the nets that speak for each class.
    """

    chosen: tuple[tuple[int, ...], ...]

    def __call__(self, tables: Sequence[Probabilities]) -> Probabilities:
        """Of the tables that it was fitted on, in the same order."""
        check_alike(tables)
        values = np.stack(
            [np.mean([tables[m].values[:, c] for m in nets], 0) for c, nets in enumerate(self.chosen)], 1
        ).clip(LOG_LOSS_CLIP)
        return replace(tables[0], values=values / values.sum(1, keepdims=True))


def fit_per_class(tables: Sequence[Probabilities], within: float = 0.1) -> PerClass:
    """For each class the nets whose loss, of that class against the rest, is at most `within` above the best's.

    Raises:
        ValueError: as `mean`; no label is known.

    Source: the winner of State Farm distracted driver detection.
    """
    check_alike(tables)
    rows = _labelled(tables[0])
    labels = tables[0].labels[rows]
    chosen = []
    for c in range(len(tables[0].classes)):
        p = np.stack([table.values[rows, c] for table in tables]).clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP)
        losses = -np.where(labels == c, np.log(p), np.log1p(-p)).mean(1)
        chosen.append(tuple(np.flatnonzero(losses <= losses.min() * (1 + within)).tolist()))
    return PerClass(tuple(chosen))


@dataclass(frozen=True)
class Bias:
    """A number for each class, added to its logit."""

    bias: tuple[float, ...]

    def __call__(self, table: Probabilities) -> Probabilities:
        """The corrected probabilities."""
        return replace(table, values=_softmax(_logits(table) + np.asarray(self.bias)))


def fit_bias(table: Probabilities, penalty: float = 1e-3) -> Bias:
    """The bias of least log loss plus `penalty` times its mean square.

    Raises:
        ValueError: no label is known.
    """
    from scipy import optimize

    rows = _labelled(table)
    logits, labels = _logits(table)[rows], table.labels[rows]
    share = np.bincount(labels, minlength=logits.shape[1]) / len(labels)

    def loss(bias: np.ndarray) -> tuple[float, np.ndarray]:
        p = _softmax(logits + bias)
        own = np.take_along_axis(p, labels[:, None], 1).clip(LOG_LOSS_CLIP)
        gradient = p.mean(0) - share + 2 * penalty * bias / len(bias)
        return float(-np.log(own).mean() + penalty * np.square(bias).mean()), gradient

    found = optimize.minimize(loss, np.zeros(logits.shape[1]), jac=True, method="L-BFGS-B").x
    return Bias(tuple((found - found.mean()).tolist()))


@dataclass(frozen=True)
class Temperature:
    """Logits are divided by a number: above 1 makes a net less sure."""

    temperature: float

    def __call__(self, table: Probabilities) -> Probabilities:
        """The corrected probabilities."""
        return replace(table, values=_softmax(_logits(table) / self.temperature))


def fit_temperature(table: Probabilities) -> Temperature:
    """The temperature, within 1/20 to 20, of least log loss.

    Raises:
        ValueError: no label is known.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    from scipy import optimize

    table = table.at(_labelled(table))
    limit = float(np.log(20))  # the loss is convex in 1/temperature, and so has one lowest place in its logarithm
    found: Any = optimize.minimize_scalar(
        lambda log: Temperature(float(np.exp(log)))(table).losses().mean(), bounds=(-limit, limit), method="bounded"
    )
    return Temperature(float(np.exp(found.x)))


@dataclass(frozen=True)
class Clip:
    """The least probability of any class; rows are scaled to a sum of 1."""

    least: float

    def __call__(self, table: Probabilities) -> Probabilities:
        """The corrected probabilities."""
        values = table.values.clip(self.least)
        return replace(table, values=values / values.sum(1, keepdims=True))


def fit_clip(table: Probabilities) -> Clip:
    """The clip of least log loss, of 57 from 1e-15 to 0.1.

    Raises:
        ValueError: no label is known.
    """
    table = table.at(_labelled(table))
    return Clip(min(CLIPS, key=lambda least: Clip(least)(table).losses().mean()))


Tables = Probabilities | Sequence[Probabilities]


def cross_fitted(
    fit: Callable[[Any], Callable[[Any], Probabilities]], tables: Tables, folds: Sequence[Hashable] | np.ndarray
) -> Probabilities:
    """What `fit` is worth on images that it was not fitted on: fitted on all folds but one, applied to that one.

    Args:
        fit: such as `fit_bias`, of one table; or such as `fit_blend`, of several.
        tables: with labels, of out-of-fold predictions.
        folds: the fold of each image, or its group.

    Raises:
        ValueError: not one fold for each image, or fewer than two; or as `fit`.
    """
    first = tables if isinstance(tables, Probabilities) else tables[0]
    where = np.unique(np.asarray(folds), return_inverse=True)[1]
    if len(where) != len(first) or where.max() < 1:
        raise ValueError(f"{len(where)} folds for {len(first)} images; give one for each, and two different at least")

    def part(rows: np.ndarray) -> Tables:
        return tables.at(rows) if isinstance(tables, Probabilities) else [table.at(rows) for table in tables]

    parts = [fit(part(where != fold))(part(where == fold)) for fold in range(where.max() + 1)]
    return join(parts).ordered(first.names)


def pseudo_labels(
    table: Probabilities, *, confidence: float, share: float, train: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Which images become training images under what the nets say of them, and their soft labels.

    Args:
        table: of images without labels.
        confidence: the least largest probability of an image that is taken, 0 to 1.
        share: pseudo-labels among all training images, at most; below 1.
        train: how many labelled training images there are.
        seed: which are taken, where there are more than the share allows.

    Returns:
        (rows of the table in ascending order, int [m]; probabilities, float32 [m, C]).

    Raises:
        ValueError: a setting out of its range.
    """
    if not 0 <= confidence <= 1 or not 0 <= share < 1 or train < 1:
        raise ValueError(
            f"confidence {confidence}, share {share}, train {train}: expected 0 to 1, 0 to below 1, at least 1"
        )
    rows = np.flatnonzero(table.values.max(1) >= confidence)
    most = int(share / (1 - share) * train)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    return rows, table.values[rows].astype(np.float32)


def _labelled(table: Probabilities) -> np.ndarray:
    rows = np.flatnonzero(table.known)
    if not len(rows):
        raise ValueError("no label of these images is known, so that nothing can be fitted on them")
    return rows
