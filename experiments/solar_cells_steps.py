"""What `solar_cells` does on each split of the cells, and what it shows."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from jaxft import ensemble, features, files, nets, report, task
from jaxft.data import Inputs, elpv
from jaxft.data.symmetries import SYMMETRIES, symmetric, viewed
from jaxft.ensemble import Probabilities
from jaxft.finetune import finetune
from jaxft.model import Model, load
from jaxft.optim import AdamW, Cosine
from jaxft.phase import Phase
from jaxft.runs import Run

VIEWS = "flips"
STAGES = ("block2", "block3", "block4", "block5")
POOLS: tuple[features.Pool, ...] = ("mean", "max", "std")
TRIED = {"logistic": (1e-4, 1e-3, 1e-2, 1e-1), "rbf": (1.0, 3.0, 10.0, 30.0)}  # C of scikit-learn
PAPER = {"VGG-19 from ImageNet, 300 pixels (the paper)": 0.8842, "SVM (the paper)": 0.8244}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is done on each split.

    Attributes:
        net: vgg16 or vgg19.
        weights: auto, imagenet, hed-bsds500, none, or the path of a Keras weight file; auto is imagenet if reachable.
        freeze: what of the net stays as it is.
        image_size: height and width in pixels.
        epochs: passes over the four flips of each training image.
        batch_size: images a step.
        lr: highest rate of AdamW, which rises over the first twentieth of the steps and falls by half a cosine.
        dropout: share of units dropped before the last layer.
        splits: how many.
    """

    net: str = "vgg16"
    weights: str = "auto"
    freeze: str = "through:block4"
    image_size: int = 224
    epochs: int = 2
    batch_size: int = 16
    lr: float = 3e-4
    dropout: float = 0.5
    splits: int = 5


def start(settings: Settings, seed: int, classes: int) -> Model:
    """The net from its file. Its last layer is 0: on features as large as hed-bsds500's a random one is far off."""
    options = nets.head_options(settings.net, "gap")
    model = load(settings.net, classes, weights=settings.weights, seed=seed, dropout=settings.dropout, **options)
    params = dict(model.variables["params"])
    params["predictions"] = {leaf: np.zeros_like(value) for leaf, value in params["predictions"].items()}
    return dataclasses.replace(model, variables=dict(model.variables) | {"params": params})


def pooled(model: Model, inputs: Inputs, path: pathlib.Path) -> np.ndarray:
    """The features of the probes, float32 [N, F], computed if the file is not there."""
    if not path.exists():
        found = np.sqrt(features.of_stages(model, STAGES, inputs, POOLS))

        def write(part: pathlib.Path) -> None:
            with part.open("wb") as file:
                np.save(file, found)

        files.write_whole(path, write)
    return np.load(path)


def fine_tuned(
    model: Model,
    cells: elpv.SolarCells,
    plain: Inputs,
    train: np.ndarray,
    held_out: np.ndarray,
    settings: Settings,
    run: Run,
) -> Probabilities:
    """What the net says of the held-out cells after training, as the mean over their views."""
    turned, views = symmetric(cells, VIEWS), len(SYMMETRIES[VIEWS])
    targets = np.tile(np.stack([1 - cells.probabilities, cells.probabilities], 1), (views, 1))
    inputs = dataclasses.replace(plain, dataset=turned, indices=viewed(train, cells, VIEWS), targets=targets)
    judged = dataclasses.replace(plain, dataset=turned, indices=viewed(held_out, cells, VIEWS))
    steps = settings.epochs * inputs.steps_per_epoch
    rate = Cosine(settings.lr, steps, warmup=steps // 20)
    phase = Phase(settings.epochs, rate, AdamW(), frozen=settings.freeze, clip_norm=1.0)
    _, predictions = finetune(model, task.classification(), inputs, judged, [phase], run)
    of_views = ensemble.of(predictions, turned)
    first = of_views.at(np.arange(len(held_out)))
    return dataclasses.replace(first, values=of_views.values.reshape(views, len(held_out), -1).mean(0))


def figures(found: Probabilities, cells: elpv.SolarCells) -> dict[str, float]:
    """Accuracy, area under the curve, and F1 of defective cells: of all, of each type."""
    from sklearn.metrics import f1_score, roc_auc_score

    kind = dict(zip(cells.names, cells.types, strict=True))
    types = np.asarray([kind[name] for name in found.names])
    called = found.values[:, 1] >= 0.5
    row = {"accuracy": float((called == found.labels).mean())}
    row["ROC AUC"] = float(roc_auc_score(found.labels, found.values[:, 1]))
    for name in ("", *elpv.TYPES):
        which = types == name if name else np.ones(len(found), bool)
        row[f"F1 {name}".rstrip()] = float(f1_score(found.labels[which], called[which]))
    return row


def show(folder: pathlib.Path, rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Prints the figures as mean ± standard deviation over splits, and leaves them in `results.json` and a picture."""
    names = list(next(iter(rows.values()))[0])
    table = [
        [name, *(report.spread([100 * row[each] for row in found], "{:.2f}") for each in names)]
        for name, found in rows.items()
    ]
    table += [[name, f"{100 * value:.2f}", *[""] * (len(names) - 1)] for name, value in PAPER.items()]
    report.columns("solar cells, per cent", ["", *names], table)
    files.write_json(folder / "results.json", {name: list(map(dict, found)) for name, found in rows.items()})
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(rows.values()):
        values = [100 * row["accuracy"] for row in found]
        axes.plot(values, [place] * len(values), "o", alpha=0.5)
        axes.plot(np.mean(values), place, "k|", markersize=18)
    for (name, value), style in zip(PAPER.items(), ("--", ":"), strict=True):
        axes.axvline(100 * value, color="grey", linestyle=style, label=name)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("held-out cells called right, per cent: each split, and the mean")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8, frameon=False)
    report.save(folder / "results.png", figure)
    print(f"{folder / 'results.png'}, results.json")
