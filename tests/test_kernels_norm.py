import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import conv as convolution
from jaxft.nets.common import BatchNorm, Conv

EPSILON, MOMENTUM = 1e-3, 0.9


class Unit(nn.Module):
    """A convolution with a bias, its BatchNorm and a ReLU; or, if `apart`, the latter alone."""

    inference: bool
    apart: bool = False
    relu: bool = True
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        norm = BatchNorm(6, self.inference, MOMENTUM, EPSILON, True, self.dtype, name="norm")
        if self.apart:
            return norm(x, relu=self.relu)
        return Conv(6, (3, 3), relu=self.relu, dtype=self.dtype, name="conv")(x, norm)


def draw(far, bias=1.0):
    """Variables whose running mean is `far` standard deviations from that of the batch, and images."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (4, 9, 8, 5))
    kernel, bias = rng.normal(0, 0.2, (3, 3, 5, 6)), rng.normal(0, bias, 6)
    y = convolved(x, kernel, bias)
    stats = {"mean": y.mean((0, 1, 2)) + far * y.std((0, 1, 2)), "var": rng.uniform(0.5, 2, 6)}
    params = {
        "conv": {"kernel": kernel, "bias": bias},
        "norm": {"scale": rng.normal(1, 0.1, 6), "bias": rng.normal(size=6)},
    }
    variables = {"params": params, "batch_stats": {"norm": stats}}
    return jax.tree.map(lambda a: np.float64(np.float32(a)), (variables, x))  # digits that float32 has


def convolved(x, kernel, bias, numpy=np):
    x = numpy.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [x[:, i : i + x.shape[1] - 2, j : j + x.shape[2] - 2] for i in range(3) for j in range(3)]
    return sum(p @ k for p, k in zip(patches, kernel.reshape(9, *kernel.shape[2:]), strict=True)) + bias


def float32(tree):
    return jax.tree.map(jnp.float32, tree)


@pytest.mark.parametrize("far, bias", [(0, 1), (0, 300), (3, 1), (-10, 1)])
@pytest.mark.parametrize("inference", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("least", [0, convolution.MIN_MACS], ids=["by products", "by XLA"])
def test_a_convolution_with_its_batch_norm(inference, far, bias, least, monkeypatch):
    """Bug: the running mean that is taken off is not added again, the bias counts twice, or digits are lost."""
    monkeypatch.setattr(convolution, "MIN_MACS", least)
    variables, x = draw(far, bias)
    conv, norm = variables["params"]["conv"], variables["params"]["norm"]
    running = variables["batch_stats"]["norm"]
    y = convolved(x, conv["kernel"], conv["bias"])
    mean, var = (running["mean"], running["var"]) if inference else (y.mean((0, 1, 2)), y.var((0, 1, 2)))
    truth = np.maximum((y - mean) / np.sqrt(var + EPSILON) * norm["scale"] + norm["bias"], 0)

    found, changed = Unit(inference).apply(float32(variables), jnp.float32(x), mutable=["batch_stats"])
    np.testing.assert_allclose(found, truth, atol=(1 + far * far) * 1e-6 * np.abs(truth).max())
    share = 0 if inference else 1 - MOMENTUM
    for name, of_batch in (("mean", mean), ("var", var)):
        expected = (1 - share) * running[name] + share * of_batch
        np.testing.assert_allclose(changed["batch_stats"]["norm"][name], expected, rtol=(1 + far * far) * 2e-6)


@pytest.mark.parametrize("relu", [False, True], ids=["", "ReLU"])
@pytest.mark.parametrize("apart", [False, True], ids=["after a convolution", "alone"])
def test_the_gradient_is_that_of_its_definition(apart, relu, monkeypatch):
    """Bug: a term of the written-out gradient is missing, of the mean or the variance that depend on every pixel."""
    monkeypatch.setattr(convolution, "MIN_MACS", 0)
    variables, x = draw(1)
    stats = variables["batch_stats"]
    weight = np.random.default_rng(1).normal(size=(4, 9, 8, 6))
    if apart:
        x = np.random.default_rng(2).normal(stats["norm"]["mean"], 1, (4, 9, 8, 6))

    def ours(params, x):
        both = {"params": params, "batch_stats": float32(stats)}
        return (Unit(False, apart, relu).apply(both, x, mutable=["batch_stats"])[0] * weight.astype(np.float32)).sum()

    def definition(params, x):
        y = x if apart else convolved(x, params["conv"]["kernel"], params["conv"]["bias"], numpy=jnp)
        y = (y - y.mean((0, 1, 2))) / jnp.sqrt(y.var((0, 1, 2)) + EPSILON)
        y = y * params["norm"]["scale"] + params["norm"]["bias"]
        return ((jnp.maximum(y, 0) if relu else y) * weight).sum()

    params = {name: leaves for name, leaves in variables["params"].items() if not apart or name == "norm"}
    found = jax.grad(ours, (0, 1))(float32(params), jnp.float32(x))
    with jax.enable_x64(True):
        expected = jax.grad(definition, (0, 1))(jax.tree.map(jnp.asarray, params), jnp.asarray(x))
    if not apart:
        np.testing.assert_array_equal(found[0]["conv"].pop("bias"), 0)
        np.testing.assert_allclose(expected[0]["conv"].pop("bias"), 0, atol=1e-9)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())


@pytest.mark.parametrize("inference", [False, True], ids=["training", "frozen"])
def test_bfloat16_follows_float32(inference):
    """Bug: statistics are kept in eight bits, or what is taken off is not what is added again."""
    variables, x = draw(1, bias=100.0)
    outputs = [
        Unit(inference, dtype=dtype).apply(float32(variables), jnp.float32(x), mutable=["batch_stats"])
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    (y, stats), (y16, stats16) = outputs
    assert y16.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(y16), y, atol=0.03 * float(y.max()))
    before = float32(variables["batch_stats"])
    share = 1 if inference else 1 - MOMENTUM
    for leaf, leaf16, old in zip(*map(jax.tree.leaves, (stats, stats16, before)), strict=True):
        assert leaf16.dtype == jnp.float32
        of_batch, of_batch16 = ((new - old * (1 - share)) / share for new in (leaf, leaf16))
        np.testing.assert_allclose(of_batch16, of_batch, rtol=0.02, atol=0.02)
