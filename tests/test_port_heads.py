"""Heads of hidden layers in Keras files: a user's own fine-tuned model fills a net, or is refused with a way out."""

import functools
import types

import jax
import keras
import keras_layouts as write
import numpy as np
import pytest
from keras.src.applications.densenet import DenseNet
from keras.src.applications.resnet import ResNet, stack_residual_blocks_v1

from jaxft import keras_match, nets, port_weights
from jaxft.nets import vgg
from tests.reference import googlenet, inception_v4, keras_nets

HIDDEN, CLASSES = (6, 4), 3
DEPTHS = (2, 2, 2, 2)


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    monkeypatch.setattr(vgg, "WIDTHS", (2, 3, 4, 5, 6))
    monkeypatch.setattr(vgg, "FC_WIDTH", 7)


def thin_vgg16(shape, fc=False):
    inputs = x = keras.Input(shape)
    for block, depth in enumerate((2, 2, 3, 3, 3), 1):
        for i in range(1, depth + 1):
            name = f"block{block}_conv{i}"
            x = keras.layers.Conv2D(vgg.WIDTHS[block - 1], 3, padding="same", activation="relu", name=name)(x)
        x = keras.layers.MaxPooling2D(name=f"block{block}_pool")(x)
    if fc:
        x = keras.layers.Flatten(name="flatten")(x)
        for name in ("fc1", "fc2"):
            x = keras.layers.Dense(vgg.FC_WIDTH, activation="relu", name=name)(x)
    return keras.Model(inputs, x, name="vgg16")


def thin_resnet50(shape):
    def stacks(x):
        for stage, (width, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), 2):
            x = stack_residual_blocks_v1(x, width, DEPTHS[0], stride1=stride, name=f"conv{stage}")
        return x

    return ResNet(stacks, False, True, include_top=False, weights=None, input_shape=shape, name="resnet50")


# family → (pixels a side, Keras's backbone without a classifier, options of our net)
FAMILIES = {
    "vgg16": (32, thin_vgg16, {"fc": False}),
    "vgg16 fc": (224, functools.partial(thin_vgg16, fc=True), {}),
    "resnet50": (32, thin_resnet50, {"depths": DEPTHS}),
    "densenet121": (
        32,
        lambda shape: DenseNet(list(DEPTHS), include_top=False, weights=None, input_shape=shape),
        {"depths": DEPTHS},
    ),
    "googlenet": (32, lambda shape: googlenet.googlenet(shape, classes=None), {"auxiliary": False}),
    # automatic names throughout
    "inception_v4": (
        80,
        lambda shape: inception_v4.inception_v4(shape, classes=None, blocks=(1, 2, 1)),
        {"table": tuple(nets.inception.v4((1, 2, 1)).items())},
    ),
}
WHOLE = {
    "inception_v3": (80, lambda shape: keras.applications.InceptionV3(False, None, input_shape=shape), {}),
    "whole resnet50": (32, lambda shape: keras.applications.ResNet50(False, None, input_shape=shape), {}),
}


def with_head(backbone, form, widths=HIDDEN, names=(), norm=False):
    """A classifier, flat in the model or beside a nested backbone; `names`: of its dense layers, None automatic."""
    keras.layers.Dense(1).build((None, 1))  # automatic names go on from earlier models of the session
    pool = [keras.layers.GlobalAveragePooling2D()] if len(backbone.output.shape) == 4 else []
    names = dict(enumerate(names))
    head = [*pool]
    for i, width in enumerate(widths):
        head += [keras.layers.Dense(width, activation="relu", name=names.get(i)), keras.layers.Dropout(0.3)]
        head += [keras.layers.BatchNormalization()] if norm else []
    last = keras.layers.Dense(CLASSES, activation="softmax", dtype="float32", name=names.get(len(widths)))
    head.append(last)
    if form == "sequential":
        return keras.Sequential([keras.Input(backbone.input.shape[1:]), keras.layers.RandomFlip(), backbone, *head])
    if form == "two models":
        inputs = keras.Input(backbone.input.shape[1:])
        return keras.Model(inputs, keras.Sequential(head)(backbone(inputs, training=False)))
    x = backbone.output
    for layer in head:
        x = layer(x)
    return keras.Model(backbone.input, x)


