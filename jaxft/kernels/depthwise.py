"""Depthwise convolution for a CPU: a sum over taps of shifted images, each times a row of the kernel.

XLA's CPU backend computes grouped convolutions on one core, channel by channel. Here a convolution of k×k is k²
products and sums that the compiler makes one loop of; so is the gradient of the input. Other platforms get XLA's own.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.kernels import of_cpu
from jaxft.kernels.conv import Pads, direct, explicit_pads, finished, sum_by_chunks, windows

ROWS = 16  # that are added up in one loop: with 14 or 8 it takes twice the time
ROWS_AT_STRIDE = 8


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
        return finished(_depthwise(x, kernel, strides, pads), None, bias, relu, x.dtype)  # type: ignore[arg-type]
    bias = bias if bias is None else bias.astype(x.dtype)
    return finished(direct(x, kernel, strides, pads), None, bias, relu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
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
    size, sides = kernel.shape[:2], x.shape[1:3]
    # Between the pixels of a stride lie zeros; the gradient is a convolution of that with the kernel turned around.
    holes = [
        (k - 1 - low, side + low - 1 - (n - 1) * stride, stride - 1)
        for k, (low, _), side, n in zip(size, pads, sides, dy.shape[1:3], strict=True)
    ]
    spread = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *holes, (0, 0, 0)))
    dx: Any = _depthwise(spread, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))
    return dx.astype(x.dtype), kernel_gradient(x, dy, size, stride, pads).reshape(kernel.shape)


def kernel_gradient(x: jax.Array, dy: jax.Array, size: tuple[int, ...], stride: int, pads: Pads) -> jax.Array:
    """[h · w, C]: for each tap the sum over places and images.

    A sum over all is slow in XLA, and so is one that products are computed in: rows are added up first, by a loop of
    their own. Chunk by chunk, x and dy are read from memory once and not once for each tap, and nothing that made them
    is computed again for each tap.
    """
    at_once = ROWS if stride == 1 else ROWS_AT_STRIDE

    def of(x: jax.Array, dy: jax.Array) -> jax.Array:
        count = dy.shape[0] * dy.shape[1]
        parts = max(n for n in range(1, at_once + 1) if count % n == 0)
        shape = (parts, count // parts, *dy.shape[2:])
        dy = dy.reshape(shape)

        def over_parts(window: jax.Array) -> jax.Array:
            window = window.reshape(shape).astype(jnp.float32)
            return functools.reduce(jnp.add, (window[i] * dy[i] for i in range(parts))).reshape(-1, shape[-1])

        return jnp.stack(list(map(over_parts, windows(x, size, (stride, stride), pads)))).sum(1)

    return sum_by_chunks(of, x, dy.astype(jnp.float32), at_once // math.gcd(dy.shape[1], at_once))


_depthwise.defvjp(_forward, _backward)
