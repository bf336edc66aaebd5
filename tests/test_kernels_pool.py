import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.pool import avg_pool, max_pool

CASES = {  # height, width, window, strides, padding
    "2×2": (8, 6, (2, 2), (2, 2), "VALID"),
    "2×2, a row and a column left over": (9, 7, (2, 2), (2, 2), "VALID"),
    "3×3 at stride 2": (9, 12, (3, 3), (2, 2), "VALID"),
    "3×3 at stride 2, padded": (8, 9, (3, 3), (2, 2), ((1, 1), (1, 1))),
    "3×3 at stride 2, padded below": (8, 9, (3, 3), (2, 2), ((0, 1), (0, 1))),
    "3×3 at stride 1": (5, 6, (3, 3), (1, 1), "SAME"),
    "3×2 at strides 2 and 3": (9, 11, (3, 2), (2, 3), "VALID"),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradient_are_xlas_ties_included(case):
    """Bug: the gradient goes to the wrong pixel, to the last of equal ones, twice, or into the padding."""
    height, width, *how = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-3, 3, (2, height, width, 5)), jnp.float32)  # few values, so many ties

    def with_gradient(pool):
        y, transposed = jax.vjp(lambda x: pool(x, *how), x)
        return y, transposed(jnp.asarray(np.random.default_rng(1).integers(-9, 9, y.shape), y.dtype))[0]

    for found, expected in zip(with_gradient(max_pool), with_gradient(nn.max_pool), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_means_and_their_gradient_are_xlas(case):
    """Bug: padding counts, a pixel is left out, or rows and columns change places."""
    height, width, *how = CASES[case]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 5)), jnp.float32)

    def with_gradient(pool):
        y, transposed = jax.vjp(pool, x)
        return y, transposed(jnp.asarray(np.random.default_rng(1).normal(size=y.shape), y.dtype))[0]

    ours = with_gradient(lambda x: avg_pool(x, *how))
    for found, expected in zip(
        ours, with_gradient(lambda x: nn.avg_pool(x, *how, count_include_pad=False)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_other_platforms_get_xlas_own(monkeypatch):
    """Bug: a GPU pools by slices."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.zeros((1, 4, 4, 1))
    found, expected = (str(jax.make_jaxpr(lambda x, f=f: f(x, (2, 2), (2, 2)))(x)) for f in (max_pool, nn.max_pool))
    assert found == expected
