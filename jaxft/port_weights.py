"""Keras weight files ↔ Flax variables, by layer name, strictly and with a report.

python -m jaxft.port_weights vgg16 FILE [--out DIR] [--to-keras FILE]
"""

import dataclasses
import fnmatch
import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxft import nets
from jaxft.keras_files import AUTOMATIC, KerasFile, Layer, Tensor, kind, read, write
from jaxft.nets import vgg

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
        net, file, sha256, layout, container, keras_version, backend: of the net's name and the file, see `KerasFile`.
        order: a key of `ORDERS`; `decided_by` says on what evidence.
        layers: layer → leaf → {"stored": the file's name for it, "shape": as stored, "dtype": as stored}.
        fresh: head layers with new random values; those of `replaced` are in the file with other shapes.
        dropped: classifier layers of the file that the chosen head does not have.
        ignored: layers of the file that match `ignore`.
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
            lines.append(
                f"  {layer:<{width}}  {', '.join(shown)}" + (f"  (cast from {', '.join(casts)})" if casts else "")
            )
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

    Args:
        name: in the zoo.
        path: of the file, of any generation.
        num_classes: of the net; the file's last layer is used if it has that width, else replaced by a fresh one.
        order: a key of `ORDERS`, or `auto`: by known hash, `backend` attribute or layout, else an error.
        seed: of fresh layers.
        ignore: patterns (as of the shell) of layers of the file that the net has no place for.
        options: fields of the net's class, as in `nets.create`.

    Returns:
        ({"params": layer → leaf → array, "batch_stats": …}, report); leaves are float32 NumPy arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor of the file is not used, a leaf of the net is not filled, shapes differ, the order cannot
            be told or contradicts the shapes, values are not finite; or as `read` and `nets.create`.
    """
    net = nets.create(name, num_classes, **options)
    if order != "auto" and order not in ORDERS:
        raise ValueError(f"order={order!r} is not auto or one of {', '.join(ORDERS)}")
    expected = _expect(name, net)
    head = net.head_layers()  # type: ignore[attr-defined]
    with read(path) as file:
        found = _by_name(name, expected, file)
        word, decided_by = _order(name, file, found, expected, order)
        problems, plan, fresh, replaced = [], {}, [], []
        for layer, leaves in expected.items():
            matched = _match(layer, found.get(layer), leaves, stored_out_in=ORDERS[word][0])
            if isinstance(matched, dict):
                plan[layer] = matched
            elif layer in head:
                (replaced if layer in found else fresh).append(layer)
            else:
                problems.append(matched)
        spare = [layer for layer in found if layer not in expected]
        ignored = [layer for layer in spare if any(fnmatch.fnmatchcase(layer, pattern) for pattern in ignore)]
        dropped = [layer for layer in spare if layer in nets.spec(name).classifier and layer not in ignored]
        for layer in spare:
            if layer not in ignored and layer not in dropped:
                problems.append(f"{layer}: the file has {_stored(found[layer])}, the net has no such layer")
        if problems:
            raise ValueError(_explain(name, file, found, problems))
        variables = _read(plan, *ORDERS[word], nets.spec(name).flattened, file.path)
        variables["params"] |= _fresh(name, net, [*fresh, *replaced], seed)
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
                for layer, leaves in plan.items()
            },
            fresh=[*fresh, *replaced],
            replaced=replaced,
            dropped=dropped,
            ignored=ignored,
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
    write(Path(path), layers)


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


def _by_name(name: str, expected: Shapes, file: KerasFile) -> dict[str, Layer]:
    """The file's layers by the net's names, as far as they have a place; automatic names count by rank."""
    published = nets.spec(name)
    whole = nets.create(name, published.num_classes)
    known = {*_keras_order(whole), *expected}
    found: dict[str, Layer] = {}
    automatic: dict[str, list[tuple[int, Layer]]] = {}
    for layer in file.layers:
        stored = layer.name or ""
        # A nested model puts its own name in front; a / inside a layer's name is a _ in the net's.
        parts = stored.split("/")
        ends = ["_".join(parts[first:]) for first in range(len(parts))]
        target = next((end for end in (published.aliases.get(end, end) for end in ends) if end in known), stored)
        number = AUTOMATIC.fullmatch(parts[-1])
        if number or layer.name is None:  # never by name: Keras 1 and 2 count from 1, Keras 3 from 0 or any number
            automatic.setdefault(layer.kind, []).append((int(number[1] or 0) if number else 0, layer))
        elif target in found:
            raise ValueError(f"{file.path} holds two layers called {target}; which one is meant cannot be told")
        else:
            found[target] = layer
    canonical = _expect(name, whole) if automatic else {}
    for keras_class, layers in automatic.items():
        numbered = file.layout in ("keras1", "keras2")  # their order depends on the version, the numbers do not
        if numbered:
            layers.sort(key=lambda layer: layer[0])
        for names in (canonical, expected):  # the rank counts in the whole net, or in the net with the chosen head
            free = [
                layer
                for layer, leaves in names.items()
                if kind(list(leaves.values())) == keras_class and layer not in found
            ]
            if numbered and all(map(AUTOMATIC.fullmatch, free)):
                free.sort(key=lambda layer: int(layer.rpartition("_")[2]))
            if len(free) == len(layers):
                found |= {name: layer for name, (_, layer) in zip(free, layers, strict=True)}
                break
        else:
            found |= {layer.name or f"{keras_class} {rank}": layer for rank, (_, layer) in enumerate(layers, 1)}
    return found


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
    if set(by_field) == {*leaves, "scale"} != set(leaves) and np.all(by_field["scale"].data[...] == 1):
        del by_field["scale"]  # a gamma that was never trained, as in the first files of Inception-V4
        layer = Layer(layer.name, tuple(by_field.values()))
    matched = by_field if set(by_field) == set(leaves) else dict(zip(leaves, layer.tensors, strict=False))
    shapes = {leaf: tensor.shape for leaf, tensor in matched.items()}
    if stored_out_in and len(shapes.get("kernel", ())) == 4:
        o, i, h, w = shapes["kernel"]
        shapes["kernel"] = (h, w, i, o)
    if len(layer.tensors) != len(leaves) or shapes != dict(leaves):
        return f"{name}: the net wants {wanted}, the file has {_stored(layer)}"
    return matched


def _field(stored: str) -> str:
    """The last part of a stored name: `block1_conv1_W_1:0` → `W`, `conv/kernel:0` → `kernel`."""
    last = stored.partition(":")[0].rpartition("/")[2]
    return next((field for field in FIELDS if re.search(rf"(^|_){field}(_\d+)?$", last)), last)


def _stored(layer: Layer) -> str:
    return ", ".join(f"{tensor.name} {'×'.join(map(str, tensor.shape))}" for tensor in layer.tensors)


def _explain(name: str, file: KerasFile, found: Mapping[str, Layer], problems: Sequence[str]) -> str:
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    lines = [f"{file.path} does not fit {name}:", *(f"  {problem}" for problem in problems[:SHOWN]), *more]
    classifier = nets.spec(name).classifier
    if not set(classifier) & set(found) and any(problem.startswith(classifier) for problem in problems):
        lines.append("The file holds no classifier; take a pooled head (head=(), or gap on the command line).")
    fits = [other for other in nets.ZOO if other != name and _fits(other, name, file)]
    if fits:
        lines += [f"It is a file of {other} ({nets.spec(other).about})," for other in fits]
        lines.append(f"not of {name} ({nets.spec(name).about}).")
    return "\n".join(lines)


def _fits(other: str, name: str, file: KerasFile) -> bool:
    """Whether the file fills the net called `other`, its classifier apart; looks at nets that it may be of alone."""
    row = nets.spec(other)
    net = nets.create(other, row.num_classes)
    names = {*_keras_order(net), *row.aliases}
    stored = [
        layer.name.replace("/", "_") for layer in file.layers if layer.name and not AUTOMATIC.fullmatch(layer.name)
    ]
    explicit = [layer for layer in stored if layer not in row.classifier]
    if not all(layer in names for layer in explicit) or not (explicit or type(net) is type(nets.create(name))):
        return False
    expected = _expect(other, net)
    found = _by_name(other, expected, file)
    wanted = {layer: leaves for layer, leaves in expected.items() if layer not in row.classifier}
    return set(wanted) == set(found) - set(row.classifier) and any(
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
                array = np.empty(tensor.shape, np.float32)
                tensor.data.read_direct(array)
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
        block = tensor.data[first * height * width : (first + step) * height * width]
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
    """Width of the last layer, by default that of the published weights; another than the file's gets a fresh one."""
    head: str | None = None
    """Of VGG: fc, gap or gap:WIDTH,…"""
    ignore: tuple[str, ...] = ()
    """Patterns of layers of the file that the net has no place for."""


def main(arguments: Arguments) -> None:
    options: dict[str, Any] = {} if arguments.head is None else {"head": vgg.head(arguments.head)}
    if arguments.out is not None and arguments.out.exists():
        raise ValueError(f"--out {arguments.out} exists already; name a new folder")
    variables, report = load(
        arguments.net,
        arguments.file,
        num_classes=arguments.num_classes or nets.spec(arguments.net).num_classes,
        order=arguments.order,
        ignore=arguments.ignore,
        **options,
    )
    print(report)
    if arguments.out is not None:
        import orbax.checkpoint as ocp  # half a second that printing a report should not cost

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(arguments.out.absolute() / "variables", variables)
        (arguments.out / "report.json").write_text(json.dumps(report.json(), indent=2) + "\n")
    if arguments.to_keras is not None:
        save(arguments.net, variables, arguments.to_keras, **options)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
