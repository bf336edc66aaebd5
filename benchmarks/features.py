"""What the feature cache saves: an epoch of VGG16 with it and without it, in one run.

    python -m benchmarks.features [--images 160] [--out docs/features.md]

The same images, weights and order on both sides, each with a state of its own, as `jaxft.finetune` runs them: images
decoded once, no augmentation, dropout as in the net. The first epoch compiles; those after it are timed, one of each
side in turn. Every loss of the two sides must be the same, bit for bit.
"""

import dataclasses
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.machine import write_table
from jaxft import features, feed, masking, nets, optim, predict, train_state
from jaxft.data import Dataset, loader, standin, statefarm
from jaxft.nets import vgg
from jaxft.progress import bar


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
    net: Any = nets.create("vgg16", len(dataset.classes), head=vgg.head(head))
    size, preprocessing = nets.spec("vgg16").native_size, nets.spec("vgg16").preprocessing
    variables = nets.init(net, size, seed=0)
    frozen = masking.frozen_layers(net, freeze, variables["params"])
    stage = features.cut(net, frozen, list(variables["params"]))
    everything, mesh = np.arange(len(dataset)), predict.data_mesh()
    steps = loader.steps_per_epoch(len(dataset), batch_size)
    sizes: dict[str, float] = {}

    def epochs(cache_features: str) -> Iterator[list[float]]:
        """First nothing, once what is computed once is; then the losses of one epoch after another."""
        tx = optim.nesterov_sgd(1e-3, 0.9)
        state = predict.replicate(train_state.create(net, variables, tx, frozen=frozen), mesh)
        fed = feed.make(
            net,
            variables,
            state,
            dataset,
            everything,
            everything[:batch_size],
            frozen=frozen,
            preprocessing=preprocessing,
            augmentation={},
            epochs=1 + timed,
            batch_size=batch_size,
            image_size=size,
            cache_features=cache_features,
        )
        sizes[cache_features] = fed.cache[None].bytes / 1e6 if fed.cache else 0.0
        yield []
        losses: list[jax.Array] = []
        for batch in fed.batches(0):
            state, metrics = fed.train_step(state, predict.shard(batch, mesh))
            losses.append(metrics["loss"])
            if sum(loss.size for loss in losses) == steps:
                yield [loss for several in losses for loss in np.ravel(several).tolist()]
                losses = []

    sides = [epochs(cache_features) for cache_features in ("off", "on")]
    made = []
    for side in sides:
        began = time.perf_counter()
        next(side)
        made.append(time.perf_counter() - began)
    seconds = []
    for epoch in range(1 + timed):
        found, times = [], []
        for side in sides:
            began = time.perf_counter()
            found.append(next(side))
            times.append(time.perf_counter() - began)
        if found[0] != found[1] or not np.isfinite(found).all():
            raise SystemExit(f"{freeze}, {head}: losses differ with the cache in epoch {epoch + 1}: {found}")
        seconds.append(times)
    off, on = zip(*seconds[1:], strict=True)  # without the epoch that compiles
    cells = [f"{statistics.median(side):.3g} ({min(side):.3g} to {max(side):.3g})" for side in (off, on)]
    ratio = statistics.median(a / b for a, b in seconds[1:])
    cost = f"{made[1]:.0f} s, {sizes['on']:.1f} MB"
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
        f"seconds of an epoch after the first, median (range) of {settings.epochs}, sides in turn. Both give the same",
        "losses, bit for bit. What is kept is what the stage of the fourth column gives: the last one that is frozen",
        "and has no dropout in or before it.",
    ]
    columns = [
        "| frozen | head | batch | kept | cache off | cache on | times as fast | making it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    write_table(settings.out, head, [*columns, *rows])


if __name__ == "__main__":
    main(tyro.cli(Settings))
