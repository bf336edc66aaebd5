"""What every net of the zoo must do in training and in prediction, on copies that are thin in depth."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from thin import CLASSES, DEPTHS, DISTINCT, make

from jaxft import masking, nets, optim, phase, port_weights, task, train, train_state
from jaxft.nets import inception
from tests.reference import keras_nets

slow = partial(pytest.param, marks=pytest.mark.slow)


def quick(*names, of=tuple(nets.ZOO)):
    """The nets, with all but those named marked slow."""
    return [name if name in names else slow(name) for name in of]


OLD = DISTINCT[: DISTINCT.index("resnet50v2")]
EVERY = quick(
    *(name for name in OLD if name != "googlenet"), "mobilenet_v3_small", "efficientnet_v2_s", "convnext_tiny"
)
DENSE = ("densenet121", "densenet121_scale")
TRAINED = ("vgg16", "resnet50", "resnet50_v02", "resnet101_scale")
MOMENTA = ("mobilenet_v2", "xception", "nasnet_mobile")  # of their own; and separable convolutions
STATISTICS = quick("resnet50", of=("resnet50", "resnet50_v02", "inception_v3", "inception_v4", "densenet121", *MOMENTA))


def train_step(scale=1 / 255.0, start=None):
    return train.make_train_step(task.classification(), CLASSES, lambda _, x, labels: (x * scale, labels), start)


def batch(images, labels=(0, 1, 2)):
    """A training batch whose labels are all known."""
    n = len(images)
    return {
        "image": images,
        "label": np.array(labels, np.int32),
        "known": np.ones(n, bool),
        "weight": np.ones(n, np.float32),
    }


@pytest.mark.parametrize("name", quick(*TRAINED, *DENSE))
def test_training(name):
    """Bugs: a parameter out of reach of the loss; frozen leaves or statistics that move; trained ones that do not."""
    net, variables, images = make(name)
    stages = list(net.layers())
    frozen = masking.frozen_layers(net, f"through:{stages[len(stages) // 2]}", variables["params"])
    net = net.clone(frozen=frozen)

    # BatchNorm on running statistics: with the statistics of the batch, a bias before it has no effect.
    def loss_of(params):
        logits = net.apply(variables | {"params": params}, images, train=False)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 1, 2])).mean()

    grads = jax.jit(jax.grad(loss_of))(variables["params"])
    dead = [path for path, grad in jax.tree_util.tree_leaves_with_path(grads) if not np.any(grad)]
    assert not dead

    state = train_state.create(net, variables, phase.Phase(epochs=1, schedule=optim.Constant(1e-3)))
    uint8 = np.random.default_rng(1).integers(0, 256, images.shape, np.uint8)
    step = train_step()
    for _ in range(2):
        state, figures = step(state, batch(uint8))
    assert np.isfinite(figures["loss"])
    for collection, after in (("params", state.params), ("batch_stats", state.batch_stats)):
        for layer, leaves in variables.get(collection, {}).items():
            for leaf, before in leaves.items():
                constant = leaf == "bias" and "batch_stats" in variables and layer != net.layers()[stages[-1]][-1]
                if layer not in frozen and constant and ("kernel" in leaves or name not in OLD):
                    continue  # a BatchNorm after it may subtract it again
                unchanged = np.array_equal(before, after[layer][leaf])
                assert unchanged == (layer in frozen), f"{collection} {layer} {leaf}"


@pytest.mark.parametrize("name", EVERY)
def test_every_stage_can_be_the_start(name):
    """Bug: a stage reads something that the output of the stage before does not carry."""
    net, variables, images = make(name, **({"auxiliary": False} if name == "googlenet" else {}))
    logits, out = net.apply(variables, images[:1])
    assert list(out) == list(net.layers())
    for stage in out:
        again, rest = net.apply(variables, out[stage], start=stage)
        np.testing.assert_array_equal(again, logits, stage)
        assert list(rest) == list(out)[list(out).index(stage) :]
    with pytest.raises(ValueError, match="start='nowhere' is not a stage"):
        net.apply(variables, images, start="nowhere")


@pytest.mark.parametrize("name", quick("vgg16", "resnet50"))
def test_bfloat16(name):
    """Bug: parameters, statistics or logits in bfloat16; or a sum that loses everything in it."""
    net, variables, images = make(name)
    reference = np.asarray(net.apply(variables, images)[0])
    half = net.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    logits, out = half.apply(variables, images)
    assert logits.dtype == jnp.float32
    assert out[next(iter(out))].dtype == jnp.bfloat16
    error = np.abs(logits - reference).max() / np.abs(reference).max()
    print(f"{name} (thin): relative logit error in bfloat16 {error:.1e}")
    assert error < 0.05


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_follow_keras(tmp_path, name):
    """Bug: a different momentum, an unbiased variance, or statistics of something that is not the batch."""
    size = (80, 75) if "ception" in name else (35, 42)
    model = keras_nets.reference(name, size, classifier=False)
    model.save_weights(tmp_path / "w.weights.h5")
    variables, _ = port_weights.load(name, tmp_path / "w.weights.h5", num_classes=None)
    images = keras_nets.images_of(size, n=8 if "inception" in name else 3) / 60
    with jax.default_matmul_precision("highest"):
        model(images, training=True)
        apply = jax.jit(lambda v, x: nets.create(name, None).apply(v, x, train=True, mutable=["batch_stats"])[1])
        ours = apply(variables, images)["batch_stats"]
    model.save_weights(tmp_path / "after.weights.h5")
    theirs = port_weights.load(name, tmp_path / "after.weights.h5", num_classes=None)[0]["batch_stats"]
    for layer, before in variables["batch_stats"].items():
        for leaf in ("mean", "var"):
            update = theirs[layer][leaf] - before[leaf]
            delta = np.abs(ours[layer][leaf] - theirs[layer][leaf]).max()
            assert np.abs(update).max() > 0
            # The deepest maps have 8 to 12 values a channel: rounding grows; an unbiased variance is 9 to 14 % more.
            assert delta <= 5e-2 * np.abs(update).max() + 2e-7 * np.abs(theirs[layer][leaf]).max(), f"{layer} {leaf}"
    keras.backend.clear_session()


@pytest.mark.parametrize("name", ["inception_v4", "googlenet"])
def test_dropout(name):
    """Bug: dropout in prediction, none in training, or the same units in every step."""
    net, variables, images = make(name)

    @jax.jit
    def apply(variables, key):
        return net.apply(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0][0]

    one, two = apply(variables, jax.random.key(0)), apply(variables, jax.random.key(1))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(one, apply(variables, jax.random.key(0)))


def test_googlenet_trains_three_heads_and_predicts_their_mean():
    """Bug: a prediction of the last head alone, a mean of logits, or a loss that leaves a head out."""
    net, variables, images = make("googlenet", dropout=(0.0, 0.0, 0.0))
    logits, out = net.apply(variables, images)
    heads = [out["loss1"], out["loss2"], out["loss3"]]
    mean = sum(np.asarray(jax.nn.softmax(head)) for head in heads) / 3
    np.testing.assert_allclose(jax.nn.softmax(logits), mean, rtol=1e-5)
    labels = jnp.array([4, 0, 1])
    separate = sum(optax.softmax_cross_entropy_with_integer_labels(head, labels).mean() for head in heads)
    trained = net.clone(frozen=masking.frozen_layers(net, "all-but-head", variables["params"]))  # compiles sooner
    state = train_state.create(trained, variables, phase.Phase(epochs=1, schedule=optim.Constant(1e-3)))
    figures = train_step(1.0, start="inception_4a")(state, batch(out["inception_4a"], labels))[1]
    np.testing.assert_allclose(figures["loss"], separate, rtol=1e-5)
    with pytest.raises(ValueError, match="start='inception_4b' lies after inception_4a.*auxiliary=False"):
        net.apply(variables, out["inception_4b"], start="inception_4b")
    with pytest.raises(ValueError, match="4×4 map.*223 to 270.*5×5: resize"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 271, 271, 3)))
    jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 223, 270, 3)))


@pytest.mark.parametrize(("name", "smallest"), [("resnet50", 32), ("densenet121", 32), ("inception_v3", 75)])
def test_images_that_are_too_small(name, smallest):
    """Bug: an empty map and a mean of nothing, NaN, instead of an error."""
    net = nets.create(name, CLASSES)
    jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, smallest, smallest, 3)))
    with pytest.raises(ValueError, match=f"at least {smallest}×{smallest} pixels, not {smallest}×{smallest - 1}"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, smallest, smallest - 1, 3)))


def test_the_nearest_name_is_suggested():
    """Bug: a KeyError, or a list of eighteen names to look through."""
    with pytest.raises(ValueError, match="no net is called 'resnet-50': did you mean 'resnet50'"):
        nets.create("resnet-50")


@pytest.mark.parametrize(
    ("file", "into", "difference"),
    [
        ("resnet50", "resnet50_v02", "ε 1.001e-5.*pool1 not padded"),
        ("resnet50_v02", "resnet50", "release v0.2.*ε 1.001e-5"),
        slow("inception_v3_v02", "inception_v3", "ReLU → BatchNorm with gamma.*BatchNorm without gamma"),
        slow("inception_v3", "inception_v3_v02", "BatchNorm without gamma.*ReLU → BatchNorm with gamma"),
        ("densenet121_scale", "densenet121", "Scale layer.*no Scale layers"),
        ("resnet101_scale", "resnet101", "Scale layer.*keras.applications"),
        ("densenet121", "densenet169", "not of densenet169"),
    ],
)
def test_a_file_of_a_sibling_is_refused(tmp_path, file, into, difference):
    """Bug: it is loaded as far as it goes, or refused with nothing but a list of layers."""
    net = nets.create(file)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *nets.spec(file).native_size, 3)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    port_weights.save(file, zeros, tmp_path / "w.h5")
    with pytest.raises(ValueError, match=rf"(?s)does not fit {into}:.*It is a file of {file} .*{difference}"):
        port_weights.load(into, tmp_path / "w.h5")


def test_older_names(tmp_path):
    """Bug: official files, whose layers have / in their names and other names of the last layer, are refused."""
    net = nets.create("densenet121", 1000, depths=DEPTHS)
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    port_weights.save("densenet121", variables, tmp_path / "w.h5", depths=DEPTHS)
    import h5py

    old = {"conv1_conv": "conv1/conv", "conv1_bn": "conv1/bn", "predictions": "fc1000"}
    with h5py.File(tmp_path / "w.h5") as new, h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs.update(new.attrs)
        names = [str(name) for name in new.attrs["layer_names"]]
        file.attrs["layer_names"] = [old.get(name, name).encode() for name in names]
        for name in names:
            group = file.require_group(old.get(name, name))
            weights = [str(weight) for weight in new[name].attrs["weight_names"]]
            renamed = [weight.replace(name, old.get(name, name), 1) for weight in weights]
            group.attrs["weight_names"] = [weight.encode() for weight in renamed]
            for weight, now in zip(weights, renamed, strict=True):
                group[now] = new[name][weight][...]
    loaded, report = port_weights.load("densenet121", tmp_path / "old.h5", depths=DEPTHS)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(np.asarray, dict(variables)))
    assert report.layers["conv1_conv"]["kernel"]["stored"] == "conv1/conv/kernel:0"


def test_an_untrained_gamma_is_dropped_and_a_trained_one_is_not(tmp_path):
    """Bug: Inception-V4's first files, whose BatchNorm has a gamma of ones, are refused; or any gamma is dropped."""
    table = tuple(inception.v4((1, 1, 1)).items())
    plain = nets.create("inception_v4", 1001, table=table)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), dict(shapes))
    import keras_layouts as write

    for gamma in (1.0, 0.9):
        layers = []
        for layer, leaves in variables["params"].items():
            fields = {"kernel": leaves.get("kernel"), "bias": leaves.get("bias")}
            if layer.startswith("batch"):
                stats = variables["batch_stats"][layer]
                fields = {"gamma": np.full_like(leaves["bias"], gamma), "beta": leaves["bias"]}
                fields |= {"moving_mean": stats["mean"], "moving_variance": stats["var"]}
            layers.append((layer, {field: array for field, array in fields.items() if array is not None}))
        path = write.named(
            tmp_path / f"{gamma}.h5", layers, write.keras_2, attributes={"backend": "tensorflow", "keras_version": "2"}
        )
        if gamma == 1:
            loaded, _ = port_weights.load("inception_v4", path, num_classes=1001, table=table)
            assert set(loaded["params"]["batch_normalization_1"]) == {"bias"}
        else:
            with pytest.raises(ValueError, match="batch_normalization_1: the net wants bias 32, mean 32, var 32"):
                port_weights.load("inception_v4", path, num_classes=1001, table=table)


def test_variants_are_rows():
    """Bug: two rows of the zoo that share a published file, or a hash that was copied from another row."""
    hashes = [weights.hash for row in nets.ZOO.values() for weights in row.weights.values()]
    assert len(set(hashes)) == len(hashes)
    assert all(len(digest) in (32, 64) for digest in hashes)  # MD5, or SHA-256 where Keras publishes that
    urls = [weights.url for row in nets.ZOO.values() for weights in row.weights.values()]
    assert len(set(urls)) == len(urls)
    assert all(dataclasses.is_dataclass(row) and row.preprocessing for row in nets.ZOO.values())
