"""What a train step must do and keep, counted from shapes alone, and a device's measured peak.

python -m benchmarks.flops DTYPE    # prints the peak, in operations a second
"""

import dataclasses
import sys
import time
from functools import partial
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import masking, optim, train
from jaxft.train_state import TrainState, create

off_the_cpu = partial(mock.patch.object, jax, "default_backend", lambda: "gpu")
"""A context in which nets are traced with XLA's own convolutions and pooling."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer, ReLU or max pooling, as the net ran it: abstract `x` → `out`; a layer has its module and its name.

    `folded`: of a convolution, that a frozen BatchNorm is part of it, and not a call of its own.
    """

    x: jax.Array
    out: jax.Array
    module: Any = None
    name: str = ""
    folded: bool = False


def calls(net: nn.Module, variables: Any, images: jax.ShapeDtypeStruct) -> list[Call]:
    """The layers with weights, ReLUs and max poolings of a forward pass in training, in the order in which they run."""
    found: list[Call] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        place = len(found)  # before a ReLU that the layer runs itself
        out = call(*args, **kwargs)
        module = context.module
        inside = [call.name for call in found[place:]]
        layer = context.method_name in ("__call__", "of_batch") and module.name in variables["params"]
        if layer and module.name not in inside:
            folded = len(args) > 1 and getattr(args[1], "inference", False)
            found.insert(place, Call(args[0], jax.tree.leaves(out)[0], module, module.name, folded))
        return out

    def recorded(function: Any) -> Any:
        def run(x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            found.append(Call(x, function(x, *args, **kwargs), name=function.__name__))
            return found[-1].out

        return run

    def forward(variables: Any, images: jax.Array) -> Any:
        return net.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})

    relu, max_pool = (mock.patch.object(nn, f.__name__, recorded(f)) for f in (nn.relu, nn.max_pool))
    with nn.intercept_methods(record), relu, max_pool, off_the_cpu():
        jax.eval_shape(forward, variables, images)
    return found


def _taps(module: Any, images: jax.Array, out: jax.Array) -> int:
    """Multiply-adds of a convolution for each pair of channels: kernel taps that meet a pixel, not the padding."""
    total = 1
    for axis, (k, stride) in enumerate(zip(module.kernel_size, np.broadcast_to(module.strides, 2), strict=True), 1):
        side, outputs = images.shape[axis], out.shape[axis]
        if module.padding == "SAME":
            before = max((outputs - 1) * stride + k - side, 0) // 2
        else:
            before = 0 if module.padding == "VALID" else module.padding[axis - 1][0]
        total *= sum(0 <= o * stride + tap - before < side for o in range(outputs) for tap in range(k))
    return total


def formula(net: nn.Module, state: TrainState, image_size: tuple[int, int], batch_size: int) -> int:
    """Operations (two a multiply-add) of convolutions and dense layers in one train step, counted layer by layer.

    Each layer runs forward; a trainable one takes the gradient of its kernel; one behind a trainable layer, in the
    order in which layers run, takes the gradient of its input.
    """
    total, behind = 0, False
    for call in calls(net, state.variables(), jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)):
        if call.module is None:
            continue
        trained = state.labels[call.name] != masking.FROZEN
        if "kernel" in state.params[call.name]:
            *_, fan_in, fan_out = state.params[call.name]["kernel"].shape
            macs = fan_in * fan_out * (_taps(call.module, call.x, call.out) if call.out.ndim == 4 else 1)
            total += macs * (1 + trained + behind)
        behind = behind or trained
    return int(2 * batch_size * total)


def normalisation(net: nn.Module, state: TrainState, image_size: tuple[int, int], batch_size: int) -> int:
    """Operations of BatchNorm in one train step, which `formula` leaves out, as shares of peak do.

    An element costs 3 in inference mode, as frozen layers run, with one more for the gradient of an input that is
    trained; behind a convolution, one addition, the factor being in the kernel. In training it costs 7, and 9 for the
    gradient.
    """
    total, behind = 0, False
    for call in calls(net, state.variables(), jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32)):
        if call.module is None:
            continue
        trained = state.labels[call.name] != masking.FROZEN
        if call.name in state.batch_stats:
            total += call.x.size * (16 if trained else 3 + behind)
        total += call.folded * call.out.size
        behind = behind or trained
    return total


def kept_bytes(net: nn.Module, state: TrainState, image_size: tuple[int, int], batch_size: int) -> int:
    """Bytes of activations in float32 that a train step must keep from its forward pass for its gradient.

    A trainable convolution, dense layer or BatchNorm keeps its input. Behind a trainable layer, ReLU keeps a byte an
    element, max pooling its input, and a convolution that a frozen BatchNorm is part of the kernel with its factor.
    What two of them keep is counted once.
    """
    kept: dict[Any, int] = {}
    behind = False
    for call in calls(net, state.variables(), jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32)):
        trained = call.module is not None and state.labels[call.name] != masking.FROZEN
        if behind and call.folded:
            kept[call.name] = 4 * state.params[call.name]["kernel"].size
        behind = behind or trained
        if trained or (behind and call.name == "max_pool"):
            kept[id(call.x)] = 4 * call.x.size
        elif behind and call.name == "relu":
            kept["mask", id(call.out)] = call.out.size
    return sum(kept.values())


def shapes(
    net: Any, freeze: str, image_size: tuple[int, int], clip_norm: float | None = None
) -> tuple[Any, TrainState]:
    """(the net with `freeze` frozen, the state of its nesterov SGD as shapes, without values)."""
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), image)
    net = net.clone(frozen=masking.frozen_layers(net, freeze, variables["params"]))
    tx = optim.nesterov_sgd(optax.constant_schedule(1e-3))
    return net, jax.eval_shape(lambda v: create(net, v, tx, frozen=net.frozen, clip_norm=clip_norm), variables)


def traced_step(state: TrainState, image_size: tuple[int, int], batch_size: int) -> jax.stages.Traced:
    """The train step of an abstract state as other platforms than a CPU run it, with XLA's own convolutions.

    Those XLA can count, `.lower().cost_analysis()["flops"]`, on a CPU: a GPU's client does not count, and of a CPU's
    own convolutions, which are loops over parts of the batch, the count sees one part.
    """
    images = jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    with off_the_cpu():
        return train.make_train_step(lambda _, images: images).trace(state, batch)


def device_peak(dtype: Any) -> float:
    """Operations a second of the fastest of ten products of square random matrices, on the default device."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)  # a GPU multiplies ones faster than it does data
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


if __name__ == "__main__":
    print(device_peak(jnp.dtype(sys.argv[1])))
