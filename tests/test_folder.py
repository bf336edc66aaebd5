"""Folders of class folders, as people have them."""

import os

import numpy as np
import pytest
from PIL import Image

from jaxft.data import folder, source


def make(root, *names, colour=(10, 20, 30)):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}.get(name.rpartition(".")[2].lower())
        Image.new("RGB", (8, 6), colour).save(path, kind or name.rpartition(".")[2])
    return root


def labelled(found):
    return {
        name: found.dataset.classes[label] if label >= 0 else None
        for name, label in zip(found.dataset.names, found.dataset.labels.tolist(), strict=True)
    }


def test_classes_are_folders(tmp_path):
    """Bug: the order of classes is that of the disk, a deeper folder is a class, or .JPG is passed over."""
    make(tmp_path, "dogs/b.png", "cats/a.JPG", "cats/deep/er/c.jpeg", "dogs/with space ü.PNG", "cats/d.webp")
    found = source.read(tmp_path)
    assert found.dataset.classes == ("cats", "dogs") and found.split == () and found.weights is None
    assert labelled(found) == {
        "cats/a.JPG": "cats", "cats/d.webp": "cats", "cats/deep/er/c.jpeg": "cats", "dogs/b.png": "dogs",
        "dogs/with space ü.PNG": "dogs",
    }  # fmt: skip
    assert all(found.dataset.images[i][:2] in (b"\xff\xd8", b"\x89P", b"RI") for i in range(5))


def test_system_files_are_passed_over(tmp_path):
    """Bug: what an operating system leaves becomes a class, or a broken image."""
    make(tmp_path, "a/1.png", "b/1.png", "__MACOSX/a/1.png", ".ipynb_checkpoints/1.png", "@eaDir/1.png", "a/._1.png")
    for name in ("a/.DS_Store", "a/Thumbs.db", "b/desktop.ini", "notes.txt", "a/labels.csv"):
        (tmp_path / name).write_bytes(b"x")
    assert list(labelled(source.read(tmp_path))) == ["a/1.png", "b/1.png"]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation", "TEST"), ("train", "valid")])
def test_split_folders(tmp_path, names):
    """Bug: train and val are taken for classes."""
    make(tmp_path, *(f"{part}/{name}/1.png" for part in names for name in ("a", "b")))
    found = source.read(tmp_path)
    assert found.dataset.classes == ("a", "b")
    expected = {"tr": "train", "va": "val", "te": "test"}
    assert found.split == tuple(expected[name[:2].lower()] for name in found.dataset.names)


def test_a_test_folder_without_labels(tmp_path):
    """Bug: Kaggle's flat test folder is refused, or its images get a class."""
    make(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png")
    found = source.read(tmp_path)
    assert labelled(found)["test/1.png"] is None and found.split == ("test", "train", "train")


def test_classes_that_are_called_like_splits(tmp_path):
    """Bug: a class of trains, in a folder `train`, is taken for the training split."""
    make(tmp_path, "train/1.png", "test/1.png")
    assert source.read(tmp_path).dataset.classes == ("test", "train")


def test_numbers_are_sorted_by_size(tmp_path):
    """Bug: class 10 comes before class 2."""
    make(tmp_path, "10/1.png", "2/1.png", "1/1.png")
    assert source.read(tmp_path).dataset.classes == ("1", "2", "10")


def test_one_name_in_two_spellings(tmp_path):
    """Bug: a folder that macOS wrote and one that Linux wrote are two classes of one name."""
    make(tmp_path, "train/caf\u00e9/1.png", "train/b/1.png", "val/cafe\u0301/2.png", "val/b/2.png")
    assert source.read(tmp_path).dataset.classes == ("b", "caf\u00e9")


def test_the_classes_of_a_model(tmp_path):
    """Bug: data that lack a class are scored with shifted labels."""
    make(tmp_path, "dogs/1.png", "cats/1.png")
    found = source.read(tmp_path, classes=("birds", "dogs", "cats"))
    assert found.dataset.classes == ("birds", "dogs", "cats") and found.dataset.labels.tolist() == [2, 1]
    with pytest.raises(ValueError, match="'cats', which the model does not know; its classes are 'birds', 'dogs'"):
        source.read(tmp_path, classes=("birds", "dogs"))
    with pytest.raises(ValueError, match="holds one class an image, and the model predicts numbers"):
        source.read(tmp_path, target="values")


def test_links(tmp_path):
    """Bug: a circle of links never ends or gives images twice, or linked images are passed over."""
    make(tmp_path, "elsewhere/1.png", "data/b/1.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b" / "up").symlink_to("..")
    assert set(labelled(source.read(tmp_path / "data"))) == {"a/1.png", "b/1.png"}
    (tmp_path / "data" / "c").symlink_to(tmp_path / "data" / "b")
    assert set(labelled(source.read(tmp_path / "data"))) == {"a/1.png", "b/1.png", "c/1.png"}


def test_pipes_are_not_opened(tmp_path):
    """Bug: reading waits for ever."""
    make(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    assert len(source.read(tmp_path).dataset) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "holds no images; expected class folders"),
        (("1.png", "2.png"), "all of its images lie in no class folder"),
        (("a/1.png", "b/1.png", "c.png"), r"1 images lie in no class folder, the first 'c\.png'"),
        (("train/a/1.png", "val/b/1.png"), "the train folder lacks the class 'b'"),
    ],
)
def test_what_is_no_such_folder(tmp_path, names, message):
    """Bug: a traceback, or a class that nobody meant."""
    make(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        source.read(tmp_path)


def test_what_is_no_folder(tmp_path):
    """Bug: the error does not say what can be given."""
    with pytest.raises(FileNotFoundError, match="give a folder of class folders"):
        source.read(tmp_path / "absent")
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is an archive: unpack it"):
        source.read(tmp_path / "photos.zip")
    (tmp_path / "photos.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is no folder and no table"):
        source.read(tmp_path / "photos.txt")


def test_images_to_be_predicted(tmp_path):
    """Bug: a folder in a folder is left out, a file is predicted twice, or two of one name are refused."""
    make(tmp_path, "new/1.png", "new/deep/1.png", "other/1.jpg")
    paths = [tmp_path / "new", tmp_path / "other" / "1.jpg", tmp_path / "new" / "1.png"]
    found = source.unlabelled(paths, ("a", "b"), "class")
    assert [name.removeprefix(f"{tmp_path}/") for name in found.names] == ["new/1.png", "new/deep/1.png", "other/1.jpg"]
    assert not found.known.any()
    assert np.isnan(source.unlabelled(paths, ("a", "b"), "values").labels).all()
    with pytest.raises(FileNotFoundError, match="give image files"):
        source.unlabelled([tmp_path / "absent"], ("a",), "class")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image is in"):
        source.unlabelled([tmp_path / "empty"], ("a",), "class")


def test_names_of_runs():
    """Bug: a run of tfds:x/y:1.0.0, or of a folder with a slash at its end, gets a folder that cannot be."""
    assert source.name_of("tfds:cats_vs_dogs/big:1.0.0") == "cats_vs_dogs_big_1.0.0"
    assert source.name_of("my photos/") == "my_photos" and source.name_of("a/b.csv") == "b"


def test_many_files_are_listed_quickly(tmp_path):
    """Bug: each file is opened when a folder is read."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(1000):
            (tmp_path / name / f"{i}.png").touch()  # empty: reading it would fail
    assert len(folder.images(tmp_path)) == 2000
