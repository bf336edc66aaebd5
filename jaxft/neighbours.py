"""The nearest images of each image by features, exactly; what they and their film say of it.

Predictions that are averaged over neighbours or segments are transductive: they depend on which other images are
predicted with them. Report them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.ensemble import Probabilities
from jaxft.progress import bar
from jaxft.task import LOG_LOSS_CLIP

SPARE = 8  # candidates beside the k, among which exact distances choose
GATHER_BYTES = 256 * 2**20  # of candidates that are compared at once
BLOCK_ROWS = 2**13  # at most, of a block: the products of two take 256 MB, of which some copies are alive at once


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest of n images to each of them, itself included.

    Attributes:
        index: int64 [n, k], the image itself first, then by distance.
        distance: float32 [n, k], Euclidean, ascending, 0 first.
    """

    index: np.ndarray
    distance: np.ndarray


def search(features: Any, k: int, *, block_bytes: int = 2**30) -> Neighbours:
    """The k nearest by Euclidean distance of every row to every row, itself included: exhaustive, block by block.

    Each pair of blocks is one matrix product on the device, in float32, and gives the distances both ways. The best
    k + 8 of every row are then compared by the differences themselves, which no cancellation touches; equal distances
    go by the number of the row.

    Args:
        features: [n, …] of any float dtype, sliced in blocks and by rows: an array, a memory-mapped one, or one on the
            device. It is never copied whole.
        k: how many, from 1 to n.
        block_bytes: of one of the two blocks that are on the device at once, in float32.

    Raises:
        ValueError: k is not 1 to n, or a feature is not finite.
    """
    count, width = len(features), int(np.prod(features.shape[1:]))
    if not 1 <= k <= count:
        raise ValueError(f"k={k} neighbours of {count} images: choose 1 to {count}, the image itself included")
    most = min(k + SPARE, count)
    size = max(1, min(count, block_bytes // (4 * max(width, 1)), BLOCK_ROWS))
    size = -(-count // -(-count // size))  # blocks of nearly equal length
    firsts = list(range(0, count, size))
    centre = jnp.nan_to_num(jnp.nanmean(jnp.asarray(features[:size], jnp.float32).reshape(-1, width), 0), posinf=0)

    def block(first: int) -> tuple[jax.Array, jax.Array]:
        rows = jnp.asarray(features[first : first + size], jnp.float32).reshape(-1, width) - centre
        padded = jnp.pad(rows, ((0, size - len(rows)), (0, 0)))  # one shape, one program
        squares = jnp.square(padded).sum(1)
        if not bool(jnp.isfinite(squares).all()):
            row = first + int(jnp.argmin(jnp.isfinite(squares)))
            raise ValueError(f"the features of image {row} are not finite; compute them again, in float32")
        return padded, jnp.where(jnp.arange(size) < len(rows), squares, jnp.inf)

    best = {first: _none(size, most) for first in firsts}
    with bar("neighbours", len(firsts) * (len(firsts) + 1) // 2, unit="blocks") as advance:
        for place, first in enumerate(firsts):
            rows = block(first)
            for other in firsts[place:]:
                columns = rows if other == first else block(other)
                best[first], best[other] = _update(
                    best[first], best[other], rows, columns, first, other, both=other != first
                )
                jax.block_until_ready(best[first])
                advance(1)
    candidates = np.concatenate([np.asarray(best[first][1]) for first in firsts])[:count]
    return _ranked(features, candidates, k, width)


def _none(size: int, most: int) -> tuple[jax.Array, jax.Array]:
    return jnp.full((size, most), jnp.inf), jnp.full((size, most), -1)


@partial(jax.jit, static_argnames="both")
def _update(mine: Any, theirs: Any, rows: Any, columns: Any, first: int, other: int, *, both: bool) -> Any:
    """The best of each row of both blocks so far, with those of the other block: (distances less own square, index)."""
    products = -2 * jnp.matmul(rows[0], columns[0].T, precision="highest")

    def nearer(best: Any, distances: jax.Array, start: int) -> Any:
        most = best[0].shape[1]
        values, places = jax.lax.top_k(-distances, min(most, distances.shape[1]))
        values = jnp.concatenate([best[0], -values], 1)
        index = jnp.concatenate([best[1], places + start], 1)
        values, places = jax.lax.top_k(-values, most)
        return -values, jnp.take_along_axis(index, places, 1)

    mine = nearer(mine, products + columns[1], other)
    return (mine, nearer(theirs, products.T + rows[1], first)) if both else (mine, mine)


def _ranked(features: Any, candidates: np.ndarray, k: int, width: int) -> Neighbours:
    """The k nearest of each row's candidates, by the distance itself."""
    count, most = candidates.shape
    candidates = np.where(candidates < 0, np.arange(count)[:, None], candidates)
    candidates = np.sort(candidates, 1)

    @jax.jit
    def distances(own: jax.Array, others: jax.Array) -> jax.Array:
        gap = others.astype(jnp.float32) - own[:, None].astype(jnp.float32)
        return jnp.sqrt(jnp.square(gap).sum(2))

    at_once = max(1, GATHER_BYTES // (4 * width * most))
    found = np.empty((count, most), np.float32)
    with bar("distances", count) as advance:
        for first in range(0, count, at_once):
            rows = np.minimum(np.arange(first, first + at_once), count - 1)  # one shape, one program
            others = features[candidates[rows].reshape(-1)].reshape(at_once, most, width)
            last = min(first + at_once, count)
            found[first:last] = np.asarray(distances(features[rows].reshape(at_once, width), others))[: last - first]
            advance(last - first)
    found[candidates == np.arange(count)[:, None]] = -1.0  # itself, before any double of it
    order = np.argsort(found, axis=1, kind="stable")[:, :k]
    index, distance = np.take_along_axis(candidates, order, 1), np.take_along_axis(found, order, 1)
    return Neighbours(index.astype(np.int64), distance.clip(0))


def weights(distance: np.ndarray, width: float) -> np.ndarray:
    """Gaussian weights of neighbours, exp(-½ (d / (width · typical))²), of sum 1 in each row; the nearest never gets 0.

    Args:
        distance: float [n, k] of `Neighbours`.
        width: of the bell, in typical distances: the median, over images, of that to the nearest other image.

    Raises:
        ValueError: the width is not above 0.
    """
    if not width > 0:
        raise ValueError(f"width={width} of the neighbours' weights must be above 0, such as 1")
    typical = np.median(distance[:, min(1, distance.shape[1] - 1)]) or 1.0
    bell = np.exp(-0.5 * np.square((distance - distance[:, :1]) / (width * typical)))
    return bell / bell.sum(1, keepdims=True)


@dataclass(frozen=True)
class Average:
    """Each image's probabilities become the weighted mean of its neighbours'.

    Attributes:
        k: how many neighbours, the image itself included; 1 changes nothing.
        width: as in `weights`.
    """

    k: int
    width: float

    def __call__(self, table: Probabilities, neighbours: Neighbours) -> Probabilities:
        """The averaged probabilities.

        Raises:
            ValueError: there are not as many images, or not k neighbours of each.
        """
        if len(table) != len(neighbours.index) or self.k > neighbours.index.shape[1]:
            raise ValueError(
                f"{len(table)} images with k={self.k}, but neighbours of shape {list(neighbours.index.shape)}: search "
                f"among the same images, with a k as large"
            )
        share = weights(neighbours.distance[:, : self.k], self.width)
        return replace(table, values=np.einsum("nk,nkc->nc", share, table.values[neighbours.index[:, : self.k]]))


def fit_average(
    tables: Sequence[Probabilities],
    neighbours: Sequence[Neighbours],
    ks: Sequence[int] = (1, 3, 5, 10, 20),
    widths: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
) -> Average:
    """The number of neighbours and the width of least log loss on labelled images.

    Args:
        tables: of each fold's held-out images: neighbours are searched within a fold, as they are within the test set.
        neighbours: of the images of each table.
        ks, widths: what is tried.

    Raises:
        ValueError: no label is known; or as `Average`.
    """
    smallest = min(found.index.shape[1] for found in neighbours)
    tried = [Average(k, width) for k in ks if k <= smallest for width in (widths if k > 1 else widths[:1])]

    def loss(average: Average) -> float:
        losses = [average(table, found).losses() for table, found in zip(tables, neighbours, strict=True)]
        return float(np.nanmean(np.concatenate(losses)))

    if not any(table.known.any() for table in tables):
        raise ValueError("no label of these images is known, so that nothing can be fitted on them")
    return min(tried, key=loss)


def segments(neighbours: Neighbours, reach: float = 1.0, *, most: int = 200) -> np.ndarray:
    """Pieces of film: images linked by chains of mutual neighbours that are near.

    Two images are linked if each is among the other's neighbours, at no more than `reach` typical distances (the
    median of that to the nearest other image).

    Args:
        neighbours: from `search`.
        reach: in typical distances.
        most: images of a segment; a larger one, which no film explains, is taken apart into single images.

    Returns:
        int64 [n]: the number of each image's segment, from 0.
    """
    from scipy import sparse

    count, k = neighbours.index.shape
    typical = np.median(neighbours.distance[:, min(1, k - 1)])
    near = neighbours.distance <= reach * typical
    rows = np.repeat(np.arange(count), k)[near.reshape(-1)]
    pairs: Any = (np.ones(len(rows)), (rows, neighbours.index[near]))
    links = sparse.coo_array(pairs, (count, count)).tocsr()
    found = sparse.csgraph.connected_components(links.multiply(links.T), directed=False)[1].astype(np.int64)
    large = np.bincount(found)[found] > most
    found[large] = found.max() + 1 + np.arange(large.sum())
    return np.unique(found, return_inverse=True)[1]


@dataclass(frozen=True)
class Share:
    """Images of a segment share one prediction, where the net is confident and consistent there.

    Attributes:
        confidence: the least largest probability of the segment's mean.
        agreement: the least share of images whose likeliest class is that of the mean.
    """

    confidence: float = 0.8
    agreement: float = 0.8

    def __call__(self, table: Probabilities, segment: np.ndarray) -> Probabilities:
        """The table in which images of such segments have the geometric mean of their segment.

        Raises:
            ValueError: not one segment for each image.
        """
        if len(segment) != len(table):
            raise ValueError(f"{len(segment)} segments for {len(table)} images; give one for each")
        count = np.bincount(segment)
        logs = np.zeros((len(count), len(table.classes)))
        np.add.at(logs, segment, np.log(table.values.clip(LOG_LOSS_CLIP)))
        mean = np.exp(logs / np.maximum(count, 1)[:, None])
        mean /= mean.sum(1, keepdims=True)
        agree = np.bincount(segment, table.values.argmax(1) == mean.argmax(1)[segment]) / np.maximum(count, 1)
        shared = (mean.max(1) >= self.confidence) & (agree >= self.agreement)
        return replace(table, values=np.where(shared[segment][:, None], mean[segment], table.values))
