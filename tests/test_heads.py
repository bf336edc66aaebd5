"""Heads, fields and their JSON values, and Flax NNX, on one net of each family."""

import itertools
import json

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx
from thin import CLASSES, make
from thin import options as make_options

from jaxft import nets
from tests.reference import keras_nets
from tests.reference.googlenet import googlenet

FAMILIES = ("vgg16", "googlenet", "inception_v4", "resnet50", "densenet121")
LAST = {"googlenet": "loss3_classifier"}
HIDDEN = (6, 4, 3)


def head(name, **fields):
    """(net, variables of its head alone, pooled features): what `start="avg_pool"` takes."""
    options = {"vgg16": {"fc": False}, "googlenet": {"auxiliary": False}}.get(name, {})
    net = nets.create(name, CLASSES, **options, **fields)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 80, 80, 3)))
    rng = np.random.default_rng(0)
    params = {layer: shapes["params"][layer] for layer in net.head_layers()}
    params = jax.tree.map(lambda leaf: rng.normal(0, 1, leaf.shape).astype(np.float32), params)
    width = params[net.head_layers()[0]]["kernel"].shape[0]
    return net, {"params": params}, rng.normal(0, 1, (3, width)).astype(np.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_layers_stand_before_the_last_one(name):
    """Bug: a width at the wrong place, a layer without ReLU, one that layers() or head_layers() leaves out."""
    net, variables, features = head(name, hidden=HIDDEN)
    last = LAST.get(name, "predictions")
    assert net.head_layers() == ("hidden1", "hidden2", "hidden3", last)
    logits, out = net.apply(variables, features, start="avg_pool")
    stages = list(net.layers())
    assert list(out) == stages[stages.index("avg_pool") :]
    x = features
    for layer, stage in zip(net.head_layers(), list(out)[1:], strict=True):
        leaves = variables["params"][layer]
        x = x @ leaves["kernel"] + leaves["bias"]
        x = x if layer == last else np.maximum(x, 0)
        np.testing.assert_allclose(out[stage], x, rtol=1e-4, atol=1e-4 * np.abs(x).max())
        assert net.layers()[stage][-1] == layer
    np.testing.assert_array_equal(logits, out[stages[-1]])


@pytest.mark.parametrize("hidden", [HIDDEN, ()], ids=["hidden", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_comes_before_each_layer_after_the_first_and_before_the_last(name, hidden):
    """Bug: pooled features are dropped before hidden1, a hidden layer is not dropped, or the key is not used."""
    rate = (0.0, 0.0, 0.5) if name == "googlenet" else 0.5
    net, variables, features = head(name, hidden=hidden, dropout=rate)
    variables, features = jax.tree.map(np.abs, (variables, features))  # so that no ReLU hides what is dropped
    listed = [stage for stage, layers in net.layers().items() if any("dropout" in layer for layer in layers)]
    last = list(net.layers())[-1]
    after_the_first = [f"hidden{i}" for i in range(2, len(hidden) + 1)]
    assert listed == [*after_the_first, last]
    out = net.apply(variables, features, start="avg_pool")[1]
    for before, stage in itertools.pairwise(out):
        rngs = {"dropout": jax.random.key(0)}
        dropped = net.apply(variables, out[before], start=before, train=True, rngs=rngs)[1][stage]
        assert (not np.array_equal(dropped, out[stage])) == (stage in listed), stage


def test_vgg_has_hidden_layers_after_its_fc_layers():
    """Bug: the file's fc layers are lost, or count as new to the task."""
    net = nets.create("vgg16", 7, hidden=(9,))
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    assert params["hidden1"]["kernel"].shape == (4096, 9) and params["predictions"]["kernel"].shape == (9, 7)
    stages = net.layers()
    assert [stages[name] for name in ("fc1", "fc2", "hidden1", "predictions")] == [
        ("flatten", "fc1"),
        ("fc2_dropout", "fc2"),
        ("hidden1_dropout", "hidden1"),
        ("predictions_dropout", "predictions"),
    ]
    assert net.head_layers() == ("hidden1", "predictions")


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6)])
def test_the_order_of_googlenets_layers(hidden):
    """Bug: a file of numbered layers swaps the heads' layers with those of the last module, or with hidden ones."""
    keras.backend.clear_session()
    names = [layer.name for layer in googlenet(hidden=hidden).layers if layer.weights]
    assert [layer for layer in nets.create("googlenet", hidden=hidden).keras_layers() if layer in names] == names


