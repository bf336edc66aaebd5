"""The same weights in Keras and in jaxft: every stage and the logits. For the zoo: `python -m benchmarks.parity`."""

import dataclasses
import gc
from functools import partial

import jax
import keras
import keras_layouts as write
import numpy as np
import pytest
import thin
from keras.src.applications.convnext import ConvNeXt  # the public names fix the depths
from keras.src.applications.densenet import DenseNet
from keras.src.applications.efficientnet_v2 import EfficientNetV2
from keras.src.applications.nasnet import NASNet

from jaxft import nets, port_weights
from jaxft.nets import common
from tests.reference import keras_nets

TOLERANCE = 1e-5  # of max|Δ| / max|reference|; Keras's own two backends differ by about 8e-6 on VGG16

# One net for each path through the code; the others differ from these in depth and width alone.
PATHS = (
    *("vgg16", "googlenet", "inception_v3", "inception_v3_v02", "thin inception_v4"),
    *(
        "resnet50",
        "resnet50_v02",
        "resnet50_v21",
        "thin inception_v4_gamma",
        "thin resnet101_scale",
        "thin densenet121",
        "thin densenet121_scale",
    ),
    *("resnet50v2", "xception", "inception_resnet_v2", "mobilenet", "mobilenet_v2", "mobilenet_v3_small"),
    *("mobilenet_v3_large", "thin nasnet_mobile", "thin nasnet_large", "efficientnet_b0", "efficientnet_v2_b0"),
    *("efficientnet_v2_s", "thin efficientnet_v2_s", "thin convnext_tiny"),
)
NEWER = PATHS[PATHS.index("resnet50v2") :]  # than Keras on Theano
# Where another net takes nearly the same path, or Keras is slow to build it.
SECOND = (
    *(
        "inception_v3_v02",
        "thin inception_v4",
        "resnet50_v02",
        "resnet50_v21",
        "thin inception_v4_gamma",
        "resnet50v2",
        "xception",
        "inception_resnet_v2",
        "mobilenet",
    ),
    *("mobilenet_v2", "mobilenet_v3_large", "thin nasnet_mobile", "thin nasnet_large", "efficientnet_b0"),
    *("efficientnet_v2_b0", "efficientnet_v2_s"),
)

# Where a thin copy takes the same path: fields of our net; the reference's own arguments.
BLOCKS = (2, 3, 2, 2)
FUSED = ((True, (24, 1, 1)), (True, (32, 4, 2)), (False, (48, 4, 2)))  # width, how much wider, strides
THIN = {
    "inception_v4": ({"table": tuple(nets.inception.v4((1, 2, 1)).items())}, {"blocks": (1, 2, 1)}),
    "inception_v4_gamma": ({"table": tuple(nets.inception.v4((1, 1, 1)).items())}, {"blocks": (1, 1, 1)}),
    "resnet101_scale": ({"depths": BLOCKS}, {"blocks": BLOCKS}),
    "densenet121": ({"depths": BLOCKS}, {"blocks": list(BLOCKS)}),
    "densenet121_scale": ({"depths": BLOCKS}, {"blocks": BLOCKS, "growth": 32, "stem_width": 64}),
    "nasnet_mobile": (
        {"filters": 16, "depth": 2},
        {"penultimate_filters": 384, "num_blocks": 2, "stem_block_filters": 32, "skip_reduction": False},
    ),
    "nasnet_large": (
        {"filters": 16, "depth": 1},
        {"penultimate_filters": 384, "num_blocks": 1, "stem_block_filters": 96, "skip_reduction": True},
    ),
    "efficientnet_v2_s": (
        {"blocks": tuple((fused, 1, *row) for fused, row in FUSED)},
        {
            **{"width_coefficient": 1.0, "depth_coefficient": 1.0, "default_size": 64, "name": "thin-s"},
            "blocks_args": [
                {
                    **{"num_repeat": 1, "kernel_size": 3, "input_filters": before, "output_filters": width},
                    **{"expand_ratio": wider, "strides": strides, "se_ratio": 0.0 if fused else 0.25},
                    "conv_type": int(fused),
                }
                for before, (fused, (width, wider, strides)) in zip((24, 24, 32), FUSED, strict=True)
            ],
        },
    ),
    "convnext_tiny": (
        {"depths": (1, 2, 1, 1), "widths": (8, 16, 24, 40)},
        {"depths": [1, 2, 1, 1], "projection_dims": [8, 16, 24, 40], "name": "convnext_tiny"},
    ),
}
BUILDERS = {
    "inception_v4": keras_nets.inception_v4.inception_v4,
    "inception_v4_gamma": keras_nets.inception_v4.inception_v4_gamma,
    "resnet101_scale": keras_nets.resnet_scale.resnet_scale,
    "densenet121": DenseNet,
    "densenet121_scale": keras_nets.densenet_scale.densenet_scale,
    "nasnet_mobile": NASNet,
    "nasnet_large": NASNet,
    "efficientnet_v2_s": EfficientNetV2,
    "convnext_tiny": ConvNeXt,
}


