"""ELPV: electroluminescence images of solar cells with the probability that a cell is defective.

2,624 grey PNG images of 300×300 pixels from 44 modules, out of the package `elpv-dataset`. Licence: CC BY-NC-SA 4.0:
not for commercial use, and cite the sources.

Source: Buerhop-Lutz et al., A benchmark for visual identification of defective solar cells in electroluminescence
imagery, EU PVSEC 2018; Deitsch et al., Automatic classification of defective photovoltaic module cells in
electroluminescence images, Solar Energy 185, 2019.
"""

import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxft import fetch
from jaxft.data import Dataset

REQUIREMENT = "elpv-dataset==1.0.0.post1"
WHEEL = "elpv_dataset-1.0.0.post1-py3-none-any.whl"
SHA256 = "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c"
FOLDER = "elpv_dataset/data/"

PROBABILITIES = (0.0, 1 / 3, 2 / 3, 1.0)  # certainly sound, possibly sound, possibly defective, certainly defective
TYPES = ("mono", "poly")  # the cell's silicon: one crystal or many
CLASSES = ("functional", "defective")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SolarCells(Dataset):
    """The images as bytes of PNG files; the class is 1 where the probability is 0.5 or more.

    Each cell is its own group: which cells come from one module is not published.

    Attributes:
        probabilities: float32 [N], each one of `PROBABILITIES`.
        types: N of "mono" or "poly".
    """

    probabilities: np.ndarray
    types: tuple[str, ...]

    @property
    def strata(self) -> tuple[tuple[int, str], ...]:
        """(whether it is defective, type) of each cell: what the paper's split keeps in proportion."""
        return tuple(zip((self.probabilities >= 0.5).astype(int).tolist(), self.types, strict=True))

    def with_labels(self) -> "SolarCells":
        """The same cells with two labels each, [N, 2]: of polycrystalline silicon, and defective."""
        labels = np.stack([[kind == "poly" for kind in self.types], self.probabilities >= 0.5], 1).astype(np.int32)
        return replace(self, labels=labels, classes=("polycrystalline", "defective"), target="labels")

    def with_values(self) -> "SolarCells":
        """The same cells with the probability of a defect as a value to predict, [N, 1]."""
        return replace(self, labels=self.probabilities[:, None], classes=("probability",), target="values")


def prepare(cache: str | os.PathLike[str] | None = None) -> SolarCells:
    """Fetches the wheel unless it is cached, and reads its images into memory (84 MB).

    Args:
        cache: folder of fetched files, as in `fetch.cache_folder`.

    Raises:
        fetch.Unavailable: the wheel cannot be fetched, or is not the one that was published.
        ValueError: `labels.csv` is not what it should be, or names an image that the wheel lacks.
    """
    return read(fetch.from_wheel(REQUIREMENT, SHA256, file_name=WHEEL, cache=cache))


def read(wheel: Path) -> SolarCells:
    """The data in the wheel at the path `wheel`, in the order of its `labels.csv`.

    Raises:
        ValueError: as `prepare`.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = set(archive.namelist())
        where = f"{FOLDER}labels.csv in {wheel}"
        if f"{FOLDER}labels.csv" not in members:
            raise ValueError(f"there is no {where}; is it a wheel of {REQUIREMENT}?")
        rows = _parse(archive.read(f"{FOLDER}labels.csv").decode(), where)
        lacking = [path for path in rows if FOLDER + path not in members]
        if lacking:
            raise ValueError(f"{where} names {len(lacking)} images that the wheel lacks, the first {lacking[0]}")
        images = tuple(archive.read(FOLDER + path) for path in rows)
    names = tuple(path.rsplit("/", 1)[-1] for path in rows)
    probabilities = np.asarray([probability for probability, _ in rows.values()], np.float32)
    return SolarCells(
        name="elpv",
        images=images,
        labels=(probabilities >= 0.5).astype(np.int32),
        groups=names,
        names=names,
        classes=CLASSES,
        probabilities=probabilities,
        types=tuple(kind for _, kind in rows.values()),
    )


def _parse(text: str, where: str) -> dict[str, tuple[float, str]]:
    """Image path → (probability, type)."""
    rows: dict[str, tuple[float, str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            path, given, kind = line.split()
            # The published file writes a third with 16 digits; a copy may round it.
            probability = next(p for p in PROBABILITIES if abs(float(given) - p) < 1e-3)
        except (ValueError, StopIteration):
            raise ValueError(
                f"line {number} of {where} is {line!r}; expected a path, a probability of 0, 1/3, 2/3 or 1, and a type"
            ) from None
        if kind not in TYPES:
            raise ValueError(f"line {number} of {where}: the type is {kind!r}, expected {' or '.join(TYPES)}")
        if path in rows:
            raise ValueError(f"line {number} of {where} names {path} a second time")
        rows[path] = (probability, kind)
    if not rows:
        raise ValueError(f"{where} is empty")
    return rows
