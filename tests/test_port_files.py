"""Weight files that people hold: shards, own names, forms of a net that only a detail tells apart."""

import json
import re
import shutil

import h5py
import keras
import keras_layouts as write
import numpy as np
import pytest
from thin import CLASSES, make
from thin import options as thin_options

from jaxft import keras_files, nets, port_weights, pretrained
from jaxft.nets import inception
from tests.reference import keras_nets

SMALL = {"alpha": 0.25}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the index of MobileNet in some shards and the same in one file, by Keras."""
    model = keras.applications.MobileNet(alpha=0.25, weights=None, input_shape=(224, 224, 3), classes=7)
    keras_nets.randomise(model, 0)
    folder = tmp_path_factory.mktemp("shards")
    model.save_weights(folder / "w.weights.json", max_shard_size=3e-4)
    model.save_weights(folder / "w.weights.h5")
    keras.backend.clear_session()
    return folder


@pytest.fixture
def shards(written, tmp_path):
    """(the index, the whole file), for a test to change."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path / "w.weights.json", tmp_path / "w.weights.h5"


def test_shards_are_one_file(shards):
    """Bug: Keras's index of shards is refused, a layer of one shard is lost, or the record names no weights."""
    index, whole = shards
    assert len(list(index.parent.glob("w_*.weights.h5"))) > 2
    loaded, report = port_weights.load("mobilenet", index, num_classes=7, **SMALL)
    expected, _ = port_weights.load("mobilenet", whole, num_classes=7, **SMALL)
    for layer, leaves in expected["params"].items():
        for leaf, array in leaves.items():
            np.testing.assert_array_equal(loaded["params"][layer][leaf], array, f"{layer} {leaf}")
    assert report.container == "shards"
    before = keras_files.content_hash(index)
    assert report.sha256 == before == pretrained.resolve("mobilenet", index, classifier=True).sha256
    shard = sorted(index.parent.glob("w_*.weights.h5"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert keras_files.content_hash(index) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.with_name("w_00001.weights.h5").unlink(), "w_00001.weights.h5 is not beside it"),
        (lambda index: index.write_text("{}"), "no index of weights in shards"),
        (lambda index: index.write_text('{"weight_map": {"a": "../w_00001.weights.h5"}}'), "files that lie beside it"),
        (lambda index: index.write_text('{"weight_map": {"a": 3}}'), "no index"),
        (lambda index: index.with_name("w_00001.weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n"), "w_00001.weights.h5"),
    ],
)
def test_bad_shards(shards, change, message):
    """Bug: a lost shard gives random layers, a name reaches out of the folder, or a traceback."""
    change(shards[0])
    with pytest.raises(ValueError, match=message):
        port_weights.load("mobilenet", shards[0], num_classes=7, **SMALL)


@pytest.mark.parametrize("twice", ["array", "group", "group in itself", "groups, forty deep"])
def test_shards_with_hard_links(shards, twice):
    """Bug: one array under 2**40 names is copied as often, or a group that holds itself comes to no end."""
    with h5py.File(shards[0].with_name("w_00001.weights.h5"), "a") as file:
        group = file.create_group("layers/x")
        group["array"] = np.ones(3, np.float32)
        if twice == "array":
            group["again"] = group["array"]
        elif twice == "group":
            file["layers/y"] = group
        elif twice == "group in itself":
            group["self"] = group
        else:
            for depth in range(40):
                outer = file.create_group(f"deep{depth}")
                outer["one"] = outer["two"] = group
                group = outer
    with pytest.raises(ValueError, match="is a second name of what the shard holds already"):
        port_weights.load("mobilenet", shards[0], num_classes=7, **SMALL)


def test_one_shard_alone_is_refused(shards):
    """Bug: what one shard lacks is random."""
    with pytest.raises(ValueError, match="the file has no such layer"):
        port_weights.load("mobilenet", shards[0].with_name("w_00001.weights.h5"), num_classes=7, **SMALL)


