"""The results page of the State Farm solution: what each step bought, over all seeds, as HTML and Markdown."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.statefarm_steps import Solved, Step
from jaxft import charts, model, page, report
from jaxft.data import Dataset
from jaxft.devices import is_writer, say
from jaxft.ensemble import Probabilities
from jaxft.predict import Predictions

NAME = "results"
HEADER = ("", "step", "what", "out of fold", "change", "accuracy", "over drivers", "test", "change", "accuracy", "kept")


def write(folder: pathlib.Path, solved: Sequence[Solved], train: Dataset, is_standin: bool) -> None:
    """Writes `results.html` and `results.md` into the folder, and prints the table.

    Args:
        folder: of all seeds.
        solved: one for each seed.
        train: the training images.
        is_standin: whether they are drawn, which the page then says.

    Raises:
        OSError: the folder cannot be written to.
    """
    if not is_writer():
        return
    rows = table(solved)
    first = solved[0]
    tables = {step.name: step.out_of_fold for step in first.steps if step.out_of_fold is not None}
    final = next(step for step in reversed(first.steps) if step.out_of_fold is not None and step.kept)
    opened = model.open(first.runs[0])
    shown = _predictions(final.out_of_fold, train)
    found = {
        "title": "State Farm, what each step bought",
        "note": "Stand-in data: drawn by a program. These figures say nothing about State Farm." if is_standin else "",
        "seeds": len(solved),
        "images_trained": len(train),
        "header": HEADER,
        "rows": rows,
        "charts": [
            _by_step(solved),
            *_curves(first.runs),
            _confusion("Confusion, a single net", tables["single net, single fold"]),
            _confusion(f"Confusion, after {final.name}", tables[final.name]),
            _reliability("Reliability, a single net", tables["single net, single fold"]),
            _reliability(f"Reliability, after {final.name}", tables[final.name]),
        ],
        "images": page.sections(opened, train, shown),
    }
    path = page.render(folder, NAME, found, pictures=f"{NAME}-pictures")
    columns = (0, 1, 3, 4, 5, 7, 8, 9, 10)
    report.columns("What each step bought", [HEADER[i] for i in columns], [[row[i] for i in columns] for row in rows])
    say(f"the page with pictures is {path}")


def table(solved: Sequence[Solved]) -> list[list[str]]:
    """A row for each step: means over seeds, with their standard deviation where there are two seeds or more."""
    names = list(dict.fromkeys(step.name for one in solved for step in one.steps))
    rows = []
    for number, name in enumerate(names, 1):
        steps = [(one, i) for one in solved for i, step in enumerate(one.steps) if step.name == name]
        one, i = steps[0]
        row = [str(number), name, one.steps[i].note]
        for side in ("out_of_fold", "test"):
            figures = [_figures(one.steps[i], side) for one, i in steps]
            before = [_before(one.steps, i, side) for one, i in steps]
            losses = [found["loss"] for found in figures]
            changes = [loss - other for loss, other in zip(losses, before, strict=True)]
            row += [report.spread(losses, "{:.4f}"), report.spread(changes, "{:+.4f}")]
            row.append(report.spread([100 * found["accuracy"] for found in figures], "{:.2f}", " %"))
            if side == "out_of_fold":
                row.append(report.spread([found["loss_spread"] for found in figures], "{:.3f}"))
        kept = [one.steps[i].kept for one, i in steps]
        word = f"{sum(map(bool, kept))} of {len(kept)}" if None not in kept else "apart" if one.steps[i].apart else ""
        rows.append([*row, f"{word}, apart" if word and one.steps[i].apart and word != "apart" else word])
    return rows


def _figures(step: Step, side: str) -> dict[str, float]:
    found: Probabilities | None = getattr(step, side)
    unknown: dict[str, float] = {"loss": math.nan, "accuracy": math.nan, "loss_spread": math.nan}
    return unknown if found is None or not found.known.any() else found.figures()


def _before(steps: Sequence[Step], place: int, side: str) -> float:
    """The log loss of the last step before this one that later ones build on."""
    for step in reversed(steps[:place]):
        if step.kept is not False and not (step.apart and step.kept is None):
            return _figures(step, side)["loss"]
    return math.nan


def _predictions(found: Probabilities | None, dataset: Dataset) -> Predictions:
    assert found is not None
    place = {name: i for i, name in enumerate(dataset.names)}
    index = np.asarray([place[name] for name in found.names])
    return Predictions(index, found.labels, found.known, found.values.astype(np.float32))


def _by_step(solved: Sequence[Solved]) -> dict[str, str]:
    series = {}
    places = [i for i, step in enumerate(solved[0].steps) if not (step.apart and step.kept is None)]
    for side, word in (("out_of_fold", "out of fold"), ("test", "test")):
        losses = [float(np.mean([_figures(one.steps[i], side)["loss"] for one in solved])) for i in places]
        if np.isfinite(losses).any():
            series[word] = ([i + 1.0 for i in places], losses)
    svg = charts.lines("log loss by step", series, "step, as numbered in the table")
    remark = "those not kept too" + ("; mean over seeds" if len(solved) > 1 else "")
    return {"title": "Log loss by step", "svg": svg, "remark": remark}


def _curves(runs: Sequence[pathlib.Path]) -> list[dict[str, str]]:
    """Held-out and training loss by epoch, a chart for each net, a curve for each fold."""
    found = []
    for net in dict.fromkeys(run.parent.name for run in runs):
        series = {}
        for run in (run for run in runs if run.parent.name == net):
            if rows := page.history(run):
                series[run.name] = (page.column(rows, "epoch"), page.column(rows, "val_loss"))
        svg = charts.lines(f"held-out log loss of {net}", series, "epoch")
        found.append({"title": f"Held-out log loss, {net}", "svg": svg, "remark": "of the last step that was trained"})
    return found


def _confusion(title: str, found: Probabilities) -> dict[str, str]:
    known = found.known
    chart = page.confusion(title, found.labels[known], found.values[known].argmax(1), found.classes)
    return chart | {"remark": f"{chart['remark']}; {known.sum():,} images out of fold"}


def _reliability(title: str, found: Probabilities) -> dict[str, str]:
    known = found.known
    right = found.values[known].argmax(1) == found.labels[known]
    return page.reliability(title, found.values[known].max(1), right)
