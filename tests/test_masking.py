import jax
import jax.numpy as jnp
import optax
import pytest
from tiny import Tiny

from jaxft import masking, nets

VGG16 = nets.create("vgg16", 10)
WEIGHTED = [f"block{b}_conv{i}" for b, depth in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, depth + 1)]
WEIGHTED += ["fc1", "fc2", "predictions"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none", []),
        ("first:1", None),
        ("first:2", WEIGHTED[:1]),
        ("first:10", WEIGHTED[:4]),
        ("first:37", WEIGHTED),
        ("through:block1", WEIGHTED[:2]),
        ("through:fc1", WEIGHTED[:14]),
        ("all-but-head", WEIGHTED[:-1]),
        ("block[12]_conv1", ["block1_conv1", "block2_conv1"]),
        ("conv1", None),
        ("through:block9", None),
        ("first:0", None),
        ("first:38", None),
        ("first:x", None),
        ("stage:block2", WEIGHTED[2:4]),
        ("stage:predictions", WEIGHTED[-1:]),
        ("stage:conv1", None),
        ("from:block5", WEIGHTED[10:]),
        ("from:block9", None),
        ("(?:block1|fc2)(?:_conv1)?", ["block1_conv1", "fc2"]),
        (frozenset({"block1_conv1"}), None),
        (["block1_conv1"], None),
        ("(", None),
        ("blok1.*", None),
    ],
)
def test_specifications(spec, expected):
    """Bug: `first:N` counts weighted layers alone, a regex matches parts of names, an empty match or a set passes."""
    if expected is None:
        with pytest.raises(ValueError, match="freeze="):
            masking.frozen_layers(VGG16, spec, WEIGHTED)
    else:
        assert masking.frozen_layers(VGG16, spec, WEIGHTED) == frozenset(expected)


def test_groups_are_layers_with_labels():
    """Bug: the layers of a group get another group's label, or layers of no group get one."""
    groups = {"low": "through:block1", "head": "from:fc2", "one": "block3_conv2"}
    expected = {
        "block1_conv1": "low",
        "block1_conv2": "low",
        "block3_conv2": "one",
        "fc2": "head",
        "predictions": "head",
    }
    assert masking.grouped(VGG16, groups, WEIGHTED) == expected


def test_groups_that_overlap_are_refused():
    """Bug: a layer of two groups silently follows the rate of the one that comes last."""
    with pytest.raises(ValueError, match="groups overlap: fc2 of 'late' .* are in 'head' too"):
        masking.grouped(VGG16, {"head": "from:fc2", "late": "fc2|fc1"}, WEIGHTED)
    with pytest.raises(ValueError, match="group low='stage:blok1' does not name a stage; the stages are block1"):
        masking.grouped(VGG16, {"low": "stage:blok1"}, WEIGHTED)


def test_no_match_names_the_layers():
    """Bug: the error leaves the user guessing what layers there are."""
    with pytest.raises(ValueError, match="block5_conv3, fc1, fc2, predictions"):
        masking.frozen_layers(VGG16, "nothing_like_this", WEIGHTED)


def test_all_but_head_trains_the_hidden_layers_of_a_pooled_head():
    """Bug: hidden layers that start from random values are frozen at them."""
    net = nets.create("vgg16", 10, fc=False, hidden=(32,))
    weighted = [*WEIGHTED[:13], "hidden1", "predictions"]
    assert masking.frozen_layers(net, "all-but-head", weighted) == frozenset(WEIGHTED[:13])


@pytest.mark.parametrize(
    ("frozen", "cut"),
    [([], None), (WEIGHTED[:1], None), (WEIGHTED[:4], "block2"), (WEIGHTED[2:4], None), (WEIGHTED[:15], "fc2")],
)
def test_frozen_prefix(frozen, cut):
    """Bug: a stage with one trained layer counts as frozen, or a frozen stage after a trained one extends the cut."""
    assert masking.frozen_prefix(VGG16, frozen, WEIGHTED) == cut


