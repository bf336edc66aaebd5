"""How many images a second each stage of the input gives, beside what the train steps take, in one run.

    python -m benchmarks.input [--images 320] [--out docs/input.md]

The images are drawn in State Farm's format, 640×480 JPEGs, and read as State Farm's are. Pillow and OpenCV decode for
comparison where they are installed. Files are in the page cache: the disk is not what is measured.
"""

import dataclasses
import importlib.util
import io
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import simplejpeg
import tyro
from PIL import Image

from benchmarks.machine import write_table
from experiments import standin
from jaxft import devices, features, feed, masking, nets, optim, preprocess, task, train, train_state
from jaxft.data import Dataset, Images, Inputs, augment, loader, statefarm
from jaxft.data.decode import Decode
from jaxft.data.rows import Rows
from jaxft.model import compute_dtype
from jaxft.phase import Phase
from jaxft.progress import bar

SIZE = (224, 224)
WARP = augment.Warp(rotation=10.0, shift=0.1)  # of the Keras fine-tuning guide of 2016
REPEATS = 3  # of every measurement
DECODED_ONCE = "batches from that file, on the device"
AUGMENTED = "augmentation and preprocessing, on the device"
FEATURES = {  # of VGG16; what the rows hold does not change the time
    "batches of cached features of fc1, on the device": (4096,),
    "batches of cached features of avg_pool, on the device": (512,),
    "batches of cached features of block4, on the device": (14, 14, 512),
}
FC1, POOLED, _ = FEATURES
STEPS: dict[str, tuple[str, dict[str, Any], str, str]] = {  # what takes images: net, its options, frozen, what feeds it
    "VGG16, first ten layers frozen": ("vgg16", {}, "first:10", DECODED_ONCE),
    "ResNet-50, all trained": ("resnet50", {}, "none", DECODED_ONCE),
    "VGG16's last layer on cached features": ("vgg16", {}, "all-but-head", FC1),
    "VGG16's pooled last layer on cached features": ("vgg16", {"fc": False}, "all-but-head", POOLED),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time the stages of the input and the steps that it feeds."""

    images: int = 320
    """Drawn images, a multiple of 10."""
    batch_size: int = 16
    """Images a step."""
    seconds: float = 1.0
    """That each of the repeats of a measurement takes, or one call where that is longer."""
    out: pathlib.Path = pathlib.Path("docs/input.md")
    """The table, as Markdown."""


def rates(count: int, run: Callable[[], Any], seconds: float) -> list[float]:
    """Images a second, of each repeat, where a call of `run` deals with `count`; the first call is not counted."""
    last, found = jax.block_until_ready(run()), []
    for _ in range(REPEATS):
        began, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() < began + seconds:
            before, last, calls = last, run(), calls + 1
            jax.block_until_ready(before)  # one call is under way while the next is prepared, as in `train.fit`
        jax.block_until_ready(last)
        found.append(count * calls / (time.perf_counter() - began))
    return found


def decoders(files: list[bytes]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, a function that makes pixels of the next file): one thread, one image."""
    data = itertools.cycle(files)
    least = {"min_height": SIZE[0], "min_width": SIZE[1]}
    pixels = Image.fromarray(simplejpeg.decode_jpeg(files[0], "RGB"))
    yield "JPEG to 640×480, simplejpeg", lambda: simplejpeg.decode_jpeg(next(data), "RGB")
    yield "the same, scaled by libjpeg", lambda: simplejpeg.decode_jpeg(next(data), "RGB", **least)
    yield "the same, Pillow", lambda: np.asarray(Image.open(io.BytesIO(next(data))))
    if importlib.util.find_spec("cv2"):
        import cv2

        yield "the same, OpenCV", lambda: cv2.imdecode(np.frombuffer(next(data), np.uint8), cv2.IMREAD_COLOR_RGB)
    yield "resize to 224×224, antialiased", lambda: np.asarray(pixels.resize(SIZE, Image.Resampling.BILINEAR))


def stages(dataset: Dataset, settings: Settings) -> Iterator[tuple[str, list[float]]]:
    """(stage, its rates), from the file to the device."""
    everything, places = np.arange(len(dataset)), itertools.cycle(range(len(dataset)))
    yield "read a file", rates(1, lambda: dataset.images[next(places)], settings.seconds)
    for name, run in decoders([dataset.images[i] for i in range(min(64, len(dataset)))]):  # type: ignore[misc]
        yield name, rates(1, run, settings.seconds)

    inputs = Inputs(dataset, everything, SIZE, settings.batch_size)

    def batches(images: Images | None = dataset.images, of: Inputs = inputs, **options: Any) -> loader.Batches:
        return loader.train_batches(of, images, seed=0, **options)

    for workers, scaled in ((1, False), (loader.default_workers(), False), (loader.default_workers(), True)):
        stream = batches(of=dataclasses.replace(inputs, decode=Decode(scaled=scaled)), workers=workers)
        name = f"batches decoded anew, {workers} thread{'s' * (workers > 1)}" + (", scaled" if scaled else "")
        yield name, rates(settings.batch_size, lambda stream=stream: next(stream), settings.seconds)
        stream.close()

    cache_folder, attempts = os.environ["JAXFT_CACHE"], itertools.count()

    def fill() -> None:
        os.environ["JAXFT_CACHE"] = f"{cache_folder}/{next(attempts)}"
        loader.decode_once([inputs])

    yield "filling the file of decoded images", rates(len(dataset), fill, settings.seconds)
    os.environ["JAXFT_CACHE"] = cache_folder
    pixels = loader.decode_once([inputs])
    assert pixels, "no room on the disk"
    mesh = devices.mesh()

    def kept(cache: Rows) -> list[float]:
        """Rates of batches, on the device, whose images are rows of the cache; of several at once for vectors."""
        stream = batches(None)
        at_once = feed.steps_at_once(cache.shape)

        def run() -> Any:
            batch: dict[str, Any] = feed.several(stream, at_once) if at_once > 1 else next(stream)
            return devices.shard(batch | {"image": cache.take(batch["index"])}, mesh, stacked=at_once > 1)

        found = rates(settings.batch_size * at_once, run, settings.seconds)
        stream.close()
        return found

    if pixels.on_device():
        yield DECODED_ONCE, kept(pixels)
    else:
        stream = batches(loader.Decoded(pixels, len(dataset)))
        yield DECODED_ONCE, rates(settings.batch_size, lambda: devices.shard(next(stream), mesh), settings.seconds)
        stream.close()
    for name, shape in FEATURES.items():
        cache = Rows("features", name, {}, everything, shape, np.float32)
        cache.fill(lambda indices, shape=shape: (np.ones((1, *shape), np.float32) for _ in indices))
        yield name, kept(cache)

    (batch,) = batches(num_steps=1)
    yield "a batch to the device", rates(settings.batch_size, lambda: devices.shard(batch, mesh), settings.seconds)
    images, key = devices.shard(batch, mesh)["image"], jax.random.key(0)
    augmented = jax.jit(lambda key, images: preprocess.caffe(WARP(key, images, {})[0]))
    yield AUGMENTED, rates(settings.batch_size, lambda: augmented(key, images), settings.seconds)


def step_rates(name: str, options: dict[str, Any], freeze: str, cached: bool, settings: Settings) -> list[float]:
    """Rates of the train step alone, on one batch that is on the device already, or on several at once of vectors."""
    net: Any = nets.create(name, 10, dtype=compute_dtype("auto"), **options)
    variables = nets.init(net, SIZE, seed=0)
    net = net.clone(frozen=masking.frozen_layers(net, freeze, variables["params"]))
    stage = features.cut(net, list(variables["params"])) if cached else None
    normalise = preprocess.get(nets.spec(name).preprocessing)
    state = train_state.create(net, variables, Phase(1, optim.Constant(1e-3)))
    images = jax.numpy.zeros((settings.batch_size, *SIZE, 3), np.uint8)
    if stage:
        images = features.make_prefix(net, stage, normalise)(variables, images, None)

    def prepare(key: jax.Array, images: jax.Array, labels: train.Labels) -> tuple[jax.Array, train.Labels]:
        return images if cached else normalise(images), labels

    step = train.make_train_step(task.classification(), 10, prepare, stage)
    batch = train.batch_of(images, np.zeros(settings.batch_size, np.int32))
    at_once = feed.steps_at_once(images.shape[1:])
    if at_once > 1:
        step, batch = train.several(step), feed.several(itertools.repeat(batch), at_once)
    batch = jax.device_put(batch)

    def run() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return rates(settings.batch_size * at_once, run, settings.seconds)


def shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def row(name: str, found: list[float]) -> str:
    return f"| {name} | {shown(statistics.median(found))} | {shown(min(found))} to {shown(max(found))} |"


def main(settings: Settings) -> None:
    given: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, bar("steps", len(STEPS), unit="steps") as advance:
        os.environ["JAXFT_CACHE"] = folder
        root = pathlib.Path(folder)
        drawn = standin.render(root / "drawn", drivers=settings.images // 10, images_per_driver=10)
        rows = []
        for name, found in stages(statefarm.prepare(drawn, root), settings):
            given[name] = statistics.median(found)
            rows.append(row(name, found))
            print(rows[-1], flush=True)
        rows += ["", "| train step | images a second | range | the input gives |", "| --- | --- | --- | --- |"]
        limited = []
        for name, (net, options, freeze, source) in STEPS.items():
            found = step_rates(net, options, freeze, source != DECODED_ONCE, settings)
            jax.clear_caches()
            times = given[source] / statistics.median(found)
            rows.append(f"{row(name, found)} {shown(times)} times as many |")
            print(rows[-1], flush=True)
            limited += [name] if times < 1 else []
            advance(1)
    head = [
        "# The input",
        "",
        f"`python -m benchmarks.input` writes this table: images a second, median and range of {REPEATS}, of "
        f"{settings.images} drawn",
        f"640×480 JPEGs to 224×224 pixels, batch {settings.batch_size}; each stage alone, in one thread unless it says "
        "otherwise, files",
        "in the page cache. A run decodes once, and reads its batches from that file or from the feature cache while",
        "the step before is computed.",
    ]
    columns = [
        "| stage | images a second | range |",
        "| --- | --- | --- |",
    ]
    verdict = f"The input limits {', '.join(limited)}." if limited else "The input limits none of them: the step does."
    write_table(settings.out, head, [*columns, *rows, "", verdict])


if __name__ == "__main__":
    main(tyro.cli(Settings))
