"""The same weights in Keras and in jaxft: every stage and the logits."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from jaxft import nets, port_weights

TOLERANCE = 1e-5  # of max|Δ| / max|reference|; Keras's own two backends differ by about 8e-6 on VGG16
KERAS = {"vgg16": keras.applications.VGG16, "vgg19": keras.applications.VGG19}


def reference(name, size, classifier):
    """A Keras net with biases that matter, and a function of images that gives its stages by our names."""
    keras.utils.set_random_seed(1)
    model = KERAS[name](weights=None, include_top=classifier, input_shape=(*size, 3), classifier_activation=None)
    rng = np.random.default_rng(2)
    for layer in model.layers:
        if layer.get_weights():
            kernel, bias = layer.get_weights()
            # He's deviation keeps activations at one scale through the depth, as trained weights do.
            kernel = rng.normal(0, np.sqrt(2 / np.prod(kernel.shape[:-1])), kernel.shape)
            layer.set_weights([kernel, rng.normal(0, 0.1, bias.shape)])
    stages = {f"block{b}": f"block{b}_pool" for b in range(1, 6)}
    if classifier:
        stages |= {stage: stage for stage in ("fc1", "fc2", "predictions")}
    return model, keras.Model(model.input, {stage: model.get_layer(layer).output for stage, layer in stages.items()})


def deviations(ours, theirs):
    """Stage → max|Δ| / max|reference|."""
    return {
        stage: float(np.abs(np.asarray(ours[stage]) - np.asarray(theirs[stage])).max() / np.abs(theirs[stage]).max())
        for stage in theirs
    }


def outputs(net, variables, images):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda v, x: net.apply(v, x)[1])(variables, images)


def images_of(size, n=2):
    return np.random.default_rng(0).normal(0, 60, (n, *size, 3)).astype(np.float32)


def compare(name, size, classifier, path):
    model, staged = reference(name, size, classifier)
    model.save_weights(path)
    num_classes = 1000 if classifier else None
    variables, _ = port_weights.load(name, path, num_classes=num_classes)
    images = images_of(size)
    with jax.default_matmul_precision("highest"):
        theirs = {stage: np.asarray(x) for stage, x in staged(images).items()}
    found = deviations(outputs(nets.create(name, num_classes), variables, images), theirs)
    print(f"{name} {size[0]}×{size[1]}: largest deviation {max(found.values()):.1e} of {found}")
    assert max(found.values()) < TOLERANCE
    return model, variables, images, theirs


@pytest.mark.parametrize("name", KERAS)
def test_every_stage_at_an_odd_size(tmp_path, name):
    """Bug: padding, pooling of odd sizes, a kernel's orientation or a bias differs from Keras's."""
    compare(name, (67, 50), False, tmp_path / "w.weights.h5")


@pytest.mark.slow
@pytest.mark.parametrize("name", KERAS)
def test_every_stage_and_the_logits_at_the_native_size(tmp_path, name):
    """Bug: fc1 reads its map in another order, the classifier's layers are swapped; and as above."""
    model, variables, images, theirs = compare(name, (224, 224), True, tmp_path / "w.weights.h5")
    for file in ("back.weights.h5", "back.h5"):  # and Keras computes the same from what is written back
        port_weights.save(name, variables, tmp_path / file)
        model.set_weights([np.zeros_like(w) for w in model.get_weights()])
        model.load_weights(tmp_path / file)
        with jax.default_matmul_precision("highest"):
            logits = np.asarray(model(images))
        assert np.abs(logits - theirs["predictions"]).max() == 0
        (tmp_path / file).unlink()


@pytest.mark.parametrize("file", ["back.weights.h5", "back.h5"])
def test_keras_loads_what_is_written_back(tmp_path, file):
    """Bug: a layout that only our own reader reads, or layers in the wrong order for Keras, which counts them."""
    model, _ = reference("vgg16", (32, 32), False)
    expected = model.get_weights()
    model.save_weights(tmp_path / "w.weights.h5")
    variables, _ = port_weights.load("vgg16", tmp_path / "w.weights.h5", num_classes=None)
    port_weights.save("vgg16", variables, tmp_path / file)
    model.set_weights([np.zeros_like(w) for w in expected])
    model.load_weights(tmp_path / file)
    for found, weight in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(found, weight)


def test_the_tolerance_is_tight_enough():
    """Bug: the comparison above passes on a net that is wrong. Each of these must exceed the tolerance ten times."""
    size = (40, 33)
    model, staged = reference("vgg16", size, False)
    images = images_of(size)
    with jax.default_matmul_precision("highest"):
        theirs = {stage: np.asarray(x) for stage, x in staged(images).items()}
    right = {
        layer.name: dict(zip(("kernel", "bias"), layer.get_weights(), strict=True))
        for layer in model.layers
        if layer.get_weights()
    }
    net = nets.create("vgg16", None)
    assert max(deviations(outputs(net, {"params": right}, images), theirs).values()) < TOLERANCE

    def worst(layer, **leaves):
        wrong = {"params": right | {layer: right[layer] | leaves}}
        return max(deviations(outputs(net, wrong, images), theirs).values())

    square = right["block5_conv3"]["kernel"]  # 3×3×512×512 survives every one of these without a shape error
    assert worst("block5_conv3", kernel=square.swapaxes(2, 3)) > 10 * TOLERANCE
    assert worst("block5_conv3", kernel=square[::-1, ::-1]) > 10 * TOLERANCE
    assert worst("block5_conv3", kernel=square.swapaxes(0, 1)) > 10 * TOLERANCE
    assert worst("block1_conv1", bias=jnp.zeros(64)) > 10 * TOLERANCE
    shifted = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]  # padding on the wrong side
    assert max(deviations(outputs(net, {"params": right}, shifted), theirs).values()) > 10 * TOLERANCE
