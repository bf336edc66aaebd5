"""What it costs to build a net and trace its train step, beside Keras on its JAX backend.

    python -m benchmarks.trace [NET …] [--repeats 3] [--out docs/trace.md]

From a fresh session: creating the net with random weights, and tracing (not compiling) its train step at the native
size with nesterov SGD; both sides in one process, interleaved, medians. Keras has its own initializers, its own
optimizer and the custom training step of its guide.
"""

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import tyro

from benchmarks.machine import write_table
from jaxft import nets, optim, preprocess, task, train, train_state
from jaxft.phase import Phase
from tests.reference import keras_nets

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time building and tracing nets beside Keras."""

    names: tyro.conf.Positional[tuple[str, ...]] = ("vgg16", "resnet152", "inception_v4", "densenet201")
    """Nets of the zoo."""
    repeats: int = 3
    """Builds and traces of each side."""
    out: pathlib.Path = pathlib.Path("docs/trace.md")
    """The table, as Markdown."""


def trace_ours(name: str) -> None:
    row = nets.spec(name)
    net = nets.create(name, row.num_classes)
    variables = nets.init(net, row.native_size, seed=0)
    state = train_state.create(net, variables, Phase(1, optim.Constant(1e-3)))
    normalise = preprocess.get(row.preprocessing)
    step = train.make_train_step(
        task.classification(), row.num_classes, lambda key, images, labels: (normalise(images), labels)
    )
    images = np.zeros((BATCH, *row.native_size, 3), np.uint8)
    step.trace(state, train.batch_of(images, np.zeros(BATCH, np.int32)))  # type: ignore[attr-defined]


def trace_keras(name: str) -> None:
    keras.backend.clear_session()
    row = nets.spec(name)
    if name in keras_nets.APPLICATIONS:
        model = keras_nets.APPLICATIONS[name](weights=None, classifier_activation=None)
    else:
        model = keras_nets.REFERENCES[name]()
    optimizer = keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True)
    optimizer.build(model.trainable_variables)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss_of(trainable, fixed, images, labels):  # noqa: ANN001, ANN202 as in Keras's guide to custom loops
        outputs, fixed = model.stateless_call(trainable, fixed, images, training=True)
        heads = outputs if isinstance(outputs, list) else [outputs]
        return sum(entropy(labels, head) for head in heads), fixed

    def step(trainable, fixed, slots, images, labels):  # noqa: ANN001, ANN202
        (loss, fixed), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable, fixed, images, labels)
        trainable, slots = optimizer.stateless_apply(slots, grads, trainable)
        return loss, trainable, fixed, slots

    values = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))
    images = jnp.zeros((BATCH, *row.native_size, 3))
    jax.jit(step).trace(*values, [v.value for v in optimizer.variables], images, jnp.zeros(BATCH, jnp.int32))


def seconds(run: Callable[[str], None], name: str) -> float:
    jax.clear_caches()
    began = time.perf_counter()
    run(name)
    return time.perf_counter() - began


def main(settings: Settings) -> None:
    rows = []
    for name in settings.names:
        times = [(seconds(trace_ours, name), seconds(trace_keras, name)) for _ in range(settings.repeats)]
        cells = [
            f"{statistics.median(side):.1f} ({min(side):.1f} to {max(side):.1f})" for side in zip(*times, strict=True)
        ]
        ratio = statistics.median(ours / theirs for ours, theirs in times)
        rows.append(f"| {name} | {cells[0]} | {cells[1]} | {ratio:.2f} |")
        print(rows[-1], flush=True)
    head = [
        "# Building and tracing, beside Keras",
        "",
        "`python -m benchmarks.trace` writes this table: seconds to create a net with random weights and trace its",
        f"train step at the native size, batch {BATCH}; median (range) of {settings.repeats}, interleaved.",
    ]
    columns = [
        "| net | jaxft | Keras on JAX | ratio |",
        "| --- | --- | --- | --- |",
    ]
    write_table(settings.out, head, [*columns, *rows], keras=keras.__version__)


if __name__ == "__main__":
    main(tyro.cli(Settings))
