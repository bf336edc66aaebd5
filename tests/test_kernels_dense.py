import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels import dense

SIZES = {"wide": (4, 2048, 512), "narrow": (4, 64, 32), "large batch": (130, 2048, 512)}  # batch, channels, features


def with_gradients(layer, batch, channels, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, channels)), dtype)
    variables = layer.init(jax.random.key(0), x)
    y, transposed = jax.vjp(layer.apply, variables, x)
    return y, transposed(jnp.asarray(rng.normal(size=y.shape), y.dtype))


def test_output_and_gradients_are_those_of_the_products():
    """Bug: a gradient is transposed, or of the other factor; the bias gets none."""
    batch, channels, features = SIZES["wide"]
    found = with_gradients(nn.Dense(features, dot_general=dense.dot_general), batch, channels)
    expected = with_gradients(nn.Dense(features), batch, channels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), found, expected)


def test_what_is_not_worth_it_and_other_platforms_get_xlas_own(monkeypatch):
    """Bug: a GPU waits at a barrier, bfloat16 is computed in float32, or small layers compile longer."""

    def program(size, dtype=jnp.float32, **options):
        batch, channels, features = SIZES[size]
        layer = nn.Dense(features, dtype=dtype, **options)
        return str(jax.make_jaxpr(lambda: with_gradients(layer, batch, channels, dtype))())

    def is_xlas_own(*size):
        return program(*size, dot_general=dense.dot_general) == program(*size)

    assert is_xlas_own("narrow") and is_xlas_own("large batch") and is_xlas_own("wide", jnp.bfloat16)
    assert "optimization_barrier" in program("wide", dot_general=dense.dot_general)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert is_xlas_own("wide")