@pytest.mark.parametrize("kind", ["conv2d", "dense"])
def test_a_head_of_either_kind_fills_mobilenets(tmp_path, kind):
    """Bug: the last layer must be a 1×1 convolution as in Keras's model, or a dense layer as in one's own; not both."""
    net, variables, _ = make("mobilenet")
    port_weights.save("mobilenet", variables, tmp_path / "keras.weights.h5", **SMALL)
    loaded, _ = port_weights.load("mobilenet", tmp_path / "keras.weights.h5", num_classes=CLASSES, **SMALL)
    kernel = variables["params"]["conv_preds"]["kernel"]
    np.testing.assert_array_equal(loaded["params"]["conv_preds"]["kernel"], kernel)
    if kind == "dense":
        layers = write_layers(net, variables)
        layers[-1] = ("my_output", {"kernel": kernel, "bias": variables["params"]["conv_preds"]["bias"]})
        path = write.named(tmp_path / "own.h5", layers, write.keras_2, attributes=write.KERAS_2)
        loaded, report = port_weights.load("mobilenet", path, num_classes=CLASSES, **SMALL)
        np.testing.assert_array_equal(loaded["params"]["conv_preds"]["kernel"], kernel)
        assert report.names["conv_preds"] == "my_output"


def write_layers(net, variables):
    """[(layer, Keras's field → array)] of a net in Keras's order."""
    fields = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
    found = []
    for layer in (layer for layers in net.layers().values() for layer in layers):
        leaves = {**variables["params"].get(layer, {}), **variables["batch_stats"].get(layer, {})}
        named = {fields.get(leaf, leaf) if "mean" in leaves else leaf: array for leaf, array in leaves.items()}
        found.append((layer, named))
    return [entry for entry in found if entry[1]]


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_the_names_of_older_keras(tmp_path, name):
    """Bug: the published files, whose layers have the names of the year of their making, are refused."""
    net, variables, _ = make(name)
    options = {**thin_options(name)[0]}
    layers = []
    for layer, fields in write_layers(net, variables):
        if name == "mobilenet_v2":
            old = re.sub(r"^block_(\d+)_(\w+?)(_BN)?$", rename_v2, layer.replace("expanded_conv_", "block_0_"))
        else:
            old = re.sub(r"_bn$", "/BatchNorm", layer).replace("squeeze_excite_conv", "squeeze_excite/Conv")
            old = re.sub(r"^(expanded_conv(_\d+)?)_(?=[a-z])", r"\1/", old)
            old = old.replace("conv", "Conv", 1) if old.startswith("conv") else old
            old = {"logits": "Logits"}.get(old, old)
        layers.append((old, fields))
    assert sum(old != layer for (old, _), (layer, _) in zip(layers, write_layers(net, variables), strict=True)) > 20
    path = write.named(tmp_path / "old.h5", layers, write.keras_2, attributes=write.KERAS_2)
    loaded, _ = port_weights.load(name, path, num_classes=CLASSES, **options)
    for layer, leaves in variables["params"].items():
        for leaf, array in leaves.items():
            np.testing.assert_array_equal(loaded["params"][layer][leaf], array, f"{layer} {leaf}")


def rename_v2(found):
    block, part, norm = found.groups()
    return f"bn{block}_conv_{block}_bn_{part}" if norm else f"mobl{block}_conv_{block}_{part}"


def test_names_of_ones_own(tmp_path):
    """Bug: layers that the user called otherwise can only be left out, or a wrong mapping loads something."""
    net, variables, _ = make("mobilenet", hidden=(4,))
    layers = write_layers(net, variables)
    renamed = {"conv_pw_3": "third", "hidden1": "neck", "conv_preds": "out"}
    layers = [(renamed.get(name, name), fields) for name, fields in layers]
    path = write.named(tmp_path / "own.h5", layers, write.keras_2, attributes=write.KERAS_2)
    options = {**SMALL, "hidden": (4,), "num_classes": CLASSES}
    with pytest.raises(ValueError, match="third"):
        port_weights.load("mobilenet", path, **options)
    loaded, report = port_weights.load("mobilenet", path, names={b: a for a, b in renamed.items()}, **options)
    for layer, leaves in variables["params"].items():
        for leaf, array in leaves.items():
            np.testing.assert_array_equal(loaded["params"][layer][leaf], array, f"{layer} {leaf}")
    assert report.names["conv_pw_3"] == "third" and not report.fresh
    for names, message in (
        ({"thirt": "conv_pw_3"}, "has none called thirt"),
        ({"third": "conv_pw"}, "no layer of the"),
    ):
        with pytest.raises(ValueError, match=message):
            port_weights.load("mobilenet", path, names=names, **options)


def test_names_on_a_command_line():
    """Bug: a word without =, or with two, becomes a mapping of something."""
    assert port_weights.pairs(("a=b", "c/d=e")) == {"a": "b", "c/d": "e"}
    for word in ("a", "a=b=c"):
        with pytest.raises(ValueError, match="is not the file's name of a layer"):
            port_weights.pairs((word,))


