import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import nets


def variables(net, size=(32, 32)):
    return net.init(jax.random.key(0), jnp.zeros((1, *size, 3)))


def test_any_stage_can_be_the_start():
    """Bug: a stage reads something beside the tensor that the stage before it hands on."""
    net = nets.create("vgg16", 10, fc=False, hidden=(16, 8))
    v = nets.init(net, (32, 32), seed=0)
    images = jax.random.normal(jax.random.key(1), (2, 45, 70, 3))
    logits, out = net.apply(v, images)
    assert list(out) == list(net.layers())
    for stage, value in out.items():
        np.testing.assert_array_equal(net.apply(v, value, start=stage)[0], logits)


def test_parameter_counts():
    """Bug: a row of the table has a wrong depth. Keras's own counts: 138,357,544, 143,667,240, 14,714,688."""

    def count(net, size):
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: variables(net, (size, size)))))

    assert count(nets.create("vgg16"), 224) == 138_357_544
    assert count(nets.create("vgg19"), 224) == 143_667_240
    assert count(nets.create("vgg16", None), 32) == 14_714_688


def test_the_fc_head_takes_inputs_that_end_in_7x7():
    """Bug: a wrong size is reported as a kernel shape in Flax's words, or 255 pixels are refused."""
    net = nets.create("vgg16", 10)
    for good in (224, 255):
        jax.eval_shape(lambda size=good: variables(net, (size, size)))
    for bad in (223, 256, 96):
        with pytest.raises(ValueError, match="224 to 255"):
            jax.eval_shape(lambda size=bad: variables(net, (size, size)))
    with pytest.raises(ValueError, match="32×32"):
        jax.eval_shape(lambda: variables(nets.create("vgg16", None), (31, 64)))


def test_an_unknown_start():
    """Bug: a misspelt stage runs the whole net on features."""
    net = nets.create("vgg16", None)
    with pytest.raises(ValueError, match="block1, block2"):
        jax.eval_shape(lambda: net.apply(variables(net), jnp.zeros((1, 2, 2, 512)), start="blok4"))


def test_dropout_is_on_in_training_alone_and_after_hidden_layers_alone():
    """Bug: dropout in inference, none in training, or on the pooled features."""
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    for hidden, differs in [((), False), ((64,), True)]:
        net = nets.create("vgg16", 10, fc=False, hidden=hidden)
        v = nets.init(net, (32, 32), seed=0)
        logits, out = net.apply(v, images)
        trained, trained_out = net.apply(v, images, train=True, rngs={"dropout": jax.random.key(2)})
        assert (not np.allclose(logits, trained)) == differs
        for stage in list(out)[:-1]:
            np.testing.assert_array_equal(out[stage], trained_out[stage])


@pytest.mark.parametrize(
    ("options", "rate"),
    [({}, 0.5), ({"fc": False}, 0.0), ({"fc": False, "hidden": (8,)}, 0.5), ({"fc": False, "dropout": 0.7}, 0.7)],
)
def test_the_rate_of_dropout_that_is_given_or_usual(options, rate):
    """Bug: the rate of a head of one layer is ignored, or readers of the field see another rate than the net's."""
    net = nets.create("vgg16", 5, **options)
    assert net.dropout == net.clone(frozen=frozenset({"block1_conv1"})).dropout == rate
    expected = ("predictions_dropout", "predictions") if rate else ("predictions",)
    assert net.layers()["predictions"] == expected


def test_bfloat16_keeps_float32_parameters_and_logits():
    """Bug: parameters are created, or logits returned, in the compute dtype."""
    net = nets.create("vgg16", 10, fc=False, hidden=(8,), dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: variables(net))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    logits, out = jax.eval_shape(lambda: net.apply(variables(net), jnp.zeros((1, 32, 32, 3))))
    assert logits.dtype == jnp.float32 and out["block5"].dtype == out["hidden1"].dtype == jnp.bfloat16


def test_an_unknown_net_suggests_the_nearest():
    """Bug: a KeyError that leaves the user to guess."""
    with pytest.raises(ValueError, match="did you mean 'vgg16'"):
        nets.create("vgg_16")
