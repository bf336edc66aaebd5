"""Datasets that tensorflow-datasets prepared, built here with its own writer, without TensorFlow."""

import contextlib
import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from jaxft.data import source
from jaxft.data.decode import Decode, pixels

KINDS = ["cat", "dog", "owl"]
IMAGE = tfds.features.Image(shape=(None, None, 3), encoding_format="png")


def picture(value):
    held = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 2 * value, 255 - value)).save(held, "PNG")
    return held.getvalue()


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares the dataset "shots" where tensorflow-datasets looks for datasets."""

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self):
            """There is no network."""

    def build(features, **splits):
        class Shots(tfds.core.ShardBasedBuilder, skip_registration=True):
            name = "shots"
            VERSION = tfds.core.Version("1.0.0")
            code_path = epath.Path(__file__)

            def _info(self):
                return Info(builder=self, features=tfds.features.FeaturesDict(features))

            def _shard_iterators_per_split(self, dl_manager):
                shards = lambda rows: [lambda: iter(enumerate(rows))]  # noqa: E731
                return {split: shards(rows) for split, rows in splits.items()}

        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
        config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
        with contextlib.redirect_stdout(io.StringIO()):
            Shots(data_dir=tmp_path, file_format="array_record").download_and_prepare(download_config=config)

    return build


def test_classes(prepare):
    """Bug: splits, names, labels or images of a TFDS dataset are mixed up, or an unknown label counts as a class."""
    rows = [{"image": picture(value), "label": label} for value, label in ((10, "owl"), (20, "cat"), (30, -1))]
    features = {"image": IMAGE, "label": tfds.features.ClassLabel(names=KINDS)}
    prepare(features, train=rows, validation=[{"image": picture(40), "label": "dog"}])
    found = source.read("tfds:shots")
    dataset = found.dataset
    assert dataset.classes == tuple(KINDS) and dataset.target == "class"
    assert dataset.labels.tolist() == [2, 0, -1, 1]
    assert dataset.names == ("train/0", "train/1", "train/2", "validation/0")
    assert found.split == ("train", "train", "train", "val")
    for place, value in enumerate((10, 20, 30, 40)):
        image = pixels(dataset.images[place], (7, 9), dataset.names[place], Decode())
        assert (image == (value, 2 * value, 255 - value)).all()
    with pytest.raises(IndexError):
        dataset.images[4]


def test_several_labels_and_values(prepare):
    """Bug: sets of labels, or numbers, of a TFDS dataset are not read as what they are."""
    several = tfds.features.Sequence(tfds.features.ClassLabel(names=KINDS))
    rows = [{"image": picture(1), "tags": ["dog", "owl"]}, {"image": picture(2), "tags": []}]
    prepare({"image": IMAGE, "tags": several}, train=rows)
    dataset = source.read("tfds:shots").dataset
    assert dataset.target == "labels" and dataset.labels.tolist() == [[0, 1, 1], [0, 0, 0]]


def test_values(prepare):
    """Bug: a number is taken for a class."""
    rows = [{"image": picture(1), "age": 0.5}, {"image": picture(2), "age": 1.5}]
    prepare({"image": IMAGE, "age": np.float32}, train=rows)
    dataset = source.read("tfds:shots").dataset
    assert dataset.target == "values" and dataset.labels.tolist() == [[0.5], [1.5]]


def test_classes_of_a_model(prepare):
    """Bug: classes of a trained model in another order are taken by number."""
    rows = [{"image": picture(1), "label": "owl"}, {"image": picture(2), "label": "cat"}]
    prepare({"image": IMAGE, "label": tfds.features.ClassLabel(names=KINDS)}, test=rows)
    assert source.read("tfds:shots", classes=("owl", "dog", "cat")).dataset.labels.tolist() == [0, 2]
    with pytest.raises(ValueError, match="'cat', which the model does not know; its classes are 'owl', 'dog'"):
        source.read("tfds:shots", classes=("owl", "dog"))


def test_without_labels(prepare):
    """Bug: a dataset that cannot be learned from fails with a KeyError."""
    prepare({"image": IMAGE, "caption": tfds.features.Text()}, train=[{"image": picture(1), "caption": "x"}])
    with pytest.raises(ValueError, match="has the features caption, image; expected one image, and a class"):
        source.read("tfds:shots")


def test_unknown(tmp_path, monkeypatch):
    """Bug: a name that is mistyped ends in a traceback of tensorflow-datasets."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="knows no 'no_such_shots', and none is prepared under that name"):
        source.read("tfds:no_such_shots")
