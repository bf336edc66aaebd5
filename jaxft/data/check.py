"""A look at data before they are trained on: broken files, doubles, leaks, labels that are nearly the same."""

import concurrent.futures
import io
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from jaxft import progress
from jaxft.data import decode
from jaxft.data.dataset import Dataset
from jaxft.data.source import Source

FEW = 5  # images of a class, below which it is reported
RARE = 20  # times fewer images than the most frequent class has
NEAR = 8  # of 128 bits in which near duplicates differ at most
LIKE = 0.99  # correlation of near duplicates in 32×32 pixels, at least
FLAT = 8  # standard deviation of grey below which an image has no features to compare
ODD = 4.0  # times the median's area, or its inverse; and the largest ratio of sides
_KINDS: tuple[str, ...] = tuple(
    "unreadable duplicate near-duplicate leak few imbalance labels unknown size mode group".split()
)


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        kind: a word for it: unreadable, duplicate, near-duplicate, leak, few, imbalance, labels, unknown, size, mode,
            group.
        serious: it makes a run fail, or its result wrong; else it may be as it should.
        text: one line, with the first names.
        names: of all the images or classes.
    """

    kind: str
    serious: bool
    text: str
    names: tuple[str, ...]


def examine(
    source: Source, train: np.ndarray | None = None, held_out: np.ndarray | None = None, *, brief: bool = False
) -> list[Finding]:
    """Everything that is found, in the order of the kinds above.

    Args:
        source: the data.
        train, held_out: int [n], indices of the split, if there is one.
        brief: only what costs no decoding: labels, groups, equal files, and headers.

    Raises:
        OSError: a file cannot be read at all.
    """
    dataset = source.dataset
    found = _labels(dataset) + _groups(dataset, train, held_out) + _equal(dataset, train, held_out)
    looks = _looks(dataset, brief)
    found += _broken(dataset, looks)
    found += _odd(dataset, looks)
    if not brief:
        found += _near(dataset, looks, train, held_out)
    return sorted(found, key=lambda finding: (not finding.serious, _KINDS.index(finding.kind)))


@dataclass(frozen=True)
class _Look:
    """What one image looks like: its error, (height, width), its mode, and what like images share (`_traits`)."""

    error: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    traits: tuple[np.ndarray, np.ndarray] | None = None


def _looks(dataset: Dataset, brief: bool) -> list[_Look]:
    def look(index: int) -> _Look:
        image, name = dataset.images[index], dataset.names[index]
        if isinstance(image, np.ndarray):
            return _Look("", image.shape[:2], f"{image.shape[2]} channels", None if brief else _traits(image))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(image), formats=decode.FORMATS) as opened:
                    mode = "animated" if getattr(opened, "is_animated", False) else opened.mode
                    size = opened.height, opened.width
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return _Look("its header cannot be read" if image else "it is empty")
        if brief:
            return _Look("", size, mode)
        try:
            return _Look("", size, mode, _traits(decode.thumbnail(image, 256, name)))
        except ValueError as error:
            return _Look(str(error).removeprefix(f"image {name} "), size, mode)

    if not brief:
        return progress.each("checking", look, len(dataset))
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(look, range(len(dataset))))


def _traits(image: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(whether grey grows to the right and downwards, on a grid of 8×8: bool [128]; the image in 32×32, standardised).

    None for an image without features. Source: the difference hash of N. Krawetz, "Kind of Like That", 2013, here along
    both sides.
    """
    grey = Image.fromarray(decode.visible(image)).convert("L")
    if np.asarray(grey).std() < FLAT:
        return None
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(np.diff(across, axis=1) > 0).ravel(), (np.diff(down, axis=0) > 0).ravel()])
    small = np.asarray(grey.resize((32, 32), Image.Resampling.BOX), np.float32).ravel()
    return bits, ((small - small.mean()) / (np.linalg.norm(small - small.mean()) or 1)).astype(np.float16)


def _broken(dataset: Dataset, looks: Sequence[_Look]) -> list[Finding]:
    broken = [(name, look.error) for name, look in zip(dataset.names, looks, strict=True) if look.error]
    if not broken:
        return []
    shown = "; ".join(f"{name}: {error}" for name, error in broken[:3])
    return [
        _finding("unreadable", True, f"{_count(broken, 'file')} cannot be read: {shown}", [n for n, _ in broken], 0)
    ]


def _labels(dataset: Dataset) -> list[Finding]:
    found = []
    spellings = defaultdict(list)
    for name in dataset.classes:
        spellings[" ".join(name.split()).casefold()].append(name)
    for alike in spellings.values():
        if len(alike) > 1:
            shown = ", ".join(map(repr, alike))
            found.append(_finding("labels", True, f"classes that differ in case or spaces alone: {shown}", alike, 0))
    if count := int((~dataset.has_label).sum()):
        names = [name for name, is_known in zip(dataset.names, dataset.has_label, strict=True) if not is_known]
        found.append(_finding("unknown", False, f"{count} images have no label, and take no part", names))
    if dataset.target == "values":
        return found
    labels = dataset.labels
    counts = (labels[:, None] == np.arange(len(dataset.classes)) if dataset.target == "class" else labels == 1).sum(0)
    few = [f"{name} ({count})" for name, count in zip(dataset.classes, counts, strict=True) if count < FEW]
    if few:
        found.append(_finding("few", True, f"{_count(few, 'class', 'classes')} with fewer than {FEW} images", few))
    most = int(counts.max(initial=0))
    rare = [f"{n} ({c})" for n, c in zip(dataset.classes, counts, strict=True) if FEW <= c < most / RARE]
    if rare:
        text = f"{_count(rare, 'class', 'classes')} with less than a {RARE}th of the images of the largest ({most})"
        found.append(_finding("imbalance", False, text, rare))
    return found


