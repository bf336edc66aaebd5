"""What the GPU program of a train step is, compiled for an H200 on a machine that has none: kernels, bytes, memory.

    pip install 'jax[cuda13]==0.10.2'     # 4.4 GB, in an environment of its own
    python -m benchmarks.gpu_program --net resnet50 vgg16 --freeze none all-but-head --peers flax keras

Nothing is run. Bytes are what the operations of the program read and write; cuDNN's own traffic and what stays in a
cache are not counted. Divided by the card's bandwidth they bound the rate from above. A lone figure means little:
compare programs of one table. Each is compiled in a process of its own, without autotuning, as there is nothing to tune
on. Of the peers, `flax` is a plain ResNet-50 of Flax's own layers, `keras` the same net in Keras on JAX; both train all
layers.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import tyro

from benchmarks.machine import run_apart, write_table
from jaxft.progress import bar
from tests.reference import hlo

# XLA's description of the card: https://github.com/openxla/xla/tree/main/xla/tools/hlo_opt (gpu_specs)
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""
BANDWIDTH = 4.8e12  # bytes a second of an H200, by its data sheet
LR, MOMENTUM = 1e-3, 0.9

Made = tuple[Callable[..., Any], tuple[Any, ...]]
"""A train step that donates its first argument, and the shapes of what it takes."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compile train steps for a GPU, and say what is in them."""

    net: tuple[str, ...] = ("resnet50",)
    """Nets of the zoo, at their native size."""
    freeze: tuple[str, ...] = ("none",)
    """What is frozen, as in the experiments; every net is compiled with each."""
    batch_size: tuple[int, ...] = (256,)
    """Images a step; every net is compiled with each."""
    dtype: str = "bfloat16"
    """Of the computation: float32 or bfloat16."""
    peers: tuple[str, ...] = ()
    """Of flax and keras, beside a ResNet-50 that is trained whole."""
    out: pathlib.Path = pathlib.Path("docs/gpu_program.md")
    """The table, as Markdown."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One program: whose it is, of which net, with what frozen, at which batch, in which type."""

    side: str
    net: str
    freeze: str
    batch_size: int
    dtype: str


def jaxft(job: Job) -> Made:
    """The library's step, on bytes that it normalises itself."""
    import jax
    import jax.numpy as jnp

    from jaxft import masking, nets, optim, preprocess, task, train, train_state
    from jaxft.phase import Phase

    row = nets.spec(job.net)
    net = nets.create(job.net, row.num_classes, dtype=jnp.dtype(job.dtype))
    image = jax.ShapeDtypeStruct((1, *row.native_size, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), image)
    net = net.clone(frozen=masking.frozen_layers(net, job.freeze, variables["params"]))
    phase = Phase(1, optim.Constant(LR), optim.NesterovSGD(MOMENTUM), frozen=job.freeze)
    state = jax.eval_shape(lambda variables: train_state.create(net, variables, phase), variables)
    normalise = preprocess.get(row.preprocessing)
    step = train.make_train_step(
        task.classification(), row.num_classes, lambda key, images, labels: (normalise(images), labels)
    )
    images = np.zeros((job.batch_size, *row.native_size, 3), np.uint8)
    batch = train.batch_of(images, np.zeros(job.batch_size, np.int32))
    return step, (state, batch)


def flax(job: Job) -> Made:
    """ResNet-50 of Flax's own layers and optax's SGD, as one would write it; its input is normalised."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    dtype = jnp.dtype(job.dtype)
    conv, norm = partial(nn.Conv, dtype=dtype), partial(nn.BatchNorm, use_running_average=False, dtype=dtype)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(norm()(conv(64, (7, 7), (2, 2), [(3, 3), (3, 3)])(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            for stage, blocks in enumerate((3, 4, 6, 3)):
                width = 64 << stage
                for block in range(blocks):
                    stride = (2, 2) if block == 0 and stage else (1, 1)
                    y = nn.relu(norm()(conv(width, (1, 1), stride)(x)))
                    y = nn.relu(norm()(conv(width, (3, 3))(y)))
                    y = norm()(conv(4 * width, (1, 1))(y))
                    if block == 0:
                        x = norm()(conv(4 * width, (1, 1), stride)(x))
                    x = nn.relu(x + y)
            return nn.Dense(1000, dtype=jnp.float32)(x.mean((1, 2)).astype(jnp.float32))

    net, optimizer = Net(), optax.sgd(LR, MOMENTUM, nesterov=True)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, stats, slots = state

        def loss_of(params: Any) -> Any:
            logits, changed = net.apply({"params": params, "batch_stats": stats}, images, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed["batch_stats"]

        (loss, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, slots = optimizer.update(gradient, slots, params)
        return (optax.apply_updates(params, updates), stats, slots), loss

    images = jax.ShapeDtypeStruct((job.batch_size, 224, 224, 3), jnp.float32)
    found = jax.eval_shape(net.init, jax.random.key(0), images)
    state = found["params"], found["batch_stats"], jax.eval_shape(optimizer.init, found["params"])
    return jax.jit(step, donate_argnums=0), (state, images, jax.ShapeDtypeStruct((job.batch_size,), jnp.int32))


def keras(job: Job) -> Made:
    """`keras.applications.ResNet50` with Keras's own SGD, its state passed by hand; its input is normalised."""
    import jax
    import jax.numpy as jnp
    import keras

    keras.mixed_precision.set_global_policy("float32" if job.dtype == "float32" else f"mixed_{job.dtype}")
    model = keras.applications.ResNet50(weights=None, classifier_activation=None)
    optimizer = keras.optimizers.SGD(LR, momentum=MOMENTUM, nesterov=True)
    optimizer.build(model.trainable_variables)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        trainable, others, slots = state

        def loss_of(trainable: Any) -> Any:
            logits, changed = model.stateless_call(trainable, others, images, training=True)
            return entropy(labels, logits), changed

        (loss, others), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        trainable, slots = optimizer.stateless_apply(slots, gradient, trainable)
        return (trainable, others, slots), loss

    def shapes(variables: Any) -> list[Any]:
        return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in variables]

    state = tuple(map(shapes, (model.trainable_variables, model.non_trainable_variables, optimizer.variables)))
    images = jax.ShapeDtypeStruct((job.batch_size, 224, 224, 3), jnp.float32)
    return jax.jit(step, donate_argnums=0), (state, images, jax.ShapeDtypeStruct((job.batch_size,), jnp.int32))


