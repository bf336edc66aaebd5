"""Nets that are described as layers and their inputs, as Keras's functional API has them.

A family writes `plan`: it calls the functions of this file on layers in place of arrays, and says where a stage ends.
From the plan come the table of layers, in the order of Keras's `model.layers`, and the computation.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.kernels.conv import convolve
from jaxft.kernels.depthwise import convolve_depthwise
from jaxft.kernels.pool import avg_pool, max_pool
from jaxft.nets.common import (
    Activation,
    Conv,
    Net,
    Padding,
    Stage,
    batch_norm,
    check_size,
    fold,
    head_stages,
    head_table,
    head_widths,
    of_channels,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a plan.

    Attributes:
        name: Keras's; layers without weights may share one. An operation that is no layer in Keras has none.
        kind: Keras's class in snake case.
        inputs: the layers whose outputs it takes.
        width: channels of its output.
        options: what `_apply` needs to know of it.
        within: the Keras model inside of the model that holds this layer, if there is one.
    """

    name: str
    kind: str
    inputs: tuple["Layer", ...]
    width: int
    options: Mapping[str, Any]
    within: str = ""


def _layer(kind: str, x: Layer | Sequence[Layer], name: str | None, width: int | None = None, **options: Any) -> Layer:
    """A layer; its name is the kind if "" is given, and none for an operation, where None is."""
    inputs = (x,) if isinstance(x, Layer) else tuple(x)
    name = "" if name is None else name or kind
    return Layer(name, kind, inputs, inputs[0].width if width is None else width, options)


def conv2d(
    x: Layer,
    name: str,
    width: int,
    size: int | tuple[int, int] = 1,
    strides: int = 1,
    padding: Padding = "SAME",
    *,
    bias: bool = False,
    groups: int = 1,
    function: str = "linear",
) -> Layer:
    """A convolution and a key of `ACTIVATIONS`; with as many groups as channels depthwise, kernel [h, w, 1, C]."""
    options = {"size": (size, size) if isinstance(size, int) else size, "strides": strides, "padding": padding}
    return _layer("conv2d", x, name, width, **options, bias=bias, groups=groups, function=function)


def depthwise(x: Layer, name: str, size: int, strides: int = 1, padding: Padding = "SAME") -> Layer:
    """A depthwise convolution without bias: one output channel for each."""
    return _layer("depthwise_conv2d", x, name, size=(size, size), strides=strides, padding=padding)


def separable(x: Layer, name: str, width: int, size: int, strides: int = 1, padding: Padding = "SAME") -> Layer:
    """A depthwise convolution and a 1×1 one, without bias: one layer in Keras."""
    return _layer("separable_conv2d", x, name, width, size=(size, size), strides=strides, padding=padding)


def norm(x: Layer, name: str, *, epsilon: float = 1e-3, momentum: float = 0.99, scale: bool = True) -> Layer:
    """A BatchNormalization."""
    return _layer("batch_normalization", x, name, epsilon=epsilon, momentum=momentum, scale=scale)


def layer_norm(x: Layer, name: str) -> Layer:
    """A LayerNormalization over channels, epsilon 1e-6."""
    return _layer("layer_normalization", x, name)


def dense(x: Layer, name: str, width: int) -> Layer:
    """A dense layer over channels, for each pixel."""
    return _layer("dense", x, name, width)


def layer_scale(x: Layer, name: str) -> Layer:
    """x · gamma, for each channel."""
    return _layer("layer_scale", x, name)


def normalization(x: Layer, name: str, factor: Sequence[float] = ()) -> Layer:
    """(x - mean) / √variance by statistics that a file holds and training leaves; then times `factor`."""
    return _layer("normalization", x, name, factor=tuple(factor))


def activation(x: Layer, function: str, name: str | None = "") -> Layer:
    """A key of `ACTIVATIONS`."""
    return _layer("activation", x, name, function=function)


def nothing(x: Layer, name: str) -> Layer:
    """A layer of Keras's that counts and needs no computation here: the preprocessing, a padding that SAME gives."""
    return _layer("nothing", x, name)


def add(inputs: Sequence[Layer], name: str | None = "", *, factor: float = 1.0) -> Layer:
    """The first plus `factor` times the second."""
    return _layer("add", inputs, name, factor=factor)


