"""The feature cache: what a wholly frozen prefix of stages gives, computed once and read from disk in every epoch.

Its inputs must repeat: images without augmentation, or a fixed number of augmented views of each. Training on cached
features gives the same losses bit for bit as computing them at every step, because both run the same programs.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxft import fetch, masking, report
from jaxft.data.augment import warp
from jaxft.progress import bar

BLOCK_BYTES = 64 * 2**20  # written, synced and entered into the manifest together: what a crash can cost
SPARE_BYTES = 2**30  # of the disk, left to others

Prefix = Callable[[Mapping[str, Any], Any, Any], jax.Array]
"""(variables, uint8 images [B, H, W, 3], None or the `row` of each) → what the last frozen stage gives."""


def cut(net: Any, frozen: frozenset[str], weighted: Sequence[str]) -> str | None:
    """The last stage of the longest prefix of `net` that is wholly frozen and the same in every pass; None if none is.

    A stage with active dropout ends the prefix. Auxiliary heads, which read inner stages, allow none.
    """
    stage = masking.frozen_prefix(net, frozen, weighted)
    if stage is None or getattr(net, "auxiliary", False):
        return None
    last = None
    for name, layers in net.layers().items():
        if getattr(net, "dropout", 0.0) and any("dropout" in layer for layer in layers):
            break
        last = name
        if name == stage:
            break
    return last


def row(view: int, index: np.ndarray, examples: int) -> np.ndarray:
    """The number, int32 [B], of a view of each of the images `index`, from which its augmentation is drawn."""
    return (view * examples + index).astype(np.int32)


def make_prefix(
    net: nn.Module,
    stage: str,
    normalise: Callable[[jax.Array], jax.Array],
    augmentation: Mapping[str, Any],
    seed: int,
) -> Prefix:
    """The jitted net up to `stage`; images that come with rows are augmented, each row in its own way."""

    @jax.jit
    def prefix(variables: Mapping[str, Any], images: jax.Array, rows: jax.Array | None) -> jax.Array:
        if rows is not None:
            images = warp(jax.random.key(seed), images, rows, **augmentation)
        return net.apply(variables, normalise(images), train=False)[1][stage]  # type: ignore[index]

    return prefix


def identity(net: nn.Module, variables: Mapping[str, Any], stage: str, **inputs: Any) -> dict[str, Any]:
    """What the features depend on, as JSON values: two caches of one identity hold the same bits.

    Args:
        net, variables: the backbone and what fills it; weights behind `stage` do not count.
        stage: where it is cut.
        inputs: what makes the inputs: the images, their size, preprocessing, augmentation and view.
    """
    weights = hashlib.sha256()
    prefix = {layer for name, layers in _until(net.layers(), stage) for layer in layers}  # type: ignore[attr-defined]
    for collection in ("params", "batch_stats"):
        for layer in sorted(prefix & set(variables.get(collection, {}))):
            for leaf, value in sorted(variables[collection][layer].items()):
                weights.update(f"{collection}/{layer}/{leaf}".encode())
                weights.update(np.ascontiguousarray(value))
    apart = ("parent", "name", "frozen", "num_classes")
    fields = {f.name: str(getattr(net, f.name)) for f in dataclasses.fields(net) if f.name not in apart}
    found = {"net": type(net).__name__, "fields": fields, "stage": stage, "weights": weights.hexdigest(), **inputs}
    versions = report.versions()
    return json.loads(json.dumps(found | {"jax": versions["jaxlib"], "device": versions["device"]}))


def _until(stages: Mapping[str, Any], last: str) -> Iterator[tuple[str, Any]]:
    for name, layers in stages.items():
        yield name, layers
        if name == last:
            return


class Cache:
    """The features of a set of images in one file, complete or in the making.

    `folder` holds `features.bin`, rows in the order of `indices`, and `manifest.json`: the identity, and of every
    block of rows the length and CRC-32. A block counts once it is synced and in the manifest, so that a run which dies
    loses at most one; the next one verifies what is there and goes on behind it.
    """

    def __init__(self, identity: Mapping[str, Any], indices: np.ndarray, shape: tuple[int, ...], dtype: Any):
        """Of features `shape` and `dtype` (each image's) for the images `indices`, int [n], of a dataset."""
        self.indices, self.shape, self.dtype = np.asarray(indices, np.int64), shape, np.dtype(dtype)
        images = hashlib.sha256(self.indices.tobytes()).hexdigest()
        self.identity = {**identity, "indices": images, "shape": list(shape), "dtype": self.dtype.name}
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.folder = fetch.cache_folder() / "features" / f"{identity['net'].lower()}-{identity['stage']}-{digest[:16]}"
        self.file, self.manifest = self.folder / "features.bin", self.folder / "manifest.json"
        self.row_bytes = math.prod(shape) * self.dtype.itemsize
        self.bytes = len(self.indices) * self.row_bytes
        self._row = np.zeros(self.indices.max() + 1, np.int64)
        self._row[self.indices] = np.arange(len(self.indices))
        self._array: Any = None

    def missing(self) -> int:
        """How many rows are still to be computed."""
        return len(self.indices) - sum(rows for rows, _ in self._blocks())

    def no_room(self) -> str | None:
        """Why what is missing will not fit on the disk; None if it will."""
        nearest = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        need, free = self.missing() * self.row_bytes, shutil.disk_usage(nearest).free
        if need + SPARE_BYTES <= free:
            return None
        return (
            f"the features need {need / 1e9:.1f} GB, and {SPARE_BYTES / 1e9:.1f} GB stay free, but {nearest} has "
            f"{free / 1e9:.1f} GB; make room or set JAXFT_CACHE to another disk"
        )

    def fill(self, compute: Callable[[np.ndarray], Iterator[np.ndarray]]) -> None:
        """Verifies what is on disk, computes what is missing, and opens the cache.

        Args:
            compute: image indices, int [m] → their features in order, in batches of any length.

        Raises:
            OSError: the disk is full or cannot be written to; finished blocks stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with fetch.sole_writer(self.file):
            blocks = self._verified()
            done = sum(rows for rows, _ in blocks)
            if done < len(self.indices):
                if reason := self.no_room():
                    raise OSError(reason)
                self._write(blocks, done, compute(self.indices[done:]))
        self._array = np.memmap(self.file, self.dtype, "r", shape=(len(self.indices), *self.shape))
        self._array = to_device(self._array)

    def take(self, indices: np.ndarray) -> Any:
        """The features of the images `indices`, int [B]: [B, *shape], on the device if the cache is held there.

        Padding rows, index -1, get those of some image.
        """
        return self._array[self._row[indices]]

    def _blocks(self) -> list[tuple[int, int]]:
        """(rows, CRC-32) of every block in the manifest."""
        if not self.manifest.exists() or not self.file.exists():
            return []
        return [(rows, crc) for rows, crc in json.loads(self.manifest.read_text())["blocks"]]

    def _verified(self) -> list[tuple[int, int]]:
        """The leading blocks of the file that are what the manifest says."""
        blocks = self._blocks()
        if not blocks:
            return []
        with self.file.open("rb") as file:
            for i, (rows, crc) in enumerate(blocks):
                if zlib.crc32(file.read(rows * self.row_bytes)) != crc:
                    print(
                        f"{self.file}: block {i + 1} of {len(blocks)} is damaged; it and what follows is computed again"
                    )
                    return blocks[:i]
        return blocks

    def _write(self, blocks: list[tuple[int, int]], done: int, batches: Iterator[np.ndarray]) -> None:
        with self.file.open("r+b" if self.file.exists() else "wb") as file:
            file.truncate(done * self.row_bytes)
            file.seek(0, os.SEEK_END)
            rows, crc = 0, 0
            with bar("features", len(self.indices), done) as advance:
                for batch in batches:
                    block = np.ascontiguousarray(batch).view(np.uint8)
                    file.write(block)
                    rows, crc = rows + len(batch), zlib.crc32(block, crc)
                    done += len(batch)
                    if rows * self.row_bytes >= BLOCK_BYTES or done == len(self.indices):
                        file.flush()
                        os.fsync(file.fileno())
                        blocks = [*blocks, (rows, crc)]
                        report.write_json(self.manifest, {"identity": self.identity, "blocks": blocks})
                        rows, crc = 0, 0
                    advance(len(batch))


def to_device(array: np.ndarray) -> Any:
    """The array on the one device of the run if half of its free memory holds it; else, and on a CPU, as it is."""
    if jax.device_count() > 1 or not (stats := jax.devices()[0].memory_stats()):
        return array
    return jax.device_put(array) if array.nbytes < (stats["bytes_limit"] - stats["bytes_in_use"]) / 2 else array


def seconds(compute: Callable[[], Any]) -> float:
    """Of the second call; the first one compiles."""
    jax.block_until_ready(compute())
    began = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - began


def write_rate(folder: pathlib.Path) -> float:
    """Bytes a second that reach the disk of `folder`, of 32 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    probe, content = folder / f"probe-{os.getpid()}", os.urandom(2**20)
    try:
        with probe.open("wb") as file:
            began = time.perf_counter()
            for _ in range(32):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            return 32 * len(content) / (time.perf_counter() - began)
    finally:
        probe.unlink(missing_ok=True)


def pays(caches: Sequence[Cache], uses: int, image_seconds: float) -> tuple[bool, str]:
    """(whether the caches save time, a line that says why).

    Args:
        caches: what would be made.
        uses: images that the run sends through the prefix without a cache, each as often as it is used.
        image_seconds: measured, of the prefix for one image.
    """
    if reason := next((reason for cache in caches if (reason := cache.no_room())), None):
        return False, reason
    todo, row_bytes = sum(cache.missing() for cache in caches), caches[0].row_bytes
    row_seconds = row_bytes / write_rate(caches[0].folder.parent)  # reading is no slower than writing
    with_it = todo * (image_seconds + row_seconds) + uses * row_seconds
    without = uses * image_seconds
    size = sum(cache.bytes for cache in caches) / 1e6
    return with_it < without, (
        f"features of {caches[0].identity['stage']!r}: {with_it:.0f} s to make and read ({todo} images to compute, "
        f"{size:.0f} MB), {without:.0f} s to compute every time"
    )


def open_cache(
    prefix: Prefix,
    variables: Mapping[str, Any],
    identity: Mapping[str, Any],
    batches: Callable[[np.ndarray], Iterator[dict[str, np.ndarray]]],
    wanted: Mapping[int | None, np.ndarray],
    *,
    examples: int,
    uses: int,
    required: bool,
) -> dict[int | None, Cache] | None:
    """The features of every wanted view, computed where the disk does not hold them; None where that does not pay.

    Args:
        prefix, variables: what computes them.
        identity: from the function of that name.
        batches: image indices, int [m] → their batches in order, as `loader.eval_batches` gives them.
        wanted: number of a view, None without augmentation → images, int [n].
        examples: in the dataset.
        uses: images that go through the prefix in the run without a cache.
        required: make the caches even where they do not pay.

    Raises:
        OSError: they are required and do not fit on the disk, or it cannot be written to.
    """

    def inputs(view: int | None, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
        return batch["image"], None if view is None else row(view, batch["index"], examples)

    first_view, first_indices = next(iter(wanted.items()))
    first = inputs(first_view, next(iter(batches(first_indices))))
    like = jax.eval_shape(prefix, variables, *first)
    caches = {
        view: Cache({**identity, "view": view}, indices, like.shape[1:], like.dtype) for view, indices in wanted.items()
    }
    if not required and any(cache.missing() for cache in caches.values()):
        image_seconds = seconds(lambda: prefix(variables, *first)) / len(first[0])
        worth_it, why = pays(list(caches.values()), uses, image_seconds)
        print(f"feature cache {'on' if worth_it else 'off'}: {why}", flush=True)
        if not worth_it:
            return None
    for view, cache in caches.items():

        def compute(indices: np.ndarray, view: int | None = view) -> Iterator[np.ndarray]:
            for batch in batches(indices):
                yield np.asarray(prefix(variables, *inputs(view, batch)))[batch["weight"] > 0]

        cache.fill(compute)
    folders = {cache.folder.parent for cache in caches.values()}
    size = sum(cache.bytes for cache in caches.values()) / 1e6
    print(f"features of {identity['stage']!r} come from {folders.pop()} ({size:.0f} MB)", flush=True)
    return caches
