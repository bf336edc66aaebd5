"""Rows that are computed once and read often: one file on disk, on the device where it fits."""

import hashlib
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np

from jaxft import fetch, files
from jaxft.progress import bar

BLOCK_BYTES = 64 * 2**20  # written, synced and entered into the manifest together: what a crash can cost
SPARE_BYTES = 4 * 2**30  # left on the disk for checkpoints and for other programs


class CacheError(OSError):
    """A cache's own file cannot be written or read; errors of what is computed pass as they are."""


@contextmanager
def _own() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(str(error)) from error


class Rows:
    """An array of one shape for each of a set of images, in one file that is complete or in the making.

    `folder` holds `rows.bin`, rows in the order of `indices`, and `manifest.json`: the identity, and the length and
    CRC-32 of every block of rows. A block counts once it is synced and in the manifest. A run that dies loses at most
    one block; the next run verifies what is there and continues after it.
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
            kind: what the rows are, "features" or "pixels"; names their folder in the cache folder.
            name: begins the name of the file's own folder; a digest of all other arguments ends it.
            identity: what the rows depend on, as JSON values. Two caches of one identity hold the same bits.
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
        self._row = np.full(self.indices.max() + 2, len(self.indices))  # absent images, and the last for padding
        self._row[self.indices] = np.arange(len(self.indices))
        self._row[-1] = 0
        self._array: Any = None

    def missing(self) -> int:
        """How many rows are still to be computed."""
        return len(self.indices) - _rows(self._blocks())

    def fill(self, compute: Callable[[np.ndarray], Iterator[np.ndarray]]) -> None:
        """Verifies what is on disk, computes what is missing, and opens the cache.

        Args:
            compute: image indices, int [m] → their rows in order, in batches of any length.

        Raises:
            CacheError: the disk is full or cannot be written to; finished blocks stay.
        """
        with ExitStack() as alone:
            with _own():
                # A whole one wants no lock, and may lie on a disk that takes no writes.
                there = self._blocks()
                blocks = self._verified(there) if _rows(there) == len(self.indices) else []
                if _rows(blocks) < len(self.indices):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    alone.enter_context(fetch.sole_writer(self.file))
                    there = self._blocks()
                    blocks = self._verified(there)
            if len(blocks) < len(there):
                place = f"block {len(blocks) + 1} of {len(there)}"
                print(f"{self.file}: {place} is damaged; it and what follows is computed again")
            done = _rows(blocks)
            if done < len(self.indices):
                if reason := no_room([self]):
                    raise CacheError(reason)
                self._write(blocks, done, compute(self.indices[done:]))
        with _own():
            rows = np.memmap(self.file, self.dtype, "r", shape=(len(self.indices), *self.shape))
        self._array = to_device(rows)

    def take(self, indices: np.ndarray | int) -> Any:
        """The rows of some images, on the device if the cache is held there.

        Args:
            indices: numbers of images, int [...]; -1, for a padding row, gets the row of some image.

        Returns:
            [..., *shape].

        Raises:
            IndexError: the cache does not hold one of the images.
        """
        rows = self._row[indices]
        if np.max(rows) >= len(self.indices):
            raise IndexError(f"{self.folder} does not hold the {self.kind} of all the images asked for")
        return self._array[rows]

    @property
    def array(self) -> Any:
        """All rows in the order of `indices`, [n, *shape]: on the device, or mapped from the file."""
        return self._array

    def on_device(self) -> bool:
        """Whether the opened cache is held on the device."""
        return isinstance(self._array, jax.Array)

    def _blocks(self) -> list[tuple[int, int]]:
        """(rows, CRC-32) for every block in the manifest."""
        if not self.manifest.exists() or not self.file.exists():
            return []
        try:
            return [(rows, crc) for rows, crc in json.loads(self.manifest.read_text(encoding="utf-8"))["blocks"]]
        except (ValueError, KeyError, TypeError):
            print(f"{self.manifest} is damaged; all of it is computed again", flush=True)
            return []

    def _verified(self, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The first of some blocks of the manifest, as far as the file holds what they say."""
        if not blocks:
            return []
        with self.file.open("rb") as file:
            for i, (rows, crc) in enumerate(blocks):
                if zlib.crc32(file.read(rows * self.row_bytes)) != crc:
                    return blocks[:i]
        return blocks

    def _write(self, blocks: list[tuple[int, int]], done: int, batches: Iterator[np.ndarray]) -> None:
        with _own():
            self._keep(done * self.row_bytes)
            file = self.file.open("r+b" if self.file.exists() else "wb")
        with file, bar(self.kind, len(self.indices), done) as advance:
            with _own():
                file.seek(0, os.SEEK_END)
            rows, crc = 0, 0
            for batch in batches:
                block = np.ascontiguousarray(batch).view(np.uint8).data
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

    def _keep(self, size: int) -> None:
        """Leaves the first bytes of the file, in a copy: another process may be reading the damaged one that it was."""
        if not self.file.exists() or self.file.stat().st_size == size:
            return

        def copy(path: pathlib.Path) -> None:
            with self.file.open("rb") as whole, path.open("wb") as part:
                for left in range(size, 0, -BLOCK_BYTES):
                    part.write(whole.read(min(left, BLOCK_BYTES)))

        files.write_whole(self.file, copy)


def _rows(blocks: Iterable[tuple[int, int]]) -> int:
    return sum(rows for rows, _ in blocks)


def no_room(caches: Iterable[Rows]) -> str | None:
    """Why the rows that caches of one kind lack will not fit on the disk together; None if they will."""
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
    """The array on the device, if there is one whose free memory is twice as large; on a CPU, and else, as it is."""
    stats = jax.devices()[0].memory_stats() or {}
    if jax.device_count() > 1 or "bytes_limit" not in stats:
        return array
    return jax.device_put(array) if array.nbytes < (stats["bytes_limit"] - stats["bytes_in_use"]) / 2 else array
