"""Every net of the zoo in Keras, and how to compare it with jaxft's stage by stage.

Nets that Keras lacks are the rebuilds beside this file. A deviation is max|Δ| / max|reference|, in float32 at the
highest matmul precision.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np

from jaxft import nets
from tests.reference import densenet_scale, googlenet, inception_v3_v02, inception_v4, resnet_scale, resnet_v02

APPLICATIONS = {
    "vgg16": keras.applications.VGG16,
    "vgg19": keras.applications.VGG19,
    "inception_v3": keras.applications.InceptionV3,
    "resnet50": keras.applications.ResNet50,
    "resnet101": keras.applications.ResNet101,
    "resnet152": keras.applications.ResNet152,
    "densenet121": keras.applications.DenseNet121,
    "densenet169": keras.applications.DenseNet169,
    "densenet201": keras.applications.DenseNet201,
}
REFERENCES: dict[str, Callable[..., keras.Model]] = {
    "googlenet": googlenet.googlenet,
    "inception_v3_v02": inception_v3_v02.inception_v3_v02,
    "inception_v4": inception_v4.inception_v4,
    "resnet50_v02": resnet_v02.resnet50_v02,
    "resnet101_scale": resnet_scale.resnet101_scale,
    "resnet152_scale": resnet_scale.resnet152_scale,
    "densenet121_scale": densenet_scale.densenet121_scale,
    "densenet161_scale": densenet_scale.densenet161_scale,
    "densenet169_scale": densenet_scale.densenet169_scale,
}


def odd_size(name: str) -> tuple[int, int]:
    """A (height, width) of no common factor with a net's strides."""
    return (107, 91) if "inception" in name else (67, 50)


def reference(name: str, size: tuple[int, int], classifier: bool, seed: int = 2) -> keras.Model:
    """The net in Keras with random weights; it returns logits, or the last feature map without a classifier."""
    keras.backend.clear_session()  # so that automatic names count from the start
    if name in APPLICATIONS:
        kind = {"include_top": classifier, "classifier_activation": None}
        model = APPLICATIONS[name](weights=None, input_shape=(*size, 3), **kind)
    else:
        classes = nets.spec(name).num_classes if classifier else None
        model = REFERENCES[name](input_shape=(*size, 3), classes=classes)
    randomise(model, seed)
    return model


def randomise(model: keras.Model, seed: int) -> None:
    """Weights that keep activations at one scale through the depth, as trained ones do, and hide no mapping error."""
    rng = np.random.default_rng(seed)
    draws: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
        "kernel": lambda shape: rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape),
        "bias": lambda shape: rng.normal(0, 0.1, shape),
        "gamma": lambda shape: rng.uniform(0.5, 1.0, shape),
        "beta": lambda shape: rng.normal(0, 0.2, shape),
        "moving_mean": lambda shape: rng.normal(0, 0.2, shape),
        "moving_variance": lambda shape: rng.uniform(0.5, 1.5, shape),
    }
    for layer in model.layers:
        if layer.weights:
            layer.set_weights([draws[weight.name](weight.shape) for weight in layer.weights])


def stage_outputs(name: str, model: keras.Model, net: Any) -> dict[str, Any]:
    """Stage of our net → the tensor of Keras's that it must equal."""
    table = net.layers()
    if name.startswith("vgg"):  # whose layers() count those of the origin's Sequential, padding and all
        ends = {stage: f"{stage}_pool" if stage.startswith("block") else stage for stage in table}
    elif name == "googlenet":  # whose heads Keras interleaves
        own = {"conv1": "pool1_norm1", "conv2": "pool2_3x3_s2", "pool3": "pool3_3x3_s2", "pool4": "pool4_3x3_s2"}
        ends = {
            stage: own.get(stage, f"{stage}_output") for stage in table if stage.startswith(("conv", "pool", "inc"))
        }
        ends |= {head: f"{head}_classifier" for head in table if head.startswith("loss")}
    else:
        flat = sum(map(len, table.values()))
        assert flat == len(model.layers), f"{name}: layers() counts {flat} layers, Keras {len(model.layers)}"
        last = np.cumsum([len(layers) for layers in table.values()]) - 1
        ends = {stage: model.layers[i].name for stage, i in zip(table, last, strict=True)}
    return {stage: model.get_layer(layer).output for stage, layer in ends.items()}


def images_of(size: tuple[int, int], n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 60, (n, *size, 3)).astype(np.float32)


def keras_stages(name: str, model: keras.Model, net: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Stage → its output by Keras."""
    staged = keras.Model(model.input, stage_outputs(name, model, net))
    with jax.default_matmul_precision("highest"):
        return {stage: np.asarray(x) for stage, x in staged(images, training=False).items()}


def our_stages(net: Any, variables: Mapping[str, Any], images: np.ndarray) -> dict[str, jax.Array]:
    """Stage → its output by jaxft."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda v, x: net.apply(v, x)[1])(variables, images)


def deviations(ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Stage → max|Δ| / max|reference|."""
    return {
        stage: float(np.abs(np.asarray(ours[stage]) - theirs[stage]).max() / np.abs(theirs[stage]).max())
        for stage in theirs
    }
