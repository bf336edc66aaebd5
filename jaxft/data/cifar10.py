"""CIFAR-10: 60,000 photographs of 32×32 pixels in ten classes, through tensorflow-datasets without TensorFlow.

Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009; the binary version and its md5 from
the author's page.
"""

import contextlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from jaxft import fetch
from jaxft.data import Dataset

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)}
SIDE = 32
_RECORD = 1 + 3 * SIDE * SIDE  # bytes: the label, then the red, green and blue plane


class Cifar10(tfds.core.ShardBasedBuilder):
    """The images of the binary version in its order; that of tensorflow-datasets' own builder needs TensorFlow."""

    VERSION = tfds.core.Version("3.0.2")
    RELEASE_NOTES = {"3.0.2": "The features of tensorflow-datasets' builder of that version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The file {URL}"

    # Where tensorflow-datasets would find this out, it imports importlib_resources, which nothing installs.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            metadata=tfds.core.MetadataDict(),
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Any]]:
        archive = Path(dl_manager.manual_dir) / URL.rpartition("/")[2]
        labels: dict[str, list[int]] = {split: [] for split in FILES}
        metadata: Any = self.info.metadata
        metadata.update(labels)  # written to a file when all records are
        return {split: [partial(_examples, archive, split, labels[split])] for split in FILES}


class _Info(tfds.core.DatasetInfo):
    """Looks for no statistics in TFDS's bucket."""

    def initialize_from_bucket(self) -> None:
        pass


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
    """(label, image uint8 [32, 32, 3]) of each record of some files of the archive, which is read in place.

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


@dataclass(frozen=True)
class _Images:
    """The PNG bytes of the images of both splits, training first."""

    train: Any
    test: Any

    def __len__(self) -> int:
        return len(self.train) + len(self.test)

    def __getitem__(self, index: int, /) -> bytes:
        first = len(self.train)
        return self.train[index]["image"] if index < first else self.test[index - first]["image"]


def prepare(cache: str | os.PathLike[str] | None = None) -> tuple[Dataset, int]:
    """Fetches the archive (170 MB) and builds the records unless they are cached.

    Args:
        cache: folder of fetched files, as in `fetch.cache_folder`.

    Returns:
        (the training images and behind them the test images, the number of the first). Each image is its own group.

    Raises:
        fetch.Unavailable: the archive cannot be fetched, or is not the one that was published.
        ValueError: as `read`.
    """
    folder = fetch.cache_folder(cache)
    archive = fetch.from_url(URL, f"md5:{MD5}", cache=folder)
    builder: Any = Cifar10(data_dir=folder / "tfds", file_format=tfds.core.FileFormat.ARRAY_RECORD)
    if not builder.data_path.exists():  # it appears, whole, by renaming
        config = tfds.download.DownloadConfig(
            manual_dir=archive.parent, try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
        )
        # tensorflow-datasets announces itself on stdout, with sizes that it does not know.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    skip = {"image": tfds.decode.SkipDecoding()}
    sources = {split: builder.as_data_source(split, decoders=skip) for split in FILES}
    labels = [label for split in FILES for label in builder.info.metadata[split]]
    names = [f"{split}_{number:05d}" for split, source in sources.items() for number in range(len(source))]
    dataset = Dataset(
        name="CIFAR-10",
        images=_Images(sources["train"], sources["test"]),
        labels=np.asarray(labels, np.int32),
        groups=tuple(names),
        names=tuple(names),
        classes=CLASSES,
    )
    return dataset, len(sources["train"])
