"""`Dataset`: labelled images, checked, with a fingerprint that the library computes itself."""

import concurrent.futures
import functools
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

Target = Literal["class", "labels", "values"]

_EXPECTED = {
    "class": "int [N], one class an image, -1 where it is unknown",
    "labels": "int [N, C] of 0, 1 and -1 (unknown), one column for each of the C classes",
    "values": "float [N, K], one column for each of the K names in `classes`, NaN where a value is unknown",
}
_KINDS = {"class": ("iu", 1), "labels": ("iu", 2), "values": ("f", 2)}  # NumPy's kinds of dtype, and the rank
_BLOCK = 64  # images a thread digests before it asks for more


class Images(Protocol):
    """Random access to images: `len(images)`, and `images[i]` from any thread.

    An image is either the bytes of a JPEG or PNG file, or a decoded uint8 array [H, W, 3], RGB.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes | np.ndarray: ...


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """N labelled images; example i of every column is image i.

    Attributes:
        name: of the dataset, for reports.
        images: N images, encoded or decoded.
        labels: by `target`. Kept as a read-only copy, int32 or float32.
        groups: N names of what must not be divided between training and test (the driver).
        names: N distinct names by which errors and predictions call an image (the file's name).
        classes: the classes in the order of the labels, or the names of the values; for people to read.
        target: what is to be predicted.
            "class": labels int [N], index into `classes`; -1: unknown.
            "labels": labels int [N, C], several at once, each 0 or 1; -1: unknown.
            "values": labels float [N, K], numbers; NaN: unknown.

    Raises:
        ValueError: columns of unequal length, images that are paths, names that are not distinct, labels of another
            kind than `target`, or outside their range.
    """

    name: str
    images: Images
    labels: np.ndarray
    groups: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    target: Target = "class"

    def __post_init__(self):
        if self.target not in get_args(Target):
            raise ValueError(f"dataset {self.name!r}: target {self.target!r}, expected {', '.join(get_args(Target))}")
        for column in ("groups", "names", "classes"):
            object.__setattr__(self, column, _strings(self.name, column, getattr(self, column)))
        object.__setattr__(self, "labels", _checked_labels(self.name, self.labels, self.target, len(self.classes)))
        lengths = {column: len(getattr(self, column)) for column in ("images", "labels", "groups", "names")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"dataset {self.name!r}: columns of unequal length: {lengths}")
        if len(set(self.names)) < len(self.names):
            doubles = [name for name, count in Counter(self.names).items() if count > 1]
            raise ValueError(
                f"dataset {self.name!r}: {len(doubles)} names stand for several images, the first {doubles[0]!r}; "
                f"names must be distinct: add the folder to them"
            )
        # Images that are read when they are needed are not all to be read here, so that the first one stands for them.
        images = (
            self.images if isinstance(self.images, list | tuple) else [self.images[i] for i in range(len(self))[:1]]
        )
        for name, image in zip(self.names, images, strict=False):
            _check_image(self.name, name, image)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        size = f"{len(self)} images, {len(self.classes)} {'values' if self.target == 'values' else 'classes'}"
        return f"{type(self).__name__}({self.name!r}: {size}, target {self.target!r})"

    @functools.cached_property
    def known(self) -> np.ndarray:
        """Which labels are known: bool, of the shape of `labels`."""
        return ~np.isnan(self.labels) if self.target == "values" else self.labels >= 0

    @property
    def has_label(self) -> np.ndarray:
        """Which images have a label that is known, of several at least one: bool [N]."""
        return self.known if self.known.ndim == 1 else np.logical_or.reduce(self.known, axis=1)

    @functools.cached_property
    def digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each image: of its bytes, or of its array with shape and dtype.

        Raises:
            ValueError: an image is neither bytes nor an array.
        """

        def block(first: int) -> list[bytes]:
            return [self._digest(index) for index in range(first, min(first + _BLOCK, len(self)))]

        # hashlib works outside the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            return tuple(digest for digests in pool.map(block, range(0, len(self), _BLOCK)) for digest in digests)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the images, labels, groups, names, classes and target; not of `name`.

        Equal data have equal fingerprints, from whatever files they come.
        """
        texts = json.dumps([self.target, self.classes, self.groups, self.names], ensure_ascii=False)
        digest = hashlib.sha256(texts.encode("utf-8", "surrogatepass"))
        digest.update(np.ascontiguousarray(self.labels, self.labels.dtype.newbyteorder("<")).tobytes())
        digest.update(b"".join(self.digests))
        return digest.hexdigest()

    def _digest(self, index: int) -> bytes:
        image = self.images[index]
        _check_image(self.name, self.names[index], image)
        if isinstance(image, bytes):
            return hashlib.sha256(image).digest()
        digest = hashlib.sha256(f"{image.dtype} {list(image.shape)}\n".encode())
        digest.update(np.ascontiguousarray(image).tobytes())
        return digest.digest()


def checked_indices(dataset: Dataset, indices: object) -> np.ndarray:
    """Indices of a dataset's examples as read-only int64 [n], n at least 1.

    Raises:
        ValueError: they are not whole numbers of one dimension, distinct and within the dataset.
    """
    given = np.asarray(indices)
    if given.dtype == bool:
        raise ValueError("indices are booleans, expected the numbers of the examples: give np.flatnonzero(indices)")
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"indices are {given.dtype}, expected whole numbers, such as those of jaxft.data.folds.split")
    if given.ndim != 1:
        raise ValueError(f"indices have the shape {list(given.shape)}, expected one dimension: give indices.ravel()")
    if not given.size:
        raise ValueError("the set is empty: indices hold no example to take a batch from")
    if given.min() < 0 or given.max() >= len(dataset):
        raise ValueError(f"indices {given.min()} to {given.max()}, expected within 0 to {len(dataset) - 1}")
    values, counts = np.unique(given, return_counts=True)
    if len(values) < len(given):
        raise ValueError(
            f"indices name {(counts > 1).sum()} examples more than once, the first {values[counts > 1][0]}: give "
            f"np.unique(indices), and for examples that are to count more, weights"
        )
    kept = given.astype(np.int64)
    kept.flags.writeable = False
    return kept


def _strings(dataset: str, column: str, values: object) -> tuple[str, ...]:
    """`values` as a tuple, if they are a sequence of strings."""
    found = type(values).__name__
    if isinstance(values, list | tuple | np.ndarray):
        if all(isinstance(value, str) for value in values):
            return tuple(map(str, values))
        found = f"{found} with {next(value for value in values if not isinstance(value, str))!r}"
    raise ValueError(f"dataset {dataset!r}: {column} must be a tuple of strings, found {found}")


def _check_image(dataset: str, name: str, image: object) -> None:
    if not isinstance(image, bytes | np.ndarray):
        raise ValueError(
            f"dataset {dataset!r}: image {name} is {type(image).__name__} {str(image)[:80]!r}, expected a file's bytes "
            f"or a uint8 array [H, W, 3]; for a path, give pathlib.Path(path).read_bytes()"
        )


def _checked_labels(dataset: str, labels: object, target: Target, classes: int) -> np.ndarray:
    array = np.asarray(labels)
    kinds, rank = _KINDS[target]
    if array.dtype.kind not in kinds or array.ndim != rank:
        raise ValueError(
            f"dataset {dataset!r}: labels {array.dtype} {list(array.shape)} do not fit target {target!r}, which takes "
            f"{_EXPECTED[target]}{_remedy(array, target)}"
        )
    if rank == 2 and array.shape[1] != classes:
        raise ValueError(
            f"dataset {dataset!r}: labels {list(array.shape)} have {array.shape[1]} columns, expected {classes}, one "
            f"for each name in `classes`"
        )
    if target == "values":
        with np.errstate(over="ignore"):
            kept = array.astype(np.float32)
        if np.isinf(kept).any():
            raise ValueError(f"dataset {dataset!r}: a value is infinite in float32; NaN says that it is unknown")
    else:
        largest = classes - 1 if target == "class" else 1
        if array.size and not (-1 <= array.min() and array.max() <= largest):
            meaning = f"{classes} classes" if target == "class" else "labels that are present or absent"
            raise ValueError(
                f"dataset {dataset!r}: labels {array.min()} to {array.max()}, "
                f"expected -1 (unknown) to {largest} for {meaning}"
            )
        kept = array.astype(np.int32)
    kept.flags.writeable = False
    return kept


def _remedy(labels: np.ndarray, target: Target) -> str:
    """How labels of another kind are brought into one that a dataset takes."""
    kind, rank = labels.dtype.kind, labels.ndim
    if kind in "OUS":
        return "; give the number of each label in `classes`"
    if target == "class":
        if rank == 2 and kind in "iub":
            return "; for one-hot labels give labels.argmax(1), for several labels an image say target='labels'"
        if kind == "b":
            return "; give labels.astype(np.int32)"
        if kind == "f":
            one_hot = "for one-hot labels give labels.argmax(1), " if rank == 2 else ""
            return f"; {one_hot}for numbers to predict say target='values' and give float labels [N, K]"
    if target == "labels" and rank == 2:
        return "; give labels.astype(np.int32), or say target='values' for numbers to predict"
    if target == "values":
        return "; give labels.astype(np.float32).reshape(len(labels), -1)"
    return ""
