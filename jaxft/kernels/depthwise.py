"""Depthwise convolution for a CPU: a sum over taps of shifted images, each times a row of the kernel.

XLA's CPU backend computes grouped convolutions on one core, channel by channel. Here a convolution of k×k is k² products
and sums that the compiler makes one loop of; so is the gradient of the input. Other platforms get XLA's own.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxft.kernels import of_cpu
from jaxft.kernels.conv import Pads, explicit_pads, windows


def convolve_depthwise(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    relu: bool = False,
    strides: int = 1,
    padding: Any = "SAME",
) -> jax.Array:
    """x [B, H, W, C] ∗ kernel [h, w, 1, C], channel by channel, plus bias [C], through a ReLU: [B, H', W', C].

    The output has the type of x; sums are float32 on a CPU.
    """
    pads = explicit_pads(x, kernel.shape[:2], (strides, strides), padding)
    if of_cpu() and min(map(min, pads)) >= 0:
        y = _depthwise(x, kernel, strides, pads)
        y = y if bias is None else y + bias
        return (nn.relu(y) if relu else y).astype(x.dtype)
    y = grouped(x, kernel, strides, pads)
    y = y if bias is None else y + bias.astype(y.dtype)
    return nn.relu(y) if relu else y


def grouped(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """XLA's own convolution."""
    layout, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), pads, dimension_numbers=layout, feature_group_count=groups
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """float32 [B, H', W', C]."""
    size = kernel.shape[:2]
    taps = kernel.reshape(-1, kernel.shape[-1])
    total: Any = 0.0
    for window, tap in zip(windows(x, size, (stride, stride), pads), taps, strict=True):
        total += window.astype(jnp.float32) * tap
    return total


def _forward(x, kernel, stride, pads):
    return _depthwise(x, kernel, stride, pads), (x, kernel)


def _backward(stride, pads, saved, dy):
    x, kernel = saved
    of_x = jax.linear_transpose(lambda x: grouped(x, kernel, stride, pads), x.astype(dy.dtype))
    if stride == 1:
        around = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape[:2], pads, strict=True))
        dx = _depthwise(dy, kernel[::-1, ::-1], 1, around)
    else:
        (dx,) = of_x(dy)
    shifted = windows(x, kernel.shape[:2], (stride, stride), pads)
    of_kernel = jnp.stack([(window.astype(jnp.float32) * dy).sum((0, 1, 2)) for window in shifted])
    return dx.astype(x.dtype), of_kernel.reshape(kernel.shape)


_depthwise.defvjp(_forward, _backward)
