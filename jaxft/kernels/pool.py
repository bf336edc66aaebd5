"""Pooling that is cheap on a CPU. Other platforms get XLA's own.

A mean is a sum of shifted images along one axis, then along the other: XLA's CPU backend computes it on every core.

For the gradient of the maximum, XLA's CPU backend looks for the largest pixel of each window again, with four arrays of
indices as large as the images. Here the forward pass notes in one byte where in its window that pixel lies. Where
several pixels are largest it is the first in the order of rows, as in XLA. Outputs are the same bits as XLA's, and so
are gradients where windows do not overlap.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxft.kernels import of_cpu
from jaxft.kernels.conv import Pads, explicit_pads, windows

Pair = tuple[int, ...]
NOWHERE = 255  # the place of no pixel, as where all are NaN
NO_PLACE = 254  # which no window has


def max_pool(
    x: jax.Array, window: Pair, strides: Pair = (1, 1), padding: str | Sequence[tuple[int, int]] = "VALID"
) -> jax.Array:
    """The same as `flax.linen.max_pool`, for x [B, H, W, C]."""
    if not of_cpu():
        return nn.max_pool(x, window, strides, padding)  # type: ignore[arg-type]
    pads = explicit_pads(x, window, strides, padding)
    if min(map(min, pads)) < 0:
        return nn.max_pool(x, window, strides, padding)  # type: ignore[arg-type]
    return _pool(x, window, strides, pads)


def avg_pool(
    x: jax.Array, window: Pair, strides: Pair = (1, 1), padding: str | Sequence[tuple[int, int]] = "VALID"
) -> jax.Array:
    """The same as `flax.linen.avg_pool` with `count_include_pad=False`, for x [B, H, W, C], in the dtype of x.

    Every window must hold a pixel that is not padding.
    """
    if not of_cpu():
        mean = nn.avg_pool(x, window, strides, padding, count_include_pad=False)  # type: ignore[arg-type]
        return mean.astype(x.dtype)
    around = explicit_pads(x, window, strides, padding)
    for axis, (k, stride, (low, high)) in enumerate(zip(window, strides, around, strict=True)):
        side, size, steps, pads = x.shape[1 + axis], [1, 1], [1, 1], [(0, 0), (0, 0)]
        first = np.arange(0, side + low + high - k + 1, stride) - low
        inside = np.minimum(first + k, side) - np.maximum(first, 0)
        size[axis], steps[axis], pads[axis] = k, stride, (low, high)
        total: Any = sum(windows(x, tuple(size), tuple(steps), tuple(pads)))
        x = total / np.expand_dims(inside, [1, 2] if axis == 0 else [1]).astype(x.dtype)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _pool(x: jax.Array, window: Pair, strides: Pair, pads: Pads) -> jax.Array:
    return functools.reduce(jnp.maximum, windows(x, window, strides, pads, -jnp.inf))


def _forward(x, window, strides, pads):
    pixels = windows(x, window, strides, pads, -jnp.inf)
    y = functools.reduce(jnp.maximum, pixels)
    place = jnp.full(y.shape, NOWHERE, jnp.uint8)
    for number, pixel in reversed(list(enumerate(pixels))):
        place = jnp.where(pixel == y, jnp.uint8(number), place)
    return y, (place, jnp.zeros((0, *x.shape[1:3])))


def _backward(window, strides, pads, saved, dy):
    place, like = saved
    shape = (len(dy), *like.shape[1:], dy.shape[3])
    gradient = functools.partial(_gradient, window, strides, pads, shape)
    # XLA's CPU backend would compute what makes dy again for each of the windows that meet in a pixel, and drops
    # barriers before it fuses. What a branch takes is computed once. That the condition always holds it cannot know.
    return (lax.cond(place.ravel()[0] != NO_PLACE, gradient, lambda *_: jnp.zeros(shape, dy.dtype), place, dy),)


def _gradient(
    window: Pair, strides: Pair, pads: Pads, shape: tuple[int, ...], place: jax.Array, dy: jax.Array
) -> jax.Array:
    """That of images of a shape [B, H, W, C] whose largest pixels lie at such places of the windows, from dy."""
    sides = shape[1:3]
    # Pixel s·q + a of an axis, 0 ≤ a < s, lies in the windows q - d, d = 0, 1, …, at place a + s·d of each.
    blocks = [-(-(side + sum(pad)) // s) for side, pad, s in zip(sides, pads, strides, strict=True)]
    reach = [-(-k // s) for k, s in zip(window, strides, strict=True)]
    total: Any = 0.0
    for down in range(reach[0]):
        for right in range(reach[1]):
            ends = [(d, n - m - d, 0) for d, n, m in zip((down, right), blocks, dy.shape[1:3], strict=True)]
            shift = functools.partial(lax.pad, padding_config=((0, 0, 0), *ends, (0, 0, 0)))
            i, j = (np.arange(s) + s * d for s, d in zip(strides, (down, right), strict=True))
            inside = (i < window[0])[:, None] & (j < window[1])
            wanted = np.where(inside, i[:, None] * window[1] + j, NOWHERE).astype(np.uint8)[:, None, :, None]
            at = shift(place, np.uint8(NOWHERE))[:, :, None, :, None]
            here = (at == wanted) & (at != NOWHERE)
            total += jnp.where(here, shift(dy, np.zeros((), dy.dtype))[:, :, None, :, None], 0)
    padded = total.reshape(len(dy), *(n * s for n, s in zip(blocks, strides, strict=True)), -1)
    rows, columns = (slice(low, low + side) for side, (low, _) in zip(sides, pads, strict=True))
    return padded[:, rows, columns]


_pool.defvjp(_forward, _backward)
