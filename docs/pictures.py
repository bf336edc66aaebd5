"""Draws the pictures of docs/finetuning.md: python docs/pictures.py. Runs are those of docs/finetuning.csv."""

import csv
import pathlib

import numpy as np
from matplotlib.figure import Figure

from jaxft import optim

HERE = pathlib.Path(__file__).parent
PROBE = 0.813  # logistic regression on pooled features of block 5 of the same net, images and split


def schedules() -> None:
    """What each schedule does over 200 updates."""
    made = {
        "Constant(1e-3)": optim.Constant(1e-3),
        "InverseTime(1e-3, 1e-2)": optim.InverseTime(1e-3, 1e-2),
        "StepDecay(1e-3, 50, 0.5)": optim.StepDecay(1e-3, 50, 0.5),
        "Cosine(1e-3, 200, warmup=20)": optim.Cosine(1e-3, 200, 20),
        "OneCycle(1e-3, 200)": optim.OneCycle(1e-3, 200),
    }
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, schedule in made.items():
        axes.plot([float(schedule(np.int32(update))) for update in range(200)], label=name)
    axes.set(xlabel="update of the phase", ylabel="learning rate", title="schedules of jaxft.optim")
    axes.legend(fontsize=8)
    figure.savefig(HERE / "schedules.png", dpi=110)


def runs() -> None:
    """Held-out accuracy of three runs by epoch, and where their second phase begins."""
    with (HERE / "finetuning.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == name]
        epochs = [int(row["epoch"]) for row in own]
        (line,) = axes.plot(epochs, [float(row["val_accuracy"]) for row in own], marker=".", label=name)
        begin = next(int(row["epoch"]) for row in own if row["phase"] == "2")
        axes.axvline(begin - 0.5, color=line.get_color(), linestyle=":", linewidth=1)
    axes.axhline(PROBE, color="grey", linewidth=1, label="linear probe on block 5")
    axes.set(xlabel="epoch (dotted: stages are opened)", ylabel="held-out accuracy")
    axes.set_title("four classes of solar cells, VGG16 from hed-bsds500, 96 pixels", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "finetuning.png", dpi=110)


if __name__ == "__main__":
    schedules()
    runs()
