"""What people look at when a run is over: pictures, tables of predictions, a summary."""

import csv
import math
import pathlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from jaxft.data import Dataset
from jaxft.data.decode import visible
from jaxft.files import read_json, write_whole
from jaxft.predict import Predictions
from jaxft.task import Task, class_losses, label_figures, label_losses

Image = Callable[[int], np.ndarray]  # index into the dataset → uint8 [H, W, 3], in its own proportions

COLUMNS, ROWS = 6, 2  # of a grid of images
DRAWS, TRIES = 3, 16  # what is shown of an augmentation, and how often it is tried
SHOWN_CLASSES = 60  # bars in one picture
SHOWN_VALUES = 8  # rows of a regression's picture
NAMES = {"loss": "loss", "accuracy": "accuracy", "mae": "mean absolute error", "rmse": "root mean squared error"}
MORE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "PingFang SC",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)
FRACTIONS = ("accuracy", "f1", "auc", "precision", "match", "ece")  # figures that end so lie between 0 and 1


def pictures(
    folder: pathlib.Path,
    predictions: Predictions,
    dataset: Dataset,
    task: Task,
    history: Sequence[Mapping[str, Any]],
    image: Image,
) -> list[pathlib.Path]:
    """Every picture of a finished run, in an existing folder; returns the files.

    `learning_curves.png` where there is a history; where any label is known, `worst_mistakes.png` and, by the task,
    `confusion_matrix.png`, `labels.png` or `values.png`.
    """
    files = []
    if history:
        files.append(folder / "learning_curves.png")
        learning_curves(files[-1], history, task)
    if not predictions.known.any():
        return files
    if task.target == "class":
        files.append(folder / "confusion_matrix.png")
        confusion_matrix(files[-1], predictions, dataset.classes)
    elif task.target == "labels":
        files.append(folder / "labels.png")
        labels(files[-1], predictions, dataset.classes, task)
    else:
        files.append(folder / "values.png")
        values(files[-1], predictions, dataset.classes)
    files.append(folder / "worst_mistakes.png")
    worst_mistakes(files[-1], predictions, dataset, task, image)
    return files


def write_predictions(path: pathlib.Path, predictions: Predictions, dataset: Dataset) -> None:
    """A csv in UTF-8 with one row an image; a label is blank where it is unknown.

    Classes: `img`, `label`, then the probability of each class under its name, as Kaggle's submissions. Labels and
    values: `img`, `label_NAME` for each name, then each probability or value under its name.
    """
    single = dataset.target == "class"
    truth = ["label"] if single else [f"label_{name}" for name in dataset.classes]

    def known(label: Any) -> str:
        if single:
            return dataset.classes[int(label)]
        return str(int(label)) if dataset.target == "labels" else f"{label:.6g}"

    def write(partial: pathlib.Path) -> None:
        columns = (predictions.label.reshape(len(predictions), -1), predictions.known.reshape(len(predictions), -1))
        with partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.writer(file)
            table.writerow(["img", *truth, *dataset.classes])
            rows = zip(predictions.index, *columns, predictions.outputs, strict=True)
            for index, labels, are_known, outputs in rows:
                told = [known(label) if is_known else "" for label, is_known in zip(labels, are_known, strict=True)]
                table.writerow([dataset.names[int(index)], *told, *(f"{output:.6g}" for output in outputs)])

    write_whole(path, write)


