"""From the command to the first finished train step, beside Keras on JAX.

    python -m benchmarks.start [--nets vgg16 resnet50] [--freeze all-but-head] [--out docs/start.md]

Every figure is of a fresh process that imports its library, builds the net, fills it from the same Keras weight file,
compiles the train step and runs it once, first with an empty cache of compiled programs, then with what that left;
both sides in turn, and their losses must agree. Files are in the page cache.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.machine import peak_bytes, write_table

BATCH = 16
TOLERANCE = 1e-3  # of the losses, relative


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time the start of a run beside Keras."""

    nets: tuple[str, ...] = ("vgg16", "resnet50")
    """Nets of the zoo that `keras.applications` has, too."""
    freeze: str = "all-but-head"
    """As in the experiments."""
    repeats: int = 3
    """Fresh processes of each kind."""
    out: pathlib.Path = pathlib.Path("docs/start.md")
    """The tables, as Markdown."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What both sides do.

    Attributes:
        net, application: its name in the zoo, and of its function in `keras.applications`.
        classes, size: width of its last layer, (height, width) of the images.
        weights: a `.weights.h5` that Keras loads.
        batch: an `.npz` of preprocessed images and labels.
        freeze, frozen: the specification, and the layers that it names.
    """

    net: str
    application: str
    classes: int
    size: tuple[int, int]
    weights: str
    batch: str
    freeze: str
    frozen: tuple[str, ...]


def jaxft(job: Job, facts: dict[str, Any]) -> float:
    from jaxft import finetune, masking, model, optim, pretrained, task, train, train_state
    from jaxft.phase import Phase

    facts |= {"imported": time.monotonic(), "imported_bytes": peak_bytes()}
    finetune.keep_programs()
    options: dict[str, Any] = {"dropout": 0.0} if job.net.startswith("vgg") else {}  # Keras's VGG has none
    weights = pretrained.resolve(job.net, job.weights, classifier=True)
    made = model.load(job.net, job.classes, weights=weights, **options)
    facts |= {"filled": time.monotonic(), "filled_bytes": peak_bytes()}
    net = made.net.clone(frozen=masking.frozen_layers(made.net, job.freeze, made.variables["params"]))
    state = train_state.create(net, made.variables, Phase(1, optim.Constant(1e-4)))
    batch = np.load(job.batch)
    step = train.make_train_step(task.classification(), job.classes, lambda key, images, labels: (images, labels))
    _, metrics = step(state, train.batch_of(batch["images"], batch["labels"]))
    return float(metrics["loss"])


def keras(job: Job, facts: dict[str, Any]) -> float:
    import keras

    facts |= {"imported": time.monotonic(), "imported_bytes": peak_bytes()}
    model = getattr(keras.applications, job.application)(weights=None, classifier_activation=None)
    model.load_weights(job.weights)
    for layer in model.layers:
        layer.trainable = layer.name not in job.frozen
    facts |= {"filled": time.monotonic(), "filled_bytes": peak_bytes()}
    model.compile(
        keras.optimizers.SGD(1e-4, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    batch = np.load(job.batch)
    return float(model.train_on_batch(batch["images"], batch["labels"]))


SIDES = {"jaxft": jaxft, "Keras on JAX": keras}


def run(side: str, job: Job, programs: pathlib.Path) -> dict[str, float]:
    """Seconds of a fresh process by phase and in all, its `loss`, and the `bytes` that filling added to its peak."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs), "KERAS_BACKEND": "jax"}
    command = [sys.executable, "-m", "benchmarks.start", "--side", side, json.dumps(dataclasses.asdict(job))]
    began = time.monotonic()  # a clock that processes share
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    return {
        "import": facts["imported"] - began,
        "build and fill": facts["filled"] - facts["imported"],
        "compile and step": facts["finished"] - facts["filled"],
        "total": facts["finished"] - began,
        "loss": facts["loss"],
        "bytes": facts["filled_bytes"] - facts["imported_bytes"],
    }


def measure(name: str, settings: Settings) -> tuple[list[str], str]:
    """The rows of a net: of its starts, and of its porting."""
    from jaxft import masking, nets
    from tests.reference import keras_nets

    row = nets.spec(name)
    net: Any = nets.create(name, row.num_classes)
    frozen = masking.frozen_layers(net, settings.freeze, nets.init(net, row.native_size, 0)["params"])
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights, batch = f"{folder}/net.weights.h5", f"{folder}/batch.npz"
        keras_nets.reference(name, row.native_size, classifier=True).save_weights(weights)
        size, rng = os.path.getsize(weights), np.random.default_rng(0)
        images = rng.normal(0, 1, (BATCH, *row.native_size, 3)).astype(np.float32)
        np.savez(batch, images=images, labels=rng.integers(0, row.num_classes, BATCH).astype(np.int32))
        application = keras_nets.APPLICATIONS[name].__name__
        job = Job(
            name, application, row.num_classes, row.native_size, weights, batch, settings.freeze, tuple(sorted(frozen))
        )
        for repeat in range(settings.repeats):
            for side in SIDES:
                programs = pathlib.Path(folder, f"{side} {repeat}")
                for kept in ("empty", "filled"):
                    found.setdefault((side, kept), []).append(run(side, job, programs))
    losses = [result["loss"] for results in found.values() for result in results]
    if not np.allclose(losses, losses[0], rtol=TOLERANCE, atol=0):
        raise SystemExit(f"{name}: the sides do not compute the same: {losses}")

    def cell(results: list[dict[str, float]], what: str) -> str:
        values = [result[what] for result in results]
        return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    starts = [
        f"| {name} | {side} | {kept} | "
        + " | ".join(cell(results, what) for what in ("import", "build and fill", "compile and step", "total"))
        + " |"
        for (side, kept), results in found.items()
    ]
    porting = f"| {name} | {size / 1e6:.0f} MB | "
    for side in SIDES:
        results = found[side, "empty"] + found[side, "filled"]
        peak = statistics.median(result["bytes"] for result in results) / size
        porting += f"{cell(results, 'build and fill')} | {peak:.2f} | "
    return starts, porting.strip()


def main(settings: Settings) -> None:
    from jaxft.progress import bar

    starts, porting = [], []
    with bar("nets", len(settings.nets), unit="nets") as advance:
        for name in settings.nets:
            rows, row = measure(name, settings)
            print(*rows, row, sep="\n", flush=True)
            starts += rows
            porting.append(row)
            advance(1)
    head = [
        "# The start of a run, beside Keras",
        "",
        f"`python -m benchmarks.start` writes these tables: seconds, median (range) of {settings.repeats} fresh",
        f"processes of each kind. `{settings.freeze}` is frozen, batch {BATCH} at the native size, float32. The total",
        "runs from the command to the first finished train step, with an empty cache of compiled programs and with a",
        "filled one.",
    ]
    tables = [
        "| net | side | programs | import | build and fill | compile, first step | total |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *starts,
        "",
        "Building the net and filling it from the weight file, and what that adds to the process's peak of memory,",
        "as a multiple of the file:",
        "",
        "| net | file | jaxft: seconds | memory | Keras: seconds | memory |",
        "| --- | --- | --- | --- | --- | --- |",
        *porting,
    ]
    write_table(settings.out, head, tables, keras=importlib.metadata.version("keras"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        facts: dict[str, Any] = {}
        facts["loss"] = SIDES[sys.argv[2]](Job(**json.loads(sys.argv[3])), facts)
        print("\n" + json.dumps(facts | {"finished": time.monotonic()}))
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU, which parent and sides share
        import tyro  # here, as what the parent alone needs: a side must not pay for it

        main(tyro.cli(Settings))
