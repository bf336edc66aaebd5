"""Every net of the zoo in Keras, and how to compare it with jaxft's stage by stage.

Nets that Keras lacks are the rebuilds beside this file. A deviation is max|Δ| / max|reference|, in float32 at the
highest matmul precision.
"""

import functools
import os
import pathlib
import re
import tempfile
import types
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
from keras.src.applications import nasnet

from jaxft import nets, preprocess
from tests.reference import densenet_scale, googlenet, inception_v3_v02, inception_v4, resnet_scale, resnet_v02


def _published(application: Callable[..., keras.Model]) -> Callable[..., keras.Model]:
    """EfficientNet as Keras makes it for its ImageNet files, with one layer more than for none; from random weights."""

    def build(**arguments: Any) -> keras.Model:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "w.weights.h5"
            application(**arguments).save_weights(file)
            with mock.patch("keras.src.utils.file_utils.get_file", lambda *_, **__: str(file)):
                return application(**arguments | {"weights": "imagenet"})

    return build


def _nasnet(application: Callable[..., keras.Model]) -> Callable[..., keras.Model]:
    """A NASNet, which Keras refuses to make in PyTorch, though its graph can be read there."""

    def build(**arguments: Any) -> keras.Model:
        own = {name: getattr(nasnet.backend, name) for name in dir(nasnet.backend)}
        with mock.patch.object(nasnet, "backend", types.SimpleNamespace(**own | {"backend": lambda: "jax"})):
            return application(**arguments)

    return build


V2 = ("B0", "B1", "B2", "B3", "S", "M", "L")
NEXT = ("Tiny", "Small", "Base", "Large", "XLarge")
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
    "resnet50v2": keras.applications.ResNet50V2,
    "resnet101v2": keras.applications.ResNet101V2,
    "resnet152v2": keras.applications.ResNet152V2,
    "xception": keras.applications.Xception,
    "inception_resnet_v2": keras.applications.InceptionResNetV2,
    "mobilenet": keras.applications.MobileNet,
    "mobilenet_v2": keras.applications.MobileNetV2,
    "mobilenet_v3_small": keras.applications.MobileNetV3Small,
    "mobilenet_v3_large": keras.applications.MobileNetV3Large,
    "nasnet_mobile": _nasnet(keras.applications.NASNetMobile),
    "nasnet_large": _nasnet(keras.applications.NASNetLarge),
    **{f"efficientnet_b{i}": _published(getattr(keras.applications, f"EfficientNetB{i}")) for i in range(8)},
    **{f"efficientnet_v2_{x.lower()}": getattr(keras.applications, f"EfficientNetV2{x}") for x in V2},
    **{f"convnext_{x.lower()}": getattr(keras.applications, f"ConvNeXt{x}") for x in NEXT},
}
UNLIKE = ("mobilenet", "mobilenet_v3_small", "mobilenet_v3_large", *(n for n in APPLICATIONS if "efficientnet" in n))
INSIDE = ("efficientnet", "mobilenet_v3", "convnext")  # preprocessing is part of the model in Keras
REFERENCES: dict[str, Callable[..., keras.Model]] = {
    "googlenet": googlenet.googlenet,
    "inception_v3_v02": inception_v3_v02.inception_v3_v02,
    "inception_v4": inception_v4.inception_v4,
    "inception_v4_gamma": inception_v4.inception_v4_gamma,
    "resnet50_v02": resnet_v02.resnet50_v02,
    "resnet50_v21": functools.partial(resnet_v02.resnet50_v02, padded=True),
    "resnet101_scale": resnet_scale.resnet101_scale,
    "resnet152_scale": resnet_scale.resnet152_scale,
    "densenet121_scale": densenet_scale.densenet121_scale,
    "densenet161_scale": densenet_scale.densenet161_scale,
    "densenet169_scale": densenet_scale.densenet169_scale,
}


