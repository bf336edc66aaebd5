"""Keras weight files ↔ Flax variables, by layer name, strictly and with a report.

python -m jaxft.port_weights vgg16 FILE [--out DIR] [--to-keras FILE]
"""

import dataclasses
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxft import files, nets
from jaxft.keras_files import AUTOMATIC, KerasFile, Layer, Tensor, Written, kind, read, write
from jaxft.keras_match import (
    Shapes,
    by_name,
    ends_of,
    expect,
    in_order,
    keras_kinds,
    keras_order,
    last_layers,
    match_layer,
    matches,
    shapes_of,
)

__all__ = ["ORDERS", "Report", "load", "read", "save"]

Variables = dict[str, dict[str, dict[str, np.ndarray]]]

# Word → (kernels are stored (out, in, h, w), taps are rotated by 180°). The official files' names say the same.
ORDERS = {
    "tf": (False, False),  # *_tf_dim_ordering_tf_kernels
    "th": (True, True),  # *_th_dim_ordering_th_kernels
    "th-tf-kernels": (True, False),  # *_th_dim_ordering_tf_kernels
    "tf-th-kernels": (False, True),  # *_tf_dim_ordering_th_kernels
}

# What is written back, where a kernel or a scale says what the layer is: Flax's leaf → Keras's field.
KERAS_FIELDS = {
    "conv2d": {"kernel": "kernel", "bias": "bias"},
    "dense": {"kernel": "kernel", "bias": "bias"},
    "batch_normalization": {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
    "scale": {"scale": "gamma", "bias": "beta"},
    "layer_normalization": {"scale": "gamma", "bias": "beta"},
    "layer_scale": {"scale": "gamma"},
    "normalization": {"mean": "mean", "var": "variance", "count": "count"},
    "depthwise_conv2d": {"depthwise_kernel": "depthwise_kernel"},
    "separable_conv2d": {"depthwise_kernel": "depthwise_kernel", "pointwise_kernel": "pointwise_kernel"},
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
        names: layer → the file's name for it, in a file that has names.
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
            stored = self.names.get(layer, layer)
            notes = [f"from {stored}"] if stored.replace("/", "_") != layer else []
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
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> tuple[Variables, Report]:
    """Fills the net called `name` from a Keras file.

    Dense layers after the backbone of a user's own file fill the hidden layers and the last one in their order,
    whatever they are called. A file does not tell their activation; in the net it is ReLU. Hidden layers that the file
    lacks altogether are fresh.

    Args:
        name: in the zoo.
        path: of the file, of any generation.
        num_classes: of the net; the file's last layer is used if it has that width, else replaced by a fresh one.
        order: a key of `ORDERS`, or `auto`: by known hash, `backend` attribute or layout, else an error.
        seed: of fresh layers.
        ignore: patterns (as in the shell) of names of the file's layers; these are taken to be absent.
        names: the file's name of a layer → the net's, for layers of one's own names: {"my_output": "predictions"}.
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
    net, spec = nets.create(name, num_classes, **options), nets.spec(name)
    expected = expect(name, net)
    with read(path) as file:
        ignored = [layer for layer in file.layers if matches(layer, ignore)]
        file = dataclasses.replace(file, layers=tuple(layer for layer in file.layers if layer not in ignored))
        _refuse_low_rank(file)
        given = _given(names or {}, file, expected)
        file = dataclasses.replace(file, layers=tuple(layer for layer in file.layers if layer not in given.values()))
        cut = any(layer.kind == "dense" for layer in ignored)
        found = by_name(name, expected, file, cut=cut, given=given)
        _require_listed(name, file)
        word, decided_by = _order(name, file, found, expected, order)
        plan = _plan(name, net, expected, found, stored_out_in=ORDERS[word][0])
        if plan.problems:
            raise ValueError(_explain(name, file, found, plan, {"num_classes": num_classes, **options}))
        variables = _read(plan.filled, *ORDERS[word], spec.flattened, spec.convolved, file.path)
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
            names={} if "0.3" in file.layout else {layer: found[layer].name for layer in plan.filled},
            fresh=plan.fresh,
            replaced=plan.replaced,
            dropped=plan.dropped,
            ignored=[layer.name for layer in ignored],
        )
    # In the net's own order of layers, whatever the file's.
    variables["params"] = {layer: variables["params"][layer] for layer in expected if layer in variables["params"]}
    return variables, report


def _refuse_low_rank(file: KerasFile) -> None:
    if found := [layer.name for layer in file.layers if any("lora_" in tensor.name for tensor in layer.tensors)]:
        raise ValueError(
            f"{file.path}: {', '.join(found)} keep the matrices of LoRA apart from their kernels; save the model as "
            ".weights.h5 or .keras, where Keras adds them up"
        )


def _given(names: Mapping[str, str], file: KerasFile, expected: Shapes) -> dict[str, Layer]:
    """The net's layer → the file's, as the caller names them."""
    given: dict[str, Layer] = {}
    for stored, target in names.items():
        layers = [layer for layer in file.layers if matches(layer, [stored])]
        if len(layers) != 1:
            found = "none" if not layers else f"{len(layers)} of these"
            known = ", ".join(layer.name for layer in file.layers)
            raise ValueError(f"names={dict(names)!r}: {file.path} has {found} called {stored}; it has {known}")
        if target not in expected or target in given:
            raise ValueError(f"names={dict(names)!r}: {target} is no layer of the net with weights, or named twice")
        given[target] = layers[0]
    return given


def _require_listed(name: str, file: KerasFile) -> None:
    """Refuses a file that lists layers of another form of the net, which no weight tells apart."""
    spec, listed = nets.spec(name), {layer.rpartition("/")[2] for layer in file.weightless}

    def fits(row: nets.Spec) -> bool:
        return listed >= set(row.holds) and not listed & set(row.lacks)

    if not listed or fits(spec):
        return
    others = [other for other, row in nets.ZOO.items() if (row.holds or row.lacks) and fits(row)]
    odd = ", ".join((*(set(spec.holds) - listed), *(listed & set(spec.lacks))))
    raise ValueError(
        f"{file.path} does not fit {name} ({spec.about}), by {odd}, which the file "
        f"{'lists' if listed & set(spec.lacks) else 'does not list'}: it is a file of {' or '.join(others)}"
    )


def save(
    name: str, variables: Mapping[str, Any], path: str | os.PathLike[str], *, nested: bool = False, **options: Any
) -> None:
    """Writes variables of the net called `name` so that Keras's `load_weights` reads them into the same architecture.

    A path that ends in `.weights.h5` gets the layout of Keras 3, another `.h5` that of Keras 2, which both read.

    Args:
        nested: the backbone is a model of its own inside of the Keras model, all of it trainable, and the head follows
            it, as in `keras.Sequential([keras.applications.ResNet50(include_top=False), …, Dense(5)])`.
        options: the fields of the net's class that the variables were made with, `num_classes` excepted.

    Raises:
        ValueError: no net has that name, the variables are not those of that net, or another suffix.
        OSError: the file cannot be written; what was there before is left.
    """
    head = variables["params"].get(nets.spec(name).head)
    net = nets.create(name, None if head is None else len(head["bias"]), **options)
    expected = expect(name, net)
    params, stats = variables["params"], variables.get("batch_stats", {})
    stored = {layer: {**params.get(layer, {}), **stats.get(layer, {})} for layer in {**params, **stats}}
    shapes = {layer: {leaf: np.shape(array) for leaf, array in leaves.items()} for layer, leaves in stored.items()}
    if shapes != expected:
        strange = [layer for layer in {**expected, **shapes} if shapes.get(layer) != expected.get(layer)]
        raise ValueError(
            f"these are not the variables of {name} with the options {options}: "
            + "; ".join(f"{layer} is {shapes.get(layer)}, expected {expected.get(layer)}" for layer in strange[:5])
        )
    kinds = keras_kinds(name, net)
    models = net.keras_models()
    outside = {*nets.spec(name).classifier, *net.head_layers()}
    layers = []
    for layer, leaves in expected.items():
        keras_class = kinds.get(layer, kind(list(leaves.values())))
        fields = {KERAS_FIELDS[keras_class][leaf]: np.asarray(stored[layer][leaf], np.float32) for leaf in leaves}
        if layer in nets.spec(name).convolved:
            fields["kernel"] = fields["kernel"][None, None]
        within = ("functional",) if nested and layer not in outside else ()
        within += (models[layer],) if layer in models else ()
        layers.append(Written(layer, keras_class, fields, within))
    write(Path(path).expanduser(), layers)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What fills which layer of a net; see `Report` for the lists. `problems`: layer → line of an error."""

    filled: dict[str, dict[str, Tensor]]
    fresh: list[str]
    replaced: list[str]
    dropped: list[str]
    problems: dict[str, str]


def _plan(name: str, net: nets.Net, expected: Shapes, found: Mapping[str, Layer], *, stored_out_in: bool) -> _Plan:
    """A head layer is fresh if the file lacks it, and replaced if its width differs; any other mismatch is a problem.

    The published head is also replaced where layers before it are new to the net or left out.
    """
    published = nets.spec(name)
    last = last_layers(name)
    hidden = [layer for layer in net.head_layers() if layer not in last]
    spare = [layer for layer in found if layer not in expected]
    dropped = [layer for layer in spare if layer in published.classifier]
    all_new = not any(layer in found for layer in hidden)
    plan = _Plan({}, [], [], dropped, {})
    for layer, leaves in expected.items():
        stored = found.get(layer)
        matched = match_layer(layer, stored, leaves, stored_out_in=stored_out_in)
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
            plan.problems[layer] = f"{layer}: the file has {shapes_of(found[layer])}, the net has no such layer"
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
    elif published := [weights for weights in nets.spec(name).weights.values() if weights.hash == file.md5]:
        return published[0].order, "the file's published hash"
    else:
        choices = "th or th-tf-kernels" if out_in else "tf or tf-th-kernels"
        raise ValueError(
            f"{file.path} does not say which backend its kernels were trained on, and whether their taps are rotated "
            f"cannot be seen: say order={choices} (th if Theano trained it; the name of the file may tell)"
        )
    return next(word for word, what in ORDERS.items() if what == (out_in, rotated)), evidence


def _explain(name: str, file: KerasFile, found: Mapping[str, Layer], plan: _Plan, options: Mapping[str, Any]) -> str:
    """What does not fit, and the options that would; `options` are those of the net, `num_classes` included."""
    problems = list(plan.problems.values())
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    lines = [f"{file.path} does not fit {name}:", *(f"  {problem}" for problem in problems[:SHOWN]), *more]
    smaller = nets.any_size(name)
    lacking = [layer for layer in plan.problems if layer not in found]
    if lacking and smaller and options["num_classes"] is not None:
        without = expect(name, nets.create(name, **{**options, **smaller}))
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
    backbone = {*expect(name, nets.create(name, published.num_classes)), *plan.dropped} - {published.head}
    own = [layer for target, layer in found.items() if layer.kind == "dense" and target not in backbone]
    own = in_order(own, file.layers, file.layout in ("keras1", "keras2"))
    others, paired = [], 0  # BatchNorm between dense layers, say; automatic names of the backbone that found no place
    for keras_class in ("conv2d", "batch_normalization", "scale"):
        spare = [found[target] for target in plan.problems if target in found and found[target].kind == keras_class]
        lacking = [layer for layer in plan.problems if layer not in found and layer.startswith(keras_class)]
        others += spare[len(lacking) :]
        paired += 2 * len(lacking)
    of_head = any(layer in own for target, layer in found.items() if target in plan.problems)
    if not of_head and not (others and len(plan.problems) == len(others) + paired):
        return []
    names = [layer.name for layer in file.layers]
    patterns = tuple(
        layer.name if names.count(layer.name) == 1 else layer.tensors[0].name.partition("/vars/")[0]
        for layer in (*own, *others)
    )
    shown = ", ".join(f"{layer.name} {'→'.join(map(str, layer.tensors[0].shape))}" for layer in (*own, *others))
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
        chosen = {"hidden": tuple(hidden), "num_classes": last, **extra}
        net = nets.create(name, **{**options, **chosen})
        expected = expect(name, net)
        layers = [layer for layer in net.head_layers() if layer not in nets.spec(name).classifier[:-1]]
        if [list(expected[layer].values()) for layer in layers] == stored:
            usual = {"hidden": (), **dict.fromkeys(smaller, True), **options}
            changed = {field: value for field, value in chosen.items() if usual.get(field) != value}
            kept = {field: chosen[field] for field in ("hidden", "num_classes")}
            return _say(name, options, kept | changed) if changed else None
    return None


def _fits(other: str, name: str, file: KerasFile) -> bool:
    """Whether the file fills the net called `other`, its head apart. Only nets that it may be of are looked at."""
    row = nets.spec(other)
    net = nets.create(other, row.num_classes)
    names = {*keras_order(net), *row.aliases}
    explicit = [
        [end.replace("/", "_") for end in ends_of(layer)]
        for layer in file.layers
        if layer.kind != "dense" and not AUTOMATIC.fullmatch(layer.name.rpartition("/")[2])
    ]
    if not all(names.intersection(ends) for ends in explicit):
        return False
    if not explicit and type(net) is not type(nets.create(name)):
        return False
    expected = expect(other, net)
    found = by_name(other, expected, file)
    wanted = {layer: leaves for layer, leaves in expected.items() if layer not in row.classifier}
    stored = {layer for layer in found if layer in wanted or found[layer].kind != "dense"} - set(row.classifier)
    return set(wanted) == stored and any(
        all(
            isinstance(match_layer(layer, found[layer], leaves, stored_out_in=flip), dict)
            for layer, leaves in wanted.items()
        )
        for flip in (False, True)
    )


def _read(
    plan: Mapping[str, Mapping[str, Tensor]],
    stored_out_in: bool,
    rotated: bool,
    flattened: Mapping[str, tuple[int, int]],
    convolved: Collection[str],
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
                array = array[0, 0] if layer in convolved and array.shape[:2] == (1, 1) else array
            if not _finite(array):
                raise ValueError(f"{path}: {tensor.name} of {layer} holds values that are not finite")
            variables["batch_stats" if leaf in ("mean", "var", "count") else "params"].setdefault(layer, {})[leaf] = (
                array
            )
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


def _fresh(name: str, net: nets.Net, layers: Collection[str], seed: int) -> dict[str, dict[str, np.ndarray]]:
    """New random values of some layers, as the net's own `init` with that seed gives them; jit prunes the others."""
    if not layers:
        return {}
    images = jnp.zeros((1, *nets.spec(name).native_size, 3))

    @jax.jit
    def init(key: jax.Array) -> dict[str, Any]:
        params = net.init(key, images)["params"]
        return {layer: params[layer] for layer in layers}

    return jax.tree.map(np.asarray, init(jax.random.key(seed)))


def pairs(words: Sequence[str]) -> dict[str, str]:
    """The names that a command line gives as my_output=predictions, for `load`.

    Raises:
        ValueError: a word has not one =.
    """
    if wrong := [word for word in words if word.count("=") != 1]:
        raise ValueError(f"names={wrong[0]!r} is not the file's name of a layer, =, and the net's")
    return dict(word.split("=") for word in words)


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
    """fc (VGG, MobileNetV3), gap, or one of them with the widths of hidden layers: gap:WIDTH,…"""
    auxiliary: bool = True
    """For GoogLeNet: whether it has its two auxiliary heads."""
    ignore: tuple[str, ...] = ()
    """Patterns of names of the file's layers, which are taken to be absent."""
    names: tuple[str, ...] = ()
    """The file's name of a layer and the net's, for layers of one's own names: my_output=predictions."""


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
        names=pairs(arguments.names),
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
