"""Depthwise convolution for a CPU: a sum over taps of shifted images, each times a row of the kernel.

XLA's CPU backend computes grouped convolutions on one core, channel by channel. Here a convolution of k×k is k²
products and sums that the compiler makes one loop of; so is the gradient of the input. Other platforms get XLA's own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxft.kernels import of_cpu
from jaxft.kernels.conv import Pads, direct, explicit_pads, finished, windows

IMAGES = 16  # that are added up in one loop


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

    A sum over all is slow in XLA, and so is one that products are computed in: images are added up first, by a loop of
    their own, for all taps at once.
    """
    padded = lax.optimization_barrier(
        lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))
    )
    at_once = max(n for n in range(1, IMAGES + 1) if len(x) % n == 0)
    dy = dy.astype(jnp.float32)

    def over_images(window: jax.Array) -> jax.Array:
        products = (window[i::at_once].astype(jnp.float32) * dy[i::at_once] for i in range(at_once))
        return functools.reduce(jnp.add, products).reshape(-1, x.shape[-1])

    taps = windows(padded, size, (stride, stride), ((0, 0), (0, 0)))
    return lax.optimization_barrier(jnp.stack(list(map(over_images, taps)))).sum(1)


_depthwise.defvjp(_forward, _backward)
