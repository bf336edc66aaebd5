"""Ways out of jaxft: each file is read by the library that it is for, and predicts the same."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import thin

from jaxft import export, graph, model, nets, task
from jaxft.data.decode import Decode

CLASSES = ("good", "bad & ugly", "käse")
SMALL = {name: 75 if "ception" in name else 64 for name in thin.LATER}
SMALL |= {"vgg16": 32, "resnet50": 32, "googlenet": 32, "densenet121_scale": 32, "inception_v3": 75}


def trained(name, goal=None, side=None, channels=3, **options):
    """A net with random weights, and statistics that are not those of a fresh BatchNorm."""
    options = {**nets.any_size(name), **options}
    made = model.load(name, 3, weights="none", dtype="float32", channels=channels, **options)
    rng = np.random.default_rng(0)

    def shaken(path, leaf):
        if path[-1].key.endswith("kernel"):
            return np.asarray(leaf)
        low, high = (0.7, 1.3) if path[-1].key in ("scale", "var") else (-0.2, 0.2)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(shaken, dict(made.variables))
    side = side or SMALL.get(name) or nets.spec(name).native_size[0]
    return dataclasses.replace(
        made,
        variables=variables,
        task=goal or task.classification(),
        classes=CLASSES,
        image_size=(side, side),
        decode=Decode(channels=channels),
    )


def images(made, count=3):
    shape = (count, *made.image_size, made.channels)
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def keras_outputs(path, given):
    import keras

    return np.asarray(keras.models.load_model(path)(given.astype(np.float32)))


def onnx_outputs(path, given):
    import onnxruntime

    return onnxruntime.InferenceSession(path).run(None, {"images": given.astype(np.float32)})[0]


def stablehlo_outputs(path, given):
    return np.asarray(jax.export.deserialize(bytearray(path.read_bytes())).call(given.astype(np.float32)))


READERS = {"keras": keras_outputs, "onnx": onnx_outputs, "stablehlo": stablehlo_outputs}


def difference(made, to, folder):
    """The largest difference between what the file and the model predict, and the largest prediction."""
    path = export.write(made, folder / f"model.{to}", to)
    given = images(made)
    expected = made.predict(list(given)).outputs
    found = READERS[to](path, given)
    assert found.shape == expected.shape
    return np.abs(found - expected).max(), np.abs(expected).max()


@pytest.mark.parametrize("to", READERS)
def test_a_net_predicts_the_same(tmp_path, to):
    """Bug: a pad, an epsilon, the order of channels or the preprocessing is another one."""
    off, largest = difference(trained("resnet50"), to, tmp_path)
    assert off <= 2e-5 * max(largest, 1), off


@pytest.mark.slow
@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize("name", list(nets.ZOO))
def test_every_net_predicts_the_same(tmp_path, name, to):
    """Bug: one row of the zoo is written as another net."""
    off, largest = difference(trained(name), to, tmp_path)
    print(f"{name} {to} {off:.1e}")
    assert off <= 5e-5 * max(largest, 1), off


@pytest.mark.slow
@pytest.mark.parametrize("to", READERS)
def test_googlenet_with_its_auxiliary_heads(tmp_path, to):
    """Bug: the mean of three heads is that of their logits."""
    off, _ = difference(trained("googlenet", side=224, auxiliary=True), to, tmp_path)
    assert off <= 2e-5


GOALS = {
    "labels": task.multilabel(),
    "values": task.regression(),
    "range": task.regression(range=(-1.0, 5.0)),
    "hidden": task.classification(),
}


@pytest.mark.slow
@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize("goal", GOALS)
def test_every_head(tmp_path, goal, to):
    """Bug: probabilities of labels are a softmax, values are cut to 0 to 1, or a hidden layer has no ReLU."""
    options = {"hidden": (16, 8), "dropout": 0.5} if goal == "hidden" else {}
    off, largest = difference(trained("vgg16", GOALS[goal], **options), to, tmp_path)
    assert off <= 2e-5 * max(largest, 1), off


@pytest.mark.slow
@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(tmp_path, channels, to):
    """Bug: a net for grey images wants three channels when it has left."""
    off, _ = difference(trained("vgg16", channels=channels), to, tmp_path)
    assert off <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("to", READERS)
def test_the_fully_connected_layers_of_vgg(tmp_path, to):
    """Bug: the map is flattened in another order."""
    off, _ = difference(trained("vgg16", side=224, fc=True), to, tmp_path)
    assert off <= 2e-5


def test_keras_needs_no_jaxft(tmp_path):
    """Bug: the file names a class of jaxft, or a Lambda that Keras refuses."""
    path = export.write(trained("vgg16"), tmp_path / "model.keras", "keras")
    program = (
        "import sys, numpy as np; sys.modules['jaxft'] = None\n"
        "import keras, zipfile\n"
        f"net = keras.models.load_model({str(path)!r})\n"
        "print(net(np.zeros((2, 32, 32, 3))).shape, [layer.name for layer in net.layers if not layer.trainable])\n"
        f"print(zipfile.ZipFile({str(path)!r}).read('jaxft.json').decode())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(2, 3)" in done.stdout and "bad & ugly" in done.stdout and "käse" in done.stdout


def test_frozen_layers_stay_frozen(tmp_path):
    """Bug: whoever trains on in Keras destroys what was frozen."""
    import keras

    made = trained("vgg16")
    made = dataclasses.replace(made, net=made.net.clone(frozen=frozenset({"block1_conv1", "block1_conv2"})))
    found = keras.models.load_model(export.write(made, tmp_path / "model.keras", "keras"))
    fixed = {layer.name for layer in found.layers if layer.weights and not layer.trainable}
    assert fixed == {"block1_conv1", "block1_conv2", "rgb_to_bgr"}


def test_weights_h5_of_an_application(tmp_path):
    """Bug: the weights of a new head are not those that Keras's own net reads."""
    import keras

    made = trained("resnet50")
    path = export.write(made, tmp_path / "model.weights.h5", "weights.h5")
    base = keras.applications.ResNet50(include_top=False, weights=None, pooling="avg", input_shape=(32, 32, 3))
    net = keras.Model(base.input, keras.layers.Dense(3, "softmax", name="predictions")(base.output))
    net.load_weights(path)
    given = images(made)
    prepared = keras.applications.resnet.preprocess_input(given.astype(np.float32))
    np.testing.assert_allclose(np.asarray(net(prepared)), made.predict(list(given)).outputs, atol=2e-5)


