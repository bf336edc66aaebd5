import dataclasses
import gzip
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import h5py
import jax
import keras_layouts as write
import numpy as np
import pytest

from jaxft import fetch, keras_files, keras_match, nets, port_weights
from jaxft.nets import vgg

CLASSES = 12


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """VGG of the same layers and names, a ten-thousandth of the size."""
    monkeypatch.setattr(vgg, "WIDTHS", (2, 3, 4, 5, 6))
    monkeypatch.setattr(vgg, "FC_WIDTH", 7)


@pytest.fixture
def layers():
    """[(name, arrays)] of a thin VGG16 in the origin's order, weightless layers included; HWIO, float32."""
    return make_layers("vgg16")


def make_layers(name, num_classes=CLASSES, seed=0):
    rng = np.random.default_rng(seed)
    net = nets.create(name, num_classes)
    expected = keras_match.expect(name, net)
    order = [layer for stage in net.layers().values() for layer in stage]
    draw = {layer: [rng.normal(size=s).astype(np.float32) for s in expected[layer].values()] for layer in expected}
    return [(layer, draw.get(layer, [])) for layer in order]


def weighted(layers):
    return [(name, arrays) for name, arrays in layers if arrays]


def notop(layers):
    return [(name, arrays) for name, arrays in layers if name.startswith("block")]


def holds(variables, layers, without=()):
    """Whether the variables are exactly the arrays of the layers."""
    expected = {name: arrays for name, arrays in weighted(layers) if name not in without}
    assert set(variables["params"]) - set(without) == set(expected)
    for name, (kernel, bias) in expected.items():
        for leaf, array in (("kernel", kernel), ("bias", bias)):
            found = variables["params"][name][leaf]
            assert found.dtype == np.float32 and isinstance(found, np.ndarray)
            np.testing.assert_array_equal(found, array, err_msg=f"{name}.{leaf}")


def rename(layers, conv, dense, first):
    """Automatic names: `conv_1`, … or, from 0, `conv`, `conv_1`, …, as the generations count."""
    counts = {conv: first, dense: first}
    renamed = []
    for name, arrays in layers:
        if arrays:
            stem = conv if arrays[0].ndim == 4 else dense
            name = f"{stem}_{counts[stem]}" if counts[stem] else stem
            counts[stem] += 1
        renamed.append((name, arrays))
    return renamed


THEANO = {"backend": b"theano", "keras_version": b"1.2.2"}
TENSORFLOW = {"backend": b"tensorflow", "keras_version": b"2.1.0"}

# layout → (file name, writer(path, layers), the layout's name, extra arguments of load)
LAYOUTS = {
    "0.3 sequential": ("w.h5", write.sequential_03, "keras0.3-sequential", {"order": "tf"}),
    "0.3 graph": ("w.h5", write.graph_03, "keras0.3-graph", {"order": "tf"}),
    "1": ("w.h5", lambda p, x: write.named(p, x, write.keras_1_official), "keras1", {"order": "tf"}),
    "1 automatic, shuffled": (
        "w.h5",
        lambda p, x: write.named(p, rename(x, "convolution2d", "dense", 1)[::-1], write.keras_1),
        "keras1",
        {"order": "tf"},
    ),
    "2": ("w.h5", lambda p, x: write.named(p, x, write.keras_2, attributes=TENSORFLOW, extra=True), "keras2", {}),
    "2 chunked, str": (
        "w.h5",
        lambda p, x: write.named(p, x, write.keras_2, attributes=TENSORFLOW, chunked=True, as_str=True),
        "keras2",
        {},
    ),
    "2 model": (
        "w.h5",
        lambda p, x: write.named(p, x, write.keras_2, attributes=TENSORFLOW, root="model_weights", extra=True),
        "keras2",
        {},
    ),
    "2 automatic": (
        "w.h5",
        lambda p, x: write.named(p, rename(x, "conv2d", "dense", 41)[::-1], write.keras_2, attributes=TENSORFLOW),
        "keras2",
        {},
    ),
    "3": ("w.weights.h5", lambda p, x: write.keras_3(p, x, with_names=True), "keras3", {}),
    "3 without names": ("w.weights.h5", write.keras_3, "keras3", {}),
    "3 zip": ("w.keras", write.keras_3, "keras3", {}),
    "2.12 zip": (
        "w.keras",
        lambda p, x: write.keras_3(p, x, prefix="_layer_checkpoint_dependencies", gaps=True),
        "keras3",
        {},
    ),
    "2.14 zip": ("w.keras", lambda p, x: write.keras_3(p, x, prefix="_layer_checkpoint_dependencies"), "keras3", {}),
}