@pytest.fixture(autouse=True)
def tidy(monkeypatch):
    for name, (_, arguments) in THIN.items():
        table = keras_nets.APPLICATIONS if name in keras_nets.APPLICATIONS else keras_nets.REFERENCES
        monkeypatch.setitem(table, f"thin {name}", partial(BUILDERS[name], **arguments))
        row = nets.ZOO[name]
        net = partial(row.net.func, **(row.net.keywords | THIN[name][0]))
        monkeypatch.setitem(nets.ZOO, f"thin {name}", dataclasses.replace(row, net=net))
    yield
    keras.backend.clear_session()
    gc.collect()


def ported(name, path, num_classes=None, **options):
    return port_weights.load(name, path, num_classes=num_classes, **options)[0]


def same(found, expected):
    """Bit for bit, and in the same order of layers."""
    for collection in expected:
        assert list(found[collection]) == list(expected[collection])
        for layer, leaves in expected[collection].items():
            assert set(found[collection][layer]) == set(leaves)
            for leaf, array in leaves.items():
                np.testing.assert_array_equal(found[collection][layer][leaf], array, f"{layer} {leaf}")


def worst(name, model, images, variables, num_classes=None, **options):
    net = nets.create(name, num_classes, **options)
    theirs = keras_nets.keras_stages(name, model, nets.create(name, num_classes), images)
    return max(keras_nets.deviations(keras_nets.our_stages(net, variables, images), theirs).values())


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SECOND else x for x in PATHS])
def test_every_stage_at_an_odd_size_from_every_layout(tmp_path, name):
    """Bug: padding, pooling of odd sizes, BatchNorm's epsilon, an order of layers or of arrays differs from Keras's."""
    size = keras_nets.odd_size(name)
    model = keras_nets.reference(name, size, classifier=False)
    model.save_weights(tmp_path / "w.weights.h5")
    variables = ported(name, tmp_path / "w.weights.h5")
    assert worst(name, model, keras_nets.images_of(size), variables) < TOLERANCE

    model.save(tmp_path / "w.keras")
    same(ported(name, tmp_path / "w.keras"), variables)
    layers = in_model_order(model)
    if "convnext" not in name:  # which has models inside, and without names layers of one class are mixed up
        same(ported(name, write.keras_3(tmp_path / "unnamed.weights.h5", layers)), variables)
    keras_2 = write.named(tmp_path / "2.h5", layers, old_name(name, "2"), attributes={"backend": "tensorflow"})
    same(ported(name, keras_2), variables)
    if name not in NEWER:
        theano = write.named(tmp_path / "1.h5", write.theano(automatic(name, layers)), old_name(name, "1"))
        same(ported(name, theano, order="th"), variables)

    # And Keras computes the same from what is written back, which is loaded by position.
    for file in ("back.weights.h5", "back.h5"):
        port_weights.save(name, variables, tmp_path / file)
        expected = model.get_weights()
        model.set_weights([np.zeros_like(array) for array in expected])
        model.load_weights(tmp_path / file)
        for found, array in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(found, array)


def in_model_order(model):
    """[(name, field → array)] of the layers of a model, weightless ones and those of models in it included."""
    return [(layer.name, {w.name: np.asarray(w) for w in layer.weights}) for layer in keras_nets.flat_layers(model)]


def automatic(name, layers):
    """Inception's layers as Keras 1 names them: counted from 1 by class, in the file's order of its choice."""
    if "inception" not in name:
        return layers
    renamed = []
    for layer, fields in layers:
        kind, _, number = layer.rpartition("_")
        kind, number = (kind, int(number)) if number.isdecimal() else (layer, 0)
        old = {"conv2d": "convolution2d", "batch_normalization": "batchnormalization"}.get(kind)
        renamed.append((f"{old}_{number + 1}" if old else layer, fields))
    return renamed[::-1]


