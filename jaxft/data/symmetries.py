"""Symmetries: each image also mirrored and turned, as examples of their own.

An augmentation that is counted out and not drawn. The views are images like any other, so that features of frozen
layers are computed once for all of them, for every split of the images; and the mean of what a net says of all views of
an image is its test-time augmentation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxft.data.dataset import Dataset, Images
from jaxft.data.decode import MAX_SIDE, thumbnail

_CHANGES = {
    "": lambda image: image,
    "mirrored": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1],
    "half turn": lambda image: image[::-1, ::-1],
    "quarter turn left": np.rot90,
    "quarter turn right": lambda image: np.rot90(image, -1),
    "transposed": lambda image: image.swapaxes(0, 1),
    "transposed, half turn": lambda image: np.rot90(image, 2).swapaxes(0, 1),
}
SYMMETRIES = {"mirror": tuple(_CHANGES)[:2], "flips": tuple(_CHANGES)[:4], "square": tuple(_CHANGES)}


def symmetric(dataset: Dataset, kind: Literal["mirror", "flips", "square"]) -> Dataset:
    """The dataset with each image in several views: example v · N + i is view v of image i, and view 0 the image.

    Views have the label and the group of their image, and its name with the view's in brackets.

    Args:
        dataset: N images in RGB.
        kind: "mirror": left and right exchanged, 2 views; "flips": also top and bottom, and both, 4 views; "square":
            also the four that exchange height and width, all 8 of a square.

    Raises:
        ValueError: an unknown kind; an image that cannot be decoded, when it is read.
    """
    if kind not in SYMMETRIES:
        raise ValueError(f"symmetries {kind!r}: expected {', '.join(SYMMETRIES)}")
    views = SYMMETRIES[kind]
    return Dataset(
        f"{dataset.name}, {kind}",
        _Views(dataset.images, dataset.names, views),
        np.concatenate([dataset.labels] * len(views)),
        dataset.groups * len(views),
        tuple(f"{name} ({view})" if view else name for view in views for name in dataset.names),
        dataset.classes,
        dataset.target,
    )


def viewed(indices: np.ndarray, dataset: Dataset, kind: str) -> np.ndarray:
    """The examples of `symmetric(dataset, kind)` that show some images of `dataset`, view by view: int64 [V · n]."""
    shift = len(dataset) * np.arange(len(SYMMETRIES[kind]))
    return (shift[:, None] + np.asarray(indices, np.int64)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Views:
    images: Images
    names: Sequence[str]
    views: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.views) * len(self.names)

    def __getitem__(self, index: int, /) -> bytes | np.ndarray:
        view, index = divmod(index, len(self.names))
        image = self.images[index]
        if not self.views[view]:
            return image
        if isinstance(image, bytes):
            image = thumbnail(image, MAX_SIDE, self.names[index])
        return np.ascontiguousarray(_CHANGES[self.views[view]](image))
