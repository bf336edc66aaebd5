"""`Inputs`: which images of a dataset a run takes, at which size, in which order, and what is done to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxft.checks import is_int
from jaxft.data import order
from jaxft.data.augment import Mixing
from jaxft.data.dataset import Dataset, checked_indices
from jaxft.data.decode import RGB, Decode

Augment = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(key, images float32 [B, H, W, 3] of 0 to 255, labels: a pytree of [B, …]) → (images, labels)."""

Order = Callable[[Dataset, np.ndarray, int, int], np.ndarray]
"""(dataset, indices int64 [n], seed, epoch) → int64 [n], a pure function: the examples of an epoch in order."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Examples of a dataset, as training or evaluation takes them.

    Attributes:
        dataset: where the images come from.
        indices: the examples, distinct, int [n]; kept as int64.
        image_size: (height, width) in pixels.
        batch_size: of all processes together.
        augment: applied on the device to each batch in training; see `jaxft.data.augment`. None: nothing.
        mix: applied after `augment`, to whole batches of float labels; see `jaxft.data.mix`. None: nothing.
        views: how many fixed augmented views of each image there are, which epochs take in turn, so that features of
            frozen layers can be cached. None: an augmentation of its own in every epoch.
        plain_view: the first of the views is the image as it is: with two views, the set doubled by augmented copies.
        weights: of each example of the dataset in the loss, float [N], at least 0; kept as float32. None: all 1.
        targets: what is learnt in place of class labels, such as pseudo-labels: probabilities of the classes for each
            example of the dataset, float [N, C]; kept as float32. A row of NaN leaves the label. None: all labels.
        order: of the examples of an epoch; see `jaxft.data.order`.
        decode: how a file becomes pixels.

    Raises:
        ValueError: a setting that cannot be; the message says what to give.
    """

    dataset: Dataset
    indices: np.ndarray
    image_size: tuple[int, int]
    batch_size: int = 16
    augment: Augment | None = None
    mix: Augment | None = None
    views: int | None = None
    plain_view: bool = False
    weights: np.ndarray | None = None
    targets: np.ndarray | None = None
    order: Order = order.shuffled
    decode: Decode = RGB

    def __post_init__(self):
        if not isinstance(self.dataset, Dataset):
            raise ValueError(
                f"dataset {self.dataset!r} is a {type(self.dataset).__name__}, expected a jaxft.data.Dataset, which "
                f"holds images and labels"
            )
        object.__setattr__(self, "indices", checked_indices(self.dataset, self.indices))
        object.__setattr__(self, "image_size", _checked_size(self.image_size))
        if not is_int(self.batch_size) or self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size!r}: expected a whole number of at least 1")
        for name in ("augment", "mix"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: expected a function of (key, images, labels), such as "
                    f"{'augment.Warp(rotation=10)' if name == 'augment' else 'mix.Mixup(0.2)'}, or None"
                )
        if isinstance(self.augment, Mixing):
            raise ValueError(f"augment {self.augment!r} mixes whole batches: give it as mix={self.augment!r}")
        if not callable(self.order):
            raise ValueError(f"order {self.order!r}: expected a function such as order.shuffled or order.balanced")
        if self.views is not None:
            if not is_int(self.views) or self.views < 1:
                raise ValueError(f"views {self.views!r}: expected at least 1, or None for new ones in every epoch")
            if self.augment is None:
                raise ValueError(f"views {self.views}: there is nothing to view without `augment`; leave views out")
            if self.mix is not None:
                raise ValueError(
                    f"views {self.views} with mix: mixed batches are never the same; leave out one of them"
                )
        if self.plain_view and self.views is None:
            raise ValueError("plain_view=True without views: say views=2 for each image and one augmented copy")
        if self.weights is not None:
            object.__setattr__(self, "weights", _checked_weights(self.dataset, self.weights))
        if self.targets is not None:
            object.__setattr__(self, "targets", _checked_targets(self.dataset, self.targets))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def known(self) -> np.ndarray:
        """Which examples of the dataset have a label or a target to learn: bool, of the shape of the labels."""
        known = self.dataset.known
        return known if self.targets is None else known | ~np.isnan(self.targets[:, 0])

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the len(indices) % batch_size examples left over are different in each.

        Raises:
            ValueError: a batch is larger than the set.
        """
        if self.batch_size > len(self.indices):
            raise ValueError(
                f"batch_size {self.batch_size}: a set of {len(self.indices)} examples gives batches of 1 to "
                f"{len(self.indices)}"
            )
        return len(self.indices) // self.batch_size


def overlap(train: Inputs, held_out: Inputs) -> list[str]:
    """What of the held-out examples training sees as well.

    Returns:
        a line for groups that are in both, unless each image is a group of its own, and one for images that are in both
        by their digests; empty if there are none.

    Raises:
        ValueError: both take the same examples of the same dataset.
    """
    if train.dataset is held_out.dataset:
        shared = np.intersect1d(train.indices, held_out.indices)
        if len(shared):
            names = _some([train.dataset.names[i] for i in shared[:3]], len(shared))
            raise ValueError(
                f"{len(shared)} of the {len(held_out)} held-out examples are trained on as well: {names}; "
                f"a score on them says nothing: divide the examples with jaxft.data.folds"
            )
    warnings = []
    if all(len(set(inputs.dataset.groups)) < len(inputs.dataset) for inputs in (train, held_out)):
        groups = sorted(_column(train, train.dataset.groups) & _column(held_out, held_out.dataset.groups) - {""})
        if groups:
            warnings.append(
                f"{len(groups)} groups are trained on and held out: {_some(groups[:3], len(groups))}; "
                f"the score may be too good: keep groups whole with jaxft.data.folds"
            )
    trained = _column(train, train.dataset.digests)
    same = [held_out.dataset.names[i] for i in held_out.indices.tolist() if held_out.dataset.digests[i] in trained]
    if same:
        warnings.append(
            f"{len(same)} held-out images equal one that is trained on, byte for byte: {_some(same[:3], len(same))}; "
            f"the score may be too good: leave out the doubles"
        )
    return warnings


def _column(inputs: Inputs, values: tuple) -> set:
    return {values[i] for i in inputs.indices.tolist()}


def _some(names: list[str], count: int) -> str:
    return ", ".join(names) + (f" and {count - len(names)} more" if count > len(names) else "")


def _checked_size(size: object) -> tuple[int, int]:
    if is_int(size):
        raise ValueError(f"image_size {size}: expected (height, width), such as ({size}, {size})")
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(is_int(side) and side > 0 for side in size):
        raise ValueError(f"image_size {size!r}: expected (height, width), two whole numbers of at least 1")
    return int(size[0]), int(size[1])


def _checked_weights(dataset: Dataset, weights: object) -> np.ndarray:
    given = np.asarray(weights)
    if given.shape != (len(dataset),):
        raise ValueError(
            f"weights have the shape {list(given.shape)}, expected [{len(dataset)}], one for each example of the "
            f"dataset, whether it is in indices or not"
        )
    if given.dtype.kind not in "fiu":
        raise ValueError(f"weights are {given.dtype}, expected numbers of at least 0")
    kept = given.astype(np.float32)
    if not (np.isfinite(kept) & (kept >= 0)).all():
        place = int(np.flatnonzero(~(np.isfinite(kept) & (kept >= 0)))[0])
        raise ValueError(f"weights[{place}] is {kept[place]}, expected a finite number of at least 0")
    kept.flags.writeable = False
    return kept


def _checked_targets(dataset: Dataset, targets: object) -> np.ndarray:
    given, shape = np.asarray(targets), (len(dataset), len(dataset.classes))
    if dataset.target != "class":
        raise ValueError(f"targets stand for class labels, and those of {dataset.name!r} are {dataset.target!r}")
    if given.shape != shape or given.dtype.kind != "f":
        raise ValueError(
            f"targets are {given.dtype} {list(given.shape)}, expected floats {list(shape)}: the probabilities of the "
            f"classes for each example of the dataset, or NaN for its label"
        )
    kept = given.astype(np.float32)
    rows = ~np.isnan(kept).all(1)
    wrong = rows & ~((kept >= 0).all(1) & (np.abs(kept.sum(1) - 1) < 1e-3))
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"targets[{place}], of {dataset.names[place]}, is {kept[place].tolist()}; expected probabilities that sum "
            f"to 1, or NaN throughout"
        )
    kept.flags.writeable = False
    return kept
