"""Rows that are computed once and read often: one file on disk, on the device where it fits."""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jaxft import fetch, files
from jaxft.progress import bar

BLOCK_BYTES = 64 * 2**20  # written, synced and entered into the manifest together: what a crash can cost
SPARE_BYTES = 4 * 2**30  # of the disk, left to checkpoints and to others


class CacheError(OSError):
    """A cache's own file cannot be written or read; errors of what is computed pass as they are."""


@contextmanager
def _own() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(str(error)) from error


class Rows:
    """What was computed of each of a set of images, an array of one shape, in one file; complete or in the making.

    `folder` holds `rows.bin`, rows in the order of `indices`, and `manifest.json`: the identity, and of every
    block of rows the length and CRC-32. A block counts once it is synced and in the manifest, so that a run which dies
    loses at most one; the next one verifies what is there and goes on behind it.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        identity: Mapping[str, Any],
        indices: np.ndarray,
        shape: tuple[int, ...],
        dtype: Any,
    ):
        """
        Args:
            kind: what the rows are, "features" or "pixels"; their folder in the cache folder.
            name: of the file's own folder, before a digest of all that follows.
            identity: what the rows depend on, as JSON values: two caches of one identity hold the same bits.
            indices: images of a dataset, int [n].
            shape, dtype: of each row.
        """
        self.kind = kind
        self.indices, self.shape, self.dtype = np.asarray(indices, np.int64), shape, np.dtype(dtype)
        images = hashlib.sha256(self.indices.tobytes()).hexdigest()
        self.identity = {**identity, "indices": images, "shape": list(shape), "dtype": self.dtype.name}
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.folder = fetch.cache_folder() / kind / f"{name}-{digest[:16]}"
        self.file, self.manifest = self.folder / "rows.bin", self.folder / "manifest.json"
        self.row_bytes = math.prod(shape) * self.dtype.itemsize
        self.bytes = len(self.indices) * self.row_bytes
        self._row = np.full(self.indices.max() + 2, len(self.indices))  # the last for padding, and absent ones
        self._row[self.indices] = np.arange(len(self.indices))
        self._row[-1] = 0
        self._array: Any = None

    def missing(self) -> int:
        """How many rows are still to be computed."""
        return len(self.indices) - sum(rows for rows, _ in self._blocks())

    def fill(self, compute: Callable[[np.ndarray], Iterator[np.ndarray]]) -> None:
        """Verifies what is on disk, computes what is missing, and opens the cache.

        Args:
            compute: image indices, int [m] → their rows in order, in batches of any length.

        Raises:
            CacheError: the disk is full or cannot be written to; finished blocks stay.
        """
        with _own():
            self.folder.mkdir(parents=True, exist_ok=True)
        with fetch.sole_writer(self.file):
            blocks = self._verified()
            done = sum(rows for rows, _ in blocks)
            if done < len(self.indices):
                if reason := no_room([self]):
                    raise CacheError(reason)
                self._write(blocks, done, compute(self.indices[done:]))
        self._array = np.memmap(self.file, self.dtype, "r", shape=(len(self.indices), *self.shape))
        self._array = to_device(self._array)

    def take(self, indices: np.ndarray) -> Any:
        """The rows of the images `indices`, int [...]: [..., *shape], on the device if the cache is held there.

        Padding rows, index -1, get those of some image.

        Raises:
            IndexError: an image is none of the cache's.
        """
        rows = self._row[indices]
        if np.max(rows) >= len(self.indices):
            raise IndexError(f"the {self.kind} in {self.folder} are not of all the images asked for")
        return self._array[rows]

    def on_device(self) -> bool:
        """Whether the opened cache is held on the device."""
        return isinstance(self._array, jax.Array)

    def _blocks(self) -> list[tuple[int, int]]:
        """(rows, CRC-32) of every block in the manifest."""
        if not self.manifest.exists() or not self.file.exists():
            return []
        try:
            return [(rows, crc) for rows, crc in json.loads(self.manifest.read_text(encoding="utf-8"))["blocks"]]
        except (ValueError, KeyError, TypeError):
            print(f"{self.manifest} is damaged; all of it is computed again", flush=True)
            return []

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
        with _own():
            file = self.file.open("r+b" if self.file.exists() else "wb")
        with file, bar(self.kind, len(self.indices), done) as advance:
            with _own():
                file.truncate(done * self.row_bytes)
                file.seek(0, os.SEEK_END)
            rows, crc = 0, 0
            for batch in batches:
                block = np.ascontiguousarray(batch).view(np.uint8)
                rows, crc, done = rows + len(batch), zlib.crc32(block, crc), done + len(batch)
                with _own():
                    file.write(block)
                    if rows * self.row_bytes >= BLOCK_BYTES or done == len(self.indices):
                        file.flush()
                        os.fsync(file.fileno())
                        blocks = [*blocks, (rows, crc)]
                        files.write_json(self.manifest, {"identity": self.identity, "blocks": blocks})
                        rows, crc = 0, 0
                advance(len(batch))


def no_room(caches: Iterable[Rows]) -> str | None:
    """Why what is missing in caches of one kind will not fit on the disk, all together; None if it will."""
    first, *others = caches
    nearest = next(folder for folder in (first.folder, *first.folder.parents) if folder.exists())
    need = sum(cache.missing() * cache.row_bytes for cache in (first, *others))
    free = shutil.disk_usage(nearest).free
    if not need or need + SPARE_BYTES <= free:
        return None
    return (
        f"the {first.kind} need {need / 1e9:.1f} GB, and {SPARE_BYTES / 1e9:.1f} GB stay free, but {nearest} has "
        f"{free / 1e9:.1f} GB; make room or set JAXFT_CACHE to another disk"
    )


def to_device(array: np.ndarray) -> Any:
    """The array on the one device of the run if half of its free memory holds it; else, and on a CPU, as it is."""
    stats = jax.devices()[0].memory_stats() or {}
    if jax.device_count() > 1 or "bytes_limit" not in stats:
        return array
    return jax.device_put(array) if array.nbytes < (stats["bytes_limit"] - stats["bytes_in_use"]) / 2 else array