@functools.cache
def fine_tuned(family, form):
    size, build, _ = (FAMILIES | WHOLE)[family]
    model = with_head(build((size, size, 3)), form)
    randomise(model)
    return model


def randomise(model):
    inner = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    own = types.SimpleNamespace(layers=[layer for layer in model.layers if layer not in inner])
    keras_nets.randomise(own, seed=len(model.layers))
    for part in inner:
        randomise(part)


@functools.cache
def predictor(family):
    name, options = family.removesuffix(" fc").removeprefix("whole "), (FAMILIES | WHOLE)[family][2]
    net = nets.create(name, CLASSES, hidden=HIDDEN, **options)
    return jax.jit(lambda variables, images: jax.nn.softmax(net.apply(variables, images)[0]))


def as_keras_predicts(model, images):
    @jax.jit
    def predict(trainable, other, images):
        return model.stateless_call(trainable, other, images, training=False)[0]

    values = [
        [variable.value for variable in kind] for kind in (model.trainable_variables, model.non_trainable_variables)
    ]
    return np.asarray(predict(*values, images))


def save(model, path):
    model.save_weights(path) if path.name.endswith(".weights.h5") else model.save(path)


def check(tmp_path, family, form):
    size, _, options = (FAMILIES | WHOLE)[family]
    name, options = family.removesuffix(" fc").removeprefix("whole "), options | {"hidden": HIDDEN}
    model = fine_tuned(family, form)
    found = []
    for suffix in ("weights.h5", "keras", "h5"):
        save(model, tmp_path / f"w.{suffix}")
        variables, report = port_weights.load(name, tmp_path / f"w.{suffix}", num_classes=CLASSES, **options)
        assert not (report.fresh or report.dropped or report.ignored)
        found.append(variables)
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])
    images = keras_nets.images_of((size, size))
    with jax.default_matmul_precision("highest"):
        theirs = as_keras_predicts(model, images)
        ours = np.asarray(predictor(family)(found[0], images))
    assert np.ptp(theirs, axis=1).min() > 1e-3  # or the head hides the rest
    np.testing.assert_allclose(ours, theirs, atol=3e-5)  # of probabilities; whole Inception-V3 rounds to 1.6e-5
    if form == "flat":
        before = model.get_weights()
        for file in ("back.weights.h5", "back.h5"):
            port_weights.save(name, found[0], tmp_path / file, **options)
            model.set_weights([np.zeros_like(array) for array in before])
            model.load_weights(tmp_path / file)
            for ours, theirs in zip(model.get_weights(), before, strict=True):
                np.testing.assert_array_equal(ours, theirs)


QUICK = [
    *(("vgg16", form) for form in ("flat", "sequential", "two models")),
    ("vgg16 fc", "flat"),
    ("resnet50", "sequential"),
]
SLOW = [(family, form) for family in FAMILIES | WHOLE for form in ("flat", "sequential", "two models")]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in QUICK)]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_a_fine_tuned_model_predicts_the_same(tmp_path, family, form):
    """Bug: head layers take each other's places, count on from other models, or are left out when saved for Keras."""
    check(tmp_path, family, form)


def vgg_weights(model):
    """[(name, arrays)] of all layers, nested models flattened; weightless ones with an empty list."""
    layers = []
    for layer in model.layers:
        layers += vgg_weights(layer) if isinstance(layer, keras.Model) else [(layer.name, layer.get_weights())]
    return layers


def filled_by(path, layers, **options):
    """Whether `path` fills a VGG16 with a pooled head of HIDDEN with just the arrays of `layers`, in their order."""
    variables, report = port_weights.load(
        "vgg16", path, **{"num_classes": CLASSES, "fc": False, "hidden": HIDDEN} | options
    )
    arrays = [arrays for _, arrays in layers if arrays]
    assert len(variables["params"]) == len(arrays)
    for (layer, leaves), stored in zip(variables["params"].items(), arrays, strict=True):
        np.testing.assert_array_equal(leaves["kernel"], stored[0], layer)
        np.testing.assert_array_equal(leaves["bias"], stored[1], layer)
        assert leaves["kernel"].dtype == np.float32
    assert not (report.fresh or report.replaced or report.dropped)
    return report


