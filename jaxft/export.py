"""A trained net for use without jaxft: Keras, ONNX, StableHLO, safetensors.

Each file comes with a JSON file beside it (`describe`): classes, size of the images, what the input and the output are.
"""

import importlib
import json
import os
import pathlib
import secrets
import shutil
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxft
from jaxft import files, graph, kernels, nets, port_weights, preprocess
from jaxft.graph import Graph, Layer
from jaxft.model import Model
from jaxft.task import TASKS

OPSET = 17  # of ONNX: the first in which all that is written here exists and runtimes of 2022 read
LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}  # of googlenet.local_response_norm
AGES = (
    "StableHLO that JAX exports is read by JAX for at least six months after the version that wrote it; keep the run's "
    "folder, and export again with a newer version."
)


def write(model: Model, path: str | os.PathLike[str], to: str) -> pathlib.Path:
    """Writes a trained model in another library's format, and a JSON file beside it.

    Args:
        model: from `model.open` or `finetune`.
        path: of the file, which must not exist.
        to: a key of `FORMATS`.

    Returns:
        the path of the file.

    Raises:
        ValueError: no such format; the file exists; a package is missing; the model cannot be written so.
        OSError: the folder cannot be written to.
    """
    if to not in FORMATS:
        raise ValueError(f"{to!r} is no format to export to; known are {', '.join(FORMATS)}")
    path = pathlib.Path(path).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists already; give another file by --out, or remove it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; make it first")
    if to == "keras" and path.suffix != ".keras":
        raise ValueError(f"{path} must end in .keras, by which Keras knows the format")
    if to == "weights.h5" and not path.name.endswith(".weights.h5"):
        raise ValueError(f"{path} must end in .weights.h5, by which Keras knows the format")
    about = describe(model)
    scratch = path.with_name(f".{secrets.token_hex(6)}")  # whole or not at all
    scratch.mkdir()
    try:
        FORMATS[to](model, scratch / path.name, about)
        files.write_json(path.with_name(f"{path.name}.json"), about | {"format": to} | NOTES.get(to, {}))
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def describe(model: Model) -> dict[str, Any]:
    """What a user of the file must know, as JSON values.

    Raises:
        ValueError: the model was not trained, or its task turns logits into something of its own.
    """
    if model.task is None or model.image_size is None:
        raise ValueError("this model has no task yet: train it with finetune, then export it")
    known = TASKS[model.task.name](**model.task.options)
    probe = jnp.asarray([[-2.0, 0.5, 3.0]])
    if not np.allclose(model.task.outputs(probe), known.outputs(probe)):
        raise ValueError(
            f"the outputs of this {model.task.name} task are functions of your own, which cannot be exported"
        )
    return {
        "classes": list(model.classes),
        "task": model.task.name,
        "input": f"RGB images [batch, {model.image_size[0]}, {model.image_size[1]}, {model.channels}] of 0 to 255",
        "output": {
            "classification": "probabilities",
            "multilabel": "probability of each label",
            "regression": "values",
        }[model.task.name],
        "image_size": list(model.image_size),
        "resize": model.decode.resize,
        "preprocessing": model.preprocessing,
        "net": model.name or type(model.net).__qualname__,
        "jaxft": jaxft.__version__,
    }


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this format needs {name.partition('.')[0]}: pip install 'jaxft[export]'") from error


def _affine(model: Model) -> tuple[bool, np.ndarray, np.ndarray]:
    """(blue first, factor, offset), float32 [C]: images become factor · x + offset, after their channels are turned."""
    channels = model.channels or 3
    prepare = preprocess.get(model.preprocessing)
    zero, one = (np.asarray(prepare(jnp.full((1, 1, channels), value)), np.float64)[0, 0] for value in (0.0, 255.0))
    turned = channels == 3 and model.preprocessing.startswith("caffe")
    return turned, ((one - zero) / 255).astype(np.float32), zero.astype(np.float32)


