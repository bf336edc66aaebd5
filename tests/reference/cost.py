"""What a train step must do and keep, counted from shapes alone, independently of what XLA makes of it."""

import dataclasses
import math
from functools import partial
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft import masking, optim, task, train
from jaxft.phase import Phase
from jaxft.train_state import TrainState, create

off_the_cpu = partial(mock.patch.object, jax, "default_backend", lambda: "gpu")
"""A context in which nets are traced with XLA's own convolutions and pooling."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer, ReLU or max pooling as the net ran it: abstract `x` → `out`. A layer has its module and its name.

    `folded`: a frozen BatchNorm is part of this convolution, and no call of its own.
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

    Each layer runs forward. A trainable layer takes the gradient of its kernel. A layer that runs after a trainable one
    takes the gradient of its input.
    """
    total, reached = 0, False
    for call in calls(net, state.variables(), jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)):
        if call.module is None:
            continue
        trained = state.labels[call.name] != masking.FROZEN
        for leaf, kernel in state.params[call.name].items():
            if not leaf.endswith("kernel"):
                continue
            if hasattr(call.module, "kernel_size") and call.out.ndim == 4:
                macs = kernel.shape[2] * kernel.shape[3] * _taps(call.module, call.x, call.out)
            else:  # depthwise, 1×1, or dense for each pixel; depthwise taps that meet the padding count too
                macs = kernel.size * math.prod(call.out.shape[1:3] if call.out.ndim == 4 else ())
            total += macs * (1 + trained + reached)
        reached = reached or trained
    return int(2 * batch_size * total)


def normalisation(net: nn.Module, state: TrainState, image_size: tuple[int, int], batch_size: int) -> int:
    """Operations of BatchNorm in one train step, which `formula` and shares of peak leave out.

    In inference mode, in which frozen layers run, an element costs 3, and one more where the input takes a gradient.
    As part of a convolution it costs one addition, as the factor is in the kernel. In training an element costs 7, and
    9 for the gradient.
    """
    total, reached = 0, False
    for call in calls(net, state.variables(), jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32)):
        if call.module is None:
            continue
        trained = state.labels[call.name] != masking.FROZEN
        if call.name in state.batch_stats:
            total += call.x.size * (16 if trained else 3 + reached)
        total += call.folded * call.out.size
        reached = reached or trained
    return total


def kept_bytes(net: nn.Module, state: TrainState, image_size: tuple[int, int], batch_size: int) -> int:
    """Bytes of activations in float32 that a train step must keep from its forward pass for its gradient.

    A trainable convolution, dense layer or BatchNorm keeps its input. After a trainable layer, ReLU keeps a byte an
    element, max pooling keeps its input, and a convolution with a frozen BatchNorm in it keeps its kernel with the
    factor. What two of them keep counts once.
    """
    kept: dict[Any, int] = {}
    reached = False
    for call in calls(net, state.variables(), jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32)):
        trained = call.module is not None and state.labels[call.name] != masking.FROZEN
        if reached and call.folded:
            kept[call.name] = 4 * state.params[call.name]["kernel"].size
        reached = reached or trained
        if trained or (reached and call.name == "max_pool"):
            kept[id(call.x)] = 4 * call.x.size
        elif reached and call.name == "relu":
            kept["mask", id(call.out)] = call.out.size
    return sum(kept.values())


def shapes(
    net: Any, freeze: str, image_size: tuple[int, int], clip_norm: float | None = None
) -> tuple[Any, TrainState]:
    """(the net with `freeze` frozen, the state of its nesterov SGD as shapes, without values)."""
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), image)
    net = net.clone(frozen=masking.frozen_layers(net, freeze, variables["params"]))
    phase = Phase(epochs=1, schedule=optim.Constant(1e-3), clip_norm=clip_norm)
    return net, jax.eval_shape(lambda v: create(net, v, phase), variables)


def abstract_batch(image: Any, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch of shapes around that of its images or features, [B, …]."""
    columns = {"label": jnp.int32, "known": jnp.bool_, "weight": jnp.float32, "index": jnp.int32}
    return {"image": image, **{name: jax.ShapeDtypeStruct((batch_size,), dtype) for name, dtype in columns.items()}}


def jitted_step(net: Any, start: str | None = None) -> Any:
    """The jitted train step of a classification, without augmentation and preprocessing."""
    return train.make_train_step(task.classification(), net.num_classes, lambda _, *batch: batch, start)


def traced_step(net: Any, state: TrainState, image_size: tuple[int, int], batch_size: int) -> jax.stages.Traced:
    """The train step of an abstract state as it runs on platforms other than a CPU, with XLA's own convolutions.

    XLA can count their operations: `.lower().cost_analysis()["flops"]` on a CPU. A GPU's client does not count. A CPU's
    own convolutions are loops over parts of the batch, of which the count sees one part.
    """
    images = jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32)
    with off_the_cpu():
        return jitted_step(net).trace(state, abstract_batch(images, batch_size))
