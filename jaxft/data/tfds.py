"""Datasets of tensorflow-datasets (TFDS), read without TensorFlow.

Import this where such a dataset is read, not at the top of a module: tensorflow-datasets takes half a second.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxft.data.dataset import Dataset
from jaxft.data.source import SPLITS, Source, numbered
from jaxft.data.tfds_records import Images


def read(name: str, classes: Sequence[str] | None = None) -> Source:
    """A dataset with one image feature, and one of a class, a sequence of classes, or a number.

    It must have been prepared in ArrayRecord (`tfds build NAME --file_format=array_record`), or be one that TFDS can
    prepare without TensorFlow.

    Args:
        name: NAME, NAME/CONFIG or NAME:VERSION, as `tfds.builder` takes it.
        classes: as of `source.read`.

    Raises:
        ValueError: there is no such dataset, it cannot be prepared here, or it has no such features.
    """
    try:
        builder: Any = tfds.builder(name, file_format="array_record", try_gcs=False)
        if not builder.data_path.exists():
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tensorflow-datasets knows no {name!r}, and none is prepared under that name") from error
    except (ImportError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"tfds:{name} is not prepared, and cannot be prepared here ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); where there is TensorFlow and a network run "
            f"tfds build {name} --file_format=array_record, and set TFDS_DATA_DIR to that folder"
        ) from error
    features = dict(builder.info.features.items())
    image = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if _kind(feature)]
    if len(image) != 1 or not labels:
        raise ValueError(
            f"tfds:{name} has the features {', '.join(sorted(features))}; expected one image, and a class, classes or "
            f"a number"
        )
    label = "label" if "label" in labels else labels[0]
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    splits = list(builder.info.splits)
    sources = tuple(builder.as_data_source(split, deserialize_method=raw) for split in splits)
    names = tuple(f"{split}/{i}" for split, source in zip(splits, sources, strict=True) for i in range(len(source)))
    images = Images(sources, image[0])
    values = [images.example(i)[label] for i in range(len(names))]
    array, known, target = _labels(values, features[label], classes, name)
    dataset = Dataset(name, images, array, names, names, known, target)  # type: ignore[arg-type]
    return Source(dataset, tuple(SPLITS.get(each.partition("/")[0].lower(), "") for each in names))


def _kind(feature: Any) -> str | None:
    if isinstance(feature, tfds.features.ClassLabel):
        return "class"
    if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.ClassLabel):
        return "labels"
    if isinstance(feature, tfds.features.Scalar) or type(feature) is tfds.features.Tensor:
        kind: Any = feature.np_dtype
        return "values" if feature.shape == () and np.dtype(kind).kind == "f" else None
    return None


def _labels(values: list[Any], feature: Any, classes: Sequence[str] | None, name: str) -> tuple[Any, Any, str]:
    """(labels, classes, target)."""
    kind = _kind(feature)
    if kind == "values":
        return np.asarray([[v.float_list.value[0]] for v in values], np.float32), tuple(classes or ("value",)), "values"
    names = (feature if kind == "class" else feature.feature).names
    sets = [[names[number] for number in value.int64_list.value if number >= 0] for value in values]
    if kind == "class":
        texts = [found[0] if found else "" for found in sets]
        return *numbered(texts, names if classes is None else classes, f"tfds:{name}"), "class"
    known = tuple(names if classes is None else classes)
    numbered([text for found in sets for text in found], known, f"tfds:{name}")
    return np.asarray([[each in found for each in known] for found in sets], np.int32), known, "labels"
