"""Batches of decoded images, each a pure function of (seed, step)."""

import functools
import hashlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

import grain
import numpy as np

from jaxft.data import decode
from jaxft.data.dataset import Images
from jaxft.data.decode import Decode
from jaxft.data.inputs import Inputs
from jaxft.data.rows import CacheError, Rows, no_room

Batch = dict[str, np.ndarray]
Batches = Generator[Batch, None, None]
"""An iterator of batches; `close()` stops its workers, as does its end or its garbage collection."""


def default_workers() -> int:
    """Threads that decode: one for each core this process may use, at most 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 16)


def train_batches(
    inputs: Inputs,
    images: Images | None,
    *,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    workers: int | None = None,
    process: tuple[int, int] = (0, 1),
) -> Batches:
    """Batches for training from `start_step` on; batch `step` depends on `inputs` and (seed, step), on nothing else.

    An epoch is `inputs.steps_per_epoch` batches, in the order that `inputs.order` gives it.

    Args:
        inputs: the examples, their order, size and weights.
        images: the dataset's, or the same ones from elsewhere, such as `Decoded`. None leaves the images out, for
            training on cached features.
        seed: at least 0.
        start_step: the first batch, at least 0; a resumed run passes the step that it restored.
        num_steps: batches to give; None goes on forever.
        workers: threads that decode, a batch each; None is one for each core. It does not change any batch.
        process: (index, count) of this process among several; it gets rows [index · B/count, (index + 1) · B/count).

    Yields:
        {"image": uint8 [B/count, H, W, 3], "label": class int32 [B/count], or labels or values float32 [B/count, C],
        "known": bool of the label's shape, "weight": float32 [B/count], "index": int32 [B/count] into the dataset}.
        An unknown label is 0. With targets also "target": float32 [B/count, C], what is learnt.

    Raises:
        ValueError: a batch larger than the set, rows that do not divide by the processes, or weights that are all 0;
            while iterating, an order of other examples, or an image that cannot be decoded, by name.
    """
    steps, size = inputs.steps_per_epoch, inputs.batch_size
    rows = _rows(size, process)
    if seed < 0 or start_step < 0 or (num_steps is not None and num_steps < 0):
        raise ValueError(f"seed {seed}, start_step {start_step}, num_steps {num_steps}: none may be negative")
    if inputs.weights is not None and not inputs.weights[inputs.indices].any():
        raise ValueError("weights are 0 for all examples of indices: nothing would be trained; give some of them more")

    @functools.lru_cache(maxsize=2)  # workers run ahead into the next epoch
    def in_order(epoch: int) -> np.ndarray:
        return _checked_order(inputs, inputs.order(inputs.dataset, inputs.indices, seed, epoch))

    def batch(step: int) -> Batch:
        epoch, first = step // steps, step % steps * size
        mine = in_order(epoch)[first : first + size][rows]
        weights = np.ones(len(mine), np.float32) if inputs.weights is None else inputs.weights[mine]
        loaded = {**_load(inputs, images, mine), "weight": weights}
        if inputs.targets is None:
            return loaded
        labels = np.eye(len(inputs.dataset.classes), dtype=np.float32)[loaded["label"]]
        given = inputs.targets[mine]
        unset = np.isnan(given)
        return {**loaded, "target": np.where(unset, labels, given), "known": loaded["known"] | ~unset[:, 0]}

    stop = _FOREVER if num_steps is None else start_step + num_steps
    return _in_order(batch, range(start_step, stop), workers, images is not None)


def eval_batches(
    inputs: Inputs, images: Images | None, *, workers: int | None = None, process: tuple[int, int] = (0, 1)
) -> Batches:
    """Each example once, in the order of `inputs.indices`; the last batch is padded: one compiled step serves all.

    Arguments and errors are as in `train_batches`, but a batch larger than the set is padded.

    Yields:
        {"image", "label", "known" and "index" as from `train_batches`, "real": bool [B/count]}. A padding row has real
        False, black pixels, label 0, known False and index -1.
    """
    indices, size = inputs.indices, inputs.batch_size
    rows = _rows(size, process)

    def batch(step: int) -> Batch:
        mine = indices[step * size : (step + 1) * size][rows]
        loaded = {**_load(inputs, images, mine), "real": np.ones(len(mine), bool)}
        padding = rows.stop - rows.start - len(mine)
        if not padding:
            return loaded
        return {
            key: np.pad(
                value, [(0, padding)] + [(0, 0)] * (value.ndim - 1), constant_values=-1 if key == "index" else 0
            )
            for key, value in loaded.items()
        }

    return _in_order(batch, range(-(-len(indices) // size)), workers, images is not None)


def decode_once(inputs: Sequence[Inputs]) -> Rows | None:
    """All images of `inputs` decoded into one file of the cache folder, where that can be.

    Args:
        inputs: of one dataset, image size and way of decoding.

    Returns:
        rows uint8 [H, W, channels]; None where the disk is full or read-only, and a line says so: decode as they are
        needed.

    Raises:
        ValueError: inputs of several datasets, sizes or ways of decoding; an image that cannot be decoded, by name.
    """
    first = inputs[0]
    for other in inputs[1:]:
        if (other.dataset is not first.dataset) or _decoding(other) != _decoding(first):
            raise ValueError(
                f"decode_once takes inputs of one dataset, size and way of decoding, found {first.dataset!r} with "
                f"{_decoding(first)} and {other.dataset!r} with {_decoding(other)}; call it for each"
            )
    dataset, (image_size, way) = first.dataset, _decoding(first)
    indices = np.unique(np.concatenate([each.indices for each in inputs]))
    images = hashlib.sha256(b"".join(dataset.digests[index] for index in indices.tolist())).hexdigest()
    libraries = {name: metadata.version(name) for name in ("pillow", "simplejpeg")}
    identity = {"images": images, "decode": asdict(way), **libraries}
    rows = Rows("pixels", "x".join(map(str, image_size)), identity, indices, (*image_size, way.channels), np.uint8)
    if reason := no_room([rows]):
        print(f"images are decoded anew in every epoch: {reason}", flush=True)
        return None

    def compute(missing: np.ndarray) -> Iterator[np.ndarray]:
        wanted = Inputs(dataset, missing, image_size, batch_size=32, decode=way)
        for batch in eval_batches(wanted, dataset.images):
            yield batch["image"][batch["real"]]

    try:
        rows.fill(compute)
    except CacheError as error:  # of the cache alone: an image that cannot be read ends the run
        print(f"images are decoded anew in every epoch: {error}; set JAXFT_CACHE to another folder", flush=True)
        return None
    print(f"decoded images come from {rows.folder} ({rows.bytes / 1e6:.0f} MB)", flush=True)
    return rows


@dataclass(frozen=True)
class Decoded:
    """The images of a dataset of `length` images, as far as `rows` holds them."""

    rows: Rows
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> np.ndarray:
        return np.asarray(self.rows.take(index))


_FOREVER = 2**62


def _decoding(inputs: Inputs) -> tuple[tuple[int, int], Decode]:
    return inputs.image_size, inputs.decode


def _rows(batch_size: int, process: tuple[int, int]) -> slice:
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process {process}: expected (index, count) with an index of 0 to {count - 1}")
    if batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} does not divide among {count} processes: choose a multiple of {count}"
        )
    each = batch_size // count
    return slice(index * each, (index + 1) * each)


def _checked_order(inputs: Inputs, found: object) -> np.ndarray:
    wanted = f"order {inputs.order!r}: expected an integer array [{len(inputs)}] of examples of indices"
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
        kind = found.dtype if isinstance(found, np.ndarray) else type(found).__name__
        raise ValueError(f"{wanted}, found {kind}: return indices in another order, as order.shuffled does")
    if found.shape != inputs.indices.shape:
        raise ValueError(f"{wanted}, found the shape {list(found.shape)}: for fewer examples, give fewer indices")
    if len(others := np.setdiff1d(found, inputs.indices)):
        raise ValueError(f"{wanted}, found {others[0]}, which is not in indices")
    return found


def _load(inputs: Inputs, images: Images | None, indices: np.ndarray) -> Batch:
    dataset = inputs.dataset
    known = dataset.known[indices]
    label = np.where(known, dataset.labels[indices], 0)
    loaded = {
        "label": label.astype(np.int32 if dataset.target == "class" else np.float32),
        "known": known,
        "index": indices.astype(np.int32),
    }
    if images is None:
        return loaded
    pixels = np.empty((len(indices), *inputs.image_size, inputs.decode.channels), np.uint8)
    for row, index in enumerate(indices.tolist()):
        pixels[row] = decode.pixels(images[index], inputs.image_size, dataset.names[index], inputs.decode)
    return {"image": pixels, **loaded}


def _in_order(batch: Callable[[int], Batch], steps: range, workers: int | None, decodes: bool) -> Batches:
    """The batches of `steps` in order; those that decode are made by threads that run a little ahead."""
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    if not decodes:
        return (batch(step) for step in steps)  # takes less time than a thread's handing it over
    # Grain's threads make whole elements. One is a batch, so the batches in flight are the workers' and two ready.
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 2)
    batches = grain.MapDataset.range(steps.start, steps.stop).map(batch).to_iter_dataset(options)

    def iterate() -> Batches:
        iterator = iter(batches)
        try:
            yield from iterator
        finally:
            iterator.close()

    return iterate()
