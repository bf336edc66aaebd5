"""What the feature cache saves: an epoch of VGG16 with it and without it, in one run.

    python -m benchmarks.features [--images 160] [--out docs/features.md]

The same images, weights and order on both sides, each with a state of its own, as `jaxft.finetune` runs them: images
decoded once, no augmentation, dropout as in the net. The first epoch compiles; those after it are timed, one of each
side in turn. Every loss of the two sides must be the same, bit for bit.
"""

import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tyro

from benchmarks.machine import write_table
from jaxft import features, masking, nets, optim, predict, train, train_state
from jaxft.data import Dataset, loader, standin, statefarm
from jaxft.nets import vgg
from jaxft.preprocess import PREPROCESSING
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
    batch_size: int = 16
    """Images a step."""
    epochs: int = 3
    """Timed epochs of each side."""
    out: pathlib.Path = pathlib.Path("docs/features.md")
    """The table, as Markdown."""


def measure(dataset: Dataset, freeze: str, head: str, settings: Settings) -> str:
    """One row of the table."""
    net: Any = nets.create("vgg16", len(dataset.classes), head=vgg.head(head))
    size, normalise = nets.spec("vgg16").native_size, PREPROCESSING[nets.spec("vgg16").preprocessing]
    variables = nets.init(net, size, seed=0)
    frozen = masking.frozen_layers(net, freeze, variables["params"])
    stage = features.cut(net, frozen, list(variables["params"]))
    assert stage, f"{freeze} freezes no stage"
    everything, mesh = np.arange(len(dataset)), predict.data_mesh()
    pixels = loader.decode_once(dataset, everything, size)
    assert pixels, "no room on the disk"
    images, held = dataset, pixels.on_device()
    if not held:
        images = dataclasses.replace(dataset, images=loader.Decoded(pixels, len(dataset)))
    prefix = features.make_prefix(net, stage, normalise, {}, seed=0)
    whole: dict[str, Any] = {"batch_size": settings.batch_size, "image_size": None if held else size}

    def with_images(batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"image": pixels.take(batch["index"])} if held else batch

    began = time.perf_counter()
    caches = features.open_cache(
        prefix,
        variables,
        features.identity(net, variables, stage, data=dataset.fingerprint),
        lambda indices: map(with_images, loader.eval_batches(images, indices, **whole)),
        {None: everything},
        examples=len(dataset),
        uses=0,
        required=True,
    )
    made = time.perf_counter() - began
    assert caches
    steps = loader.steps_per_epoch(len(dataset), settings.batch_size)
    behind = train.make_train_step(lambda _, x: x, start=stage)

    def epochs(cached: bool) -> Iterator[list[float]]:
        """The losses of one epoch after another."""
        tx = optim.nesterov_sgd(1e-3, 0.9)
        state = predict.replicate(train_state.create(net, variables, tx, frozen=frozen), mesh)
        batches = loader.train_batches(images, everything, seed=0, **whole | ({"image_size": None} if cached else {}))
        while True:
            losses = []
            for _ in range(steps):
                batch: dict[str, Any] = next(batches)
                batch = batch | {"image": caches[None].take(batch["index"])} if cached else with_images(batch)
                batch = predict.shard(batch, mesh)
                if not cached:
                    batch["image"] = prefix(state.variables(), batch["image"], None)
                state, metrics = behind(state, batch)
                losses.append(metrics["loss"])
            yield [float(loss) for loss in losses]

    sides, seconds = (epochs(False), epochs(True)), []
    for epoch in range(1 + settings.epochs):
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
    cost = f"{made:.0f} s, {caches[None].bytes / 1e6:.1f} MB"
    return f"| `{freeze}` | {head} | {stage} | {cells[0]} | {cells[1]} | {ratio:.1f} | {cost} |"


def main(settings: Settings) -> None:
    cases = [(freeze, head) for freeze in settings.freezes for head in settings.heads]
    rows = []
    with tempfile.TemporaryDirectory() as folder, bar("epochs", len(cases), unit="cases") as advance:
        os.environ["JAXFT_CACHE"] = folder
        root = pathlib.Path(folder)
        dataset = statefarm.prepare(
            standin.render(root / "drawn", drivers=settings.images // 10, images_per_driver=10), root
        )
        for freeze, head in cases:
            rows.append(measure(dataset, freeze, head, settings))
            print(rows[-1], flush=True)
            advance(1)
    head = [
        "# The feature cache",
        "",
        f"`python -m benchmarks.features` writes this table: VGG16 on {settings.images} images of 224×224, batch",
        f"{settings.batch_size}, float32; seconds of an epoch after the first, median (range) of {settings.epochs},",
        "sides in turn. Both give the same losses, bit for bit. What is kept is what the stage of the third column",
        "gives: the last one that is frozen and has no dropout in or before it.",
    ]
    columns = [
        "| frozen | head | kept | cache off | cache on | times as fast | making it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    write_table(settings.out, head, [*columns, *rows])


if __name__ == "__main__":
    main(tyro.cli(Settings))
