"""What people look at when a run is over: pictures, a table, a summary."""

import csv
import pathlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from jaxft.files import write_whole
from jaxft.predict import Predictions

COLUMNS, ROWS = 6, 2  # of a grid of images
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_predictions(
    path: pathlib.Path, predictions: Predictions, names: Sequence[str], classes: Sequence[str]
) -> None:
    """A csv with one row an image: `img`, `label`, then the probability of each class, as Kaggle's submissions."""

    def write(partial: pathlib.Path) -> None:
        with partial.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["img", "label", *classes])
            rows = zip(predictions.index, predictions.label, predictions.probabilities, strict=True)
            for index, label, probabilities in rows:
                table.writerow([names[index], classes[label], *(f"{p:.6g}" for p in probabilities)])

    write_whole(path, write)


def learning_curves(path: pathlib.Path, history: Sequence[Mapping[str, float]]) -> None:
    """Loss and accuracy, training and held out, against the epoch; rows are those of `train.fit`."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, what, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("nats", "fraction"), strict=True):
        for split, label in (("train", "training (augmented, running mean)"), ("val", "held out")):
            values = [row[f"{split}_{what}"] for row in history]
            axes.plot(epochs, values, marker="o", markersize=4, label=label)
            axes.annotate(f"{values[-1]:.3f}", (epochs[-1], values[-1]), xytext=(5, 0), textcoords="offset points")
        axes.set(xlabel="epoch", ylabel=f"{what} ({unit})", title=what, ylim=(0, None if what == "loss" else 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.18)  # room for the last values
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(path, figure)


def confusion_matrix(path: pathlib.Path, predictions: Predictions, classes: Sequence[str]) -> None:
    """Counts of (label, prediction), coloured by the fraction of the label's images."""
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (predictions.label, predictions.probabilities.argmax(1)), 1)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    size = 3 + 0.55 * len(classes)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="fraction of the label's images", shrink=0.8)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    ticks = np.arange(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right")
    axes.set_yticks(ticks, classes)
    axes.set(
        xlabel="predicted", ylabel="label", title=f"accuracy {predictions.accuracy():.1%}, n = {len(predictions.label)}"
    )
    _save(path, figure)


def worst_mistakes(
    path: pathlib.Path,
    predictions: Predictions,
    image: Callable[[int], np.ndarray],
    names: Sequence[str],
    classes: Sequence[str],
) -> None:
    """A grid of the images whose label got the lowest probability, worst first, of those that are misclassified.

    `image` takes an index into the dataset and returns uint8 [H, W, 3].
    """
    wrong = predictions.probabilities.argmax(1) != predictions.label
    worst = [i for i in np.argsort(-predictions.losses(), kind="stable") if wrong[i]][: COLUMNS * ROWS]

    def draw(axes: Axes, place: int) -> None:
        row, index = worst[place], predictions.index[worst[place]]
        guess = int(predictions.probabilities[row].argmax())
        axes.imshow(image(int(index)))
        axes.set_title(
            f"{classes[int(predictions.label[row])]}\n→ {classes[guess]} {predictions.probabilities[row, guess]:.0%}\n"
            f"{names[int(index)]}",
            fontsize=8,
        )

    _grid(path, f"worst of {wrong.sum()} mistakes: label → prediction", len(worst), draw)


def sample_augmentations(path: pathlib.Path, original: np.ndarray, augmented: np.ndarray) -> None:
    """Originals above what the train step makes of them; uint8 [B, H, W, 3] and float32 of that shape, 0 to 255."""
    shown = min(len(original), COLUMNS)

    def draw(axes: Axes, place: int) -> None:
        row, column = divmod(place, COLUMNS)
        if column < shown:
            axes.imshow(np.asarray((original, augmented)[row][column]).clip(0, 255).astype(np.uint8))
            axes.set_title(("original", "augmented")[row], fontsize=8)

    _grid(path, "what the augmentation does", 2 * COLUMNS, draw)


def table(title: str, rows: Mapping[str, Any]) -> None:
    """Prints names and values as a table."""
    shown = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        shown.add_row(name, str(value))
    Console(soft_wrap=True).print(shown)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, and the device that computed it."""
    device = jax.devices()[0]
    return {package: metadata.version(package) for package in PACKAGES} | {
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})"
    }


def _grid(path: pathlib.Path, title: str, count: int, draw: Callable[[Axes, int], None]) -> None:
    rows = max(1, -(-count // COLUMNS))
    figure = Figure(figsize=(2 * COLUMNS, 2.1 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for place, axes in enumerate(figure.subplots(rows, COLUMNS).flat):
        axes.axis("off")
        if place < count:
            draw(axes, place)
    _save(path, figure)


def _save(path: pathlib.Path, figure: Figure) -> None:
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
