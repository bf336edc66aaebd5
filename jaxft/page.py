"""The report of a run: one HTML page that needs nothing else, and the same as Markdown."""

import base64
import csv
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxft import charts, files, gradcam, report, settings
from jaxft.data import Dataset, decode
from jaxft.model import Model
from jaxft.predict import Predictions
from jaxft.task import calibration_error, label_figures

SIDE = 224  # pixels of the longer side of an image on the page
PICTURES = "report"  # the folder of the pictures that report.md shows
NAMES = {
    "ece": "calibration error",
    "roc_auc": "ROC AUC",
    "macro_f1": "macro F1",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
}
EXPLAINED = {
    "loss": "what training minimises; lower is better",
    "top5_accuracy": "share of images whose class is among the five likeliest",
    "top3_accuracy": "share of images whose class is among the three likeliest",
    "accuracy": "share of images whose likeliest class is right",
    "balanced_accuracy": "mean over classes of the share that is found",
    "macro_f1": "mean over classes of F1",
    "roc_auc": "chance that a right image ranks above a wrong one; 0.5 is guessing",
    "average_precision": "area under precision against recall",
    "ece": "how far probabilities are from frequencies; 0 is calibrated",
    "mae": "mean absolute error",
    "rmse": "root of the mean squared error",
    "r2": "share of the variance that is explained",
    "exact_match": "share of images with all labels right",
}


def write(
    folder: pathlib.Path,
    model: Model,
    dataset: Dataset | None,
    predictions: Predictions,
    *,
    stages: Sequence[str] | None = None,
    shown: int = 12,
) -> pathlib.Path:
    """Writes `report.html`, `report.md` and the pictures of the latter into the folder of a run.

    Args:
        folder: of the run, with its `history.csv`, `summary.json` and `config.json`; what is not there is left out.
        model: the trained model.
        dataset: of the predictions; None, where the images are no longer there: the report has no images then.
        predictions: of the images that judge the net.
        stages: whose Grad-CAM is shown; None: the last one whose output has places.
        shown: images of each kind.

    Returns:
        the path of `report.html`.

    Raises:
        ValueError: the model has no task, or no such stage; an image cannot be decoded.
        OSError: the folder cannot be written to.
    """
    if model.task is None:
        raise ValueError("this model was not trained, so that there is nothing to report; give that of a run")
    folder = pathlib.Path(folder).expanduser()
    found = {
        "title": folder.absolute().name,
        "net": model.name or type(model.net).__qualname__,
        "source": str(model.source.get("source", "given")),
        "size": "×".join(map(str, model.image_size or ())),
        "target": model.task.target,
        "figures": _figures(model, predictions),
        "count": len(predictions),
        "charts": _charts(folder, model, predictions),
        "table": _table(model, predictions),
        "images": [] if dataset is None else sections(model, dataset, predictions, stages, shown),
        "settings": _settings(folder),
        "versions": _versions(folder),
    }
    return render(folder, "report", found, pictures=PICTURES)


