"""State Farm distracted driver detection: photographs of drivers at ten occupations, built once, read at random.

Source: the Kaggle competition of 2016.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data import decode
from jaxft.data.dataset import Dataset
from jaxft.data.statefarm_files import CLASSES, LAYOUT, URL, Example, Layout, open_layout

_SHARD = 512  # examples; tensorflow-datasets holds those of one shard in memory, here about 25 MB


def prepare(data_dir: str | os.PathLike[str], cache_dir: str | os.PathLike[str], *, split: str = "train") -> Dataset:
    """Checks Kaggle's data, builds TFDS records of them under `cache_dir` unless that was done, and opens a split.

    Changed data are another build, in another folder. A build that fails leaves nothing that could be taken for one.

    Args:
        data_dir: the folder that holds what `statefarm_files.LAYOUT` says.
        cache_dir: takes about as many bytes as the images.
        split: "train", in the order of the csv, or "test", in the order of the names: labels -1, driver "".

    Returns:
        images as the bytes of Kaggle's files, unchanged; groups are drivers, names are file names.

    Raises:
        FileNotFoundError: the folder, the csv or the images are absent, or files of the build are.
        ValueError: csv and images do not agree, a class is empty or unknown, a file is not a JPEG, the split is absent.
    """
    data_dir, cache_dir = Path(data_dir).expanduser(), Path(cache_dir).expanduser()
    layout = open_layout(data_dir)
    if split not in layout.splits:
        raise ValueError(f"{data_dir} holds no split {split!r}, only {', '.join(layout.splits)}\n{LAYOUT}")
    from jaxft.data import tfds_records  # tensorflow-datasets takes half a second to import

    columns: dict[str, dict[str, Any]] = {
        name: {"labels": [], "drivers": [], "filenames": []} for name in layout.splits
    }
    records = tfds_records.Records(
        name="state_farm_distracted_driver",
        version="1.0.0",
        release_notes="The files of the competition of 2016.",
        description="Dashboard photographs of drivers, 640×480, in ten classes, each with its driver's name.",
        homepage=URL,
        citation=(
            "@misc{statefarm2016, title={State Farm Distracted Driver Detection}, "
            "author={Anna Montoya and Dan Holman and SF\\_data\\_science and Taylor Smith and Wendy Kan}, "
            f"year={{2016}}, publisher={{Kaggle}}, url={{{URL}}}}}"
        ),
        image=((None, None, 3), "jpeg"),
        classes=tuple(CLASSES),
        texts=("driver", "filename"),
        columns=columns,
        shards={
            name: [
                functools.partial(_shard, layout, examples[first : first + _SHARD], columns[name])
                for first in range(0, len(examples), _SHARD)
            ]
            for name, examples in layout.splits.items()
        },
        total=sum(map(len, layout.splits.values())),
    )
    # The folder is named after the data's state, so that changed data are not taken for the built ones.
    images, kept = tfds_records.open_or_build(records, cache_dir / "statefarm" / layout.key[:16], (split,))
    return Dataset(
        name=f"State Farm, {split}",
        images=images,
        labels=np.asarray(kept[split]["labels"], np.int32),
        groups=tuple(kept[split]["drivers"]),
        names=tuple(kept[split]["filenames"]),
        classes=tuple(CLASSES.values()),
    )


def _shard(
    layout: Layout, examples: tuple[Example, ...], columns: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, features) of some examples; their columns go into `columns` as well."""
    for example in examples:
        image = layout.read(example.path)
        decode.jpeg_size(image, example.path)
        label = list(CLASSES).index(example.classname) if example.classname else -1
        columns["labels"].append(label)
        columns["drivers"].append(example.driver)
        columns["filenames"].append(example.filename)
        features = {"image": image, "label": label, "driver": example.driver, "filename": example.filename}
        yield example.path, features
