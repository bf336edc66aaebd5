"""What the feature cache saves: an epoch of VGG16 with it and without it, in one run.

    python -m benchmarks.features [--images 160] [--out docs/features.md]

The same images, weights and order on both sides, each with a state of its own, as `jaxft.finetune` runs them: images
decoded once, no augmentation, dropout as in the net. The first epoch compiles; those after it are timed, one without
the cache and then, with it, as many as take a second. Every loss of the two sides must be the same, bit for bit.
"""

import dataclasses
import itertools
import math
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.machine import write_table
from experiments import standin
from jaxft import devices, features, feed, fetch, masking, nets, optim, task, train_state
from jaxft.data import Dataset, Inputs, statefarm
from jaxft.phase import Phase
from jaxft.progress import bar
from jaxft.runs import Run

EPOCHS = 10**6  # more than any side is asked for


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time epochs with the feature cache on and off."""

    freezes: tuple[str, ...] = ("all-but-head", "through:block4")
    """What is frozen, as in the experiments."""
    heads: tuple[str, ...] = ("fc", "gap")
    """Of VGG16: fc, gap or gap:WIDTH,…"""
    images: int = 160
    """Drawn images that an epoch goes through, a multiple of 10."""
    batch_sizes: tuple[int, ...] = (16, 32)
    """Images a step; each divides the images."""
    epochs: int = 3
    """Timed epochs of each side."""
    out: pathlib.Path = pathlib.Path("docs/features.md")
    """The table, as Markdown."""


def measure(dataset: Dataset, freeze: str, head: str, batch_size: int, timed: int) -> str:
    """One row of the table."""
    net: Any = nets.create("vgg16", len(dataset.classes), **nets.head_options("vgg16", head))
    spec = nets.spec("vgg16")
    variables = nets.init(net, spec.native_size, seed=0)
    net = net.clone(frozen=masking.frozen_layers(net, freeze, variables["params"]))
    stage = features.cut(net, list(variables["params"]))
    everything, mesh = np.arange(len(dataset)), devices.mesh()
    train = Inputs(dataset, everything, spec.native_size, batch_size)
    held_out = Inputs(dataset, everything[:batch_size], spec.native_size, batch_size)
    steps = train.steps_per_epoch

    def start(cache_features: Any) -> tuple[train_state.TrainState, feed.Feed]:
        """A side's state and feed, once what is computed once is."""
        state = devices.replicate(train_state.create(net, variables, Phase(EPOCHS, optim.Constant(1e-3))), mesh)
        run = Run(pathlib.Path(tempfile.gettempdir()), cache_features=cache_features)  # nothing is written there
        sides = feed.decode(train, held_out)
        return state, feed.make(net, spec.preprocessing, task.classification(), state, sides, run, range(EPOCHS), mesh)

    def epochs(state: train_state.TrainState, fed: feed.Feed) -> Iterator[list[float]]:
        """The losses of one epoch after another."""
        losses: list[jax.Array] = []
        for dispatch in fed.dispatches(0, EPOCHS * steps):
            batch = devices.shard(dispatch.batch, mesh, stacked=dispatch.stacked)
            state, metrics = fed.train_step(state, batch)
            losses.append(metrics["loss"])
            if sum(loss.size for loss in losses) == steps:
                yield [loss for several in losses for loss in np.ravel(several).tolist()]
                losses = []

    def run(side: Iterator[list[float]], count: int) -> tuple[list[list[float]], float]:
        """The losses of so many epochs, and the seconds of each."""
        began = time.perf_counter()
        return [next(side) for _ in range(count)], (time.perf_counter() - began) / count

    shutil.rmtree(fetch.cache_folder() / "features", ignore_errors=True)  # of the case before
    off = epochs(*start("off"))
    began = time.perf_counter()
    state, fed = start("on")
    made = time.perf_counter() - began
    assert fed.cache
    on, seconds = epochs(state, fed), []
    (losses_off, _), (losses_on, _) = run(off, 1), run(on, 1)  # which compile
    losses, once = run(on, 1)
    losses_on += losses
    repeats = math.ceil(1 / once)  # of short epochs, so many that a batch made ahead is nothing
    for _ in range(timed):
        of_off, of_on = run(off, 1), run(on, repeats)
        losses_off, losses_on = losses_off + of_off[0], losses_on + of_on[0]
        seconds.append((of_off[1], of_on[1]))
    if losses_off != losses_on[: 1 + timed] or not np.isfinite(losses_off).all():
        raise SystemExit(f"{freeze}, {head}: losses differ with the cache: {losses_off}, {losses_on[: 1 + timed]}")
    times = list(zip(*seconds, strict=True))
    cells = [f"{statistics.median(side):.3g} ({min(side):.3g} to {max(side):.3g})" for side in times]
    ratio = statistics.median(a / b for a, b in seconds)
    cost = f"{made:.0f} s, {fed.cache['held out'].bytes / 1e6:.1f} MB"
    return f"| `{freeze}` | {head} | {batch_size} | {stage} | {cells[0]} | {cells[1]} | {ratio:.1f} | {cost} |"


def main(settings: Settings) -> None:
    cases = list(itertools.product(settings.freezes, settings.heads, settings.batch_sizes))
    rows = []
    with tempfile.TemporaryDirectory() as folder, bar("epochs", len(cases), unit="cases") as advance:
        os.environ["JAXFT_CACHE"] = folder
        root = pathlib.Path(folder)
        dataset = statefarm.prepare(
            standin.render(root / "drawn", drivers=settings.images // 10, images_per_driver=10), root
        )
        for case in cases:
            rows.append(measure(dataset, *case, settings.epochs))
            print(rows[-1], flush=True)
            advance(1)
    head = [
        "# The feature cache",
        "",
        f"`python -m benchmarks.features` writes this table: VGG16 on {settings.images} images of 224×224, float32;",
        f"seconds of an epoch after the first, median (range) of {settings.epochs}, sides in turn, with the cache of",
        "means of as many as take a second. Both give the same losses, bit for bit. What is kept is what the stage of",
        "the fourth column gives: the last one that is frozen and has no dropout in or before it.",
    ]
    columns = [
        "| frozen | head | batch | kept | cache off | cache on | times as fast | making it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    write_table(settings.out, head, [*columns, *rows])


if __name__ == "__main__":
    main(tyro.cli(Settings))
