"""What a dataset is: columns that fit, and a fingerprint that nobody hands in."""

import hashlib
import pathlib
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from jaxft.data import Dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
CLASSES = ("ant", "bee")


def dataset(labels=(0, 1, -1, 1), **changes) -> Dataset:
    columns = {"images": PIXELS, "groups": ("g", "g", "h", "h"), "names": tuple("abcd"), "classes": CLASSES}
    return Dataset(name="insects", labels=np.asarray(labels), **columns | changes)


def test_columns_must_be_equally_long():
    """Bug: labels of another set are accepted, and every image trains as something else."""
    for column in ("images", "groups", "names"):
        with pytest.raises(ValueError, match="'insects': columns of unequal length"):
            dataset(**{column: getattr(dataset(), column)[:3]})
    with pytest.raises(ValueError, match="columns of unequal length"):
        dataset([0, 1])


@pytest.mark.parametrize(
    ("target", "labels", "message"),
    [
        ("class", [0, 2, 0, 0], "labels 0 to 2, expected -1 .unknown. to 1 for 2 classes"),
        ("class", [0, -2, 0, 0], "labels -2 to 0, expected -1"),
        ("class", [[1, 0], [0, 1], [1, 0], [1, 0]], r"labels int64 \[4, 2\] do not fit target 'class'.*argmax"),
        ("class", [0.67, 0.0, 1.0, 0.33], r"labels float64 \[4\] do not fit.*say target='values'"),
        ("class", [True, False, True, True], r"labels bool \[4\] do not fit.*astype\(np.int32\)"),
        ("class", [[1.0, 0.0]] * 4, r"labels float64 \[4, 2\] do not fit.*labels.argmax\(1\)"),
        ("class", ["ant", "bee", "ant", "ant"], r"do not fit target 'class'.*give the number of each label"),
        ("labels", [[1, 0], [0, 2], [1, 0], [1, 0]], "labels 0 to 2, expected -1 .unknown. to 1"),
        ("labels", [0, 1, 1, 0], r"labels int64 \[4\] do not fit target 'labels', which takes int \[N, C\]"),
        ("labels", [[0.5, 1.0]] * 4, r"labels float64 \[4, 2\] do not fit.*say target='values'"),
        ("labels", [[True, False]] * 4, r"labels bool \[4, 2\] do not fit.*astype\(np.int32\)"),
        ("labels", [[1, 0, 1]] * 4, "have 3 columns, expected 2, one for each name"),
        ("values", [1.0, 2.0, 3.0, 4.0], r"labels float64 \[4\] do not fit.*reshape"),
        ("values", [[1, 2]] * 4, r"labels int64 \[4, 2\] do not fit target 'values'.*float32"),
        ("values", [[1.0]] * 4, "have 1 columns, expected 2"),
        ("values", [[1e300, 0.0]] * 4, "a value is infinite in float32; NaN says"),
        ("numbers", [0, 0, 0, 0], "target 'numbers', expected class, labels, values"),
    ],
)
def test_labels_of_another_kind_are_refused(target, labels, message):
    """Bug: one-hot labels fail in the sharding, 0.67 becomes class 0, 2 of 2 classes indexes past the end."""
    with pytest.raises(ValueError, match=message):
        dataset(labels, target=target)


def test_what_is_known():
    """Bug: an unknown label counts as a class, or as the value NaN."""
    assert dataset().known.tolist() == [True, True, False, True]
    several = dataset([[0, 1], [-1, 1], [-1, -1], [0, 0]], target="labels")
    assert several.known.tolist() == [[True, True], [False, True], [False, False], [True, True]]
    values = dataset(np.array([[0, 1], [np.nan, 1], [2, np.nan], [-1, 0]]), target="values")
    assert values.known.tolist() == [[True, True], [False, True], [True, False], [True, True]]
    assert (several.labels.dtype, values.labels.dtype) == (np.int32, np.float32)