def test_safetensors(tmp_path):
    """Bug: a leaf is missing or transposed, or nobody can tell what the classes are."""
    from safetensors import safe_open

    made = trained("resnet50")
    path = export.write(made, tmp_path / "model.safetensors", "safetensors")
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        count = sum(len(leaves) for kind in made.variables.values() for leaves in kind.values())
        assert len(list(file.keys())) == count
        for kind in made.variables.values():
            for layer, leaves in kind.items():
                for leaf, value in leaves.items():
                    np.testing.assert_array_equal(file.get_tensor(f"{layer}/{leaf}"), value)


@pytest.mark.parametrize("to", export.FORMATS)
def test_what_goes_along(tmp_path, to):
    """Bug: whoever gets the file does not know the classes, or what the images must look like."""
    made = trained("vgg16")
    path = export.write(made, tmp_path / f"model.{to}", to)
    about = json.loads((tmp_path / f"model.{to}.json").read_text(encoding="utf-8"))
    assert about["classes"] == list(CLASSES) and about["image_size"] == [32, 32] and about["preprocessing"] == "caffe"
    assert about["format"] == to and sorted(tmp_path.iterdir()) == [path, tmp_path / f"model.{to}.json"]
    if to == "onnx":
        import onnx

        told = {pair.key: pair.value for pair in onnx.load(path).metadata_props}
        assert json.loads(told["classes"]) == list(CLASSES)
    if to == "stablehlo":
        assert "six months" in about["ages"]


def test_what_is_refused(tmp_path):
    """Bug: a file is overwritten, or a model that predicts something else is written."""
    made = trained("vgg16")
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"there\.onnx exists already"):
        export.write(made, tmp_path / "there.onnx", "onnx")
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="must end in .keras"):
        export.write(made, tmp_path / "model.h5", "keras")
    with pytest.raises(ValueError, match="is no format to export to; known are keras"):
        export.write(made, tmp_path / "model", "torch")
    with pytest.raises(ValueError, match="folder of .* does not exist"):
        export.write(made, tmp_path / "absent" / "model.onnx", "onnx")
    with pytest.raises(ValueError, match="has no task yet"):
        export.write(dataclasses.replace(made, task=None), tmp_path / "model.onnx", "onnx")
    own = dataclasses.replace(task.classification(), outputs=lambda logits: logits)
    with pytest.raises(ValueError, match="functions of your own"):
        export.write(dataclasses.replace(made, task=own), tmp_path / "model.onnx", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    """Bug: an ImportError, where a user wants to know what to install."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"needs onnx: pip install 'jaxft\[export\]'"):
        export.write(trained("vgg16"), tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", thin.ZOO)
def test_the_graph_holds_every_layer(name):
    """Bug: a layer with weights is left out, or a net of the zoo does something that cannot be written."""
    net = nets.create(name, 3, **nets.any_size(name))
    side = nets.spec(name).native_size
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *side, 3), np.float32))
    variables = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    found = graph.of(model.Model(net, variables, nets.spec(name).preprocessing, name, image_size=side))
    named = {layer.name.removesuffix("_pointwise") for layer in found.layers if layer.name}
    scales = {layer for layer in variables["params"] if layer.endswith("layer_scale")}  # part of the layer before
    assert named | scales == set(variables["params"])
    assert found.layers[found.heads[0]].shape == (3,)


@pytest.mark.parametrize("ending", [".weights.h5", ".h5"])
@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_a_keras_model_with_a_nested_backbone(tmp_path, name, ending):
    """Bug: the model that most Keras scripts build, a backbone within a Sequential, cannot load what is written."""
    import keras

    from jaxft import port_weights

    made = trained(name, hidden=(7,))
    path = tmp_path / f"model{ending}"
    options = {"fc": False} if name == "vgg16" else {}
    port_weights.save(name, dict(made.variables), path, nested=True, hidden=(7,), **options)
    application = {"vgg16": keras.applications.VGG16, "resnet50": keras.applications.ResNet50}[name]
    base = application(include_top=False, weights=None, input_shape=(32, 32, 3))
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(7, "relu"), keras.layers.Dense(3, "softmax")]
    net = keras.Sequential([keras.Input((32, 32, 3)), base, *head])
    net.load_weights(path)
    given = images(made)
    prepared = keras.applications.resnet.preprocess_input(given.astype(np.float32))
    np.testing.assert_allclose(np.asarray(net(prepared)), made.predict(list(given)).outputs, atol=2e-5)