@pytest.mark.parametrize("generation", LAYOUTS)
@pytest.mark.parametrize("classifier", [True, False])
def test_every_generation(tmp_path, layers, generation, classifier):
    """Bug: lexical order (conv2d_10 before conv2d_2), file order, chunks or prefixes put a layer wrong."""
    file, writer, layout, extra = LAYOUTS[generation]
    stored = layers if classifier else notop(layers)
    path = writer(tmp_path / file, stored)
    options = {"num_classes": CLASSES} if classifier else {"num_classes": None}
    variables, report = port_weights.load("vgg16", path, **options, **extra)
    holds(variables, stored)
    assert report.layout == layout
    assert report.container == ("keras" if "zip" in generation else "model" if "model" in generation else "weights")
    assert not (report.fresh or report.replaced or report.dropped or report.ignored)


def test_the_net_computes_the_same_from_either_ordering(tmp_path, layers):
    """Bug: fc1's rows stay channel-first, or taps stay rotated; both have shapes that fit."""
    flattened = ("fc1", (7, 7, vgg.WIDTHS[-1]))
    stored = write.theano(layers, flattened)
    path = write.named(tmp_path / "th.h5", stored, write.keras_1, attributes=THEANO)
    variables, report = port_weights.load("vgg16", path, num_classes=CLASSES)
    holds(variables, layers)
    assert (report.order, report.decided_by) == ("th", "the file's backend attribute")


@pytest.mark.parametrize(
    ("order", "change", "flattened"),
    [
        ("th", lambda a: a[::-1, ::-1].transpose(3, 2, 0, 1), True),
        ("th-tf-kernels", lambda a: a.transpose(3, 2, 0, 1), True),
        ("tf-th-kernels", lambda a: a[::-1, ::-1], False),
        ("tf", lambda a: a, False),
    ],
)
@pytest.mark.parametrize("writer", [write.sequential_03, write.graph_03])
def test_orderings_by_word(tmp_path, layers, order, change, flattened, writer):
    """Bug: transposition, rotation and the Dense after the Flatten are one switch, where files mix them."""
    stored = [(name, [change(a) if a.ndim == 4 else a for a in arrays]) for name, arrays in layers]
    if flattened:
        fc1 = dict(write.theano(layers, ("fc1", (7, 7, vgg.WIDTHS[-1]))))["fc1"]
        stored = [(name, fc1 if name == "fc1" else arrays) for name, arrays in stored]
    path = writer(tmp_path / "w.h5", stored)
    variables, report = port_weights.load("vgg16", path, num_classes=CLASSES, order=order)
    holds(variables, layers)
    assert (report.order, report.decided_by) == (order, "your word")
    with pytest.raises(ValueError, match=r"does not say which backend.*order=" + order[:2]):
        port_weights.load("vgg16", path, num_classes=CLASSES)


def test_a_keras_2_file_of_theano_is_rotated(tmp_path, layers):
    """Bug: HWIO is taken for TensorFlow's; the backend attribute is the one sign."""
    stored = [(name, [a[::-1, ::-1] if a.ndim == 4 else a for a in arrays]) for name, arrays in layers]
    path = write.named(tmp_path / "w.h5", stored, write.keras_2, attributes=THEANO | {"keras_version": b"2.0.8"})
    variables, report = port_weights.load("vgg16", path, num_classes=CLASSES)
    holds(variables, layers)
    assert report.order == "tf-th-kernels"


def test_a_word_that_contradicts_the_shapes(tmp_path, layers):
    """Bug: the word is believed, and every layer fails with a shape that says nothing of the ordering."""
    path = write.sequential_03(tmp_path / "w.h5", layers)
    with pytest.raises(ValueError, match="order='th' contradicts the first kernel, which is stored as 3×3×3×2"):
        port_weights.load("vgg16", path, num_classes=CLASSES, order="th")
    with pytest.raises(ValueError, match="order='hwio'"):
        port_weights.load("vgg16", path, num_classes=CLASSES, order="hwio")


