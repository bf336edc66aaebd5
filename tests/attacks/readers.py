"""What reads files that others made: bytes of any kind end in nothing worse than a ValueError of one line."""

import contextlib
import pathlib
from collections.abc import Callable

from jaxft import keras_files, model, settings
from jaxft.checkpoint import CheckpointError
from jaxft.data import cifar10, decode, statefarm_files, table

ALLOWED = (ValueError, FileNotFoundError)


def weights(file: pathlib.Path) -> None:
    """A Keras weight file or a .keras zip; all that it holds is read, where that is small."""
    with keras_files.read(file) as found:
        for layer in found.layers:
            for tensor in layer.tensors:
                tensor.dtype  # noqa: B018
                tensor.read(slice(0, 2)) if tensor.shape and tensor.data.size > 10**6 else tensor.read()
        found.sha256  # noqa: B018


def image(file: pathlib.Path) -> None:
    """An image, for training and for a picture."""
    data = file.read_bytes()
    decode.pixels(data, (32, 32), file.name)
    decode.thumbnail(data, 64, file.name)


def a_table(file: pathlib.Path) -> None:
    """A csv or Parquet table; the images that it names are not there."""
    table.read(file)


def settings_file(file: pathlib.Path) -> None:
    """The settings of a run, YAML."""
    settings.read(file)


def run_folder(file: pathlib.Path) -> None:
    """What `predict` reads first of the folder of a run."""
    (file.parent / "model.json").write_bytes(file.read_bytes())
    with contextlib.suppress(CheckpointError):  # which are missing
        model.open(file.parent)


def zip_of_images(file: pathlib.Path) -> None:
    """A zip in place of State Farm's."""
    for name, member in statefarm_files._zip_members(file).items():
        if not name.endswith("/."):
            member.read()


def tar_of_images(file: pathlib.Path) -> None:
    """A tar in place of CIFAR-10's."""
    for _ in cifar10.read(file, cifar10.FILES["test"]):
        pass


READERS: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "weights": (weights, ".h5"),
    "keras": (weights, ".keras"),
    "image": (image, ".jpg"),
    "csv": (a_table, ".csv"),
    "parquet": (a_table, ".parquet"),
    "settings": (settings_file, ".yaml"),
    "run": (run_folder, ".json"),
    "zip": (zip_of_images, ".zip"),
    "tar": (tar_of_images, ".tar.gz"),
}


def attack(reader: str, content: bytes, folder: pathlib.Path) -> str:
    """What a reader says of some bytes, "" where it takes them.

    Raises:
        Exception: whatever it raises beside a ValueError or a FileNotFoundError of a line that names the file.
    """
    read, ending = READERS[reader]
    file = folder / f"attack{ending}"
    file.write_bytes(content)
    try:
        read(file)
    except ALLOWED as error:
        said = str(error)
        if file.name not in said and "model.json" not in said:
            raise AssertionError(f"this does not name the file: {said[:300]}") from error
        return said
    return ""
