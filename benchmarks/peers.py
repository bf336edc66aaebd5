"""One side of `benchmarks.train`, in a process of its own: it builds a train step, then runs steps when told to.

    python -m benchmarks.peers SIDE < JOB

The first line that it reads is a `Job` as JSON, which it answers with a line of facts; then each line is a number of
steps, which it answers with their seconds.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

LR, MOMENTUM = 1e-4, 0.9
CHECKED_STEPS = 2  # whose losses every side must share: before an update, and after it

Step = Callable[[], Any]
"""Runs one step, not waiting for it where the library does not, and returns its loss, which `float` waits for."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What every side builds.

    Attributes:
        net: its name in the zoo.
        weights: a `.weights.h5` that Keras loads, with the published classifier.
        frozen: names of frozen layers.
        image_size, batch_size: of the images, (height, width), and of the batch.
        dtype: of the computation, float32 or bfloat16; parameters are float32.
    """

    net: str
    weights: str
    frozen: tuple[str, ...]
    image_size: tuple[int, int]
    batch_size: int
    dtype: str

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """(preprocessed images float32 [B, H, W, 3], labels int32 [B])."""
        from jaxft import nets

        rng = np.random.default_rng(0)
        images = rng.normal(0, 1, (self.batch_size, *self.image_size, 3)).astype(np.float32)
        return images, rng.integers(0, nets.spec(self.net).num_classes, self.batch_size).astype(np.int32)


def jaxft(job: Job, facts: dict[str, Any]) -> Step:
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks import flops
    from jaxft import nets, optim, port_weights, train, train_state

    row = nets.spec(job.net)
    options = without_dropout(job.net)
    variables, _ = port_weights.load(job.net, job.weights, num_classes=row.num_classes, **options)
    net = nets.create(job.net, row.num_classes, dtype=jnp.dtype(job.dtype), frozen=frozenset(job.frozen), **options)
    state = train_state.create(
        net, variables, optim.nesterov_sgd(optax.constant_schedule(LR), MOMENTUM), frozen=job.frozen
    )
    images, labels = (jax.device_put(x) for x in job.batch())
    batch = {"image": images, "label": labels}
    facts["step_flops"] = flops.formula(net, state, job.image_size, job.batch_size)
    facts["peak_flops"] = flops.device_peak(jnp.dtype(job.dtype))
    step = train.make_train_step(lambda _, images: images)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def without_dropout(name: str) -> dict[str, Any]:
    """Options of the net called `name` under which every side computes the same function."""
    from jaxft import nets

    rate = getattr(nets.create(name), "dropout", None)
    return {} if rate is None else {"dropout": (0.0, 0.0, 0.0) if isinstance(rate, tuple) else 0.0}


def keras_model(job: Job) -> Any:
    """The net of the job in Keras, filled, its frozen layers not trainable, without dropout."""
    import keras

    from benchmarks import parity

    keras.mixed_precision.set_global_policy("float32" if job.dtype == "float32" else f"mixed_{job.dtype}")
    model = parity.reference(job.net, job.image_size, classifier=True)
    model.load_weights(job.weights)
    for layer in model.layers:
        layer.trainable = layer.name not in job.frozen
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return model


def keras_step(job: Job, facts: dict[str, Any]) -> Step:
    import keras

    model = keras_model(job)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.SGD(LR, momentum=MOMENTUM, nesterov=True),
        loss=[entropy] * len(model.outputs),
        jit_compile="auto" if facts["backend"] == "jax" else facts["device"] != "cpu",
    )
    images, labels = map(keras.ops.convert_to_tensor, job.batch())
    targets = [labels] * len(model.outputs) if len(model.outputs) > 1 else labels

    def run() -> Any:
        result = model.train_on_batch(images, targets)
        return result[0] if isinstance(result, list) else result

    return run


def torch_step(job: Job, facts: dict[str, Any], compiled: bool) -> Step:
    import torch

    from benchmarks import torch_net

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = torch_net.Graph(keras_model(job)).to(device, memory_format=torch.channels_last).train()
    net.freeze(job.frozen)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, momentum=MOMENTUM, nesterov=True)
    images, labels = (torch.from_numpy(x).to(device) for x in job.batch())
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    labels = labels.long()

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "bfloat16"):
            heads = net(images)
        return sum(torch.nn.functional.cross_entropy(head, labels) for head in heads)

    if compiled:
        loss_of = torch.compile(loss_of)
    torch.backends.cudnn.benchmark = True

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


SIDES: dict[str, tuple[str, Callable[[Job, dict[str, Any]], Step]]] = {  # name → (Keras backend, step)
    "jaxft": ("jax", jaxft),
    "keras-jax": ("jax", keras_step),
    "keras-tensorflow": ("tensorflow", keras_step),
    "torch": ("torch", lambda job, facts: torch_step(job, facts, compiled=False)),
    "torch-compile": ("torch", lambda job, facts: torch_step(job, facts, compiled=True)),
}


def device(backend: str) -> tuple[str, Callable[[], int]]:
    """(what the library of `backend` runs on, its peak memory so far in bytes: of the GPU, else of the process)."""

    def resident() -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated
    elif backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return "gpu", lambda: tf.config.experimental.get_memory_info("GPU:0")["peak"]
    else:
        import jax

        if jax.default_backend() != "cpu":
            return jax.devices()[0].device_kind, lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return "cpu", resident


def versions(backend: str) -> str:
    from importlib import metadata

    names = {"torch": ["torch"], "tensorflow": ["tensorflow", "tensorflow-cpu", "keras"], "jax": ["jax", "keras"]}[
        backend
    ]
    found = {name: metadata.version(name) for name in names if any(metadata.distributions(name=name))}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def main() -> None:
    side = sys.argv[1]
    backend, make = SIDES[side]
    os.environ |= {
        "KERAS_BACKEND": backend,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the sides share a device
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    raw = json.loads(input())
    job = Job(**{name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()})
    kind, peak = device(backend)
    facts: dict[str, Any] = {"device": kind, "backend": backend, "versions": versions(backend)}
    step = make(job, facts)
    began = time.perf_counter()
    losses = [float(step())]
    first = time.perf_counter() - began
    began = time.perf_counter()
    losses += [float(step()) for _ in range(CHECKED_STEPS - 1)]
    facts["compile_s"] = first - (time.perf_counter() - began) / (CHECKED_STEPS - 1)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew, behind the build
    print(json.dumps(facts | {"losses": losses}), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        float(loss)
        print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
