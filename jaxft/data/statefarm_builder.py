"""The tensorflow-datasets builder of State Farm, and how the project calls it."""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from jaxft.data import Dataset, decode, statefarm
from jaxft.progress import bar

_SHARD = 512  # examples; tensorflow-datasets holds those of one shard in memory, here about 25 MB


class _Info(tfds.core.DatasetInfo):
    """Looks for no statistics in TFDS's bucket; looking leaves an empty folder in the system's temporary one."""

    def initialize_from_bucket(self) -> None:
        pass


class StateFarmDistractedDriver(tfds.core.ShardBasedBuilder):
    """Drivers at ten occupations: image (the bytes of Kaggle's JPEG), label, driver, filename.

    The order of the examples is that of the csv (train) and of the file names (test). Built on ShardBasedBuilder, which
    streams: GeneratorBasedBuilder keeps up to 1000 MiB in memory to shuffle it, and above that shuffles in files that
    only an installed TensorFlow can write.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The files of the competition of 2016."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Accept the competition's rules and download its data.\n{statefarm.LAYOUT}"

    # Where tensorflow-datasets would find this out, it imports importlib_resources, which nothing installs.
    code_path = epath.Path(__file__)

    on_example: Callable[[], None] | None = None
    """Called after each example that is built."""

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(
            builder=self,
            description="Dashboard photographs of drivers, 640×480, in ten classes, each with its driver's name.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(statefarm.CLASSES)),
                    "driver": tfds.features.Text(),
                    "filename": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
            homepage=statefarm.URL,
            citation=(
                "@misc{statefarm2016, title={State Farm Distracted Driver Detection}, "
                "author={Anna Montoya and Dan Holman and SF\\_data\\_science and Taylor Smith and Wendy Kan}, "
                f"year={{2016}}, publisher={{Kaggle}}, url={{{statefarm.URL}}}}}"
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Callable]]:
        layout = statefarm.open_layout(Path(dl_manager.manual_dir))
        columns: dict[str, dict[str, Any]] = {
            split: {"labels": [], "drivers": [], "filenames": []} for split in layout.splits
        }
        metadata: Any = self.info.metadata
        metadata.update(columns)  # written to a file when all records are
        return {
            split: [
                functools.partial(self._generate_shard, layout, examples[first : first + _SHARD], columns[split])
                for first in range(0, len(examples), _SHARD)
            ]
            for split, examples in layout.splits.items()
        }

    def _generate_shard(
        self, layout: statefarm.Layout, examples: tuple[statefarm.Example, ...], columns: dict[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for example in examples:
            image = layout.read(example.path)
            decode.jpeg_size(image, example.path)
            label = list(statefarm.CLASSES).index(example.classname) if example.classname else -1
            columns["labels"].append(label)
            columns["drivers"].append(example.driver)
            columns["filenames"].append(example.filename)
            row = {"image": image, "label": label, "driver": example.driver, "filename": example.filename}
            yield example.path, row
            if self.on_example:
                self.on_example()


def build(layout: statefarm.Layout, data_dir: Path, cache_dir: Path, split: str) -> Dataset:
    """Open `split` of the build of this very layout, after building it where it is not there yet."""
    place = cache_dir / "statefarm" / layout.key[:16]
    if not _builder(place).data_path.exists():  # it appears, whole, by renaming
        try:
            _generate(layout, data_dir, place)
        except OSError:
            if not _builder(place).data_path.exists():  # else another process was faster: the renaming failed
                raise
    builder: Any = _builder(place)  # tensorflow-datasets' decorators hide its signatures
    missing = [path.name for path in builder.info.splits[split].filepaths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{builder.data_path} lacks {', '.join(missing[:5])}: delete that folder and run again")
    columns = builder.info.metadata[split]
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return Dataset(
        name=f"State Farm, {split}",
        images=_Images(records),
        labels=np.asarray(columns["labels"], np.int32),
        groups=tuple(columns["drivers"]),
        names=tuple(columns["filenames"]),
        classes=tuple(statefarm.CLASSES.values()),
    )


def _builder(place: Path) -> StateFarmDistractedDriver:
    return StateFarmDistractedDriver(data_dir=place, file_format=tfds.core.FileFormat.ARRAY_RECORD)


def _generate(layout: statefarm.Layout, data_dir: Path, place: Path) -> None:
    config = tfds.download.DownloadConfig(
        manual_dir=data_dir, try_download_gcs=False, compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    builder = _builder(place)
    # tensorflow-datasets announces itself on stdout, with sizes that it does not know.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with bar("reading State Farm", sum(map(len, layout.splits.values()))) as advance, quiet:
        builder.on_example = functools.partial(advance, 1)
        builder.download_and_prepare(download_config=config)


@dataclass(frozen=True)
class _Images:
    """The bytes of the images of TFDS records."""

    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> bytes:
        return self.records[index]["image"]