def _groups(dataset: Dataset, train: np.ndarray | None, held_out: np.ndarray | None) -> list[Finding]:
    if train is None or held_out is None or len(set(dataset.groups)) == len(dataset):
        return []
    sides = [{dataset.groups[i] for i in side.tolist()} for side in (train, held_out)]
    both = sorted(sides[0] & sides[1])
    text = f"{_count(both, 'group')} are trained on and held out"
    return [_finding("group", True, text, both)] if both else []


def _equal(dataset: Dataset, train: np.ndarray | None, held_out: np.ndarray | None) -> list[Finding]:
    places = defaultdict(list)
    for index, digest in enumerate(dataset.digests):
        places[digest].append(index)
    pairs = [(same[0], other) for same in places.values() for other in same[1:]]
    return _doubles(dataset, pairs, "duplicate", "equal", train, held_out)


def _near(
    dataset: Dataset, looks: Sequence[_Look], train: np.ndarray | None, held_out: np.ndarray | None
) -> list[Finding]:
    found = [(i, look.traits) for i, look in enumerate(looks) if look.traits is not None]
    if len(found) < 2:
        return []
    rows, traits = [i for i, _ in found], [traits for _, traits in found]
    signs = np.stack([np.where(bits, 1, -1) for bits, _ in traits]).astype(np.float32)
    limit, block, pairs = signs.shape[1] - 2 * NEAR, 1024, []
    for first in range(0, len(rows), block):
        alike = signs[first : first + block] @ signs[first:].T >= limit
        for a, b in np.argwhere(np.triu(alike, 1)).tolist():
            i, j = rows[first + a], rows[first + b]
            likeness = traits[first + a][1].astype(np.float32) @ traits[first + b][1].astype(np.float32)
            if likeness >= LIKE and dataset.digests[i] != dataset.digests[j]:
                pairs.append((i, j))
    return _doubles(dataset, pairs, "near-duplicate", "nearly equal", train, held_out)


def _doubles(
    dataset: Dataset,
    pairs: Sequence[tuple[int, int]],
    kind: str,
    word: str,
    train: np.ndarray | None,
    held_out: np.ndarray | None,
) -> list[Finding]:
    """Findings of pairs of images: across the split, with other labels, and the rest."""
    sides = [set() if side is None else set(side.tolist()) for side in (train, held_out)]
    labels = dataset.labels.reshape(len(dataset), -1)
    leaks, others, rest = [], [], []
    for i, j in pairs:
        text = f"{dataset.names[i]} = {dataset.names[j]}"
        if (i in sides[0] and j in sides[1]) or (i in sides[1] and j in sides[0]):
            leaks.append(text)
        elif not np.array_equal(labels[i], labels[j]):
            others.append(text)
        else:
            rest.append(text)
    found = []
    serious = kind == "duplicate"  # nearly equal ones may be frames that look alike
    if leaks:
        text = f"{_count(leaks, 'pair')} of {word} images are trained on and held out: the score may be too good"
        found.append(_finding("leak", serious, text, leaks))
    if others:
        text = f"{_count(others, 'pair')} of {word} images have different labels"
        found.append(_finding(kind, serious, text, others))
    if rest:
        found.append(_finding(kind, False, f"{_count(rest, 'pair')} of {word} images", rest))
    return found


def _odd(dataset: Dataset, looks: Sequence[_Look]) -> list[Finding]:
    whole = [(name, look) for name, look in zip(dataset.names, looks, strict=True) if not look.error]
    if not whole:
        return []
    areas = np.asarray([look.size[0] * look.size[1] for _, look in whole], float)
    median = float(np.median(areas))
    sizes = [
        f"{name} ({look.size[1]}×{look.size[0]})"
        for (name, look), area in zip(whole, areas, strict=True)
        if not median / ODD**2 <= area <= median * ODD**2 or max(look.size) > ODD * min(look.size)
    ]
    found = []
    if sizes and len(sizes) < len(whole) / 10:
        text = f"{_count(sizes, 'image')} of a size or shape unlike the others"
        found.append(_finding("size", False, text, sizes))
    modes = defaultdict(list)
    for name, look in whole:
        modes[look.mode].append(name)
    usual = max(modes, key=lambda mode: len(modes[mode]))
    for mode, names in modes.items():
        if mode != usual and len(names) < len(whole) / 10:
            text = f"{_count(names, 'image')} of the mode {mode}, where most are {usual}"
            found.append(_finding("mode", False, text, names))
    return found


def _finding(kind: str, serious: bool, text: str, names: Iterable[str], shown: int = 3) -> Finding:
    names = tuple(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return Finding(kind, serious, f"{text}: {', '.join(names[:shown])}{more}" if shown else text, names)


def _count(things: Sequence[object], one: str, several: str | None = None) -> str:
    return f"{len(things):,} {one if len(things) == 1 else several or one + 's'}"
