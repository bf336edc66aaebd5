"""Reads an HDF5 file in a process of its own, with limits.

On some damaged or hostile files the HDF5 library itself falls into an endless loop or a segmentation fault, which no
exception can catch.

Source: what mutated weight files did to HDF5 1.14 (`tests/attacks/`).
"""

import io
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
from typing import IO, Any

SECONDS = 15  # of the processor; whole ImageNet files take less than one
WAIT = 120  # seconds, on a disk that is slow
BYTES = 8 * 2**30  # of address space
OBJECTS = 200_000  # groups and arrays
RATIO, FREE_BYTES = 100, 64 * 2**20  # read for each byte stored, beyond a size that harms nobody


def probe(path: pathlib.Path, member: str | None = None) -> str | None:
    """What is wrong with a file, or with a member of a zip; None if HDF5 can read it.

    It costs a start of Python with h5py: 0.15 s.
    """
    command = [sys.executable, "-I", "-S", __file__, json.dumps(sys.path), str(path), member or ""]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=WAIT, check=False, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"HDF5 comes to no end with it in {WAIT} s"
    if done.returncode < 0:
        died_of = signal.Signals(-done.returncode).name
        endless = died_of in ("SIGXCPU", "SIGKILL")
        return f"HDF5 comes to no end with it in {SECONDS} s" if endless else f"it makes HDF5 crash ({died_of})"
    return None if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2][:300] or "HDF5 cannot read it"


def is_stored(size: int, stored: int) -> bool:
    """Whether `size` bytes, of which so many are stored, are what they say, and no bomb."""
    return size <= max(FREE_BYTES, RATIO * stored)


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: str | pathlib.Path, start: int, size: int):
        self.file, self.start, self.size, self.place = open(path, "rb"), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self.size - self.place, 0)]
        self.file.seek(self.start + self.place)
        count = self.file.readinto(view)
        self.place += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def open_member(path: str | pathlib.Path, member: str) -> IO[bytes]:
    """A member of a zip as a file. One that is stored as it is, as in `.keras` files, is read in its place.

    Python's own reader goes back to the start of a member for each seek backwards (before 3.12), of which HDF5 makes
    hundreds: 250 MB took a minute.
    """
    import zipfile  # which a file without a member needs not

    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            return archive.open(member)  # stays open without the archive
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile(f"{member} is not where the zip says")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    return _Part(path, start, info.file_size)  # type: ignore[return-value]


def _read(path: str, member: str) -> None:
    """All names, attributes and shapes; and the arrays that are compressed."""
    import h5py

    count = 0

    def visit(_name: str, found: h5py.Group | h5py.Dataset) -> None:
        nonlocal count
        count += 1
        if count > OBJECTS:
            raise ValueError(f"it holds more than {OBJECTS:,} groups and arrays")
        for key in found.attrs:
            found.attrs.get(key)
        if isinstance(found, h5py.Dataset) and found.chunks is not None and found.id.get_storage_size():
            if is_stored(found.size * found.dtype.itemsize, found.id.get_storage_size()):  # else nobody reads it
                found[()]

    with h5py.File(open_member(path, member) if member else path, "r") as file:
        visit("/", file)
        file.visititems(visit)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # Windows has no limits, and others may have lower ones
        pass
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each takes address space
    _read(*sys.argv[2:])