def test_frozen_prefix_passes_a_stage_without_weights():
    """Bug: a pooling stage, which has nothing to freeze, ends the prefix."""
    net = nets.create("vgg16", 10, fc=False)
    weighted = [*WEIGHTED[:13], "predictions"]
    assert masking.frozen_prefix(net, WEIGHTED[:13], weighted) == "avg_pool"


PARAMS = {
    "conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "mid": {"kernel": jnp.ones(2)},
    "head": {"kernel": jnp.ones(2)},
}


def test_frozen_layers_get_no_update_and_hold_no_momentum():
    """Bug: frozen leaves pass raw gradients on (as optax.masked does) or carry a momentum buffer."""
    tx = masking.freeze(optax.sgd(0.5, 0.9), masking.labels(PARAMS, {"conv"}))
    state = tx.init(PARAMS)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 4  # mid and head alone
    updates, _ = tx.update(PARAMS, state, PARAMS)
    assert jax.tree.map(lambda x: x.tolist(), updates) == {
        "conv": {"kernel": [[0, 0], [0, 0]], "bias": [0, 0]},
        "mid": {"kernel": [-0.5, -0.5]},
        "head": {"kernel": [-0.5, -0.5]},
    }


def test_groups_have_rates_of_their_own():
    """Bug: learning-rate groups fall back to the common transform."""
    labels = masking.labels(PARAMS, {"conv"}, {"head": "fast"})
    tx = masking.freeze({"trainable": optax.sgd(0.1), "fast": optax.sgd(1.0)}, labels)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert updates["mid"]["kernel"].tolist() == pytest.approx([-0.1, -0.1])
    assert updates["head"]["kernel"].tolist() == [-1, -1]


def test_bad_labels():
    """Bug: a misspelt layer, a string for a set, a label without transform or nothing to train goes unnoticed."""
    with pytest.raises(ValueError, match="nope"):
        masking.labels(PARAMS, (), {"nope": "fast"})
    with pytest.raises(ValueError, match="nothing to train"):
        masking.labels(PARAMS, PARAMS)
    with pytest.raises(ValueError, match="frozen names layers without weights: .'cnv'."):
        masking.labels(PARAMS, {"cnv"})
    with pytest.raises(ValueError, match="frozen is a set of layer names, not 'conv'"):
        masking.labels(PARAMS, "conv")
    with pytest.raises(ValueError, match="fast"):
        masking.freeze(optax.sgd(1.0), masking.labels(PARAMS, (), {"head": "fast"}))


def test_split_and_merge_are_inverse():
    """Bug: merging loses the order of the layers, and with it the tree that a checkpoint was saved from."""
    labels = masking.labels(PARAMS, {"mid"})
    trainable, frozen = masking.split(PARAMS, labels)
    assert list(trainable) == ["conv", "head"] and list(frozen) == ["mid"]
    assert list(masking.merge(trainable, frozen, PARAMS)) == list(PARAMS)


def test_l2_mask_is_true_at_kernels_alone():
    """Bug: weight decay shrinks biases and BatchNorm's scales, which Keras's kernel_regularizer leaves alone."""
    mask = masking.kernels({"conv": {"kernel": 1, "bias": 1}, "bn": {"scale": 1, "bias": 1}})
    assert mask == {"conv": {"kernel": True, "bias": False}, "bn": {"scale": False, "bias": False}}


def test_a_layer_table_names_every_weighted_layer():
    """Bug: a net's table misses a layer, so that no specification can ever freeze it."""
    for net in (VGG16, nets.create("vgg19", 7, fc=False, hidden=(5, 4)), nets.create("vgg16", None), Tiny()):
        shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        listed = [layer for layers in net.layers().values() for layer in layers]
        assert set(shapes["params"]) <= set(listed)
        assert set(net.head_layers()) <= set(shapes["params"])
