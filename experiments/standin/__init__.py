"""The stand-in for State Farm's pictures: drawn by a program, in Kaggle's layout.

With it the whole pipeline can be tried where Kaggle's data are absent. A score on it says nothing about State Farm.
"""

import concurrent.futures
import csv
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from experiments.standin import cabin
from jaxft.progress import bar

MARKER = "STANDIN.json"
VERSION = 2  # a new version draws different pictures from the same seed
NOTE = "Drawn by a program to stand in for State Farm's photographs; scores on it say nothing about State Farm."
CLASSES = len(cabin.POSTURES)
CLIP = 5  # pictures in a row that show one movement
BEGUN, PACE = (0.55, 1.3), 0.2  # how far a movement is in the first picture of a clip, and what each adds
QUALITY = 90  # JPEG
TEST = 100_000  # number of the first driver of the test set


def jpeg(seed: int, driver: int, image: int, scale: float = 1.0) -> bytes:
    """Picture `image` of a driver, a JPEG of 640×480 · `scale`: a pure function of its arguments; class image % 10.

    The pictures of a clip follow each other as frames of a film do; in the first ones the driver may only have begun
    to do what the class says.
    """
    label, moment = image % CLASSES, image // CLASSES
    clip, frame = divmod(moment, CLIP)
    start = np.random.default_rng([seed, driver, label, clip, 1, 1]).uniform(*BEGUN)
    pixels = cabin.picture(
        cabin.random_driver(np.random.default_rng([seed, driver])),
        label,
        clip=np.random.default_rng([seed, driver, label, clip]),
        moment=float(moment),
        noise=np.random.default_rng([seed, driver, label, moment, 0]),
        begun=min(1.0, start + PACE * frame),
        scale=scale,
    )
    return simplejpeg.encode_jpeg(pixels, quality=QUALITY)


def render(
    root: Path,
    *,
    drivers: int,
    images_per_driver: int,
    test: tuple[int, int] = (0, 0),
    scale: float = 1.0,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Draws a data set into `root`, or finds it there, in Kaggle's layout.

    That is `imgs/train/c0 … c9/*.jpg` and `driver_imgs_list.csv`; with a test set `imgs/test/*.jpg` and
    `sample_submission.csv` too, and `solution.csv`, which Kaggle keeps for itself: the class and driver of each.

    Args:
        root: the folder; it appears when everything in it is written. A file `STANDIN.json` marks it.
        drivers, images_per_driver: how many; classes take turns, so a multiple of 10 gives each driver equal shares.
        test: (drivers, images of each) of the test set: other drivers, whose pictures have names in random order.
        scale: of the pictures' sides, 640×480.
        seed: decides everything drawn. A larger training set of the same seed holds the pictures of a smaller one.
        workers: threads; they change nothing but the time.

    Returns:
        `root`.

    Raises:
        ValueError: fewer than one driver or than ten images of each, or `root` holds something else.
        OSError: `root` cannot be written.
    """
    if drivers < 1 or images_per_driver < CLASSES:
        raise ValueError(
            f"a stand-in of {drivers} drivers × {images_per_driver} images: expected at least one driver and "
            f"{CLASSES} images, one of each class"
        )
    facts: dict[str, Any] = {"note": NOTE, "version": VERSION, "seed": seed, "scale": scale}
    facts |= {"drivers": drivers, "images_per_driver": images_per_driver, "test": list(test)}
    marker = json.dumps(facts, indent=2) + "\n"
    root = root.expanduser().absolute()
    if root.exists():
        if _holds(root, marker):
            return root
        raise ValueError(f"{root} is there and is not this stand-in ({facts}); name another folder or delete it")
    partial = None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        _write(partial, (drivers, images_per_driver), test, seed, scale, workers)
        (partial / MARKER).write_text(marker, encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp's is for its owner alone
        os.replace(partial, root)
    except OSError as error:
        if not _holds(root, marker):  # another process that drew the same may have been first
            # Said here because a write into a full disk fails without saying where.
            raise OSError(
                error.errno,
                f"the stand-in of {drivers} × {images_per_driver} images cannot be written to {root}; nothing of it is "
                f"left; make room or name another folder: {error}",
            ) from error
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    return root


def _holds(root: Path, marker: str) -> bool:
    return (root / MARKER).is_file() and (root / MARKER).read_text(encoding="utf-8") == marker


def _write(
    folder: Path, train: tuple[int, int], test: tuple[int, int], seed: int, scale: float, workers: int | None
) -> None:
    for label in range(CLASSES):
        (folder / f"imgs/train/c{label}").mkdir(parents=True)
    # (driver, image, name of the file)
    places = [(d, i, f"img_{d:03d}{i:05d}.jpg") for d, i in itertools.product(*map(range, train))]
    names = np.random.default_rng([seed, TEST]).permutation(test[0] * test[1]).tolist()
    places += [
        (TEST + d, i, f"img_{name}.jpg")
        for (d, i), name in zip(itertools.product(*map(range, test)), names, strict=True)
    ]
    if names:
        (folder / "imgs/test").mkdir()

    def draw(place: tuple[int, int, str]) -> tuple[str, str, str]:
        driver, image, name = place
        row = (f"p{driver:03d}", f"c{image % CLASSES}", name)
        path = folder / "imgs" / ("test" if driver >= TEST else f"train/{row[1]}") / name
        path.write_bytes(jpeg(seed, driver, image, scale))
        return row

    rows = []
    with (
        concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool,
        bar("drawing", len(places)) as advance,
    ):
        try:
            for row in pool.map(draw, places):
                rows.append(row)
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    drawn = train[0] * train[1]
    header = ["subject", "classname", "img"]
    _table(folder / "driver_imgs_list.csv", header, sorted(rows[:drawn]))
    if names:
        hidden = sorted((name, classname, subject) for subject, classname, name in rows[drawn:])
        _table(folder / "solution.csv", header[::-1], hidden)
        classes = [f"c{label}" for label in range(CLASSES)]
        _table(folder / "sample_submission.csv", ["img", *classes], [(name, *[0.1] * CLASSES) for name, *_ in hidden])


def _table(path: Path, header: list[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)
