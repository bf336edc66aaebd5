"""Which layer of a Keras file fills which layer of a net: by name, and by rank where names are automatic."""

import fnmatch
import functools
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import nets
from jaxft.keras_files import AUTOMATIC, KerasFile, Layer, Tensor, kind

Shapes = dict[str, dict[str, tuple[int, ...]]]  # layer → leaf → shape

# A layer's leaves in the order in which Keras lists its arrays.
LEAVES = ("kernel", "depthwise_kernel", "pointwise_kernel", "scale", "bias", "mean", "var", "count")

# Keras's field, of any generation → Flax's leaf.
FIELDS = {
    "depthwise_kernel": "depthwise_kernel",
    "pointwise_kernel": "pointwise_kernel",
    "kernel": "kernel",
    "W": "kernel",
    "gamma": "scale",
    "beta": "bias",
    "bias": "bias",
    "b": "bias",
    "moving_mean": "mean",
    "running_mean": "mean",
    "moving_variance": "var",
    "running_std": "var",  # a variance from Keras 1.0.7 on, whatever its name
    "mean": "mean",
    "variance": "var",
    "count": "count",
}


def expect(name: str, net: nets.Net) -> Shapes:
    """Layer → leaf → shape, in Keras's order of both."""
    images = jax.ShapeDtypeStruct((1, *nets.spec(name).native_size, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    expected: Shapes = {}
    for layer in keras_order(net):
        leaves = {leaf: found for collection in variables.values() for leaf, found in collection.get(layer, {}).items()}
        if leaves:
            expected[layer] = {leaf: leaves[leaf].shape for leaf in LEAVES if leaf in leaves}
    return expected


def keras_order(net: nets.Net) -> list[str]:
    """The net's layers as Keras's `model.layers` has them: those of `layers()`, unless the net knows better."""
    if hasattr(net, "keras_layers"):
        return list(net.keras_layers())
    return [layer for layers in net.layers().values() for layer in layers]


def keras_kinds(name: str, net: nets.Net) -> dict[str, str]:
    """Layer → its Keras class in snake case, for those whose class the shapes of their leaves do not tell."""
    return net.keras_kinds() | dict.fromkeys(nets.spec(name).convolved, "conv2d")


def matches(layer: Layer, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the layer's name, the end of its name after a /, or its place in a file of Keras 3."""
    place = layer.tensors[0].name.partition("/vars/")[0]
    names = {place, *ends_of(layer), *(end.replace("/", "_") for end in ends_of(layer))}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def ends_of(layer: Layer) -> list[str]:
    """The layer's name, and what is left of it without the names of the models around it."""
    parts = layer.name.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def by_name(
    name: str, expected: Shapes, file: KerasFile, *, cut: bool = False, given: Mapping[str, Layer] | None = None
) -> dict[str, Layer]:
    """The file's layers by the net's names, as far as they have a place there, else by their own.

    Automatic names count by rank, and so do dense layers with names that the net does not know: they are a head of the
    user's own. `cut` says that some dense layers were left out; `given` are layers whose place is known.
    """
    published = nets.spec(name)
    whole = nets.create(name, published.num_classes)
    known = {*keras_order(whole), *expected}
    canonical = functools.cache(lambda: expect(name, whole))
    found: dict[str, Layer] = dict(given or {})
    automatic: dict[str, list[Layer]] = {}
    strange = []
    for layer in file.layers:
        ends = [end.replace("/", "_") for end in ends_of(layer)]  # Keras 3 has no / in a name, nor has the net
        target = next((end for end in (published.aliases.get(end, end) for end in ends) if end in known), None)
        if AUTOMATIC.fullmatch(ends[-1]):  # never by name: Keras 1 and 2 count from 1, Keras 3 from 0 or any number
            automatic.setdefault(layer.kind, []).append(layer)
        elif target is None:
            strange.append(layer)
        elif target in found:
            raise ValueError(f"{file.path} holds two layers called {target}; which one is meant cannot be told")
        else:
            found[target] = layer
    own = [*automatic.pop("dense", ()), *_users(name, expected, found, canonical)]
    for layer in strange:
        # A second model of one session: its layers' names have a number more.
        target = re.sub(r"_\d+$", "", layer.name.rpartition("/")[2])
        target = published.aliases.get(target, target)
        if target in known and target not in found:
            found[target] = layer
        elif layer.kind == "dense":
            own.append(layer)
        else:
            found[_unused({*found, *known}, layer)] = layer
    numbered = file.layout in ("keras1", "keras2")  # their order depends on the version, the numbers do not
    last = last_layers(name)
    placed = _head(in_order(own, file.layers, numbered), found, expected, canonical, last, cut=cut)
    named = [
        target for target in found if target == published.head or target in expected and target.startswith("hidden")
    ]
    if own and named and not placed:  # the user may have called another layer so
        rest = {target: layer for target, layer in found.items() if target not in named}
        pool = in_order([*own, *(found[target] for target in named)], file.layers, numbered)
        if placed := _head(pool, rest, expected, canonical, last, cut=cut):
            own, found = pool, rest
    for layer in own:
        if layer not in placed.values():
            placed[_unused({*found, *placed, *known}, layer)] = layer
    for keras_class, layers in automatic.items():
        kinds = keras_kinds(name, whole)
        found |= _by_rank(keras_class, layers, found, expected, canonical(), kinds, numbered)
    return found | placed


def _unused(taken: Collection[str], layer: Layer) -> str:
    """A name for a layer that has no place in the net: its own, or its place in the file if that is taken."""
    return layer.name if layer.name not in taken else layer.tensors[0].name


def last_layers(name: str) -> tuple[str, ...]:
    """The layers that a new task replaces: one, or GoogLeNet's three."""
    net: nets.Net = nets.create(name, nets.spec(name).num_classes)
    return net.head_layers()


def _users(name: str, expected: Shapes, found: dict[str, Layer], canonical: Callable[[], Shapes]) -> list[Layer]:
    """Takes dense layers out of `found` that only share a name with a layer of the published head: `fc1` of 256."""
    spare = [target for target in found if target not in expected and found[target].kind == "dense"]
    heads = last_layers(name)
    strangers = [
        target
        for target in spare
        if target not in heads and found[target].tensors[0].shape != canonical().get(target, {}).get("kernel")
    ]
    return [found.pop(target) for target in strangers]


def in_order(own: Sequence[Layer], layers: Sequence[Layer], numbered: bool) -> list[Layer]:
    """The dense layers `own` as they follow each other in the model.

    Raises:
        ValueError: the file does not tell.
    """
    numbers = {layer: _number(layer) for layer in own}
    if numbered and None not in numbers.values():
        return sorted(own, key=lambda layer: numbers[layer] or 0)
    own = [layer for layer in layers if layer in own]
    keys = [layer.tensors[0].name.split("/") for layer in own]
    if numbered or all(len(key) < 3 or AUTOMATIC.fullmatch(key[-3]) for key in keys):
        return own
    # A subclassed model keys its layers by its attributes, whose order says nothing; their widths may tell.
    chains = [list(chain) for chain in itertools.permutations(own) if _is_chain(chain)] if len(own) < 7 else []
    if len(chains) > 1 or len(own) > 6:
        names = tuple(layer.name for layer in own)
        raise ValueError(
            f"the order of the dense layers {', '.join(names)} cannot be told: its model is a subclassed one, "
            f"and several orders fit the widths. Leave them out with ignore={names!r}, or save the model as a "
            "functional one"
        )
    return chains[0] if chains else own


def _number(layer: Layer) -> int | None:
    """The number of an automatic name, 0 where it has none; None for other names."""
    found = AUTOMATIC.fullmatch(layer.name.rpartition("/")[2])
    return int(found[1] or 0) if found else None


def _is_chain(layers: Sequence[Layer]) -> bool:
    kernels = [layer.tensors[0].shape for layer in layers]
    return all(a[-1] == b[0] for a, b in itertools.pairwise(kernels))


def _head(
    own: Sequence[Layer],
    found: Mapping[str, Layer],
    expected: Shapes,
    canonical: Callable[[], Shapes],
    last: Sequence[str],
    *,
    cut: bool,
) -> dict[str, Layer]:
    """The net's dense layers that dense layers of the file fill by rank; nothing if they do not fit.

    One of `last` may have any shape: it is replaced where its width differs.
    """

    def free(names: Shapes) -> list[str]:
        return [
            layer for layer, leaves in names.items() if kind(list(leaves.values())) == "dense" and layer not in found
        ]

    def fits(names: Shapes, layers: Sequence[str]) -> bool:
        return all(
            target in last or layer.tensors[0].shape == names[target]["kernel"]
            for target, layer in zip(layers, own, strict=False)
        )

    if not own:
        return {}
    last = [layer for layer in last if layer not in found]
    for names in (expected, canonical()):  # the rank counts in the net with the chosen head, or in the published net
        layers = free(names)
        if len(layers) == len(own) and fits(names, layers):
            return dict(zip(layers, own, strict=True))
    layers = free(expected)
    if cut and len(layers) == len(own) + 1 and layers[-1] in last and fits(expected, layers):
        return dict(zip(layers, own, strict=False))
    return dict(zip(last, own, strict=True)) if len(own) == len(last) == 1 else {}


def _by_rank(
    keras_class: str,
    layers: Sequence[Layer],
    found: Mapping[str, Layer],
    expected: Shapes,
    canonical: Shapes,
    kinds: Mapping[str, str],
    numbered: bool,
) -> dict[str, Layer]:
    """Layers of one class with automatic names → the net's layers of that class, if there are as many of them."""
    if numbered:
        layers = sorted(layers, key=lambda layer: _number(layer) or 0)
    for names in (canonical, expected):  # the rank counts in the published net, or in the net with the chosen head
        free = [
            layer
            for layer, leaves in names.items()
            if kinds.get(layer, kind(list(leaves.values()))) == keras_class and layer not in found
        ]
        if numbered and all(map(AUTOMATIC.fullmatch, free)):
            free.sort(key=lambda layer: int(AUTOMATIC.fullmatch(layer)[1] or 0))  # type: ignore[index]
        if len(free) == len(layers):
            return dict(zip(free, layers, strict=True))
    return {layer.name if layer.name not in expected else layer.tensors[0].name: layer for layer in layers}


def match_layer(
    name: str, layer: Layer | None, leaves: Mapping[str, tuple[int, ...]], *, stored_out_in: bool
) -> dict[str, Tensor] | str:
    """Leaf → tensor, or what is wrong."""
    wanted = ", ".join(f"{leaf} {'×'.join(map(str, shape))}" for leaf, shape in leaves.items())
    if layer is None:
        return f"{name}: the net wants {wanted}, the file has no such layer"
    fields = [FIELDS.get(_field(tensor.name)) for tensor in layer.tensors]
    by_field = {str(field): tensor for field, tensor in zip(fields, layer.tensors, strict=True)}
    if set(by_field) == {*leaves, "scale"} != set(leaves) and np.all(by_field["scale"].read() == 1):
        del by_field["scale"]  # a gamma that was never trained, as in the first files of Inception-V4
        layer = Layer(layer.name, tuple(by_field.values()))
    matched = by_field if set(by_field) == set(leaves) else dict(zip(leaves, layer.tensors, strict=False))
    shapes = {leaf: tensor.shape for leaf, tensor in matched.items()}
    if stored_out_in and len(shapes.get("kernel", ())) == 4:
        o, i, h, w = shapes["kernel"]
        shapes["kernel"] = (h, w, i, o)
    if shapes.get("kernel") == (1, 1, *leaves.get("kernel", ())):  # a dense layer that Keras keeps as a convolution
        shapes["kernel"] = leaves["kernel"]
    if len(layer.tensors) != len(leaves) or shapes != dict(leaves):
        return f"{name}: the net wants {wanted}, the file has {shapes_of(layer)}"
    if quantised := [tensor.dtype for leaf, tensor in matched.items() if tensor.dtype.kind in "iu" and leaf != "count"]:
        return f"{name}: the net wants floats, the file has {quantised[0]}; save the model before it is quantised"
    return matched


def _field(stored: str) -> str:
    """The last part of a stored name: `block1_conv1_W_1:0` → `W`, `conv/kernel:0` → `kernel`."""
    last = stored.partition(":")[0].rpartition("/")[2]
    return next((field for field in FIELDS if re.search(rf"(^|_){field}(_\d+)?$", last)), last)


def shapes_of(layer: Layer) -> str:
    return ", ".join(f"{tensor.name} {'×'.join(map(str, tensor.shape))}" for tensor in layer.tensors)
