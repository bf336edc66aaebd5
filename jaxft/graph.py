"""A net of the zoo as a list of layers, by which other libraries can build it again.

The net is traced once, in inference. Modules with weights are noted as they are called; everything between them is read
off JAX's own program.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft import kernels
from jaxft.model import Model
from jaxft.nets import functional
from jaxft.nets.common import BatchNorm, Conv, Scale, of_channels

WEIGHTED = (Conv, BatchNorm, Scale, nn.Dense)
MARK = "layer "  # before the name of a layer, in the name of its part of the program
# Of plans: Keras's classes → kinds of layers, and the window of a 1×1 convolution.
POOLS = {"max_pooling2d": "max_pool", "average_pooling2d": "avg_pool"}
OTHERS = {
    **{"batch_normalization": "norm", "layer_normalization": "layer_norm", "concatenate": "concat"},
    **{"global_average_pooling2d": "mean_map", "cropping2d": "crop"},
}
POINTWISE = {"window": (1, 1), "strides": (1, 1), "padding": ((0, 0), (0, 0)), "groups": 1}
NAMED = {"relu": "relu", "local_response_norm": "local_response_norm"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of the list.

    Attributes:
        kind: input, conv, dense, norm (BatchNorm in inference), scale, relu, max_pool, avg_pool (without padding in
            the mean), local_response_norm, concat, add, mean (over places), flatten; and in the nets that are plans
            layer_norm, affine (by constants of each channel), a name of `functional.ACTIVATIONS`, multiply, pad, crop,
            mean_map (over places, which stay as one).
        name: of a layer with weights; else "".
        inputs: places in the list.
        options: strides, padding and window of convolutions and pools, and groups; epsilon of a norm; what `add`
            multiplies its second input by.
        shape: of the output without the batch, (height, width, channels) or (width,).
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A net in inference.

    Attributes:
        layers: in an order in which each comes after its inputs; the first is the input, preprocessed images.
        heads: places of the outputs: the logits, or the three logits of GoogLeNet with its auxiliary heads.
        params, batch_stats: layer → leaf → array, float32.
    """

    layers: tuple[Layer, ...]
    heads: tuple[int, ...]
    params: Mapping[str, Any]
    batch_stats: Mapping[str, Any]