def multiply(inputs: Sequence[Layer], name: str = "") -> Layer:
    return _layer("multiply", inputs, name)


def concatenate(inputs: Sequence[Layer], name: str = "") -> Layer:
    """All channels side by side."""
    return _layer("concatenate", inputs, name, sum(x.width for x in inputs))


def pool(x: Layer, kind: str, size: int, strides: int, padding: str = "VALID", name: str = "") -> Layer:
    """Pooling of a kind, `max` or `average`; a mean does not count what is padded."""
    return _layer(f"{kind}_pooling2d", x, name, size=(size, size), strides=(strides, strides), padding=padding)


def global_mean(x: Layer, name: str = "") -> Layer:
    """The mean of each channel, [B, 1, 1, C]."""
    return _layer("global_average_pooling2d", x, name)


def pad(x: Layer, size: int | Padding, name: str = "") -> Layer:
    """Zeros around: given ((above, below), (left, right)), or what centres windows of `size` at strides of two."""
    return _layer("zero_padding2d", x, name, size=size)


def crop(x: Layer, above: int, left: int, name: str = "") -> Layer:
    return _layer("cropping2d", x, name, above=above, left=left)


def drop(x: Layer, name: str, rate: float) -> Layer:
    """Stochastic depth: in training whole examples become 0 at this rate, and the others grow by 1 / (1 - rate)."""
    return _layer("dropout", x, name, rate=rate)


ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "swish": nn.silu,
    "hard_swish": nn.hard_swish,
    "hard_sigmoid": nn.hard_sigmoid,
    "sigmoid": nn.sigmoid,
    "gelu": partial(nn.gelu, approximate=False),
    "linear": lambda x: x,
}

CONVOLUTIONS = ("conv2d", "depthwise_conv2d", "separable_conv2d")
LAYER_SCALE = 1e-6  # what Keras starts gamma at
TRAINED = (*CONVOLUTIONS, "batch_normalization", "layer_normalization", "dense", "layer_scale")
WEIGHTED = (*TRAINED, "normalization")


