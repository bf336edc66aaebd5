"""How time and memory grow: with the batch, the image, the cores, and the number of images.

    python -m benchmarks.growth [--counts 1000 10000 100000] [--out docs/growth.md]

Every figure is of a process of its own. A step is ResNet-50's, none frozen; with the batch it takes images of 96
pixels, with the image a batch of 8. Images are drawn JPEG files of 64×48 pixels in a folder for each class: `read`
finds and describes them, `decode` brings them to 32 pixels into a file of the cache, `predict` is a ResNet-50 at 32
pixels, `report` writes predictions and pictures. `growth` is the time of a row by that of the row before, over the same
of the sizes: above 1 it is worse than in proportion. The plot lies beside the table.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.machine import peak_bytes, run_apart, write_table
from jaxft.progress import bar

STEPS = 5  # timed ones of each job
CLASSES = 10
DISTINCT = 200  # drawn files; more images are copies of them

Line = tuple[list[float], list[float]]
"""Sizes, and seconds of each."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time steps and stages at growing sizes."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """At 96 pixels, on all cores and on one."""
    image_sizes: tuple[int, ...] = (96, 128, 192, 256, 352, 448)
    """At a batch of 8."""
    counts: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Numbers of images."""
    out: pathlib.Path = pathlib.Path("docs/growth.md")
    """The tables, as Markdown."""


def step(batch_size: int, side: int, cores: int) -> dict[str, float]:
    """Median seconds of a train step on so many cores of this machine, and the peak of memory."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # before JAX counts them
    import jax

    from jaxft import nets, optim, task, train, train_state
    from jaxft.phase import Phase

    net: Any = nets.create("resnet50", CLASSES)
    state = train_state.create(net, nets.init(net, (side, side), 0), Phase(1, optim.Constant(1e-4)))
    run = train.make_train_step(task.classification(), CLASSES, lambda key, images, labels: (images, labels))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, side, side, 3)).astype(np.float32)
    batch = jax.device_put(train.batch_of(images, rng.integers(0, CLASSES, batch_size).astype(np.int32)))
    seconds = []
    for _ in range(STEPS + 2):
        began = time.perf_counter()
        state, figures = run(state, batch)
        float(figures["loss"])
        seconds.append(time.perf_counter() - began)
    return {"step": statistics.median(seconds[2:]), "peak_bytes": peak_bytes()}


def stages(count: int, folder: str) -> dict[str, float]:
    """Seconds of each stage for so many images, and the peak of memory."""
    os.environ["JAXFT_CACHE"] = str(pathlib.Path(folder) / "cache")
    from jaxft import model, nets, report, task
    from jaxft.data import Inputs, loader, source

    root, found = pathlib.Path(folder) / "photos", {}
    began = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal began
        found[stage], began = time.perf_counter() - began, time.perf_counter()

    dataset = source.read(root).dataset
    lap("read")
    inputs = Inputs(dataset, np.arange(count), (32, 32), 64)
    rows = loader.decode_once([inputs])
    lap("decode")
    assert rows is not None
    net: Any = nets.create("resnet50", CLASSES)
    variables, goal = nets.init(net, (32, 32), 0), task.classification()
    made = model.Model(net, variables, "torch", None, {}, goal, dataset.classes, image_size=(32, 32), batch_size=64)
    made.predict(dataset, np.arange(64))  # compiles
    began = time.perf_counter()
    said = made.predict(dataset)
    lap("predict")
    report.write_predictions(pathlib.Path(folder) / "predictions.csv", said, dataset)
    report.pictures(pathlib.Path(folder), said, dataset, goal, [], lambda index: rows.take(np.array([index]))[0])
    lap("report")
    return found | {"peak_bytes": peak_bytes()}


def write_images(root: pathlib.Path, count: int) -> None:
    """So many JPEG files in a folder for each class."""
    import simplejpeg

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (DISTINCT, 6, 8, 3), dtype=np.uint8)
    files = [simplejpeg.encode_jpeg(np.ascontiguousarray(image.repeat(8, 0).repeat(8, 1))) for image in coarse]
    for label in range(CLASSES):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (root / f"class{index % CLASSES}" / f"{index}.jpg").write_bytes(files[index % DISTINCT])