def test_a_trained_gamma_of_inception_v4(tmp_path):
    """Bug: a file whose gammas are not all one is refused without a way out, or loses them."""
    table = tuple(inception.v4((1, 1, 1)).items())
    net = nets.create("inception_v4_gamma", CLASSES, table=table)
    variables = nets.init(net, (75, 75), 0)
    variables = {kind: {k: dict(v) for k, v in leaves.items()} for kind, leaves in variables.items()}
    variables["params"]["batch_normalization_3"]["scale"] = np.linspace(0.5, 2, 64, dtype=np.float32)
    for file in ("w.weights.h5", "w.h5"):
        port_weights.save("inception_v4_gamma", variables, tmp_path / file, table=table)
        loaded, _ = port_weights.load("inception_v4_gamma", tmp_path / file, num_classes=CLASSES, table=table)
        scale = loaded["params"]["batch_normalization_3"]["scale"]
        np.testing.assert_array_equal(scale, variables["params"]["batch_normalization_3"]["scale"])


@pytest.mark.slow
def test_the_message_names_the_net_with_gamma(tmp_path):
    """Bug: whoever trained the source's script is told what differs, and not which net has it."""
    variables = nets.init(nets.create("inception_v4_gamma", 1001), (299, 299), 0)
    params = dict(variables["params"])
    params["batch_normalization_3"] = {**params["batch_normalization_3"], "scale": np.full(64, 0.9, np.float32)}
    port_weights.save("inception_v4_gamma", {**variables, "params": params}, tmp_path / "w.h5")
    with pytest.raises(ValueError, match="It is a file of inception_v4_gamma .*gamma that was trained"):
        port_weights.load("inception_v4", tmp_path / "w.h5", num_classes=1001)


def test_resnet50_of_keras_2_1(tmp_path):
    """Bug: a file of Keras 2.1 fills the net of release v0.2, whose pool1 is not padded: other features, no message."""
    net, variables, _ = make("resnet50_v02")
    layers = write_layers(net, variables)
    for listed, fits, other in (
        ("pool1_pad", "resnet50_v21", "resnet50_v02"),
        ("pool1", "resnet50_v02", "resnet50_v21"),
    ):
        all_layers = [*layers[:2], (listed, {}), *layers[2:]]
        path = write.named(tmp_path / f"{listed}.h5", all_layers, write.keras_2, attributes=write.KERAS_2)
        options = {"num_classes": CLASSES, "depths": (2, 1, 1, 1)}
        loaded, _ = port_weights.load(fits, path, **options)
        assert set(loaded["params"]) == set(variables["params"])
        with pytest.raises(ValueError, match=f"pool1_pad.*it is a file of {fits}"):
            port_weights.load(other, path, **options)
    path = write.named(tmp_path / "unknown.h5", layers, write.keras_2, attributes=write.KERAS_2)
    for name in ("resnet50_v02", "resnet50_v21"):  # which of the two, the caller says
        port_weights.load(name, path, num_classes=CLASSES, depths=(2, 1, 1, 1))


@pytest.mark.parametrize("suffix", ["weights.h5", "keras", "h5"])
def test_lora(tmp_path, suffix):
    """Bug: the two small matrices of LoRA are lost, or a message does not name them."""
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(base.output)
    hidden = keras.layers.Dense(8, activation="relu", name="neck")
    model = keras.Model(base.input, keras.layers.Dense(3, name="out")(hidden(x)))
    hidden.enable_lora(2)
    a, b = hidden.lora_kernel_a, hidden.lora_kernel_b
    b.assign(np.ones(b.shape, np.float32))
    merged = np.asarray(hidden._kernel + a @ b)  # what the layer computes with
    path = tmp_path / f"w.{suffix}"
    if suffix == "weights.h5":
        model.save_weights(path)
    else:
        model.save(path)
    keras.backend.clear_session()
    options = {"num_classes": 3, "fc": False, "hidden": (8,)}
    if suffix == "h5":  # Keras's older format keeps them apart
        with pytest.raises(ValueError, match="neck keep the matrices of LoRA"):
            port_weights.load("vgg16", path, **options)
        return
    loaded, _ = port_weights.load("vgg16", path, **options)
    np.testing.assert_allclose(loaded["params"]["hidden1"]["kernel"], merged, rtol=1e-6, atol=1e-6)


def test_the_index_is_json_of_keras(shards):
    """The layout that the tests above rest on."""
    found = json.loads(shards[0].read_text())
    assert set(found) == {"metadata", "weight_map"}
