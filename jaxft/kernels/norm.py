"""Normalisation by the statistics of a batch, with a gradient that keeps little."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalise(
    x: jax.Array, offset: jax.Array | None, scale: jax.Array, bias: jax.Array, epsilon: float, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [..., C] by the mean and biased variance of each channel, maybe through a ReLU.

    The variance is E[x²] - E[x]² of x less the offset [C]. It needs no copy of x, and is as exact as E[(x - E[x])²]
    where the mean is not larger than some standard deviations, which an offset near the mean sees to. The output is a
    · x + b, whose rounding grows with the mean of x in standard deviations: 5e-7 of it at ten. The gradient is
    written out: it keeps x alone and reads x and the output's gradient twice. Derivatives of single operations would
    keep the result of each, and write the output's gradient once more for the ReLU, whose sign is computed from x
    again here.

    Returns:
        (float32 [..., C], mean [C] and variance [C] of x). The offset has no gradient.
    """
    mean, var = _statistics(x, offset)
    a, b = _affine(mean, lax.rsqrt(var + epsilon), scale, bias)
    y = x.astype(jnp.float32) * a + b
    return jnp.maximum(y, 0) if relu else y, mean, var


def _statistics(x: jax.Array, offset: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(mean, variance) of x. One sum alone is of x less offset: what two shared, a CPU would write to memory."""
    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.float32)
    mean = x.mean(axes)
    near, near_mean = (x, mean) if offset is None else (x - offset, mean - offset)
    return mean, jnp.maximum(jnp.square(near).mean(axes) - jnp.square(near_mean), 0)


def _affine(mean: jax.Array, inverse: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, b) [C]: the normalised x is a · x + b."""
    a = inverse * scale
    return a, bias - mean * a


def _normalise_forward(x, offset, scale, bias, epsilon, relu):
    y, mean, var = normalise(x, offset, scale, bias, epsilon, relu)  # type: ignore[misc]
    return (y, mean, var), (x, offset, scale, bias, mean, var)


def _normalise_backward(epsilon, relu, saved, gradients):
    x, offset, scale, bias, mean, var = saved
    dy, dmean, dvar = gradients
    axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    x32, inverse = x.astype(jnp.float32), lax.rsqrt(var + epsilon)
    a, b = _affine(mean, inverse, scale, bias)
    dy = jnp.where(x32 * a + b > 0, dy, 0) if relu else dy
    of_bias = dy.sum(axes)
    of_scale = ((dy * x32).sum(axes) - mean * of_bias) * inverse
    slope = (2 * dvar - inverse * a * of_scale) / n
    dx = a * dy + slope * x32 + ((dmean - a * of_bias) / n - mean * slope)
    return dx.astype(x.dtype), None if offset is None else jnp.zeros_like(offset), of_scale, of_bias


normalise.defvjp(_normalise_forward, _normalise_backward)
