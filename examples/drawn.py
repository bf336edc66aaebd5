"""Images that every example can draw for itself: a square, a disc or a cross, at a random place on noise."""

import numpy as np

from jaxft.data import Dataset

CLASSES = ("square", "disc", "cross")
SIZE = (32, 32)


def shapes(count: int = 48, seed: int = 0) -> Dataset:
    """`count` images of 32×32 pixels, a third of each class; four in a row are a group, as photographs of one day."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    images = []
    for number in range(count):
        v, u = y - rng.integers(11, 21), x - rng.integers(11, 21)
        masks = (np.maximum(abs(u), abs(v)) < 8, u**2 + v**2 < 64, (abs(u) < 3) | (abs(v) < 3))
        noise = rng.integers(0, 90, (32, 32, 3))
        images.append((noise + 150 * masks[number % 3][..., None]).astype(np.uint8))
    names = tuple(f"{number}.png" for number in range(count))
    groups = tuple(f"day {number // 4}" for number in range(count))
    return Dataset("shapes", images, np.arange(count) % 3, groups, names, CLASSES)
