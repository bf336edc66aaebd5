"""What frozen layers cost: a forward pass, and nothing else."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import flops
from jaxft import masking, nets, optim, train, train_state
from jaxft.nets import cpu_conv

SIZE, BATCH = (64, 64), 16


def frozen_state(name, freeze, monkeypatch, clip_norm=None):
    monkeypatch.setattr(cpu_conv, "conv_general_dilated", jax.lax.conv_general_dilated)  # whose operations are counted
    net = nets.create(name, 10, **nets.any_size(name))
    variables = nets.init(net, SIZE, 0)
    frozen = masking.frozen_layers(net, freeze, variables["params"])
    net = net.clone(frozen=frozen)
    tx = optim.nesterov_sgd(optax.constant_schedule(1e-3))
    return net, train_state.create(net, variables, tx, frozen=frozen, clip_norm=clip_norm)


@pytest.mark.parametrize("clip_norm", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    "name, freeze",
    [
        ("vgg16", "none"),
        ("vgg16", "first:10"),
        ("vgg16", "through:block4"),
        ("vgg16", "all-but-head"),
        ("resnet50", "through:conv4_block6"),
        ("densenet121", "through:pool3"),
        ("inception_v3", "all-but-head"),
    ],
)
def test_operations_of_a_step_are_those_of_the_formula(name, freeze, clip_norm, monkeypatch):
    """Bug: gradients of frozen layers are computed, by a norm over all leaves say, or of inputs that nobody needs."""
    if "inception" in name:
        monkeypatch.setattr(f"{__name__}.SIZE", (107, 107))
    net, state = frozen_state(name, freeze, monkeypatch, clip_norm)
    expected = flops.formula(net, state, SIZE, BATCH)
    batch = {"image": jnp.zeros((BATCH, *SIZE, 3), jnp.uint8), "label": jnp.zeros(BATCH, jnp.int32)}
    step = train.make_train_step(lambda _, images: images.astype(jnp.float32))
    counted = step.lower(state, batch).cost_analysis()["flops"]
    # The formula leaves out BatchNorm, which is 7 % of these thin-kernelled nets; frozen work would be 100 % and more.
    assert counted == pytest.approx(expected, rel=0.1 if name in ("resnet50", "densenet121") else 0.05)


def saved_bytes(function, *arguments):
    """Of what the forward pass of `function` keeps for its gradient."""
    kept = jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *arguments)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize(
    "name, stage", [("vgg16", "block4"), ("vgg16", "avg_pool"), ("resnet50", "conv4_block6"), ("densenet121", "pool3")]
)
def test_frozen_stages_save_nothing_for_the_gradient(name, stage, monkeypatch):
    """Bug: activations of frozen stages live until the backward pass."""
    net, state = frozen_state(name, f"through:{stage}", monkeypatch)
    trainable, frozen = masking.split(state.params, state.labels)
    images = jax.ShapeDtypeStruct((BATCH, *SIZE, 3), jnp.float32)
    features = jax.eval_shape(lambda x: net.apply(state.variables(), x)[1][stage], images)

    def loss(start):
        def of(trainable, x):
            variables = {**state.variables(), "params": masking.merge(trainable, frozen, state.params)}
            (logits, _), _ = net.apply(variables, x, train=True, start=start, mutable=["batch_stats"])
            return logits.sum()

        return of

    def of_trainable(start, x):
        return saved_bytes(lambda trainable: loss(start)(trainable, jnp.zeros(x.shape)), trainable)

    whole, behind = of_trainable(None, images), of_trainable(stage, features)
    assert whole == pytest.approx(behind, rel=0.05)
    everything = saved_bytes(lambda params: loss(None)(params, jnp.zeros(images.shape)), state.params)
    assert everything > 1.5 * whole
