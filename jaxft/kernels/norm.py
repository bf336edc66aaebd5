"""Normalisation by the statistics of a batch, with a gradient that keeps little."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalise(
    x: jax.Array, offset: jax.Array | None, scale: jax.Array, bias: jax.Array, epsilon: float, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [..., C] less offset [C], by the mean and biased variance of each channel, maybe through a ReLU.

    The variance is E[x²] - E[x]². It needs no copy of x, and is as exact as E[(x - E[x])²] where the mean is not larger
    than some standard deviations, which an offset near the mean sees to. The gradient is written out: it keeps x alone
    and reads x and the output's gradient twice. Derivatives of single operations would keep the result of each, and
    write the output's gradient once more for the ReLU, whose sign is computed from x again here.

    Returns:
        (float32 [..., C], mean [C] and variance [C] of x less offset). The offset has no gradient.
    """
    axes = tuple(range(x.ndim - 1))
    x = _near_zero(x, offset)
    mean = x.mean(axes)
    var = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(mean), 0)
    y = _affine(x, mean, lax.rsqrt(var + epsilon), scale, bias)
    return jnp.maximum(y, 0) if relu else y, mean, var


def _near_zero(x: jax.Array, offset: jax.Array | None) -> jax.Array:
    x = x.astype(jnp.float32)
    return x if offset is None else x - offset


def _affine(x: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return (x - mean) * (inverse * scale) + bias


def _normalise_forward(x, offset, scale, bias, epsilon, relu):
    y, mean, var = normalise(x, offset, scale, bias, epsilon, relu)  # type: ignore[misc]
    return (y, mean, var), (x, offset, scale, bias, mean, var)


def _normalise_backward(epsilon, relu, saved, gradients):
    x, offset, scale, bias, mean, var = saved
    dy, dmean, dvar = gradients
    axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    x32, inverse = _near_zero(x, offset), lax.rsqrt(var + epsilon)
    if relu:  # behind a barrier, or XLA would keep the signs, or the whole output, of the forward pass
        dy = jnp.where(_affine(x32, *lax.optimization_barrier((mean, inverse)), scale, bias) > 0, dy, 0)
    of_bias = dy.sum(axes)
    of_scale = ((dy * x32).sum(axes) - mean * of_bias) * inverse
    slope = 2 * dvar - inverse * inverse * scale * of_scale
    dx = inverse * scale * dy + ((x32 - mean) * slope + (dmean - inverse * scale * of_bias)) / n
    return dx.astype(x.dtype), None if offset is None else jnp.zeros_like(offset), of_scale, of_bias


normalise.defvjp(_normalise_forward, _normalise_backward)