def _folded(found: Graph) -> tuple[list[Layer], dict[str, dict[str, np.ndarray]]]:
    """(layers, layer → weights) with each Scale in the BatchNorm before it, as no other library has such a layer."""
    weights = {name: dict(leaves) for name, leaves in found.params.items()}
    for name, leaves in found.batch_stats.items():
        weights[name] = {**weights.get(name, {}), **leaves}
    layers = list(found.layers)
    for place, layer in enumerate(layers):
        if layer.kind == "scale":
            norm, scale = layers[layer.inputs[0]], weights[layer.name]
            assert norm.kind == "norm"  # in every net of the zoo
            own = weights[norm.name]
            own["bias"] = own["bias"] * scale["scale"] + scale["bias"]
            own["scale"] = own.get("scale", 1.0) * scale["scale"]
            layers[place] = Layer("same", "", layer.inputs, {}, layer.shape)
    return layers, weights


def _pads_are(layer: Layer, sides: tuple[int, ...]) -> str | None:
    """ "valid" or "same", as Keras and TensorFlow pad; None for other pads."""
    pads = tuple(map(tuple, layer.options["padding"]))
    if not any(map(any, pads)):
        return "valid"
    same = jax.lax.padtype_to_pads(sides[:2], layer.options["window"], layer.options["strides"], "SAME")
    return "same" if pads == tuple(map(tuple, same)) else None