def test_a_published_hash_decides(tmp_path, layers, monkeypatch):
    """Bug: the official files, which name no backend, need a word."""
    path = write.named(tmp_path / "w.h5", layers, write.keras_1_official)
    row = nets.ZOO["vgg16"]
    weights = nets.WeightFile("", hashlib.md5(path.read_bytes()).hexdigest(), classifier=True)
    monkeypatch.setitem(nets.ZOO, "vgg16", dataclasses.replace(row, weights={"x": weights}))
    assert port_weights.load("vgg16", path, num_classes=CLASSES)[1].decided_by == "the file's published hash"


def test_nested_models(tmp_path, layers):
    """Bug: an inner model is one layer with 26 arrays, or its head hides the user's own."""
    head = [("dense_1", [np.ones((6, CLASSES), np.float32), np.zeros(CLASSES, np.float32)])]
    path = write.nested(tmp_path / "w.h5", notop(layers), head)
    variables, report = port_weights.load("vgg16", path, num_classes=CLASSES, fc=False)
    holds(variables, [*notop(layers), ("predictions", head[0][1])])
    assert report.layers["predictions"]["kernel"]["stored"] == "dense_1/kernel:0"


def test_files_by_keras_itself(tmp_path):
    """Bug: a hand-written layout of these tests is not what Keras writes."""
    import keras

    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((32, 32, 3))
    for block, depth in enumerate((2, 2, 3, 3, 3), 1):
        for i in range(1, depth + 1):
            conv = keras.layers.Conv2D(
                vgg.WIDTHS[block - 1], 3, padding="same", name=f"block{block}_conv{i}", bias_initializer="uniform"
            )
            x = conv(x)
        x = keras.layers.MaxPooling2D(name=f"block{block}_pool")(x)
    inner = keras.Model(inputs, x, name="vgg16")
    outer = keras.Sequential([inputs, inner, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(CLASSES)])
    outer.compile("sgd", "mse")
    layers = [(layer.name, layer.get_weights()) for layer in inner.layers if layer.get_weights()]
    for model, expected in ((inner, layers), (outer, [*layers, ("predictions", outer.layers[-1].get_weights())])):
        for suffix in ("weights.h5", "keras", "h5"):
            path = tmp_path / f"{model.name}.{suffix}"
            model.save_weights(path) if suffix == "weights.h5" else model.save(path)
            if model is inner:
                variables, _ = port_weights.load("vgg16", path, num_classes=None)
            else:
                variables, _ = port_weights.load("vgg16", path, num_classes=CLASSES, fc=False)
            holds(variables, expected)


def test_the_head_is_replaced_dropped_or_fresh(tmp_path, layers):
    """Bug: a head of another width is an error, or is replaced without a word; or its values depend on the clock."""
    path = write.keras_3(tmp_path / "w.weights.h5", layers)
    variables, report = port_weights.load("vgg16", path, num_classes=5, seed=3)
    holds(variables, layers, without=["predictions"])
    assert variables["params"]["predictions"]["kernel"].shape == (7, 5)
    assert report.fresh == report.replaced == ["predictions"] and "replaced: predictions" in str(report)
    again, _ = port_weights.load("vgg16", path, num_classes=5, seed=3)
    other, _ = port_weights.load("vgg16", path, num_classes=5, seed=4)
    kernel = variables["params"]["predictions"]["kernel"]
    np.testing.assert_array_equal(kernel, again["params"]["predictions"]["kernel"])
    assert not np.array_equal(kernel, other["params"]["predictions"]["kernel"])

    pooled, report = port_weights.load("vgg16", path, num_classes=5, fc=False, hidden=(9,))
    assert report.dropped == ["fc1", "fc2"] and report.fresh == ["hidden1", "predictions"]
    assert list(pooled["params"])[-2:] == ["hidden1", "predictions"]


def test_fresh_values_are_those_of_the_nets_own_init(tmp_path, layers):
    """Bug: fresh layers are zeros, or drawn by other rules than the net's."""
    path = write.keras_3(tmp_path / "w.weights.h5", notop(layers))
    variables, _ = port_weights.load("vgg16", path, num_classes=5, fc=False, hidden=(9,), seed=2)
    whole = nets.create("vgg16", 5, fc=False, hidden=(9,)).init(
        jax.random.key(2), np.zeros((1, 224, 224, 3), np.float32)
    )
    for layer in ("hidden1", "predictions"):
        np.testing.assert_allclose(variables["params"][layer]["kernel"], whole["params"][layer]["kernel"], rtol=1e-6)


