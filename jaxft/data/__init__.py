"""Datasets: what a source of images gives the rest of the project."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Dataset", "Images"]


class Images(Protocol):
    """Random access to images: `len(images)`, and `images[i]` from any thread.

    An image is either the bytes of a JPEG or PNG file, or a decoded uint8 array [H, W, 3], RGB.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes | np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Dataset:
    """N labelled images with what is known of each; example i of every column is image i.

    Attributes:
        name: of the dataset, for reports.
        images: N images, encoded or decoded.
        labels: int32 [N], index into `classes`; -1 where the label is unknown.
        groups: N names of what must not be split between training and test (the driver).
        names: N distinct names by which errors and predictions call an image (the file's name).
        classes: for people to read, in the order of the labels.
        fingerprint: SHA-256, hexadecimal, of the images, their labels, groups and names: equal data, equal fingerprint.

    Raises:
        ValueError: columns of unequal length, or a label that is not the index of a class.
    """

    name: str
    images: Images
    labels: np.ndarray
    groups: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    fingerprint: str

    def __post_init__(self):
        lengths = {column: len(getattr(self, column)) for column in ("images", "labels", "groups", "names")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"dataset {self.name!r}: columns of unequal length: {lengths}")
        if len(self.labels) and not (-1 <= self.labels.min() and self.labels.max() < len(self.classes)):
            raise ValueError(
                f"dataset {self.name!r}: labels {self.labels.min()} to {self.labels.max()}, "
                f"expected -1 (unknown) to {len(self.classes) - 1} for {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.labels)
