"""One side of `benchmarks.train`, in a process of its own: it builds a train step, then runs steps when told to.

    python -m benchmarks.peers SIDE < JOB

The first line that it reads is a `Job` as JSON, which it answers with a line of facts; then each line is a number of
steps, which it answers with their seconds.
"""

import dataclasses
import gc
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.machine import peak_bytes
from tests.reference import hlo

LR, MOMENTUM = 1e-4, 0.9
CHECKED_STEPS = 2  # whose losses every side must share: before an update, and after it
TIMM = ("vgg16", "vgg19", "resnet50", "resnet101", "resnet152", "inception_v3", "inception_v4")
TIMM += ("densenet121", "densenet169", "densenet201")  # nets that timm has under the same name

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
        predict: what every side does is no train step, but the logits of the batch.
    """

    net: str
    weights: str
    frozen: tuple[str, ...]
    image_size: tuple[int, int]
    batch_size: int
    dtype: str
    predict: bool = False

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """(preprocessed images float32 [B, H, W, 3], labels int32 [B])."""
        from jaxft import nets

        rng = np.random.default_rng(0)
        images = rng.normal(0, 1, (self.batch_size, *self.image_size, 3)).astype(np.float32)
        return images, rng.integers(0, nets.spec(self.net).num_classes, self.batch_size).astype(np.int32)


def jaxft(job: Job, facts: dict[str, Any]) -> Step:
    import jax
    import jax.numpy as jnp

    from jaxft import memory, nets, optim, port_weights, task, train, train_state
    from jaxft.phase import Phase

    memory.give_back_after_compiling()  # as `finetune` does

    row = nets.spec(job.net)
    options = without_dropout(job.net)
    variables, _ = port_weights.load(job.net, job.weights, num_classes=row.num_classes, **options)
    net = nets.create(job.net, row.num_classes, dtype=jnp.dtype(job.dtype), frozen=frozenset(job.frozen), **options)
    if job.predict:
        predict = jax.jit(lambda variables, x: jnp.abs(net.apply(variables, x)[0]).mean())
        given = jax.device_put((variables, job.batch()[0]))
        return partial(counted(predict, given, facts), *given)
    state = train_state.create(net, variables, Phase(1, optim.Constant(LR), optim.NesterovSGD(MOMENTUM)))
    batch = jax.device_put(train.batch_of(*job.batch()))
    traced: Any = train.make_train_step(task.classification(), row.num_classes, lambda key, x, labels: (x, labels))
    step = counted(traced, (state, batch), facts)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def counted(function: Any, args: tuple[Any, ...], facts: dict[str, Any]) -> Callable[..., Any]:
    """The program for such arguments, compiled; what that took and what the program moves go to the facts."""
    began = time.perf_counter()
    compiled = function.lower(*args).compile()
    facts["compile_s"] = time.perf_counter() - began
    facts["moved_bytes"] = sum(hlo.operations(compiled.as_text())[1].values())
    return compiled


def without_dropout(name: str) -> dict[str, Any]:
    """Options of the net called `name` under which every side computes the same function."""
    from jaxft import nets

    net, options = nets.create(name), {}
    for option in ("dropout", "drop_path"):
        if option in nets.fields(name):
            options[option] = (0.0, 0.0, 0.0) if isinstance(getattr(net, option), tuple) else 0.0
    return options


def raw_batch(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """The batch as Keras's model takes it, which in some nets does the preprocessing itself."""
    from tests.reference import keras_nets

    images, labels = job.batch()
    return keras_nets.fed(job.net, images), labels


def keras_model(job: Job) -> Any:
    """The net of the job in Keras, filled, its frozen layers not trainable, without dropout."""
    import keras

    from tests.reference import keras_nets

    keras.mixed_precision.set_global_policy("float32" if job.dtype == "float32" else f"mixed_{job.dtype}")
    model = keras_nets.reference(job.net, job.image_size, classifier=True)
    model.load_weights(job.weights)
    frozen = frozen_layers(job, model)
    for layer in keras_nets.flat_layers(model):
        layer.trainable = layer.name not in frozen
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return model


def frozen_layers(job: Job, model: Any) -> set[str]:
    """Names of the frozen layers in the Keras model, which numbers the Inceptions' from 0, the job's from 1."""
    from tests.reference import keras_nets

    def name_in_job(name: str) -> str:
        kind, _, number = name.rpartition("_") if name[-1].isdecimal() else (name, "", "0")
        return f"{kind}_{int(number) + 1}" if kind in ("conv2d", "batch_normalization") else name

    return {layer.name for layer in keras_nets.flat_layers(model) if name_in_job(layer.name) in job.frozen}


def keras_step(job: Job, facts: dict[str, Any]) -> Step:
    import keras
    from scipy.special import log_softmax, logsumexp

    model = keras_model(job)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.SGD(LR, momentum=MOMENTUM, nesterov=True),
        loss=[entropy] * len(model.outputs),
        jit_compile="auto" if facts["backend"] == "jax" else facts["device"] != "cpu",
    )
    images, labels = map(keras.ops.convert_to_tensor, raw_batch(job))
    targets = [labels] * len(model.outputs) if len(model.outputs) > 1 else labels
    if job.predict:

        def logits() -> Any:
            found = model.predict_on_batch(images)
            if isinstance(found, list):  # GoogLeNet's prediction is the mean of three
                found = logsumexp(log_softmax(np.stack(found), -1), 0) - math.log(len(found))
            return np.abs(found).mean()

        return logits

    def run() -> Any:
        result = model.train_on_batch(images, targets)
        return result[0] if isinstance(result, list) else result

    return run