def test_names_are_distinct():
    """Bug: two images called a.jpg in different folders share a row of predictions.csv."""
    with pytest.raises(ValueError, match="1 names stand for several images, the first 'b'.*add the folder"):
        dataset(names=("a", "b", "c", "b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["a.jpg"] * 4}, r"image a is str 'a.jpg', expected a file's bytes.*read_bytes"),
        ({"images": [pathlib.Path("a.jpg")] * 4}, r"image a is \w+Path 'a.jpg', expected a file's bytes.*read_bytes"),
        ({"images": np.array(["a.jpg"] * 4)}, r"image a is str_ 'a.jpg', expected a file's bytes.*read_bytes"),
        ({"classes": "ab"}, "classes must be a tuple of strings, found str"),
        ({"groups": (1, 2, 3, 4)}, "groups must be a tuple of strings, found tuple with 1"),
    ],
)
def test_other_columns_of_another_kind_are_refused(changes, message):
    """Bug: paths fail in a decoding thread; a string of classes is taken letter by letter."""
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_the_fingerprint_is_of_the_contents():
    """Bug: changed images, labels or names pass for the same data, or a renamed dataset for other data."""
    other = PIXELS.copy()
    other[3, 4, 5, 2] ^= 1
    changes = [
        {"images": other},
        {"images": PIXELS.reshape(4, 6, 5, 3)},
        {"images": [image.tobytes() for image in PIXELS]},
        {"labels": [0, 1, -1, 0]},
        {"groups": ("g", "h", "h", "h")},
        {"names": ("ab", "b", "c", "d")},
        {"classes": ("bee", "ant")},
        {"labels": np.array([[0], [1], [-1], [1]]), "classes": ("ant",), "target": "labels"},
        {"labels": np.array([[0.0], [1], [-1], [1]]), "classes": ("ant",), "target": "values"},
    ]
    first = dataset()
    prints = [first.fingerprint, *(dataset(**change).fingerprint for change in changes)]
    assert len(set(prints)) == len(prints) and all(len(each) == 64 for each in prints)
    same = [replace(first, name="other"), dataset(np.array([0, 1, -1, 1], np.int8)), dataset(images=list(PIXELS))]
    assert {each.fingerprint for each in same} == {first.fingerprint}
    with pytest.raises(TypeError):
        replace(first, fingerprint="0" * 64)


def test_digests_are_in_the_order_of_the_images_whatever_the_threads():
    """Bug: threads that finish early go first, all images are read at once, or digested anew at each use."""

    class Slow:
        def __init__(self):
            self.asked, self.lock = 0, threading.Lock()

        def __len__(self):
            return 300

        def __getitem__(self, index, /):
            with self.lock:
                self.asked += 1
            threading.Event().wait(0.001 if index < 64 else 0)
            return str(index).encode()

    images = Slow()
    data = Dataset("many", images, np.zeros(300, int), ("",) * 300, tuple(map(str, range(300))), ("x",))
    assert images.asked == 1
    assert data.digests == tuple(hashlib.sha256(str(index).encode()).digest() for index in range(300))
    assert data.fingerprint and data.digests and images.asked == 301


def test_an_image_of_another_kind_is_named():
    """Bug: a path among lazily read images ends in hashlib's own error, or a disk's error in another."""

    class Read:
        def __init__(self, *images):
            self.images = images

        def __len__(self):
            return 4

        def __getitem__(self, index, /):
            image = self.images[min(index, len(self.images) - 1)]
            if isinstance(image, OSError):
                raise image
            return image

    with pytest.raises(ValueError, match=r"image a is str '/data/0.jpg'"):
        dataset(images=Read("/data/0.jpg"))
    with pytest.raises(ValueError, match=r"image b is str '/data/1.jpg'"):
        _ = dataset(images=Read(b"0", "/data/1.jpg")).digests
    with pytest.raises(OSError, match="the disk"):
        dataset(images=Read(OSError("the disk")))


def test_labels_are_a_copy_that_cannot_be_written():
    """Bug: labels changed in place leave the fingerprint of the old ones."""
    given = np.array([0, 1, 0, 1])
    data = dataset(given)
    given[0] = 1
    assert data.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="read-only"):
        data.labels[0] = 1


def test_a_dataset_is_shown_in_a_line():
    """Bug: a failed test or a notebook prints gigabytes of images."""
    assert repr(dataset()) == "Dataset('insects': 4 images, 2 classes, target 'class')"


def test_tensorflow_datasets_is_imported_where_it_is_needed():
    """Bug: importing a module of `jaxft.data` costs the half second of tensorflow-datasets."""
    program = (
        "import sys, jaxft.data, jaxft.data.loader, jaxft.data.statefarm, jaxft.data.cifar10, jaxft.data.elpv\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'tensorflow_datasets', 'tensorflow', 'sklearn'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