def render(folder: pathlib.Path, name: str, found: dict[str, Any], *, pictures: str) -> pathlib.Path:
    """Writes `name`.html, which needs nothing else, and `name`.md with its pictures in a folder, from templates.

    Args:
        folder: that holds both.
        name: of the templates.
        found: what they show: `charts` (title, SVG, remark), `images` from `sections`, and what the template names.
        pictures: the name of the folder of the Markdown's pictures.

    Returns:
        the path of the HTML.

    Raises:
        OSError: the folder cannot be written to.
    """
    import jinja2

    places = jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates")
    made = jinja2.Environment(loader=places, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    files.write_text(folder / f"{name}.html", made.get_template(f"{name}.html").render(found, style=charts.STYLE))
    _pictures(folder / pictures, found)
    plain = jinja2.Environment(loader=places, trim_blocks=True, lstrip_blocks=True)
    plain.filters["cell"] = _cell
    files.write_text(folder / f"{name}.md", plain.get_template(f"{name}.md").render(found, pictures=pictures))
    return folder / f"{name}.html"


def sections(
    model: Model,
    dataset: Dataset,
    predictions: Predictions,
    stages: Sequence[str] | None = None,
    shown: int = 12,
) -> list[dict[str, Any]]:
    """Worst mistakes, labels that may be wrong, and activation maps of a net, with the pictures in them.

    Arguments as in `write`.

    Raises:
        ValueError: the model has no task, or no such stage; an image cannot be decoded.
    """
    return _encoded(_images(model, dataset, predictions, stages, shown))


def _cell(text: object) -> str:
    """Text that stays within a cell of a Markdown table, and is no markup."""
    words = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|" else letter for letter in words)


def _figures(model: Model, predictions: Predictions) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of each figure of the task."""
    assert model.task is not None
    rows = []
    for name, value in model.task.metrics(predictions).items():
        base = name.rstrip("0123456789").rstrip("_") if name.rpartition("_")[2].isdigit() else name
        of = f" ({model.classes[int(name.rpartition('_')[2])]})" if base != name else ""
        number = "undefined" if not math.isfinite(value) else f"{value:.2%}" if "accuracy" in name else f"{value:.4g}"
        rows.append((NAMES.get(base, base.replace("_", " ")) + of, number, EXPLAINED.get(base, "")))
    return rows


def _charts(folder: pathlib.Path, model: Model, predictions: Predictions) -> list[dict[str, str]]:
    """Title, SVG and a remark of each chart."""
    found = _curves(folder, model)
    known, outputs = predictions.known, predictions.outputs
    if model.task is None or not known.any():
        return found
    if model.task.target == "class":
        labels, guesses = predictions.label[known].astype(int), outputs[known].argmax(1)
        found.append(confusion("Confusion matrix", labels, guesses, model.classes))
        probability, happened = outputs[known].max(1), guesses == labels
    elif model.task.target == "labels":
        probability, happened = outputs[known], predictions.label[known] > 0.5
    else:
        for column, name in enumerate(model.classes):
            rows = known[:, column]
            truth, value = predictions.label[rows, column], outputs[rows, column]
            svg = charts.scatter(f"{name}, predicted against true", truth.tolist(), value.tolist(), "true")
            found.append({"title": f"{name}: predicted against true", "svg": svg, "remark": "on the line all is right"})
        return found
    found.append(reliability("Reliability", probability, happened))
    return found


def confusion(title: str, labels: np.ndarray, guesses: np.ndarray, classes: Sequence[str]) -> dict[str, str]:
    """The chart of labels and predictions of n images, int [n] each, with its title and remark."""
    counts = np.zeros((len(classes),) * 2, int)
    np.add.at(counts, (labels, guesses), 1)
    svg = charts.confusion(title.lower(), counts, classes)
    return {"title": title, "svg": svg, "remark": "labels down, predictions across"}


def reliability(title: str, probability: np.ndarray, happened: np.ndarray) -> dict[str, str]:
    """The chart of n probabilities and whether what they are of happened, bool [n], with its title and remark."""
    svg = charts.reliability(title.lower(), probability, happened)
    remark = f"bars on the line are calibrated; calibration error {calibration_error(probability, happened):.3f}"
    return {"title": title, "svg": svg, "remark": remark}


def history(folder: pathlib.Path) -> list[dict[str, str]]:
    """The rows of a run's `history.csv`; none where there is no such file."""
    if not (folder / "history.csv").is_file():
        return []
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows: Sequence[Mapping[str, str]], name: str) -> list[float]:
    """A figure of each epoch; NaN where it is undefined."""
    return [float(row[name]) if row.get(name) else math.nan for row in rows]


def _curves(folder: pathlib.Path, model: Model) -> list[dict[str, str]]:
    rows = history(folder)
    if not rows or model.task is None:
        return []
    epochs = column(rows, "epoch")
    marks = {}
    for before, row in zip(rows, rows[1:], strict=False):
        if before["phase"] != row["phase"]:
            marks[float(before["epoch"]) + 0.5] = f"phase {row['phase']}"
    if (folder / "summary.json").is_file():
        kept = files.read_json(folder / "summary.json").get("kept", {}).get("epoch")
        if kept is not None:
            marks[float(kept)] = "kept"
    found, score = [], model.task.score[0]
    for name in ("loss", score):
        sides = {"training": f"train_{name}", "held out": f"val_{name}", "averaged weights": f"average_{name}"}
        series = {side: (epochs, column(rows, key)) for side, key in sides.items() if key in rows[0]}
        if series:
            svg = charts.lines(f"{name} by epoch", series, "epoch", marks)
            found.append({"title": name.capitalize(), "svg": svg, "remark": ""})
    rates = {
        key.removeprefix("lr_") if key != "lr" else "all layers": key for row in rows for key in row if key[:2] == "lr"
    }
    series = {name: (epochs, column(rows, key)) for name, key in rates.items() if np.isfinite(column(rows, key)).any()}
    if series:
        svg = charts.lines("learning rate by epoch", series, "epoch", {k: v for k, v in marks.items() if v != "kept"})
        found.append({"title": "Learning rate", "svg": svg, "remark": "at the end of each epoch"})
    return found