def keras_graph(job: Job) -> Any:
    """The net of the job in PyTorch: the graph of the Keras model, filled."""
    from benchmarks import torch_net

    model = keras_model(job)
    net = torch_net.Graph(model).train()
    net.freeze(frozen_layers(job, model))
    return net


def timm_net(job: Job) -> Any:
    """timm's net of that name with random weights, all of it trained, or its classifier if anything is frozen.

    Another function of nearly the same cost: a ResNet's strides sit on its 3×3 convolutions, whose work that adds to,
    convolutions in front of BatchNorm have no bias, Inception-V3's BatchNorm has a scale.
    """
    import timm

    from jaxft import nets

    net = timm.create_model(job.net, num_classes=nets.spec(job.net).num_classes)
    if job.frozen:
        net.requires_grad_(False).eval()
        net.get_classifier().requires_grad_(True)
    return net


def torch_step(job: Job, facts: dict[str, Any], make: Callable[[Job], Any], mode: str | None = None) -> Step:
    """Eager, or with torch.compile in `mode`. On a GPU float32 is multiplied as TF32, which is JAX's default, too."""
    import torch

    device = torch.device("cpu" if facts["device"] == "cpu" else "cuda")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # cuDNN's convolutions take TF32 as they are
        torch.backends.cudnn.benchmark = True
    net = make(job).to(device, memory_format=torch.channels_last)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LR, momentum=MOMENTUM, nesterov=True, fused=device.type == "cuda")
    images, labels = (torch.from_numpy(x).to(device) for x in (raw_batch(job) if make is keras_graph else job.batch()))
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    labels = labels.long()
    if job.predict:
        net.eval()

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "bfloat16"):
            heads = net(images)
        heads = heads if isinstance(heads, list) else [heads]
        if job.predict:
            if len(heads) > 1:  # GoogLeNet's prediction is the mean of three
                heads = [torch.stack(heads).float().log_softmax(-1).logsumexp(0) - math.log(len(heads))]
            return heads[0].float().abs().mean()
        return sum(torch.nn.functional.cross_entropy(head.float(), labels) for head in heads)

    if mode:
        loss_of = torch.compile(loss_of, mode=mode)

    def predict() -> Any:
        with torch.inference_mode():
            return loss_of(images, labels)

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return predict if job.predict else run


SIDES: dict[str, tuple[str, Callable[[Job, dict[str, Any]], Step]]] = {  # name → (Keras backend, step)
    "jaxft": ("jax", jaxft),
    "keras-jax": ("jax", keras_step),
    "keras-tensorflow": ("tensorflow", keras_step),
    "torch": ("torch", partial(torch_step, make=keras_graph)),
    "torch-compile": ("torch", partial(torch_step, make=keras_graph, mode="default")),
    "torch-max-autotune": ("torch", partial(torch_step, make=keras_graph, mode="max-autotune")),  # minutes to compile
    "timm": ("torch", partial(torch_step, make=timm_net)),
    "timm-compile": ("torch", partial(torch_step, make=timm_net, mode="default")),
}


def device(backend: str) -> tuple[str, Callable[[], Any], Callable[[], int]]:
    """What the library of `backend` runs on, and its peak memory: how to begin anew, and how to read it.

    That is what this process had at once of the GPU's memory, in bytes, else of the machine's. JAX cannot begin anew,
    so its peak is that of building and compiling where a step takes less.
    """
    if backend == "torch":
        import torch

        def allocated() -> int:
            torch.cuda.empty_cache()  # the other sides want the memory; the peak stays
            return torch.cuda.max_memory_allocated()

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(), torch.cuda.reset_peak_memory_stats, allocated
    elif backend == "tensorflow":
        import tensorflow as tf

        memory = tf.config.experimental
        if gpus := tf.config.list_physical_devices("GPU"):
            name = memory.get_device_details(gpus[0]).get("device_name", "GPU")
            return name, partial(memory.reset_memory_stats, "GPU:0"), lambda: memory.get_memory_info("GPU:0")["peak"]
    else:
        import jax

        first = jax.devices()[0]
        if first.platform != "cpu":
            return first.device_kind, lambda: None, lambda: first.memory_stats()["peak_bytes_in_use"]

    return "cpu", lambda: pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8"), peak_bytes


def versions(side: str, backend: str) -> str:
    from importlib import metadata

    names = {"torch": ["torch"], "tensorflow": ["tensorflow", "tensorflow-cpu"], "jax": ["jax", "flax"]}[backend]
    names += [library for library in ("keras", "timm") if side.startswith(library)]
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
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    raw = json.loads(input())
    job = Job(**{name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()})
    kind, forget_peak, peak = device(backend)
    facts: dict[str, Any] = {"device": kind, "backend": backend, "versions": versions(side, backend)}
    step = make(job, facts)
    began = time.perf_counter()
    losses = [float(step())]
    first = time.perf_counter() - began
    began = time.perf_counter()
    losses += [float(step()) for _ in range(CHECKED_STEPS - 1)]
    facts.setdefault("compile_s", 0.0)
    facts["compile_s"] += max(0.0, first - (time.perf_counter() - began) / (CHECKED_STEPS - 1))
    gc.collect()  # the Keras model that filled a net in PyTorch
    peak()  # hands what the build no longer needs to the other sides
    forget_peak()  # of the build
    print(json.dumps(facts | {"losses": losses}), file=answers, flush=True)
    for line in sys.stdin:
        float(step())  # not timed: it takes back memory, and on a GPU clocks, that another side had
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        float(loss)
        print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