def old_name(name, generation):
    fields = {"gamma": "gamma", "beta": "beta", "moving_mean": "running_mean", "moving_variance": "running_std"}
    keras_1 = fields | {"kernel": "W", "bias": "b"}
    return lambda layer, field: f"{layer}_{keras_1[field]}" if generation == "1" else f"{layer}/{field}:0"


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.ZOO)
def test_every_stage_and_the_logits_at_the_native_size(tmp_path, name):
    """Bug: the classifier's layers are swapped or read their map in another order; and as above."""
    model = keras_nets.reference(name, nets.spec(name).native_size, classifier=True)
    num_classes = nets.spec(name).num_classes
    model.save_weights(tmp_path / "w.weights.h5")
    variables = ported(name, tmp_path / "w.weights.h5", num_classes)
    found = worst(name, model, keras_nets.images_of(nets.spec(name).native_size), variables, num_classes)
    print(f"{name}: largest deviation {found:.1e}")
    assert found < TOLERANCE
    for file in ("back.weights.h5", "back.h5"):
        port_weights.save(name, variables, tmp_path / file)
        expected = model.get_weights()
        model.set_weights([np.zeros_like(array) for array in expected])
        model.load_weights(tmp_path / file)
        for array, weight in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(array, weight)
        (tmp_path / file).unlink()


COUNTED = [name for name in nets.ZOO if not name.startswith("vgg") and name != "googlenet"]
ALIKE = thin.COPIES | set(thin.LATER) - {"mobilenet_v2"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in COUNTED]
)
def test_layers_count_as_keras_counts_them(name):
    """Bug: first:N freezes other layers than model.layers[:N] does, or a file of numbered layers is misread."""
    model = keras_nets.APPLICATIONS.get(name) or keras_nets.REFERENCES[name]
    options = {"weights": None} if name in keras_nets.APPLICATIONS else {}
    keras.backend.clear_session()
    layers = keras_nets.flat_layers(model(**options))
    if name.startswith("convnext"):
        layers = [layer for layer in layers if not isinstance(layer, keras.layers.InputLayer)]
        layers.insert(0, None)
    table = nets.create(name, nets.spec(name).num_classes).layers()
    ours = [layer for layers in table.values() for layer in layers]
    if name in keras_nets.UNLIKE:  # their heads are made of other layers
        ours = ours[: ours.index("avg_pool")]
    else:
        assert len(ours) == len(layers)
    for position, (layer, name_) in enumerate(zip(layers, ours, strict=False)):
        if layer is None or not layer.weights or isinstance(layer, keras.layers.Dense):
            continue
        kind, _, number = layer.name.rpartition("_")
        kind, number = (kind, int(number)) if number.isdecimal() else (layer.name, 0)
        automatic = kind in ("conv2d", "batch_normalization")
        once = kind if kind == "normalization" else layer.name  # the reference builds EfficientNet twice
        assert name_ == (f"{kind}_{number + 1}" if automatic else once), f"{name}, layer {position}"


@pytest.mark.parametrize("name", thin.ZOO)
def test_the_zoo_states_parameters_and_cost(name, monkeypatch):
    """Bug: a number of the zoo's table is that of a different net, or a net has grown."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # plain convolutions, which are counted
    row = nets.spec(name)
    net = nets.create(name, row.num_classes)
    images = jax.ShapeDtypeStruct((1, *row.native_size, 3), np.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == row.num_params
    program = jax.make_jaxpr(lambda v, x: net.apply(v, x))(variables, images)
    assert multiply_accumulates(program.jaxpr) / 1e9 == pytest.approx(row.gmac, abs=0.006)
    stages = net.layers()
    assert row.head in stages[list(stages)[-1]] and set(row.classifier) <= set(variables["params"])


def multiply_accumulates(jaxpr):
    """Multiply-accumulates of the convolutions and matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            total += out.size * kernel.size // kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += out.size * int(np.prod([left.shape[axis] for axis in contracted]))
        for inner in equation.params.values():
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += multiply_accumulates(getattr(inner, "jaxpr", inner))
    return total


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in thin.COPIES | set(thin.LATER) else name
        for name in keras_nets.APPLICATIONS
    ],
)
def test_parameters_are_as_many_as_keras_counts(name):
    """Bug: a row of the zoo that agrees with our own net and not with Keras's."""
    assert keras_nets.APPLICATIONS[name](weights=None).count_params() == nets.spec(name).num_params


