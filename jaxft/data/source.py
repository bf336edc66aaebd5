"""One's own images: a folder of class folders, a table, or a dataset of tensorflow-datasets → `Source`."""

import os
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.data.dataset import Dataset, Target

ENDINGS = frozenset("jpg jpeg jpe jfif png webp tif tiff bmp gif avif".split())
TABLES = (".csv", ".tsv", ".parquet")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SYSTEM = frozenset({"thumbs.db", "desktop.ini", "__macosx", "ehthumbs.db", "$recycle.bin", "lost+found"})


@dataclass(frozen=True, eq=False)
class Source:
    """Images with their labels, and what the data say of how to use them.

    Attributes:
        dataset: the images.
        split: of each image "train", "val", "test", or "" where it is not said; empty if the data say nothing of it.
        weights: of each image in the loss, float32 [N]; None if the data say nothing of it.
    """

    dataset: Dataset
    split: tuple[str, ...] = ()
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Files:
    """The bytes of image files, each read when it is asked for."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> bytes:
        return pathlib.Path(self.paths[index]).read_bytes()


def read(data: str | os.PathLike[str], *, classes: Sequence[str] | None = None, target: Target | None = None) -> Source:
    """Reads labels and finds images; these stay on the disk.

    Args:
        data: a folder (see `folder.read`), a csv, tsv or Parquet file (`table.read`), or "tfds:NAME" (`tfds.read`).
        classes: the classes in the order of a trained model; by default those of the data, sorted by name, numbers by
            size.
        target: the kind of labels that is wanted, as of `Dataset`; by default what the data hold.

    Raises:
        ValueError: the data are of no such kind, not whole, or of other classes; the message says what to do.
        FileNotFoundError: there is no such folder or file.
    """
    if isinstance(data, str) and data.startswith("tfds:"):
        from jaxft.data import tfds  # tensorflow-datasets takes half a second to import

        found = tfds.read(data.removeprefix("tfds:"), classes)
    else:
        from jaxft.data import folder, table

        path = pathlib.Path(data).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}; give a folder of class folders, a table, or tfds:NAME")
        if path.is_file() and path.suffix.lower() not in TABLES:
            kind = "an archive: unpack it, and give its folder" if _is_archive(path) else "no folder and no table"
            raise ValueError(f"{path} is {kind}; expected a folder of class folders, or {', '.join(TABLES)}")
        found = table.read(path, classes) if path.is_file() else folder.read(path, classes)
    if target is not None and found.dataset.target != target:
        kinds = {"class": "one class an image", "labels": "several labels an image", "values": "numbers"}
        raise ValueError(f"{data} holds {kinds[found.dataset.target]}, and the model predicts {kinds[target]}")
    return found


def name_of(data: str) -> str:
    """A short name for data, for the folder of a run."""
    name = data.removeprefix("tfds:") if data.startswith("tfds:") else pathlib.Path(data).expanduser().absolute().stem
    return re.sub(r"[^\w.-]+", "_", name) or "data"


def unlabelled(paths: Sequence[str | os.PathLike[str]], classes: Sequence[str], target: Target) -> Dataset:
    """Images without labels, to be predicted.

    Args:
        paths: image files, and folders in which all image files are taken, however deep they lie.
        classes, target: of the model.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there is no image, or one is named twice.
    """
    from jaxft.data import folder

    found: list[str] = []
    for path in map(lambda path: pathlib.Path(path).expanduser(), paths):
        if path.is_dir():
            found += [str(path / name) for name in folder.images(path)]
        elif path.exists():
            found.append(str(path))
        else:
            raise FileNotFoundError(f"there is no {path}; give image files, or folders of them")
    if not found:
        raise ValueError(f"no image is in {', '.join(map(str, paths))}; images end in {', '.join(sorted(ENDINGS))}")
    found = list(dict.fromkeys(found))
    shape = (len(found),) if target == "class" else (len(found), len(classes))
    labels = np.full(shape, np.nan, np.float32) if target == "values" else np.full(shape, -1, np.int32)
    return Dataset("images", Files(tuple(found)), labels, tuple(found), tuple(found), tuple(classes), target)


def is_system(name: str) -> bool:
    """Whether a file or folder belongs to an operating system or a tool, and not to the data."""
    return name.startswith((".", "@")) or name.lower() in _SYSTEM or name.endswith("~")


def is_image(name: str) -> bool:
    """Whether a file is an image by the ending of its name, in capitals or not."""
    return name.rpartition(".")[2].lower() in ENDINGS and "." in name


def numbered(texts: Sequence[str], classes: Sequence[str] | None, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of class names: (int32 [N], -1 where a name is empty; the classes in order).

    Args:
        texts: N names of classes.
        classes: in the order wanted; None: those that occur, sorted by name, or by size where all are whole numbers.
        where: the names come from, for an error.

    Raises:
        ValueError: a name is none of `classes`.
    """
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    if classes is None:
        classes = in_order({text for text in texts if text})
    number = {unicodedata.normalize("NFC", name): place for place, name in enumerate(classes)}
    if unknown := sorted({text for text in texts if text and text not in number}):
        raise ValueError(
            f"{where} holds {_some(unknown)}, which the model does not know; its classes are {_some(list(classes), 12)}"
        )
    return np.asarray([number.get(text, -1) for text in texts], np.int32), tuple(classes)


def in_order(names: set[str]) -> list[str]:
    """Class names sorted, whole numbers by size and other texts as Keras sorts folders."""
    if all(re.fullmatch(r"[+-]?\d+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _is_archive(path: pathlib.Path) -> bool:
    return path.name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"))


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