class Functional(Net):
    """A net that its `plan` describes.

    Attributes:
        num_classes: width of the last layer; None stops at the last feature map.
        hidden: widths of dense ReLU layers hidden1, hidden2, … before the last layer.
        dropout: rate before each dense layer after hidden1, and before the last one, in training.
        frozen: names of frozen layers; their BatchNorm uses and keeps the running statistics.
        dtype: of the computation; parameters, statistics and logits are float32.
    """

    num_classes: int | None = 1000
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    frozen: frozenset[str] = frozenset()
    dtype: DTypeLike = jnp.float32

    smallest = 32  # pixels a side of the images
    last = "predictions"

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """The net from its input on: (stage, the layer that ends it) for each stage before the head."""
        raise NotImplementedError

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers in the order of Keras's `model.layers`, those without weights included."""
        table = {stage: tuple(layer.name for layer in layers if layer.name) for stage, layers in _stages(self).items()}
        return table | head_table(self._head(), self.dropout)

    def head_layers(self) -> tuple[str, ...]:
        """The weighted layers that no ImageNet file fills."""
        return tuple(self._head())

    def keras_kinds(self) -> dict[str, str]:
        """Layer with weights → its Keras class in snake case; those of the head are dense."""
        return {layer.name: layer.kind for layer in self._weighted()}

    def keras_models(self) -> dict[str, str]:
        """Layer → the Keras model inside of the model that holds it, where there is one."""
        return {layer.name: layer.within for layer in self._weighted() if layer.within}

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, start: str | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the net, or the stages after `start`.

        Args:
            images: [B, H, W, 3], preprocessed for the weight file; with `start`, that stage's output.
            train: BatchNorm uses the statistics of the batch, frozen layers excepted; dropout and stochastic depth are
                on, and take the random key called "dropout". Stages whose layers are all frozen drop nothing.

        Returns:
            (logits float32 [B, num_classes], outputs of every stage by name). Without a classifier the first is the
            last feature map, [B, H', W', C].

        Raises:
            ValueError: the images are too small, or `start` is not a stage.
        """
        if start is None:
            check_size(type(self).__name__, images, self.smallest)
        plan, before = _stages(self), None
        readers = _readers(plan)
        stages: list[Stage] = []
        for name, layers in plan.items():
            stages.append((name, partial(self._run, layers=layers, before=before, readers=readers, train=train)))
            before = layers[-1]
        stages += self._head_stages(train)
        # What comes before the first kernel is computed in float32.
        return fold(stages, images if start is None else images.astype(self.dtype), start)

    def plan_layers(self) -> tuple[Layer, ...]:
        """The layers of all stages before the head, each after its inputs; the first is the input."""
        return tuple(layer for layers in _stages(self).values() for layer in layers)

    def head_plan(self) -> list[tuple[str, str, int | None]]:
        """(kind, name, width) of what follows the pooling, in order: `dense`, `layer_norm` or an activation."""
        widths, functions = self._head(), self._head_activations()
        found: list[tuple[str, str, int | None]] = []
        for name, width in widths.items():
            found.append(("dense", name, width))
            found += [(functions.get(name, "relu"), "", None)] if name != list(widths)[-1] else []
        return found

    def every_output(self, variables: Any, images: jax.Array) -> list[jax.Array]:
        """The output of each of `plan_layers` in inference, of the shapes that it has without a fused kernel."""
        return self.apply(variables, images, method=type(self)._every_output)  # type: ignore[return-value]

    @nn.compact
    def _every_output(self, images: jax.Array) -> list[jax.Array]:
        values: dict[Layer, jax.Array] = {}
        for layer in self.plan_layers():
            inputs = [values[source] for source in layer.inputs] or [images]
            if layer.kind in (*CONVOLUTIONS, "batch_normalization"):
                values[layer] = self._normalised(layer, inputs[0])
            else:
                values[layer] = self._apply(layer, inputs, False)
        return list(values.values())

    def _head(self) -> dict[str, int]:
        return head_widths(self.hidden, self.last, self.num_classes)

    def _head_activations(self) -> dict[str, str]:
        """Dense layer of the head → the key of `ACTIVATIONS` that follows it, where that is not ReLU."""
        return {}

    def _head_stages(self, train: bool) -> list[Stage]:
        functions = {layer: ACTIVATIONS[function] for layer, function in self._head_activations().items()}
        return head_stages(self._head(), self.dropout, train=train, dtype=self.dtype, functions=functions)

    def _weighted(self) -> list[Layer]:
        return [layer for layer in self.plan_layers() if layer.kind in WEIGHTED]

    def _run(
        self,
        x: jax.Array,
        layers: Sequence[Layer],
        before: Layer | None,
        readers: Mapping[Layer, list[Layer]],
        train: bool,
    ) -> jax.Array:
        """A stage. A convolution takes along what only it reads or is read by: zeros around, BatchNorm, ReLU."""
        still = {layer.name for layer in layers if layer.kind in TRAINED} <= self.frozen
        values: dict[Layer | None, jax.Array] = {before: x}
        for layer in layers:
            if layer in values:
                continue  # an earlier layer took it along
            inputs = [values[source] for source in layer.inputs] or [x]
            if layer.kind == "zero_padding2d" and _is_padded_convolution(readers[layer]):
                values[layer] = inputs[0]
            elif layer.kind in (*CONVOLUTIONS, "batch_normalization"):
                normal, relu = _followers(layer, readers, layers[-1])
                source = layer.inputs[0]
                unpadded = source.kind == "zero_padding2d" and _is_padded_convolution(readers[source])
                y = self._normalised(layer, inputs[0], normal, relu is not None, train, unpadded)
                values |= dict.fromkeys([layer, normal or layer, relu or layer], y)
            else:
                values[layer] = self._apply(layer, inputs, train and not still)
        return values[layers[-1]]

    def _normalised(
        self,
        layer: Layer,
        x: jax.Array,
        normal: Layer | None = None,
        relu: bool = False,
        train: bool = False,
        unpadded: bool = False,
    ) -> jax.Array:
        """A convolution with the BatchNorm and the ReLU after it, or a BatchNorm with the ReLU after it.

        `unpadded`: x is without the zeros that the layer before puts around it.
        """
        if layer.kind == "batch_normalization":
            return self._norm(layer, train)(x.astype(self.dtype), relu=relu)
        options, norm = layer.options, None if normal is None else self._norm(normal, train)
        padding, (source,) = options["padding"], layer.inputs
        if unpadded:
            padding = pads(source.options["size"], x.shape[1:3])
        if layer.kind == "conv2d" and options["groups"] == 1:
            fields = {"strides": options["strides"], "padding": padding, "use_bias": options["bias"]}
            conv = Conv(layer.width, options["size"], relu=relu, dtype=self.dtype, name=layer.name, **fields)
            y = conv(x, norm)
            return y if options["function"] == "linear" else ACTIVATIONS[options["function"]](y)
        return _Depthwise(layer, padding, relu=relu, dtype=self.dtype, name=layer.name)(x, norm)

    def _apply(self, layer: Layer, inputs: list[jax.Array], dropping: bool) -> jax.Array:
        x, options = inputs[0], layer.options
        match layer.kind:
            case "layer_normalization":
                return LayerNorm(self.dtype, name=layer.name)(x)
            case "dense":
                return _Dense(layer.width, dtype=self.dtype, name=layer.name)(x)
            case "layer_scale":
                return _LayerScale(name=layer.name)(x)
            case "normalization":
                return _Normalization(options["factor"], name=layer.name)(x)
            case "activation":
                return ACTIVATIONS[options["function"]](x)
            case "add":
                return x + inputs[1] if options["factor"] == 1 else x + options["factor"] * inputs[1]
            case "multiply":
                return x * inputs[1]
            case "concatenate":
                return jnp.concatenate(inputs, -1)
            case "max_pooling2d":
                return max_pool(x, options["size"], options["strides"], options["padding"])
            case "average_pooling2d":
                return avg_pool(x, options["size"], options["strides"], options["padding"])
            case "global_average_pooling2d":
                return x.mean((1, 2), keepdims=True)
            case "zero_padding2d":
                rows, columns = pads(options["size"], x.shape[1:3])
                return jnp.pad(x, ((0, 0), rows, columns, (0, 0)))
            case "cropping2d":
                return x[:, options["above"] :, options["left"] :]
            case "dropout":
                example = (1, 2, 3)  # its axes
                return nn.Dropout(options["rate"], example, deterministic=not dropping, name=layer.name)(x)
            case "nothing" | "input":
                return x
        raise AssertionError(layer.kind)

    def _norm(self, layer: Layer, train: bool) -> Any:
        return batch_norm(layer.name, layer.width, train=train, frozen=self.frozen, dtype=self.dtype, **layer.options)


def _is_padded_convolution(readers: Sequence[Layer]) -> bool:
    return len(readers) == 1 and readers[0].kind in CONVOLUTIONS and readers[0].options["padding"] == "VALID"


def _followers(layer: Layer, readers: Mapping[Layer, list[Layer]], last: Layer) -> tuple[Layer | None, Layer | None]:
    """The BatchNorm and the ReLU that alone read what comes before, as far as a stage that ends with `last` goes."""
    normal = relu = None
    if layer.kind != "batch_normalization" and layer is not last and len(readers[layer]) == 1:
        (reader,) = readers[layer]
        normal = reader if reader.kind == "batch_normalization" else None
    at = normal or layer
    if at is not last and len(readers[at]) == 1 and readers[at][0].options.get("function") == "relu":
        (reader,) = readers[at]
        relu = reader if reader.kind == "activation" else None
    return normal, relu


def pads(size: Any, sides: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((above, below), (left, right)), of `pad`."""
    if not isinstance(size, int):
        return size
    half = size // 2
    above, left = (half - 1 + side % 2 for side in sides)
    return ((above, half), (left, half))


