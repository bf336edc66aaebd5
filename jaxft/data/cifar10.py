"""CIFAR-10: 60,000 photographs of 32×32 pixels in ten classes, through tensorflow-datasets without TensorFlow.

Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009; the binary version and its md5 from
the author's page.
"""

import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxft import fetch
from jaxft.data import Dataset

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)}
SIDE = 32
_RECORD = 1 + 3 * SIDE * SIDE  # bytes: the label, then the red, green and blue plane


def _examples(archive: Path, split: str, labels: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, (label, image) in enumerate(read(archive, FILES[split])):
        key = f"{split}_{number:05d}"
        labels.append(label)
        yield key, {"id": key, "image": _png(image), "label": label}


def _png(image: np.ndarray) -> bytes:
    """What tensorflow-datasets would make of the array, with TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def read(archive: Path, names: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """(label, image uint8 [32, 32, 3]) of each record in some files of the archive, read in place.

    Raises:
        ValueError: the archive is not whole, lacks a file, or a file is not of this format.
    """
    for name in names:
        try:
            with tarfile.open(archive) as tar:
                member = tar.extractfile(f"cifar-10-batches-bin/{name}")
                data = member.read() if member else b""
        except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError) as error:
            raise ValueError(f"{archive} is not the whole binary CIFAR-10 ({error}): fetch {URL} again") from error
        if not data or len(data) % _RECORD:
            raise ValueError(f"{archive}: {name} has {len(data)} bytes, expected a multiple of {_RECORD}")
        records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
        if records[:, 0].max() >= len(CLASSES):
            raise ValueError(f"{archive}: {name} holds label {records[:, 0].max()}, expected 0 to {len(CLASSES) - 1}")
        for record in records:
            yield int(record[0]), record[1:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)


def prepare(cache: str | os.PathLike[str] | None = None) -> tuple[Dataset, int]:
    """Fetches the archive (170 MB) and builds the records unless they are cached.

    Args:
        cache: folder of fetched files, as in `fetch.cache_folder`.

    Returns:
        (the training images and after them the test images, the number of the first). Each image is its own group.

    Raises:
        fetch.Unavailable: the archive cannot be fetched, or is not the one that was published.
        ValueError: as `read`.
    """
    folder = fetch.cache_folder(cache)
    archive = fetch.from_url(URL, f"md5:{MD5}", cache=folder)
    from jaxft.data import tfds_records  # tensorflow-datasets takes half a second to import

    labels: dict[str, list[int]] = {split: [] for split in FILES}
    records = tfds_records.Records(
        name="cifar10",
        version="3.0.2",
        release_notes="The features of tensorflow-datasets' builder of that version, which itself needs TensorFlow.",
        description="60,000 photographs of 32×32 pixels in ten classes, in the order of the binary version.",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        citation="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
        image=((SIDE, SIDE, 3), "png"),
        classes=CLASSES,
        texts=("id",),
        columns=labels,
        shards={split: [partial(_examples, archive, split, labels[split])] for split in FILES},
        total=60_000,
    )
    images, kept = tfds_records.open_or_build(records, folder / "tfds", tuple(FILES))
    names = tuple(f"{split}_{number:05d}" for split in FILES for number in range(len(kept[split])))
    dataset = Dataset(
        name="CIFAR-10",
        images=images,
        labels=np.asarray([label for split in FILES for label in kept[split]], np.int32),
        groups=names,
        names=names,
        classes=CLASSES,
    )
    return dataset, len(kept["train"])
