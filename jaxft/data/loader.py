"""Batches of decoded images, each a pure function of (seed, step)."""

import functools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TypeVar

import grain
import numpy as np

from jaxft.data import Dataset, decode
from jaxft.data.cache import Cache, no_room

Batch = dict[str, np.ndarray]
Batches = Generator[Batch, None, None]
"""An iterator of batches; `close()` stops its workers, as does its end or its garbage collection."""


def default_workers() -> int:
    """Threads that decode: one for each core this process may use, at most 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 16)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Whole batches in a set; the examples % batch_size left over sit out an epoch, others in each.

    Raises:
        ValueError: no examples, a batch size below 1, or a batch larger than the set.
    """
    if examples < 1:
        raise ValueError("the set is empty: there is no index to take a batch from")
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size {batch_size}: a set of {examples} examples gives batches of 1 to {examples}")
    return examples // batch_size


def train_batches(
    dataset: Dataset,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    image_size: tuple[int, int] | None,
    scaled: bool = False,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    workers: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Shuffled batches from `start_step` on; batch `step` depends on the arguments and (seed, step), on nothing else.

    An epoch is `steps_per_epoch(len(indices), batch_size)` batches of one permutation, without replacement; every
    epoch has its own permutation.

    Args:
        dataset: where the images come from.
        indices: the examples to train on, [n].
        batch_size: of all processes together, B.
        image_size: (H, W); None leaves the images out, for training on cached features.
        scaled: see `decode.rgb`.
        seed: at least 0.
        start_step: the first batch, at least 0; a resumed run passes the step that it restored.
        num_steps: batches to give; None goes on forever.
        workers: threads that decode, a batch each; None is one for each core. It does not change any batch.
        process_index, process_count: of several processes, this one gets rows [index · B/count, (index + 1) · B/count).

    Yields:
        {"image": uint8 [B/count, H, W, 3], "label": int32 [B/count], "index": int32 [B/count], into the dataset}.

    Raises:
        ValueError: no indices, a batch larger than the set, rows that do not divide by the processes; while iterating,
            an image that cannot be decoded, by name.
    """
    indices = _checked_indices(dataset, indices)
    steps = steps_per_epoch(len(indices), batch_size)
    rows = _rows(batch_size, process_index, process_count)
    if seed < 0 or start_step < 0 or (num_steps is not None and num_steps < 0):
        raise ValueError(f"seed {seed}, start_step {start_step}, num_steps {num_steps}: none may be negative")

    @functools.lru_cache(maxsize=2)  # workers run ahead into the next epoch
    def permutation(epoch: int) -> np.ndarray:
        # Raw words of the generator: NumPy promises them across versions, unlike `Generator.permutation`.
        words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(len(indices))
        return np.argsort(words, kind="stable")

    def batch(step: int) -> Batch:
        epoch, first = step // steps, step % steps * batch_size
        return _load(dataset, indices[permutation(epoch)[first : first + batch_size][rows]], image_size, scaled)

    stop = _FOREVER if num_steps is None else start_step + num_steps
    return _in_order(batch, range(start_step, stop), workers, image_size is not None)


def eval_batches(
    dataset: Dataset,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    image_size: tuple[int, int] | None,
    scaled: bool = False,
    workers: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Each example once, in the order of `indices`; the last batch is padded so that one compiled step serves all.

    The arguments, and what is raised, are those of `train_batches`, but for a batch larger than the set, which is
    padded like any last one.

    Yields:
        {"image": uint8 [B/count, H, W, 3], "label": int32 [B/count], "index": int32 [B/count],
        "weight": float32 [B/count]}; a padding row has weight 0, black pixels, label 0 and index -1, others weight 1.
    """
    indices = _checked_indices(dataset, indices)
    if len(indices) < 1:
        raise ValueError("the set is empty: there is nothing to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    rows = _rows(batch_size, process_index, process_count)

    def batch(step: int) -> Batch:
        mine = indices[step * batch_size : (step + 1) * batch_size][rows]
        padding = rows.stop - rows.start - len(mine)
        loaded = _load(dataset, mine, image_size, scaled)
        loaded["weight"] = np.ones(len(mine), np.float32)
        fill = {"image": 0, "label": 0, "index": -1, "weight": 0}
        return {
            key: np.pad(value, [(0, padding)] + [(0, 0)] * (value.ndim - 1), constant_values=fill[key])
            if padding
            else value
            for key, value in loaded.items()
        }

    return _in_order(batch, range(-(-len(indices) // batch_size)), workers, image_size is not None)


def decode_once(
    dataset: Dataset, indices: np.ndarray, image_size: tuple[int, int], *, scaled: bool = False
) -> Cache | None:
    """The images `indices`, int [n], decoded at `image_size` into a file of the cache folder, where that can be.

    Returns:
        rows uint8 [H, W, 3]; None where the disk is full or read-only, and a line says so: decode as they are needed.

    Raises:
        ValueError: an image that cannot be decoded, by name.
    """
    libraries = {name: metadata.version(name) for name in ("pillow", "simplejpeg")}
    identity = {"data": dataset.fingerprint, "size": list(image_size), "scaled": scaled, **libraries}
    name = "x".join(map(str, image_size))
    cache = Cache("pixels", name, identity, np.unique(indices), (*image_size, 3), np.uint8)
    if reason := no_room([cache]):
        print(f"images are decoded anew in every epoch: {reason}", flush=True)
        return None

    def compute(missing: np.ndarray) -> Iterator[np.ndarray]:
        for batch in eval_batches(dataset, missing, batch_size=32, image_size=image_size, scaled=scaled):
            yield batch["image"][batch["weight"] > 0]

    try:
        cache.fill(compute)
    except OSError as error:
        print(f"images are decoded anew in every epoch: {error}; set JAXFT_CACHE to another folder", flush=True)
        return None
    print(f"decoded images come from {cache.folder} ({cache.bytes / 1e6:.0f} MB)", flush=True)
    return cache


@dataclass(frozen=True)
class Decoded:
    """The images of a dataset of `length` images, those that `cache` holds."""

    cache: Cache
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> np.ndarray:
        return np.asarray(self.cache.take(index))


_FOREVER = 2**62
T = TypeVar("T")


def _checked_indices(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    checked = np.asarray(indices, np.int64)
    if checked.ndim != 1 or (len(checked) and not (0 <= checked.min() and checked.max() < len(dataset))):
        raise ValueError(f"indices must be one-dimensional, within 0 to {len(dataset) - 1}: the dataset has no others")
    return checked


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index}: expected 0 to {process_count - 1}")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide among {process_count} processes")
    each = batch_size // process_count
    return slice(process_index * each, (process_index + 1) * each)


def _load(dataset: Dataset, indices: np.ndarray, image_size: tuple[int, int] | None, scaled: bool) -> Batch:
    labels = {"label": np.asarray(dataset.labels, np.int32)[indices], "index": indices.astype(np.int32)}
    if image_size is None:
        return labels
    images = np.empty((len(indices), *image_size, 3), np.uint8)
    for row, index in enumerate(indices.tolist()):
        images[row] = decode.rgb(dataset.images[index], image_size, dataset.names[index], scaled=scaled)
    return {"image": images, **labels}


def _in_order(batch: Callable[[int], Batch], steps: range, workers: int | None, decodes: bool) -> Batches:
    """The batches of `steps` in order; those that decode are made by threads that run a little ahead."""
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    if not decodes:
        return (batch(step) for step in steps)  # which takes less time than a thread's handing it over
    # Grain's threads make whole elements; one is a batch, so the batches in flight are the workers' and two ready.
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 2)
    batches = grain.MapDataset.range(steps.start, steps.stop).map(batch).to_iter_dataset(options)

    def iterate() -> Batches:
        iterator = iter(batches)
        try:
            yield from iterator
        finally:
            iterator.close()

    return iterate()
