"""Floating-point operations of a train step by formula, and a device's measured peak."""

import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft import masking
from jaxft.train_state import TrainState


def _taps(module: nn.Module, images: jax.Array, out: jax.Array) -> int:
    """Multiply-adds of a convolution for each pair of channels: kernel taps that meet a pixel, not the padding."""
    assert isinstance(module, nn.Conv)
    total = 1
    for axis, (k, stride) in enumerate(zip(module.kernel_size, np.broadcast_to(module.strides, 2), strict=True), 1):
        side, outputs = images.shape[axis], out.shape[axis]
        if module.padding == "SAME":
            before = max((outputs - 1) * stride + k - side, 0) // 2
        else:
            before = 0 if module.padding == "VALID" else module.padding[axis - 1][0]
        total *= sum(0 <= o * stride + tap - before < side for o in range(outputs) for tap in range(k))
    return total


def layer_macs(net: nn.Module, variables: Any, image_size: tuple[int, int]) -> dict[str, int]:
    """Layer → multiply-adds of one image, for convolutions and dense layers, in the order in which they run."""
    macs: dict[str, int] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and "kernel" in variables["params"].get(module.name or "", {}):
            *_, fan_in, fan_out = variables["params"][module.name]["kernel"].shape
            macs[module.name] = fan_in * fan_out * (_taps(module, args[0], out) if out.ndim == 4 else 1)
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(net.apply, variables, jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32))
    return macs


def formula(net: nn.Module, state: TrainState, image_size: tuple[int, int], batch_size: int) -> int:
    """Operations (two a multiply-add) of convolutions and dense layers in one train step, counted layer by layer.

    Each layer runs forward; a trainable one takes the gradient of its kernel; one behind a trainable layer, in the
    order in which layers run, takes the gradient of its input.
    """
    macs = layer_macs(net, {"params": state.params, "batch_stats": state.batch_stats}, image_size)
    total, behind = 0, False
    for layer, each in macs.items():
        trained = state.labels[layer] != masking.FROZEN
        total += each * (1 + trained + behind)
        behind = behind or trained
    return int(2 * batch_size * total)


def device_peak(dtype: Any) -> float:
    """Operations a second of the fastest of ten products of square matrices, on the default device."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)