def test_the_reference_of_googlenet_is_the_one_of_the_parity_tests():
    """Bug: the order above is that of a net that no weights are compared with."""
    assert keras_nets.REFERENCES["googlenet"] is googlenet


@pytest.mark.parametrize(
    ("name", "word", "options"),
    [
        ("vgg16", "fc", {"fc": True, "hidden": ()}),
        ("vgg16", "gap", {"fc": False, "hidden": ()}),
        ("vgg19", "gap:4096,2048", {"fc": False, "hidden": (4096, 2048)}),
        ("vgg16", "fc:256", {"fc": True, "hidden": (256,)}),
        ("resnet50", "gap", {"hidden": ()}),
        ("googlenet", "gap:256", {"hidden": (256,)}),
    ],
)
def test_a_head_as_a_command_line_names_it(name, word, options):
    """Bug: widths are lost, or a net gets an option that it does not have."""
    assert nets.head_options(name, word) == options
    assert nets.create(name, 3, **options).hidden == options["hidden"]


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("vgg16", "flatten", "head='flatten' is not fc, gap"),
        ("vgg16", "gap:", "is not fc, gap"),
        ("vgg16", "gap:0", "is not fc, gap"),
        ("vgg16", "gap:256,", "is not fc, gap"),
        ("resnet50", "fc", "fc layers, which resnet50 does not have: say gap$"),
        ("resnet50", "fc:256", "say gap:256"),
    ],
)
def test_a_head_that_cannot_be(name, word, message):
    """Bug: it is taken for something near, or fails later in Python's words."""
    with pytest.raises(ValueError, match=message):
        nets.head_options(name, word)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet50",
            {"head": (32,)},
            r"resnet50 has no option 'head'.*say hidden=\(32,\)\. .*num_classes, hidden, dropout",
        ),
        ("resnet50", {"fc": False}, "resnet50 has no option 'fc'"),
        ("vgg16", {"dropuot": 0.1}, "did you mean 'dropout'"),
        ("vgg16", {"hidden": [32]}, r"hidden=\[32\] is not a tuple of positive integers.*hidden=\(256,\)"),
        ("vgg16", {"hidden": 32}, "is not a tuple"),
        ("vgg16", {"hidden": (32, 0)}, "is not a tuple of positive integers"),
        ("vgg16", {"hidden": (True,)}, "is not a tuple of positive integers"),
        ("vgg16", {"hidden": (32.0,)}, "is not a tuple of positive integers"),
        ("densenet121", {"dropout": 1.0}, "dropout=1.0 is not a rate from 0 to below 1"),
        ("densenet121", {"dropout": float("nan")}, "is not a rate"),
        ("densenet121", {"dropout": (0.1, 0.1, 0.1)}, "dropout=.* is not a rate"),
        ("googlenet", {"dropout": 0.5}, "dropout=0.5 is not a tuple of 3 rates"),
        ("googlenet", {"dropout": (0.5, 0.5)}, "is not a tuple of 3 rates"),
        ("inception_v3", {"dtype": jnp.float16}, "float16.*loss scaling.*bfloat16"),
        ("inception_v3", {"dtype": "int8"}, "float32 or bfloat16"),
        ("inception_v3", {"dtype": "half a float"}, "float32 or bfloat16"),
        ("resnet50", {"frozen": "through:conv1"}, r"masking\.frozen_layers\(net, 'through:conv1'"),
        ("resnet50", {"frozen": ["conv1_conv"]}, "expected a frozenset of layer names"),
        ("resnet50", {"num_classes": 0}, "num_classes=0 is not a positive integer"),
        ("resnet50", {"num_classes": "5"}, "num_classes='5' is not a positive integer"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    """Bug: a TypeError in Python's words, or a net that fails, or underflows, only in training."""
    with pytest.raises(ValueError, match=f"(?s){message}"):
        nets.create(name, **options)


def test_a_field_is_checked_whenever_it_is_set():
    """Bug: clone(frozen=…) takes a specification for a set of its letters."""
    with pytest.raises(ValueError, match="frozenset"):
        nets.create("resnet50").clone(frozen="all-but-head")


FIELDS = {
    "vgg16": {"fc": False, "hidden": (32, 8), "dropout": 0.25},
    "googlenet": {"auxiliary": False, "dropout": (0.1, 0.2, 0.3)},
    "inception_v4": {"dropout": 0.0, "frozen": frozenset({"conv2d_2", "conv2d_1"})},
    "vgg19": {"fc": False, "dropout": 0.7},
    "resnet50": {"depths": (1, 2, 1, 1), "dtype": jnp.bfloat16, "frozen": frozenset({"conv1_bn"})},
    "densenet121_scale": {"hidden": (4,), "fold_scale": True},
}


@pytest.mark.parametrize("name", FIELDS)
def test_options_go_to_json_and_back(name):
    """Bug: a field is lost, a tuple comes back as a list, or a set in an order that differs from run to run."""
    table = {} if name != "inception_v4" else {"table": make_options("inception_v4")[0]["table"]}
    net = nets.create(name, 7, **FIELDS[name], **table)
    options = nets.options(name, net)
    text = json.dumps(options, allow_nan=False)
    assert nets.from_options(name, json.loads(text)) == net
    assert set(options) == {"num_classes", *FIELDS[name], *table}
    assert nets.options(name, nets.create(name)) == {}
    assert nets.from_options(name, {}) == nets.create(name)
    assert nets.options(name, nets.create(name, None)) == {"num_classes": None}


def test_options_of_a_different_net_are_refused():
    """Bug: a record names one net and describes a different one."""
    with pytest.raises(ValueError, match="resnet50 is a ResNet, and this net is a VGG"):
        nets.options("resnet50", nets.create("vgg16"))
    with pytest.raises(ValueError, match="no option 'growth'"):
        nets.from_options("resnet50", {"growth": 3})
    with pytest.raises(ValueError, match="is not a part of a net"):
        nets.from_options("inception_v3", {"table": [["stem", [{"os.system": {"command": "true"}}]]]})


@pytest.mark.parametrize("name", FAMILIES)
def test_flax_nnx_users_get_the_same_logits(name):
    """Bug: two variables of a layer have one name in NNX, or a call needs what the bridge does not pass on."""
    net, variables, images = make(name, **({"auxiliary": False} if name == "googlenet" else {}))
    images = images[:1, :80, :80]
    stats = variables.get("batch_stats", {})

    model = nnx.eval_shape(lambda: nnx.bridge.ToNNX(net).lazy_init(images, rngs=jax.random.key(0)))
    nnx.update(model, {layer: leaves | stats.get(layer, {}) for layer, leaves in variables["params"].items()})
    logits, out = model(images)

    expected, stages = net.apply(variables, images)
    np.testing.assert_array_equal(logits, expected)
    assert list(out) == list(stages)
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == len(jax.tree.leaves(variables["params"]))
    if name == "resnet50":
        trained, _ = model(images, train=True, rngs=nnx.Rngs(dropout=0), mutable=["batch_stats"])
        layer = next(iter(stats))
        running = getattr(model, layer)["mean"]
        assert isinstance(running, nnx.BatchStat) and not np.array_equal(running[...], stats[layer]["mean"])