def odd_size(name: str) -> tuple[int, int]:
    """A (height, width) of no common factor with a net's strides."""
    return (107, 91) if "ception" in name else (67, 50)


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
        "depthwise_kernel": lambda shape: rng.normal(0, np.sqrt(2 / np.prod(shape[:2])), shape),
        "pointwise_kernel": lambda shape: rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape),
        "bias": lambda shape: rng.normal(0, 0.1, shape),
        "gamma": lambda shape: rng.uniform(0.5, 1.0, shape),
        "beta": lambda shape: rng.normal(0, 0.2, shape),
        "moving_mean": lambda shape: rng.normal(0, 0.2, shape),
        "moving_variance": lambda shape: rng.uniform(0.5, 1.5, shape),
        "variable": lambda shape: rng.uniform(0.5, 1.0, shape),  # LayerScale's gamma
        "mean": lambda shape: rng.normal(0, 0.2, shape),
        "variance": lambda shape: rng.uniform(0.5, 1.5, shape),
        "count": lambda shape: np.array(7),
    }
    for layer in model.layers:
        if layer.weights:
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)  # Keras 3 calls its kernel one like others
            names = ["depthwise_kernel" if depthwise else re.sub(r"_\d+$", "", w.name) for w in layer.weights]
            values = [draws[n](weight.shape) for n, weight in zip(names, layer.weights, strict=True)]
            if layer.name.endswith("project_bn"):  # the last of a block: many of these are added up
                values[0] *= 0.3
            layer.set_weights(values)
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def stage_outputs(name: str, model: keras.Model, net: Any) -> dict[str, Any]:
    """Stage of our net → the tensor of Keras's that it must equal."""
    table, name = net.layers(), name.removeprefix("thin ")
    if name.startswith("vgg"):  # whose layers() count those of the origin's Sequential, padding and all
        ends = {stage: f"{stage}_pool" if stage.startswith("block") else stage for stage in table}
    elif name == "googlenet":  # whose heads Keras interleaves
        own = {"conv1": "pool1_norm1", "conv2": "pool2_3x3_s2", "pool3": "pool3_3x3_s2", "pool4": "pool4_3x3_s2"}
        ends = {
            stage: own.get(stage, f"{stage}_output") for stage in table if stage.startswith(("conv", "pool", "inc"))
        }
        ends |= {head: f"{head}_classifier" for head in table if head.startswith("loss")}
    elif name.startswith("convnext"):  # which keeps some layers in models of their own
        adds = iter([operation.output for operation in model.operations if type(operation).__name__ == "Add"])
        own = {"stem": f"{name}_stem", "head_layernorm": model.layers[-1].name, "avg_pool": f"{name}_head_layernorm"}
        ends = {
            stage: next(adds) if "block" in stage else own.get(stage, f"{name}_downsampling_block_{stage[-1]}")
            for stage in table
            if stage != f"{name}_head_dense"
        }
        ends |= {stage: stage for stage in table if stage.endswith("head_dense")}
    elif name in UNLIKE:  # whose heads are made of other layers
        head = [s for s in table if set(table[s]) & {"avg_pool", *nets.spec(name).classifier}]
        last = np.cumsum([len(layers) for layers in table.values()]) - 1
        body = {stage: model.layers[i].name for stage, i in zip(table, last, strict=True) if stage not in head}
        assert head or list(last)[-1] == len(model.layers) - 1
        ends = body | ({head[-1]: model.layers[-1].name} if head else {})
    else:
        flat = sum(map(len, table.values()))
        assert flat == len(model.layers), f"{name}: layers() counts {flat} layers, Keras {len(model.layers)}"
        last = np.cumsum([len(layers) for layers in table.values()]) - 1
        ends = {stage: model.layers[i].name for stage, i in zip(table, last, strict=True)}
    return {stage: model.get_layer(end).output if isinstance(end, str) else end for stage, end in ends.items()}


def flat_layers(model: keras.Model) -> list[keras.Layer]:
    """The layers of a model, those of models in it in their place."""
    return [inner for layer in model.layers for inner in getattr(layer, "layers", (layer,))]


def images_of(size: tuple[int, int], n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 60, (n, *size, 3)).astype(np.float32)


def fed(name: str, images: np.ndarray) -> np.ndarray:
    """What the Keras model takes for these preprocessed images: some preprocess theirs themselves."""
    if not name.removeprefix("thin ").startswith(INSIDE):
        return images
    normalise = preprocess.get(nets.spec(name).preprocessing)
    zero, one = (np.asarray(normalise(np.full((1, 1, 3), value))) for value in (0.0, 255.0))
    return ((images - zero) * (255 / (one - zero))).astype(np.float32)


def keras_stages(name: str, model: keras.Model, net: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """Stage → its output by Keras, for images that are preprocessed, as ours are."""
    staged = keras.Model(model.input, stage_outputs(name, model, net))
    images = fed(name, images)
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