def learning_curves(path: pathlib.Path, history: Sequence[Mapping[str, Any]], task: Task) -> None:
    """Loss, score and learning rate against the epoch; the monitored figure too, if it is neither of the first two.

    Rows are those of the history: `epoch`, `lr` or `lr_LABEL`, `train_…`, `val_…`, and where there is an average of the
    weights, `average_…`. A line marks each place where `phase` changes. What is missing or not finite is left out.
    """
    score = task.score[0]
    panels = list(dict.fromkeys(["loss", score, task.monitor]))
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(4.4 * (len(panels) + 1), 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels) + 1)
    for axes, what in zip(all_axes, panels, strict=False):
        for column, label in (
            ("train", "training (running mean)"),
            ("val", "held out"),
            ("average", "averaged weights"),
        ):
            curve = _column(history, f"{column}_{what}")
            if np.isfinite(curve).any():
                _curve(axes, epochs, curve, _legend(label, epochs, curve, task, what, column))
        title = NAMES.get(what, what.replace("_", " "))
        axes.set_title(f"{title} (monitored)" if what == task.monitor else title)
        if what.endswith(FRACTIONS):
            axes.set_ylim(-0.03, 1.03)
        elif what in ("loss", "mae", "rmse"):
            _from_zero(axes)
    _rates(all_axes[-1], history, epochs)
    for axes in all_axes:
        axes.set(xlabel="epoch", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        for before, after in zip(history, history[1:], strict=False):
            if before.get("phase") != after.get("phase"):
                axes.axvline((before["epoch"] + after["epoch"]) / 2, color="grey", linestyle=":", linewidth=1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    save(path, figure)


def confusion_matrix(path: pathlib.Path, predictions: Predictions, classes: Sequence[str]) -> None:
    """Counts of (label, prediction) where the label is known, coloured by the fraction of the label's images."""
    rows = predictions.known
    truth, guess = predictions.label[rows], predictions.outputs[rows].argmax(1)
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (truth, guess), 1)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    many = len(classes) > SHOWN_CLASSES  # then there is no room for counts and for every name
    cell = 9 / len(classes) if many else 0.55 if len(classes) <= 15 else 0.32
    side = max(2.2, cell * len(classes))
    figure = Figure(figsize=(side + 1, side))
    axes = figure.add_axes((0, 0, side / (side + 1), 1))
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    bar = figure.add_axes(((side + 0.2) / (side + 1), 0.1, 0.18 / (side + 1), 0.8))
    figure.colorbar(shown, cax=bar, label="fraction of the row")
    if not many:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.5 else "black"
                size = min(9, 72 * cell / (0.75 * max(2, len(str(count)))))
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=size)
    ticks = np.arange(0, len(classes), -(-len(classes) // SHOWN_CLASSES))
    names = _distinct(classes, 28)[:: ticks[1] if len(ticks) > 1 else 1]
    size = 9 if cell > 0.4 else 7
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    accuracy = f"accuracy {(truth == guess).mean():.1%}" if len(truth) else "no label is known"
    axes.set(xlabel="predicted", ylabel="label", title=f"{accuracy}, n = {len(truth)}")
    save(path, figure)


def labels(path: pathlib.Path, predictions: Predictions, classes: Sequence[str], task: Task) -> None:
    """Average precision, F1 and number of positives of each label, as bars; of many labels, those that do worst."""
    thresholds = np.asarray(task.options.get("threshold", 0.5), np.float32)
    figures = {name: np.asarray(column, float) for name, column in label_figures(predictions, thresholds).items()}
    shown = np.arange(len(classes))
    if len(classes) > SHOWN_CLASSES:
        worst = np.argsort(np.nan_to_num(figures["average_precision"], nan=2.0), kind="stable")[:SHOWN_CLASSES]
        shown = np.sort(worst)
    counts = predictions.known.sum(0)
    figure = Figure(figsize=(10, 0.9 + 0.24 * len(shown)))
    panels = figure.subplots(1, 3, sharey=True, gridspec_kw={"wspace": 0.08})
    for axes, name, title in zip(
        panels, ("average_precision", "f1", "positives"), ("average precision", "F1", "positives"), strict=True
    ):
        column = figures[name][shown]
        axes.barh(np.arange(len(shown)), np.nan_to_num(column), color="tab:blue", height=0.7)
        fraction = name != "positives"
        limit = 1.0 if fraction else max(1.0, column.max())
        for place, figure_of_label in enumerate(column):
            text = "undefined" if math.isnan(figure_of_label) else f"{figure_of_label:.2f}"
            text = text if fraction else f"{int(figure_of_label)} of {counts[shown[place]]}"
            axes.text(np.nan_to_num(figure_of_label) + 0.02 * limit, place, text, va="center", fontsize=7)
        axes.set(title=title, xlim=(0, 1.15 * limit if fraction else 1.5 * limit))
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    names = _distinct(classes, 32)
    panels[0].set_yticks(np.arange(len(shown)), [names[c] for c in shown.tolist()], fontsize=8)
    panels[0].set_ylim(len(shown) - 0.5, -0.5)
    panels[-1].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if len(shown) < len(classes):
        note = f"the {len(shown)} of {len(classes)} labels with the lowest average precision"
        panels[1].annotate(note, (0.5, 1), (0, 26), "axes fraction", "offset points", ha="center")
    save(path, figure)


def values(path: pathlib.Path, predictions: Predictions, names: Sequence[str]) -> None:
    """For each value, predicted against true with the diagonal, and the distribution of predicted - true."""
    count = min(len(names), SHOWN_VALUES)
    figure = Figure(figsize=(9, 3.9 * count), layout="constrained")
    if count < len(names):
        figure.suptitle(f"the first {count} of {len(names)} values")
    for c, (left, right) in enumerate(figure.subplots(count, 2, squeeze=False)):
        rows = predictions.known[:, c] & np.isfinite(predictions.outputs[:, c])
        truth, found = predictions.label[rows, c].astype(float), predictions.outputs[rows, c].astype(float)
        left.set(xlabel="true", ylabel="predicted", title=f"{_short(names[c], 28)}, n = {len(truth)}")
        right.set(xlabel="predicted - true", ylabel="images", title="residuals")
        if not len(truth):
            continue
        low, high = min(truth.min(), found.min()), max(truth.max(), found.max())
        margin = 0.05 * (high - low) or 1.0
        limits = (low - margin, high + margin)
        left.plot(limits, limits, color="grey", linewidth=1, linestyle="--")
        left.scatter(truth, found, s=12, alpha=max(0.15, min(0.8, 200 / len(truth))), linewidths=0)
        left.set(xlim=limits, ylim=limits, aspect="equal")
        residuals = found - truth
        right.hist(residuals, bins=min(40, max(5, round(math.sqrt(len(residuals))))), color="tab:blue")
        right.axvline(0, color="grey", linewidth=1, linestyle="--")
        right.set_title(f"residuals: mean {residuals.mean():.3g}, mean size {np.abs(residuals).mean():.3g}")
        right.xaxis.set_major_locator(MaxNLocator(6))
        right.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    save(path, figure)


def worst_mistakes(path: pathlib.Path, predictions: Predictions, dataset: Dataset, task: Task, image: Image) -> None:
    """A grid of the images that the net is most wrong about, the worst first; unknown labels are left out.

    Classes: misclassified images whose label got the lowest probability. Labels: each wrong label by itself. Values:
    the largest errors, in standard deviations of each value.
    """
    title, worst = mistakes(predictions, dataset.classes, task)
    cells = []
    for row, caption in worst[: COLUMNS * ROWS]:
        index = int(predictions.index[row])
        cells.append((image(index), f"{caption}\n{_short(dataset.names[index], 28)}"))
    _grid(path, title, cells)


def mistakes(predictions: Predictions, classes: Sequence[str], task: Task) -> tuple[str, list[tuple[int, str]]]:
    """What the net is most wrong about, as `worst_mistakes` shows it.

    Returns:
        (a line about all of them, (row of the predictions, caption) of at most 12, the worst first).
    """
    found = {"class": _wrong_classes, "labels": _wrong_labels, "values": _wrong_values}[task.target]
    title, worst = found(predictions, classes, task)
    return title, worst[: COLUMNS * ROWS]


def augmentations(
    path: pathlib.Path,
    originals: np.ndarray,
    transform: Callable[[jax.Array, jax.Array], jax.Array] | None,
    seed: int = 0,
) -> None:
    """Training images above what the augmentation makes of them: up to three different results for each image.

    Args:
        path: of the picture.
        originals: uint8 [B, H, W, C]; the first 6 are shown.
        transform: (key, images float32 [B, H, W, 3], 0 to 255) → images of the same shape; None: no augmentation.
        seed: of the keys.
    """
    shown = min(len(originals), COLUMNS)
    results: list[list[np.ndarray]] = [[original] for original in originals[:shown]]  # different ones, of each image
    if transform is not None:
        images = jax.numpy.asarray(originals, jax.numpy.float32)
        for t in range(TRIES):
            drawn = np.asarray(transform(jax.random.fold_in(jax.random.key(seed), t), images))
            for column, made in zip(results, drawn.clip(0, 255).round().astype(np.uint8), strict=False):
                if len(column) <= DRAWS and not any(np.array_equal(made, other) for other in column):
                    column.append(made)
            if min(map(len, results)) > DRAWS:
                break
    rows = max(map(len, results))
    cells = [
        (column[row], "original" if row == 0 else f"result {row}") if row < len(column) else None
        for row in range(rows)
        for column in results
    ]
    if transform is None:
        title = "no augmentation: training takes the images as they are"
    elif rows == 1:
        title = f"the augmentation changed nothing in {TRIES} draws"
    else:
        title = "what the augmentation makes of training images (results that differ)"
    _grid(path, title, cells, columns=shown)


def lr_curve(path: pathlib.Path, rates: Sequence[float], losses: Sequence[float], suggestion: float | None) -> None:
    """Loss of a range test against the learning rate, with the rate that it suggests; None: it suggests none."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    curve = np.asarray(losses, float)
    axes.plot(rates, np.where(np.isfinite(curve), curve, np.nan))
    if suggestion is not None:
        axes.axvline(suggestion, color="tab:orange", linestyle="--", label=f"suggestion: {suggestion:.2g}")
        axes.legend()
    finite = curve[np.isfinite(curve)]
    if len(finite):
        start, low = finite[0], finite.min()
        # The end of the test diverges, and would flatten what matters.
        top = min(finite.max(), max(start, low) + max(start - low, 0.25 * abs(start)))
        room = 0.05 * (top - low) or 0.1
        axes.set_ylim(low - room, top + room)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="learning-rate range test")
    axes.grid(alpha=0.3)
    save(path, figure)


def table(title: str, rows: Mapping[str, Any]) -> None:
    """Prints names and values as a table."""
    shown = Table(title=title, show_header=False, title_justify="left")
    shown.add_column(overflow="fold")  # in several lines, where rich would cut what is long
    shown.add_column(overflow="fold")
    for name, value in rows.items():
        shown.add_row(name, str(value))
    Console(soft_wrap=True).print(shown)


def columns(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with a header, its columns as wide as the terminal allows."""
    shown = Table(*header, title=title, title_justify="left")
    for column in shown.columns:
        column.overflow = "fold"
    for row in rows:
        shown.add_row(*row)
    Console(width=None if Console().is_terminal else 120).print(shown)


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean ± standard deviation of the values that are numbers, each in `form`, such as "{:.2f}", and their unit."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "–"
    deviation = f" ± {np.std(known, ddof=1):{form.strip('{}:').replace('+', '')}}" if len(known) > 1 else ""
    return form.format(float(np.mean(known))) + deviation + unit


def figures(title: str, metrics: Mapping[str, float | None], rows: Mapping[str, Any]) -> None:
    """Prints the figures of a task's `metrics`, then `rows`."""
    table(title, {**_shown(metrics), **rows})


def print_predictions(predictions: Predictions, dataset: Dataset, most: int) -> None:
    """Prints the first `most` predictions: of classes the three likeliest, of labels and values each."""
    rows = []
    for index, outputs in zip(predictions.index[:most], predictions.outputs, strict=False):
        best = np.argsort(-outputs)[:3] if dataset.target == "class" else np.arange(len(outputs))
        shown = (f"{outputs[c]:.1%}" if dataset.target != "values" else f"{outputs[c]:.4g}" for c in best)
        named = ", ".join(f"{dataset.classes[c]} {value}" for c, value in zip(best, shown, strict=True))
        rows.append((dataset.names[index], named))
    columns(f"the first {len(rows)} of {len(predictions):,} predictions", ("image", "prediction"), rows)


def _shown(metrics: Mapping[str, float | None]) -> dict[str, str]:
    return {
        name.replace("_", " "): "undefined"
        if value is None or math.isnan(value)
        else f"{value:.2%}"
        if "accuracy" in name
        else f"{value:.4f}"
        for name, value in metrics.items()
    }


def result(title: str, folder: pathlib.Path, rows: Mapping[str, Any]) -> None:
    """Prints what `summary.json` of a run's folder says: figures, the state that was kept, speed; then `rows`."""
    summary = read_json(folder / "summary.json")
    kept, speed = summary["kept"], summary["images_per_second"]
    about = {
        "held-out images": summary["images"]["held_out"],
        "state": f"{kept['which']}, epoch {kept['epoch']} of {summary['epochs']}",
        "speed": f"{speed:.1f} images/s" if speed else "not measured: every step compiled",
    }
    table(title, {**_shown(summary["metrics"]), **about, **rows, "everything else": folder})


def _wrong_classes(predictions: Predictions, classes: Sequence[str], task: Task) -> tuple[str, list[tuple[int, str]]]:
    guess, losses = predictions.outputs.argmax(1), class_losses(predictions)
    wrong = np.flatnonzero(predictions.known & (guess != predictions.label))
    worst = wrong[np.argsort(-losses[wrong], kind="stable")]
    captions = [
        f"{_short(classes[int(predictions.label[row])], 28)}\n"
        f"→ {_short(classes[int(guess[row])], 22)} {predictions.outputs[row, guess[row]]:.0%}"
        for row in worst[: COLUMNS * ROWS].tolist()
    ]
    return _title("label → prediction", len(wrong), int(predictions.known.sum()), "images"), list(
        zip(worst.tolist(), captions, strict=False)
    )


def _wrong_labels(predictions: Predictions, classes: Sequence[str], task: Task) -> tuple[str, list[tuple[int, str]]]:
    thresholds = np.asarray(task.options.get("threshold", 0.5), np.float32)
    present, losses = predictions.label > 0.5, label_losses(predictions)
    entries = np.argwhere(predictions.known & ((predictions.outputs > thresholds) != present))
    order = np.argsort(-losses[entries[:, 0], entries[:, 1]], kind="stable")[: COLUMNS * ROWS]
    worst = []
    for row, c in (map(int, entry) for entry in entries[order]):
        truth = "present" if present[row, c] else "absent"
        worst.append((row, f"{_short(classes[c], 28)}\n{truth} → {predictions.outputs[row, c]:.0%}"))
    return _title("truth → probability", len(entries), int(predictions.known.sum()), "labels"), worst


def _wrong_values(predictions: Predictions, names: Sequence[str], task: Task) -> tuple[str, list[tuple[int, str]]]:
    known = predictions.known & np.isfinite(predictions.outputs)
    truth = np.where(known, predictions.label, np.nan).astype(float)
    spread = [np.nanstd(column) or 1.0 if np.isfinite(column).any() else 1.0 for column in truth.T]
    off = np.where(known, np.abs(predictions.outputs - truth) / spread, -1)
    places = np.argsort(-off.ravel(), kind="stable")[: min(COLUMNS * ROWS, int(known.sum()))]
    worst = []
    for place in map(int, places):
        row, c = divmod(place, truth.shape[1])
        name = f"{_short(names[c], 28)}\n" if len(names) > 1 else ""
        worst.append((row, f"{name}{truth[row, c]:.4g} → {predictions.outputs[row, c]:.4g}"))
    return f"largest errors of {int(known.sum())} values, true → predicted", worst


def _title(what: str, mistakes: int, known: int, unit: str) -> str:
    if not mistakes:
        return f"no mistake in {known} {unit}"
    worst = "worst mistakes" if mistakes > COLUMNS * ROWS else "mistakes"
    return f"{worst}, {what} ({mistakes} wrong of {known} {unit})"


def _column(history: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """float64 [rows]; NaN for what a row lacks: JSON has turned NaN into None."""
    column = [row.get(name) for row in history]
    return np.asarray([math.nan if value is None else value for value in column], np.float64)


def _rates(axes: Axes, history: Sequence[Mapping[str, Any]], epochs: Sequence[float]) -> None:
    """Learning rates, and the names of the phases where each begins."""
    names = dict.fromkeys(name for row in history for name in row if name == "lr" or name.startswith("lr_"))
    for name in names:
        _curve(axes, epochs, _column(history, name), "" if name == "lr" else _short(name.removeprefix("lr_"), 24))
    positive = [rate for name in names for rate in _column(history, name) if rate > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min(positive) / 2, max(positive) / 1e4))  # half a cosine ends next to nothing
    else:
        _from_zero(axes)
    axes.set_title("learning rate at the epoch's end")
    previous = None
    for row in history if len({row.get("phase") for row in history}) > 1 else ():
        if (phase := row.get("phase")) != previous and phase is not None:
            place = (row["epoch"] - 0.42, 0.03)
            axes.text(
                *place,
                f"phase {_short(phase, 24)}",
                transform=axes.get_xaxis_transform(),
                rotation=90,
                fontsize=7,
                color="dimgrey",
            )
        previous = phase


def _from_zero(axes: Axes) -> None:
    tops = [np.nanmax(line.get_ydata()) for line in axes.get_lines() if np.isfinite(line.get_ydata()).any()]
    axes.set_ylim(0, 1.08 * max(tops, default=1.0) or 1.0)


def _curve(axes: Axes, epochs: Sequence[float], curve: np.ndarray, label: str) -> None:
    shown = np.where(np.isfinite(curve), curve, np.nan)
    axes.plot(epochs, shown, marker="o", markersize=4 if len(epochs) <= 40 else 1.5, label=label)


def _legend(label: str, epochs: Sequence[float], curve: np.ndarray, task: Task, what: str, column: str) -> str:
    """The curve's name with its last value, and with its best one where the best epoch is chosen by it."""
    finite = np.isfinite(curve)
    text = f"{label}: {curve[-1]:.4g} at the end" if finite[-1] else label
    if what != task.monitor or column == "train":
        return text
    sign = 1 if task.best == "lowest" else -1
    best = int(np.argmin(np.where(finite, sign * curve, math.inf)))
    return f"{text}, best {curve[best]:.4g} (epoch {epochs[best]:g})"


def _short(name: str, most: int) -> str:
    """The name in one line and at most so many characters, its middle left out; no part of it is read as a formula."""
    name = " ".join(str(name).split()).encode("utf-8", "replace").decode()  # no half of a surrogate pair
    if len(name) > most:
        end = most // 2 - 1
        name = f"{name[: most - 1 - end]}…{name[-end:]}"
    return name.replace("$", r"\$")


def _distinct(names: Sequence[str], most: int) -> list[str]:
    """Each name as `_short` makes it, with its place before it where that leaves two names equal."""
    short = [_short(name, most) for name in names]
    counts = Counter(short)
    return [name if counts[name] == 1 else f"{place}: {name}" for place, name in enumerate(short)]


def _grid(
    path: pathlib.Path, title: str, cells: Sequence[tuple[np.ndarray, str] | None], columns: int | None = None
) -> None:
    """Images with captions, row by row, each in its own proportions; None leaves a place empty."""
    shown = [cell for cell in cells if cell is not None]
    columns = columns or min(COLUMNS, max(1, len(cells)))
    rows = -(-len(cells) // columns)
    lines = max((caption.count("\n") + 1 for _, caption in shown), default=0)
    tallest = max((min(image.shape[0] / image.shape[1], 1.4) for image, _ in shown), default=0)
    height = 1.85 * tallest + 0.16 * lines + 0.1
    figure = Figure(figsize=(2 * columns, height * rows + 0.45), layout="constrained")
    figure.suptitle(title)
    for cell, axes in zip(cells, figure.subplots(rows, columns, squeeze=False).flat if rows else (), strict=False):
        if cell is not None:
            axes.imshow(visible(cell[0]))
            axes.set_anchor("N")
            axes.set_title(cell[1], fontsize=8)
    for axes in figure.axes:
        axes.axis("off")
    save(path, figure)


def save(path: pathlib.Path, figure: Figure) -> None:
    """A figure as PNG, written whole, in fonts that have the letters of many scripts."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in MORE_FONTS if name in installed)]
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_fontfamily(families)

    def write(partial: pathlib.Path) -> None:
        with warnings.catch_warnings():
            # A script that the fonts of this machine lack is drawn as boxes; the csv has the names.
            warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
            figure.savefig(partial, dpi=110, format="png", bbox_inches="tight", pad_inches=0.12)

    write_whole(path, write)
