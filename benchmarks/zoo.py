"""Every net of the zoo on images for some steps: does it learn?

    python -m benchmarks.zoo [NET …] [--steps 24] [--out docs/zoo.md]

Loss: the mean over the first and the last three steps of nesterov SGD from random weights, BatchNorm in training mode,
on one batch of stand-in State Farm images and one of solar cells: a net that is wired wrongly learns not even those.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import tyro

from benchmarks.machine import write_table
from experiments.statefarm_data import open_data
from jaxft import fetch, nets, optim, preprocess, task, train, train_state
from jaxft.data import Dataset, decode, elpv
from jaxft.phase import Phase

BATCH = 8
LR = 1e-3
SIZE = 96  # pixels of the images that are learned


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train every net for some steps."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Nets of the zoo; all by default."""
    steps: int = 24
    """Steps of training on each of the two batches."""
    out: pathlib.Path = pathlib.Path("docs/zoo.md")
    """The table, as Markdown."""


def losses(name: str, dataset: Dataset, steps: int) -> list[float]:
    """The loss of each step on one batch of the dataset."""
    row = nets.spec(name)
    net = nets.create(name, len(dataset.classes), **nets.any_size(name))
    variables = nets.init(net, (SIZE, SIZE), seed=0)
    indices = np.random.default_rng(0).permutation(len(dataset))[:BATCH]
    images = np.stack([decode.pixels(dataset.images[i], (SIZE, SIZE), dataset.names[i]) for i in indices])
    state = train_state.create(net, variables, Phase(1, optim.Constant(LR)))
    normalise = preprocess.get(row.preprocessing)
    step = train.make_train_step(
        task.classification(), len(dataset.classes), lambda key, images, labels: (normalise(images), labels)
    )
    found = []
    for _ in range(steps):
        state, metrics = step(state, train.batch_of(images, dataset.labels[indices]))
        found.append(float(metrics["loss"]))
    return found


def main(settings: Settings) -> None:
    drivers, cells = open_data(None, 0)[0], elpv.prepare(fetch.cache_folder())
    rows = []
    for name in settings.names or tuple(nets.ZOO):
        learned = [losses(name, dataset, settings.steps) for dataset in (drivers, cells)]
        jax.clear_caches()
        shown = " | ".join(f"{np.mean(curve[:3]):.3f} → {np.mean(curve[-3:]):.3f}" for curve in learned)
        row = nets.spec(name)
        rows.append(f"| {name} | {row.num_params / 1e6:.1f} | {row.gmac:.2f} | {shown} |")
        print(rows[-1], flush=True)
    head = [
        "# The zoo",
        "",
        "`python -m benchmarks.zoo` writes this table. Parameters in millions, with classifier; 10⁹ multiply-adds of",
        f"an image of the native size. Loss on one batch of {BATCH} images of {SIZE}×{SIZE} pixels: the mean of the",
        f"first three and of the last three of {settings.steps} steps from random weights.",
    ]
    columns = [
        "| net | parameters | GMAC | loss, stand-in drivers | loss, solar cells |",
        "| --- | --- | --- | --- | --- |",
    ]
    write_table(settings.out, head, [*columns, *rows])


if __name__ == "__main__":
    main(tyro.cli(Settings))