def test_scales_fold(tmp_path):
    """Bug: the folded net computes something else than the one whose Scale layers were trained."""
    for name in ("thin resnet101_scale", "thin densenet121_scale"):
        size = keras_nets.odd_size(name)
        model = keras_nets.reference(name, size, classifier=False)
        model.save_weights(tmp_path / "w.weights.h5")
        variables = common.fold_scales(ported(name, tmp_path / "w.weights.h5"))
        assert not [layer for layer in variables["params"] if "scale" in layer]
        assert worst(name, model, keras_nets.images_of(size), variables, fold_scale=True) < TOLERANCE


@pytest.mark.slow
def test_the_tolerance_is_tight_enough_for_vgg():
    """Bug: the comparison above passes on a net that is wrong. Each of these must exceed the tolerance ten times."""
    size = (40, 33)
    model = keras_nets.reference("vgg16", size, classifier=False)
    images = keras_nets.images_of(size)
    net = nets.create("vgg16", None)
    theirs = keras_nets.keras_stages("vgg16", model, net, images)
    right = {
        layer.name: dict(zip(("kernel", "bias"), layer.get_weights(), strict=True))
        for layer in model.layers
        if layer.get_weights()
    }

    def off(images, **layers):
        wrong = {"params": {name: right[name] | layers.get(name, {}) for name in right}}
        return max(keras_nets.deviations(keras_nets.our_stages(net, wrong, images), theirs).values())

    assert off(images) < TOLERANCE
    square = right["block5_conv3"]["kernel"]  # 3×3×512×512 survives every one of these without a shape error
    assert off(images, block5_conv3={"kernel": square.swapaxes(2, 3)}) > 10 * TOLERANCE
    assert off(images, block5_conv3={"kernel": square[::-1, ::-1]}) > 10 * TOLERANCE
    assert off(images, block5_conv3={"kernel": square.swapaxes(0, 1)}) > 10 * TOLERANCE
    assert off(images, block1_conv1={"bias": np.zeros(64, np.float32)}) > 10 * TOLERANCE
    shifted = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]  # padding on the wrong side
    assert off(shifted) > 10 * TOLERANCE


@pytest.mark.slow
def test_the_tolerance_is_tight_enough_for_batch_norm(tmp_path, monkeypatch):
    """Bug: as above, for what only nets with BatchNorm can have wrong, in one layer of fifty-three at a time."""
    size = (67, 50)
    model = keras_nets.reference("resnet50", size, classifier=False)
    model.save_weights(tmp_path / "w.weights.h5")
    variables = ported("resnet50", tmp_path / "w.weights.h5")
    images = keras_nets.images_of(size)

    def off(params=None, stats=None):
        wrong = {
            "params": variables["params"] | (params or {}),
            "batch_stats": variables["batch_stats"] | (stats or {}),
        }
        return worst("resnet50", model, images, wrong)

    assert off() < TOLERANCE
    norm = "conv3_block2_2_bn"
    stats = variables["batch_stats"][norm]
    assert off(stats={norm: {"mean": stats["var"], "var": stats["mean"] ** 2}}) > 10 * TOLERANCE
    assert (
        off(params={norm: {**variables["params"][norm], "bias": variables["params"][norm]["scale"]}}) > 10 * TOLERANCE
    )
    unit = variables["params"]["conv3_block2_2_conv"]
    assert off(params={"conv3_block2_2_conv": unit | {"kernel": unit["kernel"].swapaxes(2, 3)}}) > 10 * TOLERANCE
    # Shapes of the shortcut and of the last convolution agree in the first stage alone: trap of positional loading.
    first, last = variables["params"]["conv2_block1_0_conv"], variables["params"]["conv2_block1_3_conv"]
    assert off(params={"conv2_block1_0_conv": last, "conv2_block1_3_conv": first}) > 10 * TOLERANCE

    shifted = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]  # padding on the wrong side
    net = nets.create("resnet50", None)
    theirs = keras_nets.keras_stages("resnet50", model, net, images)
    ours = keras_nets.our_stages(net, variables, shifted)
    assert max(keras_nets.deviations(ours, theirs).values()) > 10 * TOLERANCE
    right = nets.resnet.VARIANTS["keras"]
    monkeypatch.setitem(nets.resnet.VARIANTS, "keras", dataclasses.replace(right, epsilon=1e-3))
    assert off() > 10 * TOLERANCE
