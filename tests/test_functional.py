"""Nets that are plans of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thin import make

from jaxft.nets import functional
from jaxft.nets.functional import Layer, add, conv2d, keras_order, norm, pad


def test_the_order_is_that_of_keras():
    """Bug: layers of two ways are listed way after way, where Keras goes by the distance from the output."""
    x = Layer("input", "input", (), 3, {})
    long = norm(conv2d(norm(conv2d(x, "a1", 4), "a2"), "a3", 4), "a4")
    short = norm(conv2d(x, "b1", 4), "b2")
    found = [layer.name for layer in keras_order(add([long, short], "sum"))]
    assert found == ["input", "a1", "a2", "a3", "b1", "a4", "b2", "sum"]


def test_stochastic_depth():
    """Bug: blocks are dropped in prediction, in frozen stages (whose cached features would differ), or never."""
    net, variables, images = make("efficientnet_v2_s", drop_path=0.9, dropout=0.0)

    def run(net, key, train=True):
        keys = {"dropout": jax.random.key(key)}
        return net.apply(variables, images, train=train, rngs=keys, mutable=["batch_stats"])[0][1]["top"]

    assert not np.allclose(run(net, 0), run(net, 1))
    np.testing.assert_array_equal(run(net, 0), run(net, 0))
    np.testing.assert_array_equal(run(net, 0, train=False), run(net, 1, train=False))
    still = net.clone(frozen=frozenset(variables["params"]))
    np.testing.assert_array_equal(run(still, 0), run(net, 0, train=False))


class Padded(functional.Functional):
    """Zeros around what a convolution reads, which the convolution takes along, and what it does not."""

    shared: bool = False

    def plan(self, x):
        y = pad(x, ((2, 1), (0, 3)), "zeros")
        z = conv2d(y, "conv", 4, 3, 2, "VALID")
        yield "all", z if not self.shared else add([z, conv2d(y, "other", 4, 3, 2, "VALID")], "sum")


@pytest.mark.parametrize("shared", [False, True])
def test_zeros_around(shared):
    """Bug: a convolution pads twice, or not at all where another layer reads the padded image, too."""
    net = Padded(num_classes=None, shared=shared)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 34, 3)), jnp.float32)
    variables = net.init(jax.random.key(0), x)
    found = net.apply(variables, x)[0]
    padded = jnp.pad(x, ((0, 0), (2, 1), (0, 3), (0, 0)))
    names = ("conv", "other") if shared else ("conv",)
    kernel = sum(variables["params"][name]["kernel"] for name in names)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(padded, kernel, (2, 2), "VALID", dimension_numbers=layout)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_equal_nets_share_a_plan():
    """Bug: each call of `layers` plans hundreds of layers again."""
    one, two = make("nasnet_mobile")[0], make("nasnet_mobile", frozen=frozenset({"stem_conv1"}))[0]
    assert one.plan_layers()[5] is two.plan_layers()[5]
