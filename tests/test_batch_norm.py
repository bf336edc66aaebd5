import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nets.common import BatchNorm, Conv

EPSILON, MOMENTUM = 1e-3, 0.9


class Unit(nn.Module):
    """A convolution with a bias, its BatchNorm and a ReLU; or, if `apart`, a BatchNorm alone."""

    inference: bool
    apart: bool = False
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        norm = BatchNorm(6, self.inference, MOMENTUM, EPSILON, True, self.dtype, name="norm")
        if self.apart:
            return norm(x)
        return Conv(6, (3, 3), relu=True, dtype=self.dtype, name="conv")(x, norm)


def draw(far):
    """Variables whose running mean is `far` standard deviations from that of the batch, and images."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (4, 9, 8, 5))
    kernel, bias = rng.normal(0, 0.2, (3, 3, 5, 6)), rng.normal(size=6)
    y = convolved(x, kernel, bias)
    stats = {"mean": y.mean((0, 1, 2)) + far * y.std((0, 1, 2)), "var": rng.uniform(0.5, 2, 6)}
    params = {
        "conv": {"kernel": kernel, "bias": bias},
        "norm": {"scale": rng.normal(1, 0.1, 6), "bias": rng.normal(size=6)},
    }
    return {"params": params, "batch_stats": {"norm": stats}}, x


def convolved(x, kernel, bias):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [x[:, i : i + x.shape[1] - 2, j : j + x.shape[2] - 2] for i in range(3) for j in range(3)]
    return sum(p @ k for p, k in zip(patches, kernel.reshape(9, *kernel.shape[2:]), strict=True)) + bias


def float32(tree):
    return jax.tree.map(jnp.float32, tree)


@pytest.mark.parametrize("far", [0, 3, -10])
@pytest.mark.parametrize("inference", [False, True], ids=["training", "frozen"])
def test_a_convolution_with_its_batch_norm(inference, far):
    """Bug: the running mean that is taken off is not added again, the bias counts twice, or digits are lost."""
    variables, x = draw(far)
    kernel, bias = variables["params"]["conv"].values()
    scale, beta = variables["params"]["norm"].values()
    running = variables["batch_stats"]["norm"]
    y = convolved(x, kernel, bias)
    mean, var = (running["mean"], running["var"]) if inference else (y.mean((0, 1, 2)), y.var((0, 1, 2)))
    truth = np.maximum((y - mean) / np.sqrt(var + EPSILON) * scale + beta, 0)

    found, changed = Unit(inference).apply(float32(variables), jnp.float32(x), mutable=["batch_stats"])
    np.testing.assert_allclose(found, truth, atol=(1 + far * far) * 1e-6 * np.abs(truth).max())
    share = 0 if inference else 1 - MOMENTUM
    for name, of_batch in (("mean", mean), ("var", var)):
        expected = (1 - share) * running[name] + share * of_batch
        np.testing.assert_allclose(changed["batch_stats"]["norm"][name], expected, rtol=(1 + far * far) * 2e-6)


def test_the_gradient_is_that_of_its_definition():
    """Bug: a term of the written-out gradient is missing, of the mean or the variance that depend on every pixel."""
    variables, x = draw(2)
    stats = variables["batch_stats"]["norm"]
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(4, 9, 8, 6))

    def ours(params, x):
        y = Unit(False, apart=True).apply(
            {"params": params, "batch_stats": float32({"norm": stats})}, x, mutable=["batch_stats"]
        )[0]
        return (y * weight.astype(np.float32)).sum()

    def definition(params, x):
        y = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + EPSILON)
        return ((y * params["norm"]["scale"] + params["norm"]["bias"]) * weight).sum()

    x = rng.normal(stats["mean"], 1, (4, 9, 8, 6))
    params = {"norm": variables["params"]["norm"]}
    found = jax.grad(ours, (0, 1))(float32(params), jnp.float32(x))
    with jax.enable_x64(True):
        expected = jax.grad(definition, (0, 1))(jax.tree.map(jnp.asarray, params), jnp.asarray(x))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max())


@pytest.mark.parametrize("inference", [False, True], ids=["training", "frozen"])
def test_bfloat16_follows_float32(inference):
    """Bug: statistics are kept or the running mean is taken off in eight bits."""
    variables, x = draw(1)
    outputs = [
        Unit(inference, dtype=dtype).apply(float32(variables), jnp.float32(x), mutable=["batch_stats"])
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    (y, stats), (y16, stats16) = outputs
    assert y16.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(y16), y, atol=0.03 * float(y.max()))
    for leaf, leaf16 in zip(*map(jax.tree.leaves, (stats, stats16)), strict=True):
        assert leaf16.dtype == jnp.float32
        np.testing.assert_allclose(leaf16, leaf, rtol=0.01)