HEAD = (
    "# GPU programs, compiled without a GPU",
    "",
    "`python -m benchmarks.gpu_program` writes this table: a train step at the native size as XLA compiles it for one",
    "H200, on a machine that has none. Nothing was run. GB moved: what its operations read and write, cuDNN's own",
    "traffic not counted; with 4.8 TB/s that bounds the rate from above: no measured rate. Copies are transposes too.",
    "Memory: temporaries, and what the step is given (state and images).",
)
TABLE = (
    "| net | frozen | batch | side | kernels | cuDNN | copies | GB moved | largest parts | images/s below | GB held |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)
SIDES: dict[str, Callable[[Job], Made]] = {"jaxft": jaxft, "flax": flax, "keras": keras}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    largest = ", ".join(f"{kind.removeprefix('__cudnn$')} {gb:.1f}" for kind, gb in row["by_kind"].items())
    head = (
        f"| {row['net']} | {row['freeze']} | {row['batch_size']} | {row['side']} | {row['kernels']:,} | {row['cudnn']} "
    )
    moved = f"| {row['copies']} | {row['gb_moved']:.1f} | {largest} | {row['most_images_per_second']:,.0f} "
    return head + moved + f"| {row['gb_temporary']:.1f} + {row['gb_given']:.1f} |"


def compiled(job: Job) -> dict[str, Any]:
    """Compiles a program in this process, and counts what is in it."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc("1x1x1", platform="cuda", target_config=H200, topology="1x1x1")
    sharding = NamedSharding(Mesh(topology.devices[:1], ("data",)), PartitionSpec())
    step, shapes = SIDES[job.side](job)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):  # the kernels of a CPU stay out
        lowered = step.trace(*shapes).lower(lowering_platforms=("cuda",))
    done = lowered.compile()
    many, moved = hlo.operations(done.as_text())
    memory, total = done.memory_analysis(), sum(moved.values())
    return dataclasses.asdict(job) | {
        "kernels": sum(many.values()),
        "cudnn": sum(count for kind, count in many.items() if kind.startswith("__cudnn")),
        "copies": many["copy"] + many["transpose"],
        "gb_moved": total / 1e9,
        "by_kind": {kind: of_kind / 1e9 for kind, of_kind in moved.most_common(3)},
        "most_images_per_second": job.batch_size * BANDWIDTH / total,
        "gb_temporary": memory.temp_size_in_bytes / 1e9,
        "gb_given": memory.argument_size_in_bytes / 1e9,
    }


def main(settings: Settings) -> None:
    """Compiles every program in a process of its own; prints and writes the table."""
    jobs = []
    for net, freeze, batch in itertools.product(settings.net, settings.freeze, settings.batch_size):
        sides = ("jaxft", *(settings.peers if (net, freeze) == ("resnet50", "none") else ()))
        jobs += [Job(side, net, freeze, batch, settings.dtype) for side in sides]
    os.environ |= {  # of this process, and of those that it starts
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    rows = []
    with bar("compiling", len(jobs), unit="programs") as advance:
        for job in jobs:
            rows.append(line(run_apart("benchmarks.gpu_program", dataclasses.asdict(job))))
            write_table(settings.out, [*HEAD, "", f"Computed in {settings.dtype}."], [*TABLE, *rows])
            advance(1, f"{job.net} {job.freeze} {job.side}")
    print("\n".join([*TABLE, *rows]))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(compiled(Job(**json.loads(sys.argv[1])))))
    else:
        main(tyro.cli(Settings))