def keras(model: Model, path: pathlib.Path, about: Mapping[str, Any]) -> None:
    """A `.keras` file: `keras.models.load_model(path)` reads it in any process, and its images are of 0 to 255.

    It holds the preprocessing and the task's outputs as layers; frozen layers are not trainable. `jaxft.json` in the
    file says what is in `about`.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    library = _package("keras")
    found = graph.of(model)
    layers, weights = _folded(found)
    made = library.models.Model(*_keras_graph(model, found, layers, weights, library.layers, library.ops))
    for layer in made.layers:
        if layer.name in weights and layer.weights:
            layer.set_weights(_keras_weights(layer, weights[layer.name]))
            layer.trainable = layer.name not in model.net.frozen
    made.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("jaxft.json", json.dumps(dict(about), indent=2, ensure_ascii=False))


def _keras_weights(layer: Any, leaves: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    order = ("kernel", "scale", "bias", "mean", "var")  # as Keras lists the weights of each kind of layer
    return [np.asarray(leaves[name]) for name in order if name in leaves]


def _keras_graph(
    model: Model, found: Graph, layers: list[Layer], weights: Mapping[str, Any], kit: Any, ops: Any
) -> tuple[Any, Any]:
    """(input, output), symbolic tensors of Keras."""
    turned, factor, offset = _affine(model)
    images = kit.Input(layers[0].shape, name="images")
    x = images
    if turned:
        swap = np.eye(3, dtype=np.float32)[::-1].reshape(1, 1, 3, 3)
        x = _fixed(kit, swap, "rgb_to_bgr")(x)
    x = kit.Rescaling(factor.tolist(), offset.tolist(), name="preprocessing")(x)
    tensors = [x]
    for layer in layers[1:]:
        given = [tensors[place] for place in layer.inputs]
        tensors.append(_keras_layer(layer, given, layers[layer.inputs[0]].shape, weights, kit, ops))
    heads = [tensors[place] for place in found.heads]
    if len(heads) > 1:
        _require_classes(model)
        return images, kit.Average(name="probabilities")([kit.Softmax()(head) for head in heads])
    assert model.task is not None
    if model.task.name == "classification":
        return images, kit.Softmax(name="probabilities")(heads[0])
    if model.task.name == "multilabel":
        return images, kit.Activation("sigmoid", name="probabilities")(heads[0])
    if model.task.options["range"] is None:
        return images, heads[0]
    low, high = model.task.options["range"]
    return images, kit.Rescaling(high - low, low, name="values")(kit.Activation("sigmoid")(heads[0]))


def _require_classes(model: Model) -> None:
    if model.task is None or model.task.name != "classification":
        raise ValueError(
            "a net with auxiliary heads is exported for classification alone; train it with auxiliary=False"
        )


def _fixed(kit: Any, kernel: np.ndarray, name: str | None = None) -> Any:
    """A 1×1 convolution with a kernel that is never trained."""
    layer = kit.Conv2D(kernel.shape[-1], 1, use_bias=False, name=name, trainable=False)
    layer.build((None, None, None, kernel.shape[2]))
    layer.set_weights([kernel])
    return layer


def _keras_layer(
    layer: Layer, given: list[Any], before: tuple[int, ...], weights: Mapping[str, Any], kit: Any, ops: Any
) -> Any:
    x, options = given[0], layer.options
    factor = options.get("factor", 1.0) if layer.kind == "add" else 1.0

    def by(each: Any) -> Any:
        return each if factor == 1.0 else kit.Rescaling(factor)(each)

    simple: dict[str, Callable[[], Any]] = {
        "same": lambda: x,
        "relu": lambda: kit.ReLU()(x),
        "concat": lambda: kit.Concatenate()(given),
        "add": lambda: kit.Add()([x, *(by(each) for each in given[1:])]),
        "mean": lambda: kit.GlobalAveragePooling2D()(x),
        "flatten": lambda: kit.Flatten()(x),
        "mean_map": lambda: kit.GlobalAveragePooling2D(keepdims=True)(x),
        "multiply": lambda: kit.Multiply()(given),
        "relu6": lambda: kit.ReLU(6.0)(x),
        **{
            name: lambda function=function: kit.Activation(function)(x)
            for name, function in (
                *(("swish", "silu"), ("hard_swish", "hard_silu"), ("hard_sigmoid", "hard_sigmoid")),
                *(("sigmoid", "sigmoid"), ("gelu", "gelu")),
            )
        },
        "pad": lambda: kit.ZeroPadding2D(options["padding"])(x),
        "crop": lambda: kit.Cropping2D(((options["above"], 0), (options["left"], 0)))(x),
        "affine": lambda: kit.Rescaling(options["factor"].tolist(), options["offset"].tolist())(x),
        "layer_norm": lambda: kit.LayerNormalization(epsilon=1e-6, name=layer.name)(x),
        "dense": lambda: kit.Dense(layer.shape[-1], name=layer.name)(x),
    }
    if layer.kind in simple:
        return simple[layer.kind]()
    if layer.kind == "norm":
        scale = "scale" in weights[layer.name]
        return kit.BatchNormalization(epsilon=options["epsilon"], scale=scale, name=layer.name)(x)
    if layer.kind == "local_response_norm":
        channels = layer.shape[-1]
        near = np.abs(np.subtract.outer(np.arange(channels), np.arange(channels))) <= LRN["size"] // 2
        around = _fixed(kit, near.astype(np.float32).reshape(1, 1, channels, channels))(kit.Multiply()([x, x]))
        divisor = kit.Rescaling(LRN["alpha"] / LRN["size"], LRN["bias"])(around)
        return kit.Multiply()([x, ops.power(divisor, -LRN["beta"])])
    padding = _pads_are(layer, before)
    if padding is None:  # zeros, which no maximum takes: what is pooled here comes after a ReLU
        x, padding = kit.ZeroPadding2D(options["padding"])(x), "valid"
    if layer.kind == "conv":
        bias = "bias" in weights[layer.name]
        settings = {"strides": options["strides"], "padding": padding, "use_bias": bias, "name": layer.name}
        settings["groups"] = options.get("groups", 1)
        return kit.Conv2D(layer.shape[-1], options["window"], **settings)(x)
    pool = kit.MaxPooling2D if layer.kind == "max_pool" else kit.AveragePooling2D
    return pool(options["window"], options["strides"], padding)(x)


def weights_h5(model: Model, path: pathlib.Path, about: Mapping[str, Any]) -> None:
    """A `.weights.h5` file for the Keras model of the same layers and names, whose `load_weights(path)` reads it.

    For a net of `keras.applications` that is the application without its top, global average pooling and dense layers
    named as here. It holds weights alone: preprocessing and outputs are the business of whoever loads it.
    """
    if model.name is None:
        raise ValueError("weights.h5 is written for nets of the zoo, whose layers Keras has names for")
    port_weights.save(model.name, dict(model.variables), path, **_options(model))


def _options(model: Model) -> dict[str, Any]:
    assert model.name is not None
    found = {name: getattr(model.net, name) for name in nets.options(model.name, model.net)}
    for name in ("frozen", "num_classes", "dtype"):
        found.pop(name, None)
    return found


def onnx(model: Model, path: pathlib.Path, about: Mapping[str, Any]) -> None:
    """An ONNX file: input `images` float32 [batch, H, W, C] of 0 to 255, output `outputs` float32 [batch, classes].

    The batch is free. `metadata_props` hold what is in `about`.
    """
    library = _package("onnx")
    found = graph.of(model)
    layers, weights = _folded(found)
    writer = _OnnxWriter(library, weights)
    turned, factor, offset = _affine(model)
    x = writer.node("Transpose", ["images"], perm=[0, 3, 1, 2])
    if turned:
        x = writer.node("Gather", [x, writer.array(np.asarray([2, 1, 0]))], axis=1)
    x = writer.node("Mul", [x, writer.array(factor.reshape(1, -1, 1, 1))])
    tensors = [writer.node("Add", [x, writer.array(offset.reshape(1, -1, 1, 1))])]
    for layer in layers[1:]:
        tensors.append(writer.layer(layer, [tensors[place] for place in layer.inputs]))
    heads = [tensors[place] for place in found.heads]
    assert model.task is not None
    if len(heads) > 1:
        _require_classes(model)
        total = writer.node("Sum", [writer.node("Softmax", [head], axis=1) for head in heads])
        last = writer.node("Div", [total, writer.array(np.float32(len(heads)))])
    elif model.task.name == "classification":
        last = writer.node("Softmax", heads, axis=1)
    elif model.task.name == "multilabel" or model.task.options["range"] is not None:
        last = writer.node("Sigmoid", heads)
        if model.task.name == "regression":
            low, high = model.task.options["range"]
            last = writer.node("Mul", [last, writer.array(np.float32(high - low))])
            last = writer.node("Add", [last, writer.array(np.float32(low))])
    else:
        last = heads[0]
    writer.node("Identity", [last], output="outputs")
    made = writer.model(layers[0].shape, len(model.classes))
    for key, value in about.items():
        made.metadata_props.add(
            key=key, value=value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
    library.checker.check_model(made, full_check=True)
    library.save(made, path)


class _OnnxWriter:
    """Nodes of a graph of ONNX, in NCHW."""

    def __init__(self, library: Any, weights: Mapping[str, Mapping[str, np.ndarray]]):
        self.library, self.weights = library, weights
        self.nodes: list[Any] = []
        self.arrays: list[Any] = []

    def node(self, kind: str, inputs: list[str], output: str | None = None, **options: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(self.library.helper.make_node(kind, inputs, [output], **options))
        return output

    def array(self, values: np.ndarray | np.floating, name: str | None = None) -> str:
        name = name or f"a{len(self.arrays)}"
        self.arrays.append(self.library.numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def layer(self, layer: Layer, given: list[str]) -> str:
        own, x = self.weights.get(layer.name, {}), given[0]
        leaf = {key: (lambda key=key: self.array(own[key], f"{layer.name}/{key}")) for key in own}
        if layer.kind == "conv":
            inputs = [x, self.array(np.transpose(own["kernel"], (3, 2, 0, 1)), f"{layer.name}/kernel")]
            inputs += [leaf["bias"]()] if "bias" in own else []
            return self.node("Conv", inputs, group=layer.options.get("groups", 1), **self.window(layer))
        if layer.kind == "dense":
            return self.node("Gemm", [x, leaf["kernel"](), leaf["bias"]()])
        if layer.kind == "norm":
            ones = self.array(np.ones_like(own["bias"])) if "scale" not in own else leaf["scale"]()
            inputs = [x, ones, leaf["bias"](), leaf["mean"](), leaf["var"]()]
            return self.node("BatchNormalization", inputs, epsilon=layer.options["epsilon"])
        if layer.kind in ("max_pool", "avg_pool"):
            kind = {"max_pool": "MaxPool", "avg_pool": "AveragePool"}[layer.kind]
            return self.node(kind, [x], **self.window(layer))
        if layer.kind == "mean":
            return self.node("Flatten", [self.node("GlobalAveragePool", [x])])
        if layer.kind == "flatten":
            return self.node("Flatten", [self.node("Transpose", [x], perm=[0, 2, 3, 1])])
        if layer.kind == "local_response_norm":
            return self.node("LRN", [x], **LRN)
        if layer.kind == "concat":
            return self.node("Concat", given, axis=1)
        if layer.kind in self.of_plans:
            return getattr(self, f"_{layer.kind}")(layer, given, own)
        return x if layer.kind == "same" else self.node(self.of_one[layer.kind], given)

    of_one = {"relu": "Relu", "sigmoid": "Sigmoid", "multiply": "Mul", "mean_map": "GlobalAveragePool"}  # node
    of_plans = (
        *("relu6", "swish", "hard_swish", "hard_sigmoid", "gelu", "pad", "crop", "affine", "layer_norm", "add"),
    )

    def number(self, value: float) -> str:
        return self.array(np.asarray(value, np.float32))

    def _relu6(self, layer: Layer, given: list[str], own: Any) -> str:
        return self.node("Clip", [given[0], self.number(0), self.number(6)])

    def _swish(self, layer: Layer, given: list[str], own: Any) -> str:
        return self.node("Mul", [given[0], self.node("Sigmoid", given)])

    def _hard_sigmoid(self, layer: Layer, given: list[str], own: Any) -> str:
        return self.node("HardSigmoid", given, alpha=1 / 6, beta=0.5)

    def _hard_swish(self, layer: Layer, given: list[str], own: Any) -> str:
        return self.node("Mul", [given[0], self._hard_sigmoid(layer, given, own)])

    def _gelu(self, layer: Layer, given: list[str], own: Any) -> str:
        risen = self.node("Erf", [self.node("Mul", [given[0], self.number(0.5**0.5)])])
        half = self.node("Mul", [given[0], self.number(0.5)])
        return self.node("Mul", [half, self.node("Add", [risen, self.number(1)])])

    def _add(self, layer: Layer, given: list[str], own: Any) -> str:
        factor = layer.options.get("factor", 1.0)
        second = given[1] if factor == 1.0 else self.node("Mul", [given[1], self.number(factor)])
        return self.node("Add", [given[0], second])

    def _pad(self, layer: Layer, given: list[str], own: Any) -> str:
        (top, bottom), (left, right) = layer.options["padding"]
        return self.node("Pad", [given[0], self.array(np.asarray([0, 0, top, left, 0, 0, bottom, right]))])

    def _crop(self, layer: Layer, given: list[str], own: Any) -> str:
        starts = np.asarray([layer.options["above"], layer.options["left"]])
        ends = np.full(2, np.iinfo(np.int64).max)
        return self.node("Slice", [given[0], *map(self.array, (starts, ends, np.asarray([2, 3])))])

    def _affine(self, layer: Layer, given: list[str], own: Any) -> str:
        factor, offset = (
            self.array(np.float32(layer.options[name]).reshape(1, -1, 1, 1)) for name in ("factor", "offset")
        )
        return self.node("Add", [self.node("Mul", [given[0], factor]), offset])

    def _layer_norm(self, layer: Layer, given: list[str], own: Any) -> str:
        leaves = [self.array(own[leaf], f"{layer.name}/{leaf}") for leaf in ("scale", "bias")]
        if len(layer.shape) == 1:
            return self.node("LayerNormalization", [given[0], *leaves], axis=-1, epsilon=1e-6)
        x = self.node("Transpose", given, perm=[0, 2, 3, 1])
        x = self.node("LayerNormalization", [x, *leaves], axis=-1, epsilon=1e-6)
        return self.node("Transpose", [x], perm=[0, 3, 1, 2])

    def window(self, layer: Layer) -> dict[str, Any]:
        (top, bottom), (left, right) = layer.options["padding"]
        return {
            "kernel_shape": list(layer.options["window"]),
            "strides": list(layer.options["strides"]),
            "pads": [top, left, bottom, right],
        }

    def model(self, shape: tuple[int, ...], outputs: int) -> Any:
        helper, kind = self.library.helper, self.library.TensorProto.FLOAT
        made = helper.make_graph(
            self.nodes,
            "jaxft",
            [helper.make_tensor_value_info("images", kind, ["batch", *shape])],
            [helper.make_tensor_value_info("outputs", kind, ["batch", outputs])],
            self.arrays,
        )
        settings = {"opset_imports": [helper.make_opsetid("", OPSET)], "producer_name": "jaxft", "ir_version": 8}
        return helper.make_model(made, producer_version=jaxft.__version__, **settings)


def stablehlo(model: Model, path: pathlib.Path, about: Mapping[str, Any]) -> None:
    """A program of StableHLO with its weights: `jax.export.deserialize(path.read_bytes()).call(images)`.

    Images are float32 [batch, H, W, C] of 0 to 255; the batch is free. It runs on CPU, CUDA and TPU, and needs JAX but
    not jaxft. Such programs age: see `AGES`.
    """
    from jax import export

    prepare, task = preprocess.get(model.preprocessing), model.task
    assert task is not None and model.image_size is not None
    variables = {kind: model.variables.get(kind, {}) for kind in ("params", "batch_stats")}

    def outputs(images: jax.Array) -> jax.Array:
        return task.outputs(model.net.apply(variables, prepare(images), train=False)[0])

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_size, model.channels or 3), jnp.float32)
    with kernels.plain():
        made = export.export(jax.jit(outputs), platforms=("cpu", "cuda", "tpu"))(images)
    path.write_bytes(made.serialize())


def safetensors(model: Model, path: pathlib.Path, about: Mapping[str, Any]) -> None:
    """A safetensors file: "layer/leaf" → float32, layers named as in Keras; metadata hold what is in `about`.

    Leaves are kernel [h, w, in, out] or [in, out], bias, scale (gamma), mean and var (running statistics).
    """
    library = _package("safetensors.numpy")
    arrays = {
        f"{layer}/{leaf}": np.ascontiguousarray(value, np.float32)
        for kind in ("params", "batch_stats")
        for layer, leaves in model.variables.get(kind, {}).items()
        for leaf, value in leaves.items()
    }
    told = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in about.items()
    }
    library.save_file(arrays, path, metadata=told)


FORMATS: dict[str, Callable[[Model, pathlib.Path, Mapping[str, Any]], None]] = {
    "keras": keras,
    "weights.h5": weights_h5,
    "onnx": onnx,
    "stablehlo": stablehlo,
    "safetensors": safetensors,
}
NOTES: dict[str, dict[str, str]] = {
    "stablehlo": {"ages": AGES},
    "weights.h5": {"holds": "weights alone: preprocess the images as named here, and apply the output to the logits"},
}