def grown(sizes: list[float], seconds: list[float]) -> list[str]:
    """Of each row, its seconds by those of the row before, over the same of the sizes."""
    pairs = itertools.pairwise(zip(sizes, seconds, strict=True))
    return ["", *(f"{(t / s) / (n / m):.2f}" for (m, s), (n, t) in pairs)]


def draw(path: pathlib.Path, panels: dict[str, dict[str, Line]]) -> None:
    """A panel for each kind of growth: seconds over size, both logarithmic, and the line of proportion."""
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (title, lines) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for name, (sizes, seconds) in lines.items():
            axes.loglog(sizes, seconds, "o-", label=name)
        sizes, seconds = max(lines.values(), key=lambda line: line[1][-1])
        axes.loglog(sizes, [seconds[-1] * size / sizes[-1] for size in sizes], ":", color="grey", label="in proportion")
        axes.set(xlabel=title, ylabel="seconds")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(settings: Settings) -> None:
    """Measures, prints and writes the tables and the plot."""
    all_cores = len(os.sched_getaffinity(0))
    jobs = len(settings.batch_sizes) * len({1, all_cores}) + len(settings.image_sizes) + len(settings.counts)
    panels: dict[str, dict[str, Line]] = {"images in a batch": {}}
    lines = []
    with bar("growth", jobs, unit="jobs") as advance:

        def ask(**job: Any) -> dict[str, float]:
            found = run_apart("benchmarks.growth", job)
            advance(1, str(job))
            return found

        def steps(title: str, name: str, values: Sequence[int], power: int = 1, **others: int) -> Line:
            """Steps whose argument `name` takes the values; the size is the value to that power."""
            found = [ask(**{name: value}, **others) for value in values]
            sizes, seconds = [float(value**power) for value in values], [one["step"] for one in found]
            lines.extend(["", f"| {title} | seconds a step | peak MB | growth |", "| --- | --- | --- | --- |"])
            for value, one, growth in zip(values, found, grown(sizes, seconds), strict=True):
                lines.append(f"| {value} | {one['step']:.3f} | {one['peak_bytes'] / 1e6:,.0f} | {growth} |")
            return sizes, seconds

        for cores in sorted({1, all_cores}, reverse=True):
            told = f"{cores} core" + "s" * (cores > 1)
            grows = steps(f"images in a batch, {told}", "batch_size", settings.batch_sizes, side=96, cores=cores)
            panels["images in a batch"][told] = grows
        grows = steps("side in pixels", "side", settings.image_sizes, power=2, batch_size=8, cores=all_cores)
        panels["pixels of an image"] = {"a step": grows}
        of_counts = []
        for count in settings.counts:
            with tempfile.TemporaryDirectory() as folder:
                write_images(pathlib.Path(folder) / "photos", count)
                of_counts.append(ask(count=count, folder=folder))
    kinds = [kind for kind in of_counts[0] if kind != "peak_bytes"]
    counts = list(map(float, settings.counts))
    grow = {kind: grown(counts, [one[kind] for one in of_counts]) for kind in kinds}
    lines += ["", "| images | " + " | ".join(f"{kind}, s | growth" for kind in kinds) + " | peak MB |"]
    lines.append("| --- |" + " --- | --- |" * len(kinds) + " --- |")
    for row, (count, one) in enumerate(zip(settings.counts, of_counts, strict=True)):
        cells = " | ".join(f"{one[kind]:.2f} | {grow[kind][row]}" for kind in kinds)
        lines.append(f"| {count:,} | {cells} | {one['peak_bytes'] / 1e6:,.0f} |")
    panels["images of a set"] = {kind: (counts, [one[kind] for one in of_counts]) for kind in kinds}
    draw(settings.out.with_suffix(".png"), panels)
    head = [
        "# How time and memory grow",
        "",
        "`python -m benchmarks.growth` writes these tables: a ResNet-50's step with the batch (96 pixels) and with the",
        f"image (a batch of 8), medians of {STEPS}; then what is done for all images of a set, of 64×48 pixels. Growth",
        "is the time of a row by that of the row before, over the same of the sizes: 1 is in proportion.",
        "",
        f"![Seconds over size]({settings.out.with_suffix('.png').name})",
    ]
    write_table(settings.out, head, lines[1:])
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        asked = json.loads(sys.argv[1])
        print(json.dumps(stages(**asked) if "count" in asked else step(**asked)))
    else:
        main(tyro.cli(Settings))