def _table(model: Model, predictions: Predictions) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the figures of each class, label or value."""
    assert model.task is not None
    known = predictions.known

    def number(value: float) -> str:
        return "–" if not math.isfinite(value) else f"{value:.3f}"

    if model.task.target == "class":
        labels, guesses = predictions.label[known].astype(int), predictions.outputs[known].argmax(1)
        rows = []
        for c, name in enumerate(model.classes):
            hits, there, said = ((labels == c) & (guesses == c)).sum(), (labels == c).sum(), (guesses == c).sum()
            precision = hits / said if said else math.nan
            recall = hits / there if there else math.nan
            f1 = 2 * hits / (there + said) if there + said else math.nan
            rows.append([name, number(precision), number(recall), number(f1), str(there)])
        return ["class", "precision", "recall", "F1", "images"], rows
    if model.task.target == "labels":
        threshold = np.asarray(model.task.options.get("threshold", 0.5), np.float32)
        found = label_figures(predictions, threshold)
        columns = zip(*(found[name] for name in ("f1", "roc_auc", "average_precision", "positives")), strict=True)
        rows = [
            [name, number(f1), number(auc), number(ap), str(count)]
            for name, (f1, auc, ap, count) in zip(model.classes, columns, strict=True)
        ]
        return ["label", "F1", "ROC AUC", "average precision", "images"], rows
    rows = []
    for c, name in enumerate(model.classes):
        error = (predictions.outputs[:, c] - predictions.label[:, c])[known[:, c]]
        mean, mae = (error.mean(), np.abs(error).mean()) if len(error) else (math.nan, math.nan)
        rows.append([name, f"{mae:.4g}", f"{mean:+.4g}", str(len(error))])
    return ["value", "mean absolute error", "mean error", "images"], rows


def _images(
    model: Model, dataset: Dataset, predictions: Predictions, stages: Sequence[str] | None, shown: int
) -> list[dict[str, Any]]:
    """Sections of images: title, explanation, and (picture, caption) of each."""
    assert model.task is not None

    def small(row: int) -> np.ndarray:
        index = int(predictions.index[row])
        return decode.thumbnail(dataset.images[index], SIDE, dataset.names[index], model.decode)

    title, worst = report.mistakes(predictions, dataset.classes, model.task)
    sections = [
        {
            "title": "Worst mistakes",
            "text": title,
            "images": [
                (small(row), f"{dataset.names[int(predictions.index[row])]}\n{words}") for row, words in worst[:shown]
            ],
        }
    ]
    if model.task.target == "class":
        sections.append(
            {
                "title": "Labels that may be wrong",
                "text": "The net is as sure of another class as it is, in the mean, of images that carry that class as "
                "their label (confident learning, Northcutt et al. 2021). Some are hard, some are mislabelled.",
                "images": [
                    (small(row), f"{dataset.names[int(predictions.index[row])]}\nlabel {dataset.classes[label]}, looks "
                     f"like {dataset.classes[other]}")
                    for row, label, other in suspects(predictions)[:shown]
                ],
            }
        )  # fmt: skip
    rows = _spread(predictions, shown)
    if len(rows) and model.image_size is not None:
        known = gradcam.stages(model, (*model.image_size, model.decode.channels))
        for stage in stages or known[-1:]:
            sections.append(_activations(model, dataset, predictions, rows, stage))
    return sections


def _activations(
    model: Model, dataset: Dataset, predictions: Predictions, rows: np.ndarray, stage: str
) -> dict[str, Any]:
    assert model.image_size is not None
    indices = [int(predictions.index[row]) for row in rows]
    images = np.stack(
        [decode.pixels(dataset.images[i], model.image_size, dataset.names[i], model.decode) for i in indices]
    )
    targets = predictions.outputs[rows].argmax(1)
    heat = gradcam.heatmaps(model, images, stage, targets)
    pictures = []
    for index, image, part, target in zip(indices, images, heat, targets.tolist(), strict=True):
        upright = decode.visible(image)
        both = np.concatenate([upright, gradcam.overlay(upright, part)], 1)
        pictures.append((both, f"{dataset.names[index]}\nspeaks for {dataset.classes[target]}"))
    return {
        "title": f"Where the net looks: {stage}",
        "text": "Left the image as the net gets it, right the parts that raise the named output, the brighter the "
        "more (Grad-CAM, Selvaraju et al. 2017). An image without bright parts has none that speak for it.",
        "images": pictures,
    }


def _spread(predictions: Predictions, shown: int) -> np.ndarray:
    """Rows to look at: of every class that is predicted the surest, in turn."""
    guesses, sure = predictions.outputs.argmax(1), predictions.outputs.max(1)
    order = np.argsort(-sure, kind="stable")
    turn = np.zeros(len(order), int)
    seen: dict[int, int] = {}
    for row in order.tolist():
        turn[row] = seen.setdefault(int(guesses[row]), 0)
        seen[int(guesses[row])] += 1
    return order[np.argsort(turn[order], kind="stable")][:shown]


def suspects(predictions: Predictions) -> list[tuple[int, int, int]]:
    """Images whose label the net doubts with reason: (row of the predictions, label, class that it looks like).

    A class's threshold is the mean probability that it gets where it is the label. An image is suspected if another
    class reaches its threshold and is likelier than any other that does; the largest gap comes first. The predictions
    must be of images that the net was not trained on.

    Source: Northcutt et al. 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels".
    """
    rows = np.flatnonzero(predictions.known)
    labels, p = predictions.label[rows].astype(int), predictions.outputs[rows].astype(float)
    classes = p.shape[1]
    mean = [p[labels == c, c].mean() if (labels == c).any() else math.inf for c in range(classes)]
    confident = np.where(p >= np.asarray(mean), p, -1.0)
    other = confident.argmax(1)
    doubtful = (confident.max(1) > 0) & (other != labels)
    gap = p[np.arange(len(p)), other] - p[np.arange(len(p)), labels]
    order = [i for i in np.argsort(-gap, kind="stable") if doubtful[i]]
    return [(int(rows[i]), int(labels[i]), int(other[i])) for i in order]


def _settings(folder: pathlib.Path) -> list[tuple[str, str]]:
    """What the run was told, or what it recorded, in lines."""
    if (folder / "settings.yaml").is_file():
        return [(name, str(value)) for name, value in settings.read(folder / "settings.yaml").items()]
    if (folder / "config.json").is_file():
        saved = files.read_json(folder / "config.json")
        return list(_flat({key: saved[key] for key in ("model", "train", "phases", "seed", "config") if key in saved}))
    return []


def _flat(values: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(values, Mapping) and values:
        return [line for key, value in values.items() for line in _flat(value, f"{name}.{key}" if name else str(key))]
    if isinstance(values, list) and any(isinstance(value, Mapping) for value in values):
        return [line for place, value in enumerate(values, 1) for line in _flat(value, f"{name} {place}")]
    return [(name, str(values))]


def _versions(folder: pathlib.Path) -> list[tuple[str, str]]:
    if not (folder / "summary.json").is_file():
        return []
    return [(name, str(value)) for name, value in files.read_json(folder / "summary.json").get("versions", {}).items()]


def _pictures(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes what the page shows as files, and puts their names beside."""
    folder.mkdir(exist_ok=True)
    for number, chart in enumerate(found["charts"], 1):
        chart["file"] = f"chart{number}.svg"
        files.write_text(folder / chart["file"], charts.alone(chart["svg"]))
    for place, section in enumerate(found["images"], 1):
        for number, picture in enumerate(section["images"], 1):
            picture["file"] = f"image{place}-{number}.jpg"
            files.write_whole(folder / picture["file"], lambda path, data=picture["data"]: path.write_bytes(data))


def _encoded(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sections with each picture as the bytes of a JPEG file, and as an address that holds them."""
    for section in sections:
        pictures = []
        for image, caption in section["images"]:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=88)
            data = file.getvalue()
            address = f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"
            pictures.append({"data": data, "uri": address, "caption": caption.splitlines()})
        section["images"] = pictures
    return sections
