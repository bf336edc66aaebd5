"""What the whole State Farm solution takes on this machine, from measured rates: hours and disk, before it is begun.

    python -m benchmarks.statefarm                     # at full size: 22,424 and 79,726 images, 224 pixels
    python -m benchmarks.statefarm --neighbours 79726  # the exact search of neighbours itself, at full size

Steps and predictions of each net are timed on drawn images at the size, the search of neighbours on random features.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.machine import hardware
from jaxft import (
    devices,
    features,
    masking,
    model,
    neighbours,
    nets,
    optim,
    preprocess,
    report,
    task,
    train,
    train_state,
)
from jaxft.phase import Phase

TRAIN, TEST = 22_424, 79_726  # State Farm's images


@dataclasses.dataclass(frozen=True)
class Settings:
    """Rates of the parts of `experiments.statefarm_solution`, and what they add up to."""

    nets: tuple[str, ...] = ("vgg16", "resnet50")
    """Of the zoo."""
    freeze: tuple[str, ...] = ("first:10", "none")
    """Of each net."""
    image_size: int = 224
    """Pixels that a net sees."""
    batch_size: int = 16
    """Images a step, as in training."""
    dtype: str = "auto"
    """Of the computation."""
    epochs: int = 10
    """Passes over the training images."""
    folds: int = 5
    """Folds by driver."""
    views: int = 4
    """Of test-time augmentation."""
    rounds: int = 5
    """Timed rounds; the median counts."""
    steps: int = 10
    """Steps a round."""
    neighbours: int = 0
    """Search the neighbours of so many random rows of 25,088 features; 0 extrapolates from 4,096."""
    out: pathlib.Path | None = None
    """A JSON file for the figures."""


def rates(net: str, freeze: str, settings: Settings, regions: int) -> dict[str, float]:
    """Images a second in training and in prediction, and the parameters, of a net or of one with so many regions."""
    size = settings.image_size
    options = nets.any_size(net)
    if regions > 1:
        options |= {"regions": tuple((f"r{i}", 0, 0, 0.5, 0.5) for i in range(regions)), "region_size": (size, size)}
    side = size * (2 if regions > 1 else 1)
    start = model.load(net, 10, weights="none", dtype=settings.dtype, **options)
    frozen = masking.frozen_layers(start.net, freeze, list(start.variables["params"]))
    net_frozen = start.net.clone(frozen=frozen)
    state = train_state.create(net_frozen, start.variables, Phase(1, optim.Constant(1e-4), frozen=freeze))
    state = devices.replicate(state, devices.mesh())
    goal, normalise = task.classification(), preprocess.get(start.preprocessing)
    step = train.make_train_step(goal, 10, lambda key, images, labels: (normalise(images), labels))
    predict = features.eval_step(net_frozen, list(start.variables["params"]), start.preprocessing, goal)
    rng = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return rng.integers(0, 256, (count, side, side, 3), np.uint8)

    batch = train.batch_of(images(settings.batch_size), rng.integers(0, 10, settings.batch_size).astype(np.int32))
    batch = jax.device_put(batch)
    found = {"training": [], "prediction": []}
    many = jax.device_put(images(settings.batch_size))
    for turn in range(settings.rounds + 1):  # the first compiles
        began = time.perf_counter()
        for _ in range(settings.steps):
            state, figures = step(state, batch)
        jax.block_until_ready(figures)
        middle = time.perf_counter()
        variables = state.variables()
        for _ in range(settings.steps):
            said = predict(variables, many)
        jax.block_until_ready(said)
        if turn:
            count = settings.steps * settings.batch_size
            found["training"].append(count / (middle - began))
            found["prediction"].append(count / (time.perf_counter() - middle))
    figures = {name: statistics.median(values) for name, values in found.items()}
    return figures | {"parameters": sum(leaf.size for leaf in jax.tree.leaves(start.variables))}


def search_seconds(count: int, width: int = 25_088) -> float:
    """Seconds of the exact search among so many rows of random features, on the device where they fit."""
    key = jax.random.key(0)
    made = jnp.concatenate(
        [jax.random.normal(jax.random.fold_in(key, i), (min(8192, count - i), width)) for i in range(0, count, 8192)]
    )
    jax.block_until_ready(made)
    neighbours.search(made[: min(count, 1024)], 20)
    began = time.perf_counter()
    neighbours.search(made, 20)
    return time.perf_counter() - began


def main(settings: Settings) -> None:
    """Measures, prints a table of hours by step, and the disk."""
    figures: dict[str, object] = {"hardware": hardware(devices.versions()["device"]), "versions": devices.versions()}
    rows, hours, disk = [], 0.0, 0.0
    for net, freeze in zip(settings.nets, settings.freeze, strict=True):
        one, three = (rates(net, freeze, settings, regions) for regions in (1, 3))
        figures[net] = {"whole image": one, "three regions": three}
        folds, seen = settings.folds, TRAIN * (settings.folds - 1) / settings.folds
        parts = {
            "single nets, random folds": 2
            * folds
            * (seen * settings.epochs / one["training"] + TEST / one["prediction"]),
            "views, augmentation": 2
            * folds
            * (seen * settings.epochs / three["training"] + TEST / three["prediction"]),
            "test-time views, twice": 2 * folds * (TEST + TRAIN / folds) * (1 + settings.views) / three["prediction"],
            "pseudo-labels": folds * (2 * seen * settings.epochs / three["training"] + TEST / three["prediction"]),
            "refit": 2 * TRAIN * settings.epochs / three["training"]
            + TEST * (1 + settings.views) / three["prediction"],
        }
        for name, seconds in parts.items():
            rows.append((net, name, f"{seconds / 3600:.2f}"))
            hours += seconds / 3600
        disk += (
            3 * 2 * 4 * one["parameters"] * (5 * folds + 1)
        )  # the last two and the best state, with momentum, of each run
    count = settings.neighbours or 4096
    seconds = search_seconds(count)
    full = seconds if count == TEST else seconds * (TEST / count) ** 2
    figures["neighbours"] = {
        "rows": count,
        "seconds": seconds,
        "tera_operations_a_second": 25_088 * count**2 / seconds / 1e12,
    }
    rows.append(("", f"neighbours ({count:,} rows measured)", f"{full / 3600:.2f}"))
    pixels = (TRAIN + TEST) * 3 * settings.image_size**2 * (1 + 4) / 1e9
    disk = disk / 1e9 + pixels + TEST * 25_088 * 4 / 1e9 + 6  # decoded at both sizes, features, the images themselves
    figures |= {"hours": hours + full / 3600, "disk_gb": disk, "rows": rows}
    report.columns("The solution at full size, estimated", ("net", "step", "hours"), rows)
    print(
        f"{figures['hours']:.1f} hours in all; {disk:.0f} GB of disk; {os.cpu_count()} cores, "
        f"{hardware(devices.versions()['device'])}"
    )
    if settings.out is not None:
        settings.out.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Settings))
