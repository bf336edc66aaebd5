"""Normalisation by the statistics of a batch, with a gradient that keeps little."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [..., C] by the mean and biased variance of each channel → (float32 [..., C], mean [C], variance [C]).

    The variance is E[x²] - E[x]². It needs no copy of x, and is as exact as E[(x - E[x])²] where the mean is not larger
    than some standard deviations. The gradient is written out: it keeps x alone and reads x and the output's gradient
    twice, where the derivatives of single operations would keep the result of each.
    """
    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.float32)
    mean = x.mean(axes)
    var = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(mean), 0)
    return (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias, mean, var


def _normalise_forward(x, scale, bias, epsilon):
    y, mean, var = normalise(x, scale, bias, epsilon)  # type: ignore[misc]
    return (y, mean, var), (x, scale, mean, var)


def _normalise_backward(epsilon, saved, gradients):
    x, scale, mean, var = saved
    dy, dmean, dvar = gradients
    axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    x32, inverse = x.astype(jnp.float32), lax.rsqrt(var + epsilon)
    of_bias = dy.sum(axes)
    of_scale = ((dy * x32).sum(axes) - mean * of_bias) * inverse
    slope = 2 * dvar - inverse * inverse * scale * of_scale
    dx = inverse * scale * dy + ((x32 - mean) * slope + (dmean - inverse * scale * of_bias)) / n
    return dx.astype(x.dtype), of_scale, of_bias


normalise.defvjp(_normalise_forward, _normalise_backward)