@pytest.mark.parametrize("form", ["flat", "sequential"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_precision_policies(tmp_path, policy, form):
    """Bug: a loss-scale optimizer's slots are layers, or two bytes of bfloat16 are called no numbers."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = with_head(thin_vgg16((32, 32, 3)), form)
    finally:
        keras.config.set_dtype_policy(before)
    randomise(model)
    model.compile("adam", "mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    model.optimizer.build(model.trainable_variables)
    layers = [(name, [np.asarray(array, np.float32) for array in arrays]) for name, arrays in vgg_weights(model)]
    for suffix in ("weights.h5", "keras", "h5"):
        save(model, tmp_path / f"w.{suffix}")
        report = filled_by(tmp_path / f"w.{suffix}", layers)
        assert report.layers["hidden1"]["kernel"]["dtype"] == (policy if policy == "bfloat16" else "float32")


@pytest.fixture(scope="module")
def stored():
    """(backbone, head) as [(name, arrays)] of a thin VGG16 with a pooled head."""
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "WIDTHS", (2, 3, 4, 5, 6))
        expected = keras_match.expect("vgg16", nets.create("vgg16", CLASSES, fc=False, hidden=HIDDEN))
    layers = [
        (name, [rng.normal(size=s).astype(np.float32) for s in leaves.values()]) for name, leaves in expected.items()
    ]
    return layers[:13], layers[13:]


def renamed(head, names):
    return [(name, arrays) for name, (_, arrays) in zip(names, head, strict=True)]


TENSORFLOW = {"backend": b"tensorflow", "keras_version": b"2.3.1"}
OLD = "_layer_checkpoint_dependencies"
LAYOUTS = {
    "1": lambda p, base, head: write.named(p, base + renamed(head, ("dense_1", "dense_2", "dense_3")), write.keras_1),
    "1, later model, file out of order": lambda p, base, head: write.named(
        p, base + renamed(head, ("dense_9", "dense_10", "dense_11"))[::-1], write.keras_1
    ),
    "1 nested": lambda p, base, head: write.nested(
        p, base, renamed(head, ("dense_4", "dense_5", "dense_6")), weight_name=write.keras_1, attributes={}
    ),
    "2": lambda p, base, head: write.named(
        p, base + renamed(head, ("dense", "dense_1", "dense_2")), write.keras_2, attributes=TENSORFLOW
    ),
    "2 model, later": lambda p, base, head: write.named(
        p,
        base + renamed(head, ("dense_98", "dense_99", "dense_100"))[::-1],
        write.keras_2,
        attributes=TENSORFLOW,
        root="model_weights",
        extra=True,
    ),
    "2 automatic names throughout": lambda p, base, head: write.named(
        p,
        [(f"conv2d_{n}", arrays) for n, (_, arrays) in enumerate(base, 95)][::-1]
        + renamed(head, ("dense_1", "dense_2", "dense_3")),
        write.keras_2,
        attributes=TENSORFLOW,
    ),
    "2 nested": lambda p, base, head: write.nested(p, base, renamed(head, ("dense", "dense_1", "dense_2"))),
    "2 nested, a second copy": lambda p, base, head: write.nested(
        p, [(f"{name}_1", arrays) for name, arrays in base], renamed(head, ("dense_3", "dense_4", "dense_5"))
    ),
    "2 nested head": lambda p, base, head: write.nested(
        p, base, [("top", renamed(head, ("dense_3", "dense_4", "dense_5")))]
    ),
    "2.12 zip": lambda p, base, head: write.keras_3(p.with_suffix(".keras"), base + head, prefix=OLD, gaps=True),
    "2.14 nested zip": lambda p, base, head: write.keras_3(
        p.with_suffix(".keras"), base, prefix=OLD, model="functional", outer=head
    ),
    "3 nested, no names": lambda p, base, head: write.keras_3(
        p.with_suffix(".weights.h5"), base, model="functional", outer=head
    ),
    "names of the user's": lambda p, base, head: write.named(
        p, base + renamed(head, ("squeeze", "bottleneck", "steering")), write.keras_2, attributes=TENSORFLOW
    ),
    "names of the published head": lambda p, base, head: write.named(
        p, base + renamed(head, ("fc1", "fc2", "predictions")), write.keras_2, attributes=TENSORFLOW
    ),
    "names of the net in other places": lambda p, base, head: write.named(
        p, base + renamed(head, ("predictions", "hidden1", "fc1")), write.keras_2, attributes=TENSORFLOW
    ),
    "some names": lambda p, base, head: write.named(
        p, base + renamed(head, ("dense", "bottleneck", "dense_1")), write.keras_2, attributes=TENSORFLOW
    ),
    "3, some names": lambda p, base, head: write.keras_3(
        p.with_suffix(".weights.h5"), base + renamed(head, ("dense_7", "a", "dense_8")), with_names=True
    ),
    "a subclassed model": lambda p, base, head: write.keras_3(
        p.with_suffix(".weights.h5"), base, model="backbone", outer=renamed(head, ("squeeze", "b", "a")), keys=True
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_generation_with_a_head_of_ones_own(tmp_path, stored, layout):
    """Bug: a head's names of one generation, of a nested model or of the user's own are not understood."""
    base, head = stored
    path = LAYOUTS[layout](tmp_path / "w.h5", base, head)
    report = filled_by(path, base + head, order="tf" if layout.startswith("1") else "auto")
    if "some names" in layout:
        assert report.names["hidden2"] in ("bottleneck", "a") and f"from {report.names['hidden2']})" in str(report)


def refused(path, **options):
    with pytest.raises(ValueError) as caught:
        port_weights.load("vgg16", path, **{"num_classes": CLASSES, "fc": False} | options)
    return str(caught.value)


def test_two_ways_out(tmp_path, stored):
    """Bug: a head that the net cannot take is an error that leaves the user to guess, or is lost without a word."""
    base, head = stored
    head = renamed(head, ("dense", "dense_1", "dense_2"))
    path = write.named(tmp_path / "w.h5", base + head, write.keras_2, attributes=TENSORFLOW)
    ways = (
        "The file's head is dense 6→6, dense_1 6→4, dense_2 4→3. Two ways out: "
        "hidden=(6, 4), num_classes=3{} (on a command line --head gap:6,4 --num-classes 3) takes it; "
        "ignore=('dense', 'dense_1', 'dense_2') (--ignore dense dense_1 dense_2) leaves it out for a fresh one."
    )
    for wrong in ({}, {"hidden": (6,)}, {"hidden": (6, 5)}, {"hidden": (8,), "num_classes": 7}, {"num_classes": 7}):
        assert ways.format("") in refused(path, **wrong)
    assert ways.format(", fc=False") in refused(path, fc=True)
    filled_by(path, base + head)
    for options in ({}, {"hidden": (5,)}, {"hidden": (6, 4)}):
        variables, report = port_weights.load(
            "vgg16", path, num_classes=CLASSES, fc=False, ignore=("dense", "dense_?"), **options
        )
        assert report.ignored == ["dense", "dense_1", "dense_2"] and not report.replaced
        assert report.fresh == [layer for layer in variables["params"] if not layer.startswith("block")]
    _, report = port_weights.load("vgg16", path, num_classes=7, fc=False, hidden=HIDDEN)
    assert report.fresh == report.replaced == ["predictions"]
    _, report = port_weights.load("vgg16", path, num_classes=CLASSES, fc=False, hidden=HIDDEN, ignore=["dense_2"])
    assert report.fresh == ["predictions"] and not report.replaced and report.ignored == ["dense_2"]


def test_a_linear_head_of_ones_own_is_not_lost(tmp_path, stored):
    """Bug: a trained layer of the right width goes, because the net has a hidden layer that the file lacks."""
    base, head = stored
    last = [("dense", [np.ones((6, CLASSES), np.float32), np.ones(CLASSES, np.float32)])]
    path = write.named(tmp_path / "w.h5", base + last, write.keras_2, attributes=TENSORFLOW)
    assert "Two ways out: hidden=(), num_classes=3 " in refused(path, hidden=(5,))
    _, report = port_weights.load("vgg16", path, num_classes=7, fc=False, hidden=(5,))
    assert report.fresh == ["hidden1", "predictions"] and report.replaced == ["predictions"]


def test_heads_that_no_net_has(tmp_path, stored):
    """Bug: options are offered that do not take the file, for BatchNorm or a Flatten in the head."""
    base, head = stored
    norm = ("batch_normalization", [np.ones(6, np.float32)] * 4)
    write.keras_3(tmp_path / "n.weights.h5", [*base, *head, norm], with_names=True)
    message = refused(tmp_path / "n.weights.h5", hidden=HIDDEN)
    assert "batch_normalization: the file has" in message
    assert "which vgg16 cannot take: ignore=('dense', " not in message and "'batch_normalization')" in message
    flat = [("dense", [np.ones((6 * 49, 4), np.float32), np.ones(4, np.float32)]), ("dense_1", head[-1][1])]
    path = write.named(tmp_path / "w.h5", base + flat, write.keras_2, attributes=TENSORFLOW)
    message = refused(path, hidden=(4,))
    assert (
        "The file's head is dense 294→4, dense_1 4→3, which vgg16 cannot take: ignore=('dense', 'dense_1')" in message
    )
    assert port_weights.load("vgg16", path, num_classes=3, fc=False, ignore=["dense*"])[1].fresh == ["predictions"]


def test_an_order_that_a_file_does_not_tell(tmp_path, stored):
    """Bug: the attributes of a subclassed model are taken in alphabetical order, where several orders fit."""
    base, head = stored
    twice = [("b", [np.ones((6, 6), np.float32), np.ones(6, np.float32)])] + renamed(head, ("c", "d", "a"))
    path = write.keras_3(tmp_path / "w.weights.h5", base, model="backbone", outer=twice, keys=True)
    assert "the order of the dense layers a, b, c, d cannot be told" in refused(path, hidden=(6, 6, 4))
    assert port_weights.load("vgg16", path, num_classes=3, fc=False, ignore=list("abcd"))[1].fresh == ["predictions"]


def test_a_quantised_head_is_refused_by_name(tmp_path, stored):
    """Bug: a head of int8 with the right width is replaced by random values, or its integers are taken for weights."""
    base, head = stored
    kernel = np.ones((6, CLASSES), np.int8)
    for arrays in ([kernel, np.zeros(CLASSES, np.float32), np.ones(CLASSES, np.float32)], [kernel, np.zeros(CLASSES)]):
        path = write.keras_3(tmp_path / "w.weights.h5", [*base, ("predictions", arrays)], with_names=True)
        message = refused(path)
        assert "predictions: the net wants" in message and "ignore=('predictions',)" in message
        assert "Two ways" not in message
        _, report = port_weights.load("vgg16", path, num_classes=CLASSES, fc=False, ignore=["predictions"])
        assert report.fresh == ["predictions"]


def test_googlenet_without_auxiliary_heads(tmp_path):
    """Bug: a file without loss1 and loss2 is refused without the option that takes it."""
    expected = keras_match.expect("googlenet", nets.create("googlenet", CLASSES, auxiliary=False))
    layers = [(name, [np.ones(s, np.float16) for s in leaves.values()]) for name, leaves in expected.items()]
    path = write.keras_3(tmp_path / "w.weights.h5", layers, with_names=True)
    with pytest.raises(ValueError, match="loss2_fc; auxiliary=False .*--no-auxiliary.* makes the net without them"):
        port_weights.load("googlenet", path, num_classes=CLASSES)
    assert not port_weights.load("googlenet", path, num_classes=CLASSES, auxiliary=False)[1].fresh