class _Depthwise(nn.Module):
    """A depthwise convolution, and of a separable one the 1×1 convolution after it."""

    layer: Layer
    padding: Padding
    relu: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, normal: Any) -> jax.Array:
        layer, channels, glorot = self.layer, x.shape[-1], nn.initializers.glorot_uniform()
        size, options = layer.options["size"], {"strides": layer.options["strides"], "padding": self.padding}
        if layer.kind == "conv2d":
            kernel = self.param("kernel", glorot, (*size, 1, channels))
        else:  # as Keras keeps it
            kernel = self.param("depthwise_kernel", glorot, (*size, channels, 1)).reshape(*size, 1, channels)
        bias = self.param("bias", nn.initializers.zeros, (channels,)) if layer.options.get("bias") else None
        x = x.astype(self.dtype)
        if layer.kind != "separable_conv2d":
            if normal is not None and normal.inference:
                factor, shift = normal.affine(bias)
                return convolve_depthwise(x, kernel * factor, shift, relu=self.relu, **options)
            x = convolve_depthwise(x, kernel, bias, relu=self.relu and normal is None, **options)
            return x if normal is None else normal(x, relu=self.relu)
        x = convolve_depthwise(x, kernel, None, **options)
        pointwise = self.param("pointwise_kernel", glorot, (1, 1, channels, layer.width))
        if normal is not None and normal.inference:
            factor, shift = normal.affine()
            return convolve(x, pointwise, shift, factor=factor, relu=self.relu)
        x = convolve(x, pointwise, None if normal is None else -normal.offset(), relu=self.relu and normal is None)
        return x if normal is None else normal.of_batch(x, relu=self.relu)


