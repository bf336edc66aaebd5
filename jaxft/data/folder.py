"""A folder of class folders: the way in which most people keep their images."""

import os
import pathlib
import unicodedata
from collections.abc import Sequence

from jaxft.data.dataset import Dataset
from jaxft.data.source import ENDINGS, SPLITS, Files, Source, is_image, is_system, numbered


def read(path: pathlib.Path, classes: Sequence[str] | None = None) -> Source:
    """The images of a folder; the class of each is the folder that it lies in.

    photos/cats/1.jpg, photos/dogs/a/2.JPG: images may lie deeper in their class folder. Above the class folders there
    may be `train`, `val` (or `valid`, `validation`) and `test`; images directly in one of these have no known label.
    Files of operating systems (.DS_Store, Thumbs.db, __MACOSX) and files that are no images are passed over. Links are
    followed.

    Args:
        path: of the folder.
        classes: as of `source.read`.

    Raises:
        ValueError: there are no images or no class folders, or a split folder has a class that `train` lacks.
    """
    found = images(path)
    if not found:
        raise ValueError(
            f"{path} holds no images; expected class folders with images in them, such as {path.name}/cats/1.jpg "
            f"(endings {', '.join(sorted(ENDINGS))})"
        )
    parts = [name.split("/") for name in found]
    split: tuple[str, ...] = ()
    if all(len(part) > 1 and part[0].lower() in SPLITS for part in parts) and any(len(part) > 2 for part in parts):
        split = tuple(SPLITS[part[0].lower()] for part in parts)
        parts = [part[1:] for part in parts]
    outside = [name for name, part in zip(found, parts, strict=True) if len(part) == 1]
    if not split and outside:
        what = "all of its images lie" if len(outside) == len(found) else f"{len(outside)} images lie"
        raise ValueError(
            f"{path}: {what} in no class folder, the first {outside[0]!r}; make a folder for each class, or give a "
            f"table with the columns file and label"
        )
    texts = [unicodedata.normalize("NFC", part[0]) if len(part) > 1 else "" for part in parts]
    if split and classes is None:
        in_train = {text for text, side in zip(texts, split, strict=True) if side == "train" and text}
        if lacking := sorted({text for text in texts if text} - in_train):
            raise ValueError(f"{path}: the train folder lacks the class {lacking[0]!r}, which another split has")
    labels, classes = numbered(texts, classes, str(path))
    files = Files(tuple(os.path.join(path, name) for name in found))
    dataset = Dataset(path.absolute().name, files, labels, tuple(found), tuple(found), classes)
    return Source(dataset, split)


def images(path: pathlib.Path) -> list[str]:
    """The image files below a folder, by their paths relative to it with "/" between, in the order of these.

    Raises:
        OSError: a folder cannot be read.
    """
    found: list[str] = []
    top = os.stat(path)
    waiting = [("", {(top.st_dev, top.st_ino)})]  # folders, with all that lie above
    while waiting:
        below, above = waiting.pop()
        with os.scandir(path / below) as entries:
            for entry in entries:
                if is_system(entry.name):
                    continue
                name = f"{below}{entry.name}"
                if entry.is_dir():
                    info = entry.stat()  # of the folder that a link names
                    if (info.st_dev, info.st_ino) not in above:  # a link that leads up would never end
                        waiting.append((f"{name}/", above | {(info.st_dev, info.st_ino)}))
                elif is_image(entry.name) and entry.is_file():
                    found.append(name)
    return sorted(found)
