"""Images in the records of tensorflow-datasets (TFDS), built and read without TensorFlow.

Import this where records are needed, not at the top of a module: tensorflow-datasets takes half a second.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from jaxft.progress import bar

Shard = Callable[[], Iterator[tuple[str, dict[str, Any]]]]
"""Gives (key, features) of its examples: "image" as encoded bytes, "label" and the texts."""


@dataclass(frozen=True)
class Records:
    """What is built.

    Attributes:
        name, version: of the TFDS dataset.
        release_notes: of this version.
        description, homepage, citation: for the record's readers.
        image: (shape with None for what varies, encoding "jpeg" or "png").
        classes: names of the labels.
        texts: names of the text features.
        columns: JSON values that the shards fill while they run, and that are kept beside the records.
        shards: of each split, in order.
        total: examples of all splits.
    """

    name: str
    version: str
    release_notes: str
    description: str
    homepage: str
    citation: str
    image: tuple[tuple[int | None, ...], str]
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    columns: Mapping[str, Any]
    shards: Mapping[str, Sequence[Shard]]
    total: int


@dataclass(frozen=True)
class Images:
    """The encoded images in one feature of raw TFDS records, one source after another."""

    sources: tuple[Any, ...]
    feature: str = "image"

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int, /) -> bytes:
        return self.example(index)[self.feature].bytes_list.value[0]

    def example(self, index: int) -> Mapping[str, Any]:
        """The encoded features of an example, by name."""
        for source in self.sources:
            if index < len(source):
                # TFDS's own decoding of the other features takes six times as long as this.
                example = tf_example_pb2.Example.FromString(source[index])  # pyright: ignore[reportAttributeAccessIssue]
                return example.features.feature
            index -= len(source)
        raise IndexError(f"there are {len(self)} images")


def open_or_build(records: Records, place: Path, splits: Sequence[str]) -> tuple[Images, Mapping[str, Any]]:
    """The images of `splits`, one after another, and the columns that were kept, after building what is not there yet.

    Args:
        records: what is built.
        place: folder of the build; the build appears in it whole or not at all.
        splits: those that are read.

    Raises:
        FileNotFoundError: the build lacks a file.
        OSError: it cannot be written.
    """
    if not _Builder(records, place).data_path.exists():  # it appears, whole, by renaming
        try:
            _build(records, place)
        except OSError:
            if not _Builder(records, place).data_path.exists():  # else another process was faster: the renaming failed
                raise
    builder: Any = _Builder(records, place)  # tensorflow-datasets' decorators hide its signatures
    missing = [path.name for split in splits for path in builder.info.splits[split].filepaths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{builder.data_path} lacks {', '.join(missing[:5])}: delete that folder and run again")
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    sources = tuple(builder.as_data_source(split, deserialize_method=raw) for split in splits)
    return Images(sources), builder.info.metadata


def _build(records: Records, place: Path) -> None:
    config = tfds.download.DownloadConfig(
        manual_dir=place, try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    # tensorflow-datasets announces itself on stdout, with sizes that it does not know.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with bar(f"building {records.name}", records.total) as advance, quiet:
        builder = _Builder(records, place, lambda: advance(1))
        builder.download_and_prepare(download_config=config)


class _Info(tfds.core.DatasetInfo):
    """Looks for no statistics in TFDS's bucket; looking leaves an empty folder in the system's temporary one."""

    def initialize_from_bucket(self) -> None:
        pass


class _Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """The builder of any `Records`: a ShardBasedBuilder, because that keeps the order and streams.

    GeneratorBasedBuilder keeps up to 1000 MiB in memory to shuffle it, and above that shuffles in files that
    only an installed TensorFlow can write.
    """

    name = "records"  # each instance gets the name of its records

    # Where tensorflow-datasets would find this out, it imports importlib_resources, which nothing installs.
    code_path = epath.Path(__file__)

    def __init__(self, records: Records, place: Path, on_example: Callable[[], object] = lambda: None):
        # Set on the instance, as tensorflow-datasets' own AdhocBuilder does.
        self.name = records.name  # pyright: ignore[reportAttributeAccessIssue]
        self.VERSION = tfds.core.Version(records.version)
        self.RELEASE_NOTES = {records.version: records.release_notes}  # pyright: ignore[reportAttributeAccessIssue]
        self.records, self.on_example = records, on_example
        super().__init__(data_dir=place, file_format=tfds.core.FileFormat.ARRAY_RECORD)

    def _info(self) -> tfds.core.DatasetInfo:
        shape, encoding = self.records.image
        return _Info(
            builder=self,
            description=self.records.description,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=shape, encoding_format=encoding),
                    "label": tfds.features.ClassLabel(names=list(self.records.classes)),
                    **{name: tfds.features.Text() for name in self.records.texts},
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
            homepage=self.records.homepage,
            citation=self.records.citation,
            metadata=tfds.core.MetadataDict(),
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Any]]:
        metadata: Any = self.info.metadata
        metadata.update(self.records.columns)  # written to a file when all records are

        def counted(shard: Shard) -> Callable[[], Iterator[tuple[str, dict[str, Any]]]]:
            def examples() -> Iterator[tuple[str, dict[str, Any]]]:
                for example in shard():
                    yield example
                    self.on_example()

            return examples

        return {split: [counted(shard) for shard in shards] for split, shards in self.records.shards.items()}