class _Dense(nn.Module):
    """A dense layer for each pixel: x [B, H, W, C] → [B, H, W, width]."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), (x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        return convolve(x.astype(self.dtype), kernel[None, None], bias)


class LayerNorm(nn.Module):
    """Keras's LayerNormalization over channels, epsilon 1e-6, in float32."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
        return (y * scale + bias).astype(self.dtype)


class _LayerScale(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(LAYER_SCALE), x.shape[-1:])
        return x * scale.astype(x.dtype)


class _Normalization(nn.Module):
    """Statistics of the data that a file holds, with the number of images that they come from. Nothing trains them."""

    factor: tuple[float, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:]).value
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:]).value
        self.variable("batch_stats", "count", jnp.zeros, ())
        x = (x.astype(jnp.float32) - mean) / jnp.sqrt(jnp.maximum(var, 1e-14))
        return x * jnp.asarray(of_channels(self.factor, x.shape[-1])) if self.factor else x


def _stages(net: Functional) -> dict[str, list[Layer]]:
    """Stage → its layers in Keras's order."""
    of_all = ("parent", "name", "hidden", "dropout", "frozen", "dtype")
    own = tuple((field.name, getattr(net, field.name)) for field in dataclasses.fields(net) if field.name not in of_all)
    return _planned(type(net), own)


@functools.cache
def _planned(family: type[Functional], fields: tuple[tuple[str, Any], ...]) -> dict[str, list[Layer]]:
    """The same object for equal nets, so that their layers are the same ones."""
    ends = dict(family(**dict(fields), parent=None).plan(Layer("input", "input", (), 3, {})))
    ordered, table, begin = keras_order(list(ends.values())[-1]), {}, 0
    for stage, end in ends.items():
        stop = ordered.index(end) + 1
        table[stage] = ordered[begin:stop]
        begin = stop
    return table


def keras_order(output: Layer) -> list[Layer]:
    """The layers that `output` depends on, and itself, as Keras sorts `model.layers`.

    The longest way to the output decides; of equals, the one that is met first on the way from the output to the
    input, where the first input of a layer is followed first.
    """
    met, finished, stack = {output: 0}, [], [(output, iter(output.inputs))]
    while stack:
        layer, rest = stack[-1]
        for source in rest:
            if source not in met:
                met[source] = len(met)
                stack.append((source, iter(source.inputs)))
                break
        else:
            finished.append(layer)
            stack.pop()
    depth = dict.fromkeys(finished, 0)
    for layer in reversed(finished):
        for source in layer.inputs:
            depth[source] = max(depth[source], depth[layer] + 1)
    return sorted(finished, key=lambda layer: (-depth[layer], met[layer]))


def _readers(plan: Mapping[str, Sequence[Layer]]) -> dict[Layer, list[Layer]]:
    """Layer → the layers that take its output."""
    readers: dict[Layer, list[Layer]] = {layer: [] for layers in plan.values() for layer in layers}
    for layer in list(readers):
        for source in layer.inputs:
            readers[source].append(layer)
    return readers
