"""The stand-in for State Farm's pictures: drawn by a program, in Kaggle's layout.

With it the whole pipeline can be tried where Kaggle's data are absent. A score on it says nothing about State Farm.
"""

import concurrent.futures
import csv
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from experiments.standin import cabin
from jaxft.progress import bar

MARKER = "STANDIN.json"
VERSION = 1  # a new version draws different pictures from the same seed
NOTE = "Drawn by a program to stand in for State Farm's photographs; scores on it say nothing about State Farm."
CLASSES = len(cabin.POSTURES)
CLIP = 5  # pictures in a row that show one movement
QUALITY = 90  # JPEG


def jpeg(seed: int, driver: int, image: int) -> bytes:
    """Picture `image` of a driver, a 640×480 JPEG: a pure function of its arguments; its class is image % 10."""
    label, moment = image % CLASSES, image // CLASSES
    pixels = cabin.picture(
        cabin.random_driver(np.random.default_rng([seed, driver])),
        label,
        clip=np.random.default_rng([seed, driver, label, moment // CLIP]),
        moment=float(moment),
        noise=np.random.default_rng([seed, driver, label, moment, 0]),
    )
    return simplejpeg.encode_jpeg(pixels, quality=QUALITY)


def render(root: Path, *, drivers: int, images_per_driver: int, seed: int = 0, workers: int | None = None) -> Path:
    """Draws a training set into `root`, or finds it there: `imgs/train/c0 … c9/*.jpg` and `driver_imgs_list.csv`.

    Args:
        root: the folder; it appears when everything in it is written. A file `STANDIN.json` marks it.
        drivers, images_per_driver: how many; classes take turns, so a multiple of 10 gives each driver equal shares.
        seed: decides everything drawn. A larger set of the same seed holds the pictures of a smaller one.
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
    facts: dict[str, Any] = {"note": NOTE, "version": VERSION, "seed": seed}
    facts |= {"drivers": drivers, "images_per_driver": images_per_driver}
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
        _write(partial, drivers, images_per_driver, seed, workers)
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


def _write(folder: Path, drivers: int, images_per_driver: int, seed: int, workers: int | None) -> None:
    for label in range(CLASSES):
        (folder / f"imgs/train/c{label}").mkdir(parents=True)
    places = [(driver, image) for driver in range(drivers) for image in range(images_per_driver)]

    def draw(place: tuple[int, int]) -> tuple[str, str, str]:
        driver, image = place
        row = (f"p{driver:03d}", f"c{image % CLASSES}", f"img_{driver:03d}{image:05d}.jpg")
        (folder / "imgs/train" / row[1] / row[2]).write_bytes(jpeg(seed, driver, image))
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
    with (folder / "driver_imgs_list.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["subject", "classname", "img"])
        table.writerows(sorted(rows))
