"""Depthwise convolution and its gradients, against sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import depthwise
from jaxft.kernels.conv import direct, explicit_pads

CASES = [
    ((3, 3), 1, "SAME", (3, 9, 7, 5)),
    ((3, 3), 2, "SAME", (2, 8, 7, 4)),
    ((5, 5), 2, "SAME", (4, 11, 12, 3)),
    ((7, 7), 1, "SAME", (16, 8, 8, 2)),
    ((3, 3), 2, ((0, 1), (0, 1)), (2, 8, 9, 4)),
    ((3, 5), 1, "VALID", (1, 9, 9, 6)),
    ((3, 3), 3, "VALID", (17, 10, 11, 2)),
]


def reference(x, kernel, stride, pads, dy):
    """(output, gradient of the input, gradient of the kernel), float64."""
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = dy.shape[1:3]
    y, dx, dk = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i, j in np.ndindex(*kernel.shape[:2]):
        place = np.s_[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        y += padded[place] * kernel[i, j, 0]
        dx[place] += dy * kernel[i, j, 0]
        dk[i, j, 0] = (padded[place] * dy).sum((0, 1, 2))
    (top, _), (left, _) = pads
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dk


@pytest.mark.parametrize(("size", "stride", "padding", "shape"), CASES)
def test_it_is_the_sum_in_float64(size, stride, padding, shape):
    """Bug: a pad on the wrong side, a stride that shifts the gradient, images left out of a sum."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(*size, 1, shape[-1])).astype(np.float32)
    pads = explicit_pads(jnp.asarray(x), size, (stride, stride), padding)

    def run(x, kernel):
        return depthwise.convolve_depthwise(x, kernel, strides=stride, padding=padding)

    y, back = jax.vjp(jax.jit(run), jnp.asarray(x), jnp.asarray(kernel))
    dy = rng.normal(size=y.shape).astype(np.float32)
    found = (y, *back(jnp.asarray(dy)))
    for name, ours, exact in zip(("y", "dx", "dk"), found, reference(x, kernel, stride, pads, dy), strict=True):
        assert ours.shape == exact.shape
        np.testing.assert_allclose(ours, exact, atol=2e-6 * np.abs(exact).max(), err_msg=name)
    plain = direct(jnp.asarray(x), jnp.asarray(kernel), stride, pads)  # what other platforms compute
    np.testing.assert_allclose(y, plain, atol=1e-5)


def test_bias_relu_and_bfloat16():
    """Bug: the bias is added after the ReLU, or the output of bfloat16 is float32."""
    x = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    y = depthwise.convolve_depthwise(x, jnp.ones((3, 3, 1, 2)), jnp.array([-5.0, 0.0]), relu=True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[0, 0, 0], [0.0, 4.0])
    np.testing.assert_array_equal(y[0, 1, 1], [4.0, 9.0])
