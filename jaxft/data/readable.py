"""Images that cannot be decoded, left out of a dataset where its owner allows a share of them."""

import dataclasses
from typing import Any

import numpy as np

from jaxft import devices, progress
from jaxft.checks import check_real
from jaxft.data.dataset import Dataset, Images
from jaxft.data.decode import Decode, thumbnail

NAMED = 5  # of those that are left out


class _Readable:
    """Images with a black pixel in place of some."""

    def __init__(self, images: Images, without: frozenset[int]):
        self._images, self._without = images, without

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int, /) -> Any:
        return np.zeros((1, 1, 3), np.uint8) if index in self._without else self._images[index]


def leave_out(dataset: Dataset, decode: Decode, share: float) -> Dataset:
    """The dataset with the label of every image unknown that cannot be decoded, so that nothing trains on it or judges.

    Each image is decoded once. What is left out is said, by name.

    Args:
        dataset: any.
        decode: how.
        share: the largest share of images that may be left out, 0 to below 1; at 0 nothing is looked at, and the first
            such image ends a run.

    Raises:
        ValueError: more of them cannot be decoded.
    """
    check_real("--corrupt", share, lambda value: 0 <= value < 1, "a share from 0 to below 1, 0.01 say")
    if not share:
        return dataset

    def wrong(index: int) -> str:
        try:
            thumbnail(dataset.images[index], 64, dataset.names[index], decode)
        except ValueError as error:
            return str(error)
        return ""

    reasons = progress.each("reading", wrong, len(dataset))
    bad = {index: reason for index, reason in enumerate(reasons) if reason}
    if not bad:
        return dataset
    found = f"{len(bad):,} of {len(dataset):,} images cannot be decoded"
    some = "; ".join(list(bad.values())[:NAMED]) + (" …" if len(bad) > NAMED else "")
    if len(bad) > share * len(dataset):
        raise ValueError(f"{found}, more than --corrupt {share:g} allows: {some}")
    devices.say(f"WARNING: {found} and are left out: {some}")
    labels = dataset.labels.copy()
    labels[list(bad)] = np.nan if dataset.target == "values" else -1
    return dataclasses.replace(dataset, images=_Readable(dataset.images, frozenset(bad)), labels=labels)