def bad(layers, change):
    """The layers with `change(name, arrays)` in place of those for which it returns something."""
    return [
        (name, change(name, arrays) if arrays and change(name, arrays) is not None else arrays)
        for name, arrays in layers
    ]


def test_strict(tmp_path, layers):
    """Bug: a layer that is missing, superfluous or of another shape is passed over, or reported without its name."""

    def load(stored, **options):
        path = write.keras_3(tmp_path / "w.weights.h5", stored, with_names=True)
        return port_weights.load("vgg16", path, num_classes=CLASSES, **options)

    missing = [layer for layer in layers if layer[0] != "block3_conv2"]
    with pytest.raises(ValueError, match="block3_conv2: the net wants kernel 3×3×4×4, bias 4, the file has no such"):
        load(missing)
    shape = bad(layers, lambda name, a: [a[0][..., :-1], a[1]] if name == "block4_conv1" else None)
    with pytest.raises(
        ValueError, match=r"block4_conv1: the net wants kernel 3×3×4×5, bias 5, the file has .* 3×3×4×4"
    ):
        load(shape)
    bias = bad(layers, lambda name, a: [a[0]] if name == "fc2" else None)
    with pytest.raises(ValueError, match="fc2: the net wants kernel 7×7, bias 7, the file has"):
        load(bias)
    extra = [*layers, ("dsn1", [np.ones((1, 1, 2, 1), np.float32)])]
    with pytest.raises(ValueError, match="dsn1: the file has .*, the net has no such layer"):
        load(extra)
    variables, report = load(extra, ignore=["dsn?"])
    holds(variables, layers)
    assert report.ignored == ["dsn1"]
    twice = write.nested(tmp_path / "twice.h5", notop(layers), [("block1_conv1", dict(layers)["block1_conv1"])])
    with pytest.raises(ValueError, match="two layers called block1_conv1"):
        port_weights.load("vgg16", twice, num_classes=None)


def test_fc_layers_of_a_file_without_classifier(tmp_path, layers):
    """Bug: fc1 and fc2 start from random values although ported ones were asked for."""
    path = write.keras_3(tmp_path / "w.weights.h5", notop(layers), with_names=True)
    with pytest.raises(ValueError, match=r"(?s)fc1: .*The file lacks fc1, fc2; fc=False .*--head gap\b"):
        port_weights.load("vgg16", path, num_classes=CLASSES)


@pytest.mark.parametrize(("file", "into"), [("vgg19", "vgg16"), ("vgg16", "vgg19")])
def test_a_sibling_is_refused_by_name(tmp_path, file, into):
    """Bug: the layers that both have are loaded and the others are left random or unused."""
    path = write.keras_3(tmp_path / "w.weights.h5", make_layers(file), with_names=True)
    with pytest.raises(ValueError, match=rf"(?s)does not fit {into}.*block3_conv4.*It is a file of {file} "):
        port_weights.load(into, path, num_classes=CLASSES)


def test_values_that_are_not_finite(tmp_path, layers):
    """Bug: a damaged file trains to NaN an hour later."""
    for value in (np.nan, np.inf):
        dict(layers)["block2_conv1"][0][1, 1, 0, 0] = value
        path = write.keras_3(tmp_path / "w.weights.h5", layers)
        with pytest.raises(ValueError, match="block2_conv1 holds values that are not finite"):
            port_weights.load("vgg16", path, num_classes=CLASSES)


def test_other_float_types_are_cast_and_reported(tmp_path, layers):
    """Bug: a float16 file gives float16 parameters."""
    half = [(name, [a.astype(np.float16) for a in arrays]) for name, arrays in layers]
    path = write.keras_3(tmp_path / "w.weights.h5", half)
    variables, report = port_weights.load("vgg16", path, num_classes=CLASSES)
    holds(variables, [(name, [a.astype(np.float32) for a in arrays]) for name, arrays in half])
    assert report.layers["fc1"]["kernel"]["dtype"] == "float16" and "cast from float16" in str(report)