def of(model: Model) -> Graph:
    """The layers of a model's net.

    Args:
        model: with a size of images; its net is one of the zoo, or has the modules of `jaxft.nets.common` for layers.

    Raises:
        ValueError: the model has no image size, or its net does something that no layer of the list does.
    """
    if model.image_size is None or model.channels is None:
        raise ValueError("the size of the images is not known: give a model that was trained, or set image_size")
    if isinstance(model.net, functional.Functional):
        return _of_plan(model.net, model)
    net = model.net.clone(dtype=jnp.float32)
    variables = {
        kind: jax.tree.map(np.asarray, dict(model.variables.get(kind, {}))) for kind in ("params", "batch_stats")
    }
    options: dict[str, dict[str, Any]] = {}

    def note(call: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, WEIGHTED):
            return call(*arguments, **keywords)
        x, *norm = arguments
        if isinstance(module, Conv) and module.mean is not None:
            x = module.mean(x)
        x = _marked(module, x, options)
        x = _marked(norm[0], x, options) if norm and norm[0] is not None else x
        return nn.relu(x) if isinstance(module, Conv) and module.relu else x

    def heads(images: jax.Array) -> tuple[jax.Array, ...]:
        with nn.intercept_methods(note):
            logits, outputs = net.apply(variables, images, train=False)
        if getattr(net, "auxiliary", False) and net.num_classes is not None:
            return outputs["loss1"], outputs["loss2"], outputs["loss3"]
        return (logits,)

    shape = (*model.image_size, model.channels)
    with kernels.plain():
        program = jax.make_jaxpr(heads)(jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    reader = _Reader(options, shape)
    found = reader.run(program.jaxpr, program.consts, [0])
    for place in found:
        if not isinstance(place, int):
            why = place.why if isinstance(place, _Unknown) else "an output does not depend on the images"
            raise ValueError(f"this net cannot be exported: {why}")
    return _pruned(Graph(tuple(reader.layers), tuple(found), variables["params"], variables["batch_stats"]))


def _of_plan(net: functional.Functional, model: Model) -> Graph:
    """The graph of a net that describes itself. LayerScale and separable convolutions become simpler layers."""
    assert model.image_size is not None and model.channels is not None
    params = {name: {k: np.asarray(v) for k, v in own.items()} for name, own in model.variables["params"].items()}
    stats = {name: dict(own) for name, own in model.variables.get("batch_stats", {}).items()}
    size = jax.ShapeDtypeStruct((1, *model.image_size, model.channels), jnp.float32)
    shapes = jax.eval_shape(net.every_output, jax.tree.map(jnp.asarray, dict(model.variables)), size)
    layers: list[Layer] = []
    places: dict[functional.Layer, int] = {}

    def put(kind: str, inputs: tuple[int, ...], shape: tuple[int, ...], name: str = "", **options: Any) -> int:
        layers.append(Layer(kind, name, inputs, options, shape))
        return len(layers) - 1

    for layer, output in zip(net.plan_layers(), shapes, strict=True):
        shape, options = tuple(output.shape[1:]), layer.options
        inputs = tuple(places[source] for source in layer.inputs)
        own = params.get(layer.name, {})
        if layer.kind == "input":
            places[layer] = put("input", (), shape)
        elif layer.kind in functional.CONVOLUTIONS:
            window = _window(options["size"], (options["strides"],) * 2, options["padding"], layers[inputs[0]].shape)
            if layer.kind != "conv2d":
                kernel = own.pop("depthwise_kernel")
                own["kernel"] = kernel.reshape(*kernel.shape[:2], 1, -1)
            middle = (*shape[:2], own["kernel"].shape[3])
            groups = options["groups"] if layer.kind == "conv2d" else middle[2]
            places[layer] = put("conv", inputs, middle, layer.name, groups=groups, **window)
            if layer.kind == "separable_conv2d":
                params[f"{layer.name}_pointwise"] = {"kernel": own.pop("pointwise_kernel")}
                places[layer] = put("conv", (places[layer],), shape, f"{layer.name}_pointwise", **POINTWISE)
            if options.get("function", "linear") != "linear":
                places[layer] = put(options["function"], (places[layer],), shape)
        elif layer.kind == "dense":  # of each pixel
            own["kernel"] = own["kernel"][None, None]
            places[layer] = put("conv", inputs, shape, layer.name, **POINTWISE)
        elif layer.kind == "layer_scale":  # after a dense layer in every net
            before = params[layer.inputs[0].name]
            before |= {leaf: value * own["scale"] for leaf, value in before.items()}
            del params[layer.name]
            places[layer] = inputs[0]
        elif layer.kind == "normalization":
            mean, var = (np.asarray(stats[layer.name].pop(leaf), np.float64) for leaf in ("mean", "var"))
            rgb = options["factor"] or (1.0, 1.0, 1.0)
            factor = np.asarray(of_channels(rgb, len(var))) / np.sqrt(np.maximum(var, 1e-14))
            del stats[layer.name]
            places[layer] = put("affine", inputs, shape, factor=factor, offset=-mean * factor)
        elif layer.kind in ("nothing", "dropout"):
            places[layer] = inputs[0]
        elif layer.kind == "zero_padding2d":
            padding = functional.pads(options["size"], layers[inputs[0]].shape[:2])
            places[layer] = put("pad", inputs, shape, padding=padding)
        elif layer.kind in POOLS:
            window = _window(options["size"], options["strides"], options["padding"], layers[inputs[0]].shape)
            places[layer] = put(POOLS[layer.kind], inputs, shape, **window)
        else:
            kind = options["function"] if layer.kind == "activation" else OTHERS.get(layer.kind, layer.kind)
            named = layer.name if layer.kind.endswith("normalization") else ""
            kept = ("epsilon", "factor", "above", "left")
            places[layer] = put(kind, inputs, shape, named, **{k: options[k] for k in kept if k in options})
    at = put("mean", (len(layers) - 1,), layers[-1].shape[-1:])
    for kind, name, width in net.head_plan():
        at = put(kind, (at,), (width or layers[at].shape[-1],), name)
    return _pruned(Graph(tuple(layers), (at,), params, stats))


def _window(size: Any, strides: Any, padding: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"window": size, "strides": strides, "padding": _pads(padding, size, strides, shape[:2])}


def _marked(module: Any, x: jax.Array, options: dict[str, dict[str, Any]]) -> jax.Array:
    """What has the shape of the module's output, in a part of the program that bears its name."""

    def layer(x: jax.Array) -> jax.Array:
        if isinstance(module, Conv):
            kernel = jnp.zeros((*module.kernel_size, x.shape[-1], module.features))
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (module.strides,) * 2, module.padding, dimension_numbers=numbers
            )
        return x @ jnp.zeros((x.shape[-1], module.features)) if isinstance(module, nn.Dense) else x * 1.0

    kinds = {Conv: "conv", BatchNorm: "norm", Scale: "scale", nn.Dense: "dense"}
    noted: dict[str, Any] = {"kind": next(word for kind, word in kinds.items() if isinstance(module, kind))}
    if isinstance(module, Conv):
        noted |= {"window": module.kernel_size, "strides": (module.strides,) * 2}
        noted["padding"] = _pads(module.padding, module.kernel_size, noted["strides"], x.shape[1:3])
    if isinstance(module, BatchNorm):
        noted["epsilon"] = module.epsilon
    options[str(module.name)] = noted
    layer.__name__ = f"{MARK}{module.name}"
    return jax.jit(layer)(x)


def _pads(padding: Any, window: Any, strides: Any, sides: Any) -> tuple[tuple[int, int], ...]:
    """((above, below), (left, right)) in pixels."""
    if not isinstance(padding, str):
        return tuple((int(low), int(high)) for low, high in padding)
    pads = jax.lax.padtype_to_pads(sides, window, strides, padding)
    return tuple((int(low), int(high)) for low, high in pads)


