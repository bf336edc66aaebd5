"""What the experiments on State Farm share: the data, Kaggle's or drawn ones, and the table at the end."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments import standin
from jaxft import devices, fetch, nets, pretrained, report
from jaxft.data import Dataset, Inputs, statefarm
from jaxft.data.augment import Warp
from jaxft.data.folds import split
from jaxft.model import Model
from jaxft.runs import Run

KAGGLE = pathlib.Path("data/state-farm-distracted-driver-detection")  # where the bare command looks for Kaggle's data
DRIVERS, IMAGES = 80, 10  # of the stand-in; images of each driver
SOLUTION = (20, 30), (36, 50)  # the same of the training and the test set of the stand-in for the whole solution
NOTE = "STAND-IN DATA: these images are drawn by a program; this score says nothing about State Farm."


def is_absent() -> bool:
    """Whether the command line names no folder and Kaggle's data are not where the bare command looks for them."""
    return not KAGGLE.exists() and not any(word.partition("=")[0] == "--data-dir" for word in sys.argv)


def open_data(data_dir: pathlib.Path | None, seed: int) -> tuple[Dataset, bool]:
    """(the dataset, whether it is the stand-in, which is drawn where there is no folder and then said).

    Raises:
        FileNotFoundError, ValueError: as `statefarm.prepare`.
    """
    name = f"{DRIVERS}x{IMAGES}-seed{seed}"
    folder, is_standin = _found(data_dir, name, drivers=DRIVERS, images_per_driver=IMAGES, seed=seed)
    return statefarm.prepare(folder, fetch.cache_folder()), is_standin


def _found(data_dir: pathlib.Path | None, name: str, **drawn: Any) -> tuple[pathlib.Path, bool]:
    """(the folder of Kaggle's files, or of the stand-in, drawn under that name; whether it is the latter, and said)."""
    folder = data_dir.expanduser() if data_dir else KAGGLE if KAGGLE.exists() else None
    if folder is None:
        folder = standin.render(fetch.cache_folder() / f"standin-v{standin.VERSION}-{name}", **drawn)
    is_standin = (folder / standin.MARKER).exists()
    if is_standin and devices.is_writer():
        print(NOTE, flush=True)
    return folder, is_standin


def open_both(data_dir: pathlib.Path | None) -> tuple[Dataset, Dataset, pathlib.Path, bool]:
    """(training set, test set, the folder of Kaggle's files, whether it is the stand-in).

    Raises:
        FileNotFoundError, ValueError: as `statefarm.prepare`; there is no test set.
    """
    (drivers, images), test = SOLUTION
    name = f"{drivers}x{images}-test{test[0]}x{test[1]}"
    folder, is_standin = _found(data_dir, name, drivers=drivers, images_per_driver=images, test=test)
    sets = [statefarm.prepare(folder, fetch.cache_folder(), split=split) for split in ("train", "test")]
    return sets[0], sets[1], folder, is_standin


def sides(
    sized: Callable[..., Inputs], drivers: Sequence[str], fold: tuple[int, int, int], warp: Warp, views: int | None
) -> tuple[Inputs, Inputs]:
    """The images of the drivers outside one fold, warped, and those inside, as they are.

    Args:
        sized: indices and further settings → `Inputs`.
        drivers: one for each image.
        fold: (which, of how many, seed), as `folds.split` takes them.
        warp, views: of the training side; a warp that moves nothing, and its views, are left out.

    Raises:
        ValueError: as `folds.split` and `Inputs`.
    """
    train, held_out = split(drivers, *fold)
    moves = warp != Warp()
    return sized(train, augment=warp if moves else None, views=views if moves else None), sized(held_out)


def vgg16_head(head: str, weights: str, image_size: int) -> tuple[str | pretrained.Weights, dict[str, Any]]:
    """(the weights, the options of the head); "auto" is `fc` where the official file can be had and the size fits it.

    Raises:
        ValueError: the head is none of auto, fc, gap and gap:WIDTH,…
        fetch.Unavailable: imagenet is asked for and cannot be fetched.
    """
    if head != "auto":
        return weights, nets.head_options("vgg16", head)
    if image_size in range(224, 256) and weights in ("auto", "imagenet"):
        try:
            return pretrained.resolve("vgg16", weights, classifier=True), {"fc": True}
        except fetch.Unavailable:
            if weights == "imagenet":
                raise
    return weights, {"fc": False}


def show(title: str, run: Run, model: Model, is_standin: bool) -> None:
    """Prints the figures, which state was kept, how fast it went, the weights and the data."""
    if devices.is_writer():
        data = {"data": "stand-in, drawn by a program"} if is_standin else {}
        report.result(title, run.folder, {"weights": model.source["source"], **data})
        if is_standin:
            print(NOTE)