def test_files_that_are_not_whole_or_not_keras(tmp_path, layers):
    """Bug: h5py's own words, without the file or what to do; or a truncated file that loads."""
    whole = write.keras_3(tmp_path / "w.weights.h5", layers).read_bytes()
    path = tmp_path / "bad.h5"
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="bad.h5 is not a whole Keras weight file"):
            port_weights.load("vgg16", path)
    with h5py.File(path, "w") as file:
        file["temperature"] = np.zeros(3)
    with pytest.raises(ValueError, match="not of Keras.*temperature"):
        port_weights.load("vgg16", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil", "x")
    with pytest.raises(ValueError, match=r"bad.h5 is a zip without model.weights.h5, so not a .keras file"):
        port_weights.load("vgg16", path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        port_weights.load("vgg16", tmp_path / "none.h5")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        port_weights.load("vgg16", tmp_path)


def zipped(*names):
    def fill(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return fill


def holding(content):
    return lambda path: path.write_bytes(content)


SAFETENSORS = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
CONVERT = "a .keras zip. Take the Keras file of the same net .* save_weights as .weights.h5"

# file name → (what writes it, what the message must say)
FOREIGN = {
    "resnet50.pth": (zipped("resnet50/data.pkl", "resnet50/data/0"), f"is a PyTorch file.*{CONVERT}"),
    "old.pt": (holding(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), f"is a PyTorch file.*{CONVERT}"),
    "w.pkl": (holding(pickle.dumps({"w": 1})), f"is a pickle.*{CONVERT}"),
    "w.npz": (lambda path: np.savez(path, w=np.zeros(2)), f"is a NumPy file.*{CONVERT}"),
    "w.npy": (lambda path: np.save(path, np.zeros(2)), f"is a NumPy file.*{CONVERT}"),
    "w.safetensors": (
        holding(len(SAFETENSORS).to_bytes(8, "little") + SAFETENSORS + bytes(4)),
        f"is a safetensors file.*{CONVERT}",
    ),
    "lfs.h5": (
        holding(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a Git LFS pointer, .*git lfs pull",
    ),
    "w.weights.json": (
        holding(json.dumps({"metadata": {}, "weight_map": {"/layers/dense/vars": "w_00000.weights.h5"}}).encode()),
        "an index of shards .*, of which w_00000.weights.h5 is not beside it",
    ),
    "w.h5.gz": (holding(gzip.compress(b"x")), "compressed with gzip: unpack it first"),
    "login.h5": (holding(b"\n<!DOCTYPE html><html>log in</html>"), "is a web page"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_kinds_are_named(tmp_path, name):
    """Bug: a PyTorch file, an LFS pointer, … is called a transfer that was cut short, and downloaded once more."""
    make, message = FOREIGN[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"(?s){name} is .*") as caught:
        port_weights.load("vgg16", tmp_path / name)
    assert re.search(message, str(caught.value)) and "cut short" not in str(caught.value)


def test_a_suffix_is_no_evidence(tmp_path, layers):
    """Bug: a whole Keras file is refused because its name ends as PyTorch's do."""
    path = write.keras_3(tmp_path / "w.ckpt", layers)
    holds(port_weights.load("vgg16", path, num_classes=CLASSES)[0], layers)


def test_a_file_is_read_once_for_its_hashes(tmp_path, layers, monkeypatch):
    """Bug: sha256 for the report and md5 for the published files take a reading each."""
    path = write.named(tmp_path / "w.h5", layers, write.keras_1_official)
    os.utime(path, (1e9, 1e9))
    digests = []
    new = hashlib.new
    monkeypatch.setattr(fetch.hashlib, "new", lambda kind, **options: digests.append(kind) or new(kind, **options))
    row = nets.ZOO["vgg16"]
    weights = nets.WeightFile("", hashlib.md5(path.read_bytes()).hexdigest(), classifier=True)
    monkeypatch.setitem(nets.ZOO, "vgg16", dataclasses.replace(row, weights={"x": weights}))
    for _ in range(2):
        _, report = port_weights.load("vgg16", path, num_classes=CLASSES)
        assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(digests) == ["md5", "sha256"]


def test_files_that_reach_outside_themselves(tmp_path, layers):
    """Bug: a weight file reads another file of the user's through a link."""
    secret = tmp_path / "secret.h5"
    kernel = dict(layers)["block1_conv1"][0]
    with h5py.File(secret, "w") as file:
        file["data"] = kernel
    kernel.tofile(tmp_path / "raw")

    def external_storage(group):
        group.create_dataset("0", kernel.shape, "f4", external=[(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)])

    def virtual(group):
        layout = h5py.VirtualLayout(kernel.shape, "f4")
        layout[...] = h5py.VirtualSource(str(secret), "data", kernel.shape)
        group.create_virtual_dataset("0", layout)

    def external_link(group):
        group["0"] = h5py.ExternalLink(str(secret), "/data")

    def soft_link(group):
        group["0"] = h5py.SoftLink("/layers/conv2d_1/vars/0")

    def text(group):
        group["0"] = ["text"]

    for trick, message in (
        (external_storage, "another file"),
        (virtual, "another file"),
        (external_link, "is a link"),
        (soft_link, "is a link"),
        (text, "not numbers"),
    ):
        path = write.keras_3(tmp_path / "w.weights.h5", layers)
        with h5py.File(path, "r+") as file:
            del file["layers/conv2d/vars/0"]
            trick(file["layers/conv2d/vars"])
        with pytest.raises(ValueError, match=message):
            port_weights.load("vgg16", path, num_classes=CLASSES)


def test_a_claimed_size_is_not_allocated(tmp_path, layers):
    """Bug: a file of a few kilobytes that claims a terabyte is read before its shape is compared."""
    path = write.keras_3(tmp_path / "w.weights.h5", layers)
    with h5py.File(path, "r+") as file:
        del file["layers/conv2d/vars/0"]
        file["layers/conv2d/vars"].create_dataset("0", (3, 3, 2**20, 2**20), "f4", chunks=(1, 1, 64, 64))
    with pytest.raises(ValueError, match="vars/0 would be 39,582,418,599,936 bytes when read, of 0 that are stored"):
        port_weights.load("vgg16", path, num_classes=CLASSES)


def many_parameters(path):
    with h5py.File(path, "w") as file:
        file.attrs["nb_layers"] = 1
        file.create_group("layer_0").attrs["nb_params"] = 10**9


def many_paths(path):
    with h5py.File(path, "w") as file:
        group = file.create_group("layers")
        for _ in range(40):
            inner = group.create_group("a")
            group["b"] = inner  # a hard link: twice as many paths with each
            group = inner


def deep(path):
    with h5py.File(path, "w") as file:
        file.create_group("/".join("a" * 200))


def circle(path):
    with h5py.File(path, "w") as file:
        file.create_group("a")["b"] = file["/"]


def compressed(path):
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "a/vars/0",
            (2**13, 2**13),
            "f4",
            compression="gzip",
            chunks=(2**13, 2**6),
            data=np.zeros((2**13, 2**13), "f4"),
        )


def inflated(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(2**27))


def odd_attribute(path):
    with h5py.File(path, "w") as file:
        file.attrs["nb_layers"] = [[1, 2], [3, 4]]


def not_text(path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = b"\xff\xfe"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (many_parameters, "layer_0 promises 1,000,000,000 arrays in nb_params, and holds 0"),
        (many_paths, "more than 20,000 groups"),
        (deep, "more than 50 in one another"),
        (circle, "more than 50 in one another"),
        (compressed, "would be 268,435,456 bytes when read"),
        (inflated, "model.weights.h5 would be 134,217,728 bytes when read"),
        (odd_attribute, "not a whole Keras weight file"),
        (not_text, "utf-8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_means_harm(tmp_path, make, message):
    """Bug: a small file hangs the reader, takes gigabytes, or ends in an exception that does not name it."""
    make(tmp_path / "w.h5")
    with pytest.raises(ValueError, match=f"w.h5.*{message}"):
        port_weights.load("vgg16", tmp_path / "w.h5", num_classes=CLASSES)


@pytest.mark.parametrize("name", ["back.h5", "back.weights.h5"])
@pytest.mark.parametrize("options", [{}, {"fc": False}, {"fc": False, "hidden": (9, 8)}, {"hidden": (9,)}], ids=str)
def test_what_is_saved_loads_again(tmp_path, layers, name, options):
    """Bug: the order of a pytree, which sorts names, becomes the order of the file."""
    source = write.keras_3(tmp_path / "w.weights.h5", layers, with_names=True)
    variables, _ = port_weights.load("vgg16", source, num_classes=CLASSES, ignore=["predictions"], **options)
    variables = jax.tree.map(np.asarray, variables)
    port_weights.save("vgg16", variables, tmp_path / name, **options)
    again, report = port_weights.load("vgg16", tmp_path / name, num_classes=CLASSES, **options)
    assert not report.fresh
    assert list(again["params"]) == [layer for layer in report.layers]
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_bad_saves(tmp_path, layers, monkeypatch):
    """Bug: variables of another net are written, or a failed write destroys the file that was there."""
    source = write.keras_3(tmp_path / "w.weights.h5", layers)
    variables, _ = port_weights.load("vgg16", source, num_classes=CLASSES)
    with pytest.raises(ValueError, match="not the variables of vgg19"):
        port_weights.save("vgg19", variables, tmp_path / "x.h5")
    with pytest.raises(ValueError, match=".weights.h5"):
        port_weights.save("vgg16", variables, tmp_path / "x.npz")
    before = source.read_bytes()

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(keras_files, "_write_keras3", fail)
    with pytest.raises(OSError, match="no space"):
        port_weights.save("vgg16", variables, source)
    assert source.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [source.name]


def test_the_report_is_json(tmp_path, layers):
    """Bug: a tuple, path or dtype in the report, which json refuses or changes."""
    path = write.keras_3(tmp_path / "w.weights.h5", layers)
    _, report = port_weights.load("vgg16", path, num_classes=CLASSES)
    assert json.loads(json.dumps(report.json())) == report.json()
    assert report.layers["block1_conv1"]["kernel"] == {
        "stored": "layers/conv2d/vars/0",
        "shape": [3, 3, 3, 2],
        "dtype": "float32",
    }
    assert all(word in str(report) for word in (report.sha256, "keras3", "order tf", "block5_conv3", "fc1"))


def command(*arguments):
    script = f"""
        import sys
        from jaxft.nets import vgg
        vgg.WIDTHS, vgg.FC_WIDTH = {vgg.WIDTHS}, {vgg.FC_WIDTH}
        import runpy
        sys.argv = ["port_weights", *{[str(a) for a in arguments]}]
        runpy.run_module("jaxft.port_weights", run_name="__main__")
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path, layers):
    """Bug: the command converts without writing, overwrites a folder, or ends a user's mistake with a traceback."""
    import orbax.checkpoint as ocp

    path = write.keras_3(tmp_path / "w.weights.h5", layers)
    out, back = tmp_path / "out", tmp_path / "back.h5"
    done = command("vgg16", path, "--num-classes", CLASSES, "--out", out, "--to-keras", back)
    assert done.returncode == 0, done.stderr
    assert "block5_conv3" in done.stdout
    assert json.loads((out / "report.json").read_text())["file"] == str(path)
    holds(port_weights.load("vgg16", back, num_classes=CLASSES)[0], layers)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / "variables")
    np.testing.assert_array_equal(restored["params"]["fc1"]["kernel"], dict(layers)["fc1"][0])
    for arguments in (("vgg16", path, "--num-classes", CLASSES, "--out", out), ("vgg17", path), ("vgg19", path)):
        failed = command(*arguments)
        assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("order", ["tf", "th"])
def test_memory_of_porting_the_whole_vgg16(tmp_path, monkeypatch, order):
    """Bug: a second copy of fc1 (411 MB) while it is read or reordered: more than 1.6 × the file."""
    monkeypatch.undo()  # the real widths
    assert vgg.FC_WIDTH == 4096
    layers = make_layers("vgg16", 1000)
    stored = write.theano(layers, ("fc1", (7, 7, 512))) if order == "th" else layers
    path = write.sequential_03(tmp_path / "whole.h5", stored)
    del layers, stored
    script = f"""
        import hashlib, resource, time
        from pathlib import Path
        import h5py
        from jaxft import port_weights
        path = Path({str(path)!r})
        began = time.perf_counter()
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        with h5py.File(path) as file:
            for group in file.values():
                for data in group.values():
                    data[...]
        print(time.perf_counter() - began)
    """
    port = f"""
        import re, time
        from jaxft import port_weights
        began = time.perf_counter()
        port_weights.load("vgg16", {str(path)!r}, order={order!r})
        seconds = time.perf_counter() - began
        # Not ru_maxrss, which a child inherits from the process that started it.
        print(seconds, 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
    """
    run = lambda text: subprocess.run(  # noqa: E731
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.split()
    plain = float(run(script)[0])
    seconds, peak = map(float, run(port))
    size = Path(path).stat().st_size
    print(f"{order}: peak {peak / size:.2f} × the file of {size / 1e6:.0f} MB; {seconds / plain:.2f} × reading it")
    assert peak < 1.6 * size