@dataclasses.dataclass(frozen=True)
class _Unknown:
    """A value that no layer gives; nothing is wrong as long as no output needs it."""

    why: str


class _Reader:
    """Reads a program of JAX, equation by equation; values are places of layers, or arrays that are known."""

    def __init__(self, options: Mapping[str, Mapping[str, Any]], shape: tuple[int, ...]):
        self.options = options
        self.layers = [Layer("input", "", (), {}, shape)]

    def add(self, kind: str, inputs: tuple[int, ...], shape: tuple[int, ...], name: str = "", **options: Any) -> int:
        self.layers.append(Layer(kind, name, inputs, options, tuple(shape)))
        return len(self.layers) - 1

    def run(self, program: Any, constants: Any, inputs: list[Any]) -> list[Any]:
        known = dict(zip(program.constvars, map(np.asarray, constants), strict=True))
        known |= dict(zip(program.invars, inputs, strict=True))

        def value(variable: Any) -> Any:
            return np.asarray(variable.val) if hasattr(variable, "val") else known[variable]

        for equation in program.eqns:
            given = [value(variable) for variable in equation.invars]
            known |= dict(zip(equation.outvars, self.equation(equation, given), strict=True))
        return [value(variable) for variable in program.outvars]

    def equation(self, equation: Any, given: list[Any]) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if unknown := [value for value in given if isinstance(value, _Unknown)]:
            return unknown[:1] * len(equation.outvars)
        if not any(isinstance(value, int) for value in given):  # nothing of the images: JAX computes it now
            found = equation.primitive.bind(*given, **params)
            return [np.asarray(each) for each in (found if equation.primitive.multiple_results else [found])]
        shape = equation.outvars[0].aval.shape[1:]
        inner = params.get("jaxpr") or params.get("call_jaxpr") or params.get("fun_jaxpr")
        called = str(params.get("name", ""))
        if inner is not None and called.startswith(MARK):
            layer = called.removeprefix(MARK)
            noted = dict(self.options[layer])
            return [self.add(noted.pop("kind"), (given[0],), shape, layer, **noted)]
        if inner is not None and called in NAMED:
            return [self.add(NAMED[called], (given[0],), shape)]
        if inner is not None:
            return self.run(inner.jaxpr, inner.consts, given)
        return [self.primitive(name, params, given, shape)]

    def primitive(
        self, name: str, params: Mapping[str, Any], given: list[Any], shape: tuple[int, ...]
    ) -> int | _Unknown:
        """The layer that a primitive is."""
        of_layers = tuple(value for value in given if isinstance(value, int))
        if name == "reduce_window_max" or name == "reduce_window_sum":
            window, strides = params["window_dimensions"][1:3], params["window_strides"][1:3]
            kind = "max_pool" if name == "reduce_window_max" else "sum_pool"
            pads = tuple(params["padding"][1:3])
            return self.add(kind, of_layers, shape, window=window, strides=strides, padding=pads)
        if name == "div" and self.layers[of_layers[0]].kind == "sum_pool" and len(of_layers) == 1:
            pool = self.layers[of_layers[0]]  # by the number of pixels in each window
            return self.add("avg_pool", pool.inputs, shape, **pool.options)
        if name == "reduce_sum" and tuple(params["axes"]) == (1, 2):
            return self.add("sum", of_layers, shape)
        if name == "div" and self.layers[of_layers[0]].kind == "sum" and len(of_layers) == 1:
            total = self.layers[of_layers[0]]
            return self.add("mean", total.inputs, shape)
        if name == "concatenate" and params["dimension"] == 3 and len(of_layers) == len(given):
            return self.add("concat", of_layers, shape)
        if name in ("add", "add_any") and len(of_layers) == 2:
            return self.add("add", of_layers, shape)
        if name == "reshape" and len(shape) == 1 and shape[0] == math.prod(self.layers[of_layers[0]].shape):
            same = len(self.layers[of_layers[0]].shape) == 1
            return of_layers[0] if same else self.add("flatten", of_layers, shape)
        if name in ("convert_element_type", "copy", "stop_gradient"):
            return of_layers[0]
        return _Unknown(f"it computes {name} of {list(shape)}, for which there is no layer")


def _pruned(graph: Graph) -> Graph:
    """The graph without layers that no output needs, such as the sums of which a mean was made."""
    needed, waiting = {0}, list(graph.heads)
    while waiting:
        place = waiting.pop()
        if place not in needed:
            needed.add(place)
            waiting += graph.layers[place].inputs
    order = sorted(needed)
    new = {old: place for place, old in enumerate(order)}
    layers = tuple(
        dataclasses.replace(graph.layers[old], inputs=tuple(new[place] for place in graph.layers[old].inputs))
        for old in order
    )
    return dataclasses.replace(graph, layers=layers, heads=tuple(new[place] for place in graph.heads))
