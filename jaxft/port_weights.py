"""Keras weight files ↔ Flax variables, by layer name, strictly and with a report.

python -m jaxft.port_weights vgg16 FILE [--out DIR] [--to-keras FILE]
"""

import dataclasses
import fnmatch
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxft import files, nets
from jaxft.keras_files import AUTOMATIC, KerasFile, Layer, Tensor, kind, read, write

__all__ = ["ORDERS", "Report", "load", "read", "save"]

Variables = dict[str, dict[str, dict[str, np.ndarray]]]
Shapes = dict[str, dict[str, tuple[int, ...]]]

# Word → (kernels are stored (out, in, h, w), taps are rotated by 180°). The official files' names say the same.
ORDERS = {
    "tf": (False, False),  # *_tf_dim_ordering_tf_kernels
    "th": (True, True),  # *_th_dim_ordering_th_kernels
    "th-tf-kernels": (True, False),  # *_th_dim_ordering_tf_kernels
    "tf-th-kernels": (False, True),  # *_tf_dim_ordering_th_kernels
}

# A layer's leaves in the order in which Keras lists its arrays.
LEAVES = ("kernel", "scale", "bias", "mean", "var")

# Keras's field, of any generation → Flax's leaf.
FIELDS = {
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
}

# What is written back, where a kernel or a scale says what the layer is: Flax's leaf → Keras's field.
KERAS_FIELDS = {
    "conv2d": {"kernel": "kernel", "bias": "bias"},
    "dense": {"kernel": "kernel", "bias": "bias"},
    "batch_normalization": {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
    "scale": {"scale": "gamma", "bias": "beta"},
}

SHOWN = 8  # problems of a file that an error lists


@dataclasses.dataclass(frozen=True)
class Report:
    """What `load` found and did.

    Attributes:
        net: the net's name.
        file, sha256, layout, container, keras_version, backend: of the file, see `KerasFile`.
        order: a key of `ORDERS`; `decided_by` says on what evidence.
        layers: layer → leaf → {"stored": the file's name for it, "shape": as stored, "dtype": as stored}.
        names: layer → the file's name for it, where that is a different one.
        fresh: head layers with new random values; those of `replaced` are in the file with a different width.
        dropped: classifier layers of the file that the chosen head does not have.
        ignored: layers of the file that match `ignore`, by the file's names.
    """

    net: str
    file: str
    sha256: str
    layout: str
    container: str
    keras_version: str | None
    backend: str | None
    order: str
    decided_by: str
    layers: dict[str, dict[str, dict[str, Any]]]
    names: dict[str, str]
    fresh: list[str]
    replaced: list[str]
    dropped: list[str]
    ignored: list[str]

    def json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        version = f", Keras {self.keras_version}" if self.keras_version else ""
        backend = f", backend {self.backend}" if self.backend else ""
        lines = [
            f"{self.net} from {self.file}",
            f"  SHA-256 {self.sha256}",
            f"  layout {self.layout} ({self.container}{version}{backend}); order {self.order}, by {self.decided_by}",
        ]
        width = max(map(len, self.layers), default=0)
        for layer, leaves in self.layers.items():
            shown = (f"{leaf} {'×'.join(map(str, found['shape']))}" for leaf, found in leaves.items())
            casts = {found["dtype"] for found in leaves.values()} - {"float32"}
            notes = [f"from {self.names[layer]}"] if layer in self.names else []
            notes += [f"cast from {cast}" for cast in casts]
            lines.append(f"  {layer:<{width}}  {', '.join(shown)}" + (f"  ({'; '.join(notes)})" if notes else ""))
        for what in ("fresh", "replaced", "dropped", "ignored"):
            if names := getattr(self, what):
                lines.append(f"  {what}: {', '.join(names)}")
        return "\n".join(lines)


def load(
    name: str,
    path: str | os.PathLike[str],
    *,
    num_classes: int | None = 1000,
    order: str = "auto",
    seed: int = 0,
    ignore: Sequence[str] = (),
    **options: Any,
) -> tuple[Variables, Report]:
    """Fills the net called `name` from a Keras file.

    A file of one's own with dense layers after the backbone fills `hidden` and the last layer by rank, whatever they
    are called. Where the file has no hidden layers, all of them are fresh.

    Args:
        name: in the zoo.
        path: of the file, of any generation.
        num_classes: of the net; the file's last layer is used if it has that width, else replaced by a fresh one.
        order: a key of `ORDERS`, or `auto`: by known hash, `backend` attribute or layout, else an error.
        seed: of fresh layers.
        ignore: patterns (as in the shell) of names of the file's layers; these are taken to be absent.
        options: fields of the net's class (fc, hidden, …), as in `nets.create`.

    Returns:
        ({"params": layer → leaf → array, "batch_stats": …}, report); leaves are float32 NumPy arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor of the file is not used, a leaf of the net is not filled, shapes differ, the order cannot
            be told or contradicts the shapes, values are not finite; or as `read` and `nets.create`.
    """
    if order != "auto" and order not in ORDERS:
        raise ValueError(f"order={order!r} is not auto or one of {', '.join(ORDERS)}")
    net = nets.create(name, num_classes, **options)
    expected = _expect(name, net)
    with read(path) as file:
        ignored = [layer for layer in file.layers if _matches(layer, ignore)]
        file = dataclasses.replace(file, layers=tuple(layer for layer in file.layers if layer not in ignored))
        found = _by_name(name, expected, file, cut=any(layer.kind == "dense" for layer in ignored))
        word, decided_by = _order(name, file, found, expected, order)
        plan = _plan(name, net, expected, found, stored_out_in=ORDERS[word][0])
        if plan.problems:
            raise ValueError(_explain(name, file, found, plan, num_classes, options))
        variables = _read(plan.filled, *ORDERS[word], nets.spec(name).flattened, file.path)
        variables["params"] |= _fresh(name, net, plan.fresh, seed)
        report = Report(
            net=name,
            file=str(path),
            sha256=file.sha256,
            layout=file.layout,
            container=file.container,
            keras_version=file.keras_version,
            backend=file.backend,
            order=word,
            decided_by=decided_by,
            layers={
                layer: {
                    leaf: {"stored": tensor.name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}
                    for leaf, tensor in leaves.items()
                }
                for layer, leaves in plan.filled.items()
            },
            names={layer: found[layer].name for layer in plan.filled if found[layer].name.replace("/", "_") != layer},
            fresh=plan.fresh,
            replaced=plan.replaced,
            dropped=plan.dropped,
            ignored=[layer.name for layer in ignored],
        )
    # In the net's own order of layers, whatever the file's.
    variables["params"] = {layer: variables["params"][layer] for layer in expected}
    return variables, report


def save(name: str, variables: Mapping[str, Any], path: str | os.PathLike[str], **options: Any) -> None:
    """Writes variables of the net called `name` so that Keras's `load_weights` reads them into the same architecture.

    A path that ends in `.weights.h5` gets the layout of Keras 3, another `.h5` that of Keras 2, which both read.
    `options` are the fields of the net's class that the variables were made with, `num_classes` excepted.

    Raises:
        ValueError: no net has that name, the variables are not those of that net, or another suffix.
        OSError: the file cannot be written; what was there before is left.
    """
    head = variables["params"].get(nets.spec(name).head)
    expected = _expect(name, nets.create(name, None if head is None else len(head["bias"]), **options))
    stored = {
        layer: {**leaves, **variables.get("batch_stats", {}).get(layer, {})}
        for layer, leaves in variables["params"].items()
    }
    shapes = {layer: {leaf: np.shape(array) for leaf, array in leaves.items()} for layer, leaves in stored.items()}
    if shapes != expected:
        strange = [layer for layer in {**expected, **shapes} if shapes.get(layer) != expected.get(layer)]
        raise ValueError(
            f"these are not the variables of {name} with the options {options}: "
            + "; ".join(f"{layer} is {shapes.get(layer)}, expected {expected.get(layer)}" for layer in strange[:5])
        )
    layers = []
    for layer, leaves in expected.items():
        keras_class = kind(list(leaves.values()))
        fields = {KERAS_FIELDS[keras_class][leaf]: np.asarray(stored[layer][leaf], np.float32) for leaf in leaves}
        layers.append((layer, keras_class, fields))
    write(Path(path).expanduser(), layers)


def _expect(name: str, net: nn.Module) -> Shapes:
    """Layer → leaf → shape, in Keras's order of both."""
    images = jax.ShapeDtypeStruct((1, *nets.spec(name).native_size, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    expected: Shapes = {}
    for layer in _keras_order(net):
        leaves = {leaf: found for collection in variables.values() for leaf, found in collection.get(layer, {}).items()}
        if leaves:
            expected[layer] = {leaf: leaves[leaf].shape for leaf in LEAVES if leaf in leaves}
    return expected


def _keras_order(net: Any) -> list[str]:
    """The net's layers as Keras's `model.layers` has them: those of `layers()`, unless the net knows better."""
    if hasattr(net, "keras_layers"):
        return list(net.keras_layers())
    return [layer for layers in net.layers().values() for layer in layers]


def _matches(layer: Layer, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the layer's name, the end of its name after a /, or its place in a file of Keras 3."""
    place = layer.tensors[0].name.partition("/vars/")[0]
    names = {place, *_ends(layer), *(end.replace("/", "_") for end in _ends(layer))}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _ends(layer: Layer) -> list[str]:
    """The layer's name, and what is left of it without the names of the models around it."""
    parts = layer.name.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


def _by_name(name: str, expected: Shapes, file: KerasFile, *, cut: bool = False) -> dict[str, Layer]:
    """The file's layers by the net's names, as far as they have a place there, else by their own.

    Automatic names count by rank, and so do dense layers with names that the net does not know: they are a head of the
    user's own. `cut` says that some dense layers were left out.
    """
    published = nets.spec(name)
    whole = nets.create(name, published.num_classes)
    known = {*_keras_order(whole), *expected}
    canonical = functools.cache(lambda: _expect(name, whole))
    found: dict[str, Layer] = {}
    automatic: dict[str, list[Layer]] = {}
    strange = []
    for layer in file.layers:
        ends = [end.replace("/", "_") for end in _ends(layer)]  # Keras 3 has no / in a name, nor has the net
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
    own = _in_order(own, file.layers, numbered)
    placed = _head(own, found, expected, canonical, _last_layers(name), cut=cut) if own else {}
    for layer in own:
        if layer not in placed.values():
            placed[_unused({*found, *placed, *known}, layer)] = layer
    for keras_class, layers in automatic.items():
        found |= _by_rank(keras_class, layers, found, expected, canonical(), numbered)
    return found | placed


def _unused(taken: Collection[str], layer: Layer) -> str:
    """A name for a layer that has no place in the net: its own, or its place in the file if that is taken."""
    return layer.name if layer.name not in taken else layer.tensors[0].name


def _last_layers(name: str) -> tuple[str, ...]:
    """The layers that a new task replaces: one, or GoogLeNet's three."""
    net: Any = nets.create(name, nets.spec(name).num_classes)
    return net.head_layers()


def _users(name: str, expected: Shapes, found: dict[str, Layer], canonical: Callable[[], Shapes]) -> list[Layer]:
    """Takes dense layers out of `found` that only share a name with a layer of the published head: `fc1` of 256."""
    spare = [target for target in found if target not in expected and found[target].kind == "dense"]
    heads = _last_layers(name)
    strangers = [
        target
        for target in spare
        if target not in heads and found[target].tensors[0].shape != canonical().get(target, {}).get("kernel")
    ]
    return [found.pop(target) for target in strangers]


def _in_order(own: Sequence[Layer], layers: Sequence[Layer], numbered: bool) -> list[Layer]:
    """The dense layers as they follow each other in the model."""
    numbers = {layer: _number(layer) for layer in own}
    if numbered and None not in numbers.values():
        return sorted(own, key=lambda layer: numbers[layer] or 0)
    own = [layer for layer in layers if layer in own]
    keys = [layer.tensors[0].name.split("/") for layer in own]
    if numbered or all(len(key) < 3 or AUTOMATIC.fullmatch(key[-3]) for key in keys) or len(own) > 6:
        return own
    # A subclassed model keys its layers by its attributes, whose order says nothing; their widths may tell.
    chains = [list(chain) for chain in itertools.permutations(own) if _is_chain(chain)]
    return chains[0] if len(chains) == 1 else own


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

    The last layer may have any shape: it is replaced where its width differs.
    """

    def free(names: Shapes) -> list[str]:
        return [
            layer for layer, leaves in names.items() if kind(list(leaves.values())) == "dense" and layer not in found
        ]

    def fits(names: Shapes, layers: Sequence[str]) -> bool:
        return all(
            layer.tensors[0].shape == names[target]["kernel"] for target, layer in zip(layers, own, strict=False)
        )

    last = [layer for layer in last if layer not in found]
    for names in (expected, canonical()):  # the rank counts in the net with the chosen head, or in the published net
        layers = free(names)
        if len(layers) == len(own) and fits(names, layers[:-1]):
            return dict(zip(layers, own, strict=True))
    layers = free(expected)
    if cut and len(layers) == len(own) + 1 and layers[-1] in last and fits(expected, layers[:-1]):
        return dict(zip(layers, own, strict=False))
    return dict(zip(last, own, strict=True)) if len(own) == len(last) == 1 else {}


def _by_rank(
    keras_class: str,
    layers: Sequence[Layer],
    found: Mapping[str, Layer],
    expected: Shapes,
    canonical: Shapes,
    numbered: bool,
) -> dict[str, Layer]:
    """Layers of one class with automatic names → the net's layers of that class, if there are as many of them."""
    if numbered:
        layers = sorted(layers, key=lambda layer: _number(layer) or 0)
    for names in (canonical, expected):  # the rank counts in the published net, or in the net with the chosen head
        free = [
            layer
            for layer, leaves in names.items()
            if kind(list(leaves.values())) == keras_class and layer not in found
        ]
        if numbered and all(map(AUTOMATIC.fullmatch, free)):
            free.sort(key=lambda layer: int(layer.rpartition("_")[2]))
        if len(free) == len(layers):
            return dict(zip(free, layers, strict=True))
    return {layer.name if layer.name not in expected else layer.tensors[0].name: layer for layer in layers}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What fills which layer of a net; see `Report` for the lists. `problems`: layer → line of an error."""

    filled: dict[str, dict[str, Tensor]]
    fresh: list[str]
    replaced: list[str]
    dropped: list[str]
    problems: dict[str, str]


def _plan(name: str, net: Any, expected: Shapes, found: Mapping[str, Layer], *, stored_out_in: bool) -> _Plan:
    """A head layer is fresh if the file lacks it, and replaced if its width differs; any other mismatch is a problem.

    The published head is also replaced where layers before it are new to the net or left out.
    """
    published = nets.spec(name)
    last = _last_layers(name)
    hidden = [layer for layer in net.head_layers() if layer not in last]
    spare = [layer for layer in found if layer not in expected]
    dropped = [layer for layer in spare if layer in published.classifier]
    all_new = not any(layer in found for layer in hidden)
    plan = _Plan({}, [], [], dropped, {})
    for layer, leaves in expected.items():
        stored = found.get(layer)
        matched = _match(layer, stored, leaves, stored_out_in=stored_out_in)
        width = stored.tensors[0].shape[-1:] if stored else None
        rebuilt = width == (published.num_classes,) and (dropped or hidden and all_new)
        if isinstance(matched, dict):
            plan.filled[layer] = matched
        elif stored is None and (layer in last or layer in hidden and all_new):
            plan.fresh.append(layer)
        elif stored and layer in last and (width != leaves["kernel"][-1:] or rebuilt):
            plan.fresh.append(layer)
            plan.replaced.append(layer)
        else:
            plan.problems[layer] = matched
    for layer in spare:
        if layer not in dropped:
            plan.problems[layer] = f"{layer}: the file has {_stored(found[layer])}, the net has no such layer"
    return plan


def _order(name: str, file: KerasFile, found: Mapping[str, Layer], expected: Shapes, word: str) -> tuple[str, str]:
    """(key of `ORDERS`, the evidence for it)."""
    kernels = [
        (found[layer].tensors[0].shape, expected[layer]["kernel"])
        for layer in expected
        if layer in found and len(expected[layer].get("kernel", ())) == 4
    ]
    as_tf = sum(stored == (h, w, i, o) for stored, (h, w, i, o) in kernels)
    out_in = sum(stored == (o, i, h, w) for stored, (h, w, i, o) in kernels) > as_tf
    if word != "auto":
        if kernels and ORDERS[word][0] != out_in:
            shape = "×".join(map(str, kernels[0][0]))
            raise ValueError(f"{file.path}: order={word!r} contradicts the first kernel, which is stored as {shape}")
        return word, "your word"
    if file.layout == "keras3":
        rotated, evidence = False, "the layout (Keras 3 has no Theano)"
    elif file.backend is not None:
        rotated, evidence = file.backend == "theano", "the file's backend attribute"
    elif published := [weights for weights in nets.spec(name).weights.values() if weights.md5 == file.md5]:
        return published[0].order, "the file's published hash"
    else:
        choices = "th or th-tf-kernels" if out_in else "tf or tf-th-kernels"
        raise ValueError(
            f"{file.path} does not say which backend its kernels were trained on, and whether their taps are rotated "
            f"cannot be seen: say order={choices} (th if Theano trained it; the name of the file may tell)"
        )
    return next(word for word, what in ORDERS.items() if what == (out_in, rotated)), evidence


def _match(
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
    if len(layer.tensors) != len(leaves) or shapes != dict(leaves):
        return f"{name}: the net wants {wanted}, the file has {_stored(layer)}"
    if quantised := [tensor.dtype for tensor in layer.tensors if tensor.dtype.kind in "iu"]:
        return f"{name}: the net wants floats, the file has {quantised[0]}; save the model before it is quantised"
    return matched


def _field(stored: str) -> str:
    """The last part of a stored name: `block1_conv1_W_1:0` → `W`, `conv/kernel:0` → `kernel`."""
    last = stored.partition(":")[0].rpartition("/")[2]
    return next((field for field in FIELDS if re.search(rf"(^|_){field}(_\d+)?$", last)), last)


def _stored(layer: Layer) -> str:
    return ", ".join(f"{tensor.name} {'×'.join(map(str, tensor.shape))}" for tensor in layer.tensors)


def _explain(
    name: str,
    file: KerasFile,
    found: Mapping[str, Layer],
    plan: _Plan,
    num_classes: int | None,
    options: Mapping[str, Any],
) -> str:
    problems = list(plan.problems.values())
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    lines = [f"{file.path} does not fit {name}:", *(f"  {problem}" for problem in problems[:SHOWN]), *more]
    smaller = nets.any_size(name)
    lacking = [layer for layer in plan.problems if layer not in found]
    if lacking and smaller and num_classes is not None:
        without = _expect(name, nets.create(name, num_classes, **{**options, **smaller}))
        if not set(lacking) & set(without):
            lines.append(
                f"The file lacks {', '.join(lacking)}; {_say(name, options, smaller)} makes the net without them."
            )
    lines += _ways_out(name, file, found, plan, options)
    fits = [other for other in nets.ZOO if other != name and _fits(other, name, file)]
    if fits:
        lines += [f"It is a file of {other} ({nets.spec(other).about})," for other in fits]
        lines.append(f"not of {name} ({nets.spec(name).about}).")
    return "\n".join(lines)


def _say(name: str, options: Mapping[str, Any], changed: Mapping[str, Any]) -> str:
    """The changed options as Python and as a command line has them."""
    values = {**options, **changed}
    words = []
    if {"fc", "hidden"} & set(changed):
        fc = values.get("fc", "fc" in nets.fields(name))
        widths = ",".join(map(str, values.get("hidden", ())))
        words.append(f"--head {'fc' if fc else 'gap'}{':' if widths else ''}{widths}")
    if "auxiliary" in changed:
        words.append("--auxiliary" if changed["auxiliary"] else "--no-auxiliary")
    if "num_classes" in changed:
        words.append(f"--num-classes {changed['num_classes']}")
    python = ", ".join(f"{field}={value!r}" for field, value in changed.items())
    return f"{python} (on a command line {' '.join(words)})"


def _ways_out(
    name: str, file: KerasFile, found: Mapping[str, Layer], plan: _Plan, options: Mapping[str, Any]
) -> list[str]:
    """If the file's head does not fit: the options that take it, and the patterns that leave it out."""
    published = nets.spec(name)
    backbone = {*_expect(name, nets.create(name, published.num_classes)), *plan.dropped} - {published.head}
    own = [layer for target, layer in found.items() if layer.kind == "dense" and target not in backbone]
    if not any(layer in own for target, layer in found.items() if target in plan.problems):
        return []
    own = _in_order(own, file.layers, file.layout in ("keras1", "keras2"))
    others = []  # such as BatchNorm between dense layers
    for keras_class in ("conv2d", "batch_normalization", "scale"):
        spare = [found[target] for target in plan.problems if target in found and found[target].kind == keras_class]
        lacking = [layer for layer in plan.problems if layer not in found and layer.startswith(keras_class)]
        others += spare[len(lacking) :]
    names = [layer.name for layer in file.layers]
    patterns = tuple(
        layer.name if names.count(layer.name) == 1 else layer.tensors[0].name.partition("/vars/")[0]
        for layer in (*own, *others)
    )
    shown = ", ".join(f"{layer.name} {'→'.join(map(str, layer.tensors[0].shape))}" for layer in own)
    words = " ".join(f"'{pattern}'" if " " in pattern else pattern for pattern in patterns)
    fresh = f"ignore={patterns!r} (--ignore {words}) leaves it out for a fresh one"
    taking = None if others else _options_for(name, own, options)
    if taking is None:
        return [f"The file's head is {shown}, which {name} cannot take: {fresh}."]
    return [f"The file's head is {shown}. Two ways out: {taking} takes it; {fresh}."]


def _options_for(name: str, own: Sequence[Layer], options: Mapping[str, Any]) -> str | None:
    """The options, in words, with which the net called `name` has these layers as its head, or None."""
    *hidden, last = (layer.tensors[0].shape[-1] for layer in own)
    smaller = nets.any_size(name)
    larger = {field: not value for field, value in smaller.items()}
    stored = [[tensor.shape for tensor in layer.tensors] for layer in own]
    if any(tensor.dtype.kind in "iu" for layer in own for tensor in layer.tensors):
        return None
    for extra in ({}, smaller, larger):
        net: Any = nets.create(name, last, **{**options, **extra, "hidden": tuple(hidden)})
        expected = _expect(name, net)
        layers = [layer for layer in net.head_layers() if layer not in nets.spec(name).classifier[:-1]]
        if [list(expected[layer].values()) for layer in layers] == stored:
            changed = {field: value for field, value in extra.items() if options.get(field) != value}
            return _say(name, options, {"hidden": tuple(hidden), "num_classes": last, **changed})
    return None


def _fits(other: str, name: str, file: KerasFile) -> bool:
    """Whether the file fills the net called `other`, its head apart. Only nets that it may be of are looked at."""
    row = nets.spec(other)
    net = nets.create(other, row.num_classes)
    names = {*_keras_order(net), *row.aliases}
    explicit = [
        [end.replace("/", "_") for end in _ends(layer)]
        for layer in file.layers
        if layer.kind != "dense" and not AUTOMATIC.fullmatch(layer.name.rpartition("/")[2])
    ]
    if not all(names.intersection(ends) for ends in explicit):
        return False
    if not explicit and type(net) is not type(nets.create(name)):
        return False
    expected = _expect(other, net)
    found = _by_name(other, expected, file)
    wanted = {layer: leaves for layer, leaves in expected.items() if layer not in row.classifier}
    stored = {layer for layer in found if layer in wanted or found[layer].kind != "dense"} - set(row.classifier)
    return set(wanted) == stored and any(
        all(
            isinstance(_match(layer, found[layer], leaves, stored_out_in=flip), dict)
            for layer, leaves in wanted.items()
        )
        for flip in (False, True)
    )


def _read(
    plan: Mapping[str, Mapping[str, Tensor]],
    stored_out_in: bool,
    rotated: bool,
    flattened: Mapping[str, tuple[int, int]],
    path: Path,
) -> Variables:
    """The planned tensors as float32 in Flax's order; each is read straight into its place."""
    variables: Variables = {"params": {}, "batch_stats": {}}
    for layer, leaves in plan.items():
        for leaf, tensor in leaves.items():
            if leaf == "kernel" and stored_out_in and layer in flattened:
                array = _channels_last(tensor, flattened[layer])
            else:
                array = tensor.read()
            if array.ndim == 4:
                array = array.transpose(2, 3, 1, 0) if stored_out_in else array
                array = np.ascontiguousarray(array[::-1, ::-1] if rotated else array)
            if not _finite(array):
                raise ValueError(f"{path}: {tensor.name} of {layer} holds values that are not finite")
            variables["batch_stats" if leaf in ("mean", "var") else "params"].setdefault(layer, {})[leaf] = array
    return variables


def _finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, block by block, so that each is read from memory once."""
    flat = array.ravel()
    blocks = (flat[first : first + 65_536] for first in range(0, flat.size, 65_536))
    return all(np.isfinite(block.min()) and np.isfinite(block.max()) for block in blocks)


def _channels_last(tensor: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """A Dense kernel whose input rows count (C, H, W) → rows that count (H, W, C), a few channels at a time."""
    height, width = shape
    channels = tensor.shape[0] // (height * width)
    array = np.empty(tensor.shape, np.float32)
    rows = array.reshape(height * width, channels, -1)
    step = 32  # channels; of fc1 26 MB, where the whole kernel is 411
    for first in range(0, channels, step):
        block = tensor.read(slice(first * height * width, (first + step) * height * width))
        rows[:, first : first + step] = block.reshape(-1, height * width, array.shape[1]).swapaxes(0, 1)
    return array


def _fresh(name: str, net: nn.Module, layers: Collection[str], seed: int) -> dict[str, dict[str, np.ndarray]]:
    """New random values of some layers, as the net's own `init` with that seed gives them; jit prunes the others."""
    if not layers:
        return {}
    images = jnp.zeros((1, *nets.spec(name).native_size, 3))

    @jax.jit
    def init(key: jax.Array) -> dict[str, Any]:
        params = net.init(key, images)["params"]
        return {layer: params[layer] for layer in layers}

    return jax.tree.map(np.asarray, init(jax.random.key(seed)))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Port a Keras weight file: print the report, convert, write back."""

    net: tyro.conf.Positional[str]
    """A net of the zoo."""
    file: tyro.conf.Positional[Path]
    """The Keras weight file, of any generation."""
    out: Path | None = None
    """A folder that must not exist: gets the variables as an Orbax checkpoint and report.json."""
    to_keras: Path | None = None
    """A file to write back: .weights.h5 for Keras 3, .h5 for Keras 2."""
    order: str = "auto"
    """Kernel ordering of the file: auto, tf, th, th-tf-kernels or tf-th-kernels."""
    num_classes: int | None = None
    """Width of the last layer, by default that of the published weights; another than the file has makes it fresh."""
    head: str | None = None
    """fc (VGG alone), gap, or one of them with the widths of hidden layers: gap:WIDTH,…"""
    auxiliary: bool = True
    """For GoogLeNet: whether it has its two auxiliary heads."""
    ignore: tuple[str, ...] = ()
    """Patterns of names of the file's layers, which are taken to be absent."""


def main(arguments: Arguments) -> None:
    options = {} if arguments.head is None else nets.head_options(arguments.net, arguments.head)
    if not arguments.auxiliary:
        options["auxiliary"] = False
    out = None if arguments.out is None else arguments.out.expanduser().absolute()
    if out is not None and out.exists():
        raise ValueError(f"--out {out} exists already; name a new folder")
    variables, report = load(
        arguments.net,
        arguments.file,
        num_classes=arguments.num_classes or nets.spec(arguments.net).num_classes,
        order=arguments.order,
        ignore=arguments.ignore,
        **options,
    )
    print(report)
    if out is not None:
        import orbax.checkpoint as ocp  # half a second that printing a report should not cost

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(out / "variables", variables)
        files.write_json(out / "report.json", report.json())
    if arguments.to_keras is not None:
        save(arguments.net, variables, arguments.to_keras, **options)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
