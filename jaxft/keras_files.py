"""Keras weight files of every generation, read lazily and as data alone: nothing in them is executed or followed.

Source: the `save_weights` of Keras 0.3, 1.2, 2.x and 3.x.
"""

import contextlib
import dataclasses
import hashlib
import json
import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from jaxft import fetch, hdf5_probe
from jaxft.files import write_whole

# Keras's automatic names of layers, of any generation → its class in snake case.
CLASSES = {
    **{name: name for name in ("conv2d", "depthwise_conv2d", "separable_conv2d", "dense", "batch_normalization")},
    **{name: name for name in ("layer_normalization", "normalization", "layer_scale", "scale")},
    **{"convolution2d": "conv2d", "separableconvolution2d": "separable_conv2d"},
    "batchnormalization": "batch_normalization",
}
AUTOMATIC = re.compile(rf"(?:{'|'.join(CLASSES)})(?:_(\d+))?")
_KERAS1_FIELD = re.compile(r"(.+)_(W|b|gamma|beta|running_mean|running_std)(?:_\d+)?")
NESTED = "backbone"  # the name of a nested model in a file of Keras 2; Keras goes by the order
_MEMBER = "model.weights.h5"  # of a .keras zip
_STATISTICS = ("moving_mean:0", "moving_variance:0", "mean:0", "variance:0", "count:0")
_BFLOAT16 = np.dtype("V2")  # what h5py makes of it; no other two bytes are in a weight file

# Limits, looked at before anything is read. The largest file of the zoo has 700 layers in groups four deep.
_MAX_GROUPS = 20_000  # visited: hard links can make 2**40 paths of a few groups
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_NAMES = 1_000  # attributes of names: Keras 2 splits at 64 kB, and each is looked up among all the others
# What h5py, zipfile and the decompressors raise on bad files, beside ValueError.
_BROKEN = (
    *(OSError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError, MemoryError, EOFError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)

_RANDOM_STATE = ("seed_generator", "seed_generator_state", "StateVar")  # of dropout and augmentation: no weights

_KERAS_ONLY = "expected the weights of Keras: HDF5 (.h5) or a .keras zip"
_AGAIN = "its transfer may have been cut short: download it again"
_OTHERS = (
    f"It cannot fill a net here; {_KERAS_ONLY}. Take the Keras file of the same net (weights imagenet), "
    "or move the weights into a Keras model and save_weights as .weights.h5"
)


def kind(shapes: Sequence[tuple[int, ...]]) -> str:
    """The Keras class of a layer in snake case: by a kernel's rank, else by the number of vectors (a Scale has two).

    A LayerNormalization cannot be told from a Scale by its shapes.
    """
    if len(shapes[0]) == 4:
        pair = len(shapes) > 1 and len(shapes[1]) == 4
        return "separable_conv2d" if pair else "depthwise_conv2d" if shapes[0][-1] == 1 else "conv2d"
    if len(shapes[0]) == 2:
        return "dense"
    if shapes[-1] == ():
        return "normalization"
    return {1: "layer_scale", 2: "scale"}.get(len(shapes), "batch_normalization")


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One array of a file, not read yet; `name` is what the file at `path` calls it."""

    name: str
    data: h5py.Dataset
    path: Path = Path()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if self.data.dtype == _BFLOAT16 else self.data.dtype

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The values as float32, or some rows of them.

        Raises:
            ValueError: the file is damaged in this place.
        """
        try:
            if rows == slice(None) and self.data.dtype != _BFLOAT16:
                array = np.empty(self.shape, np.float32)
                self.data.read_direct(array)
                return array
            return np.asarray(self.data[rows]).view(self.dtype).astype(np.float32)
        except _BROKEN as error:
            raise ValueError(f"{self.path}: {self.name} cannot be read ({error}); {_AGAIN}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer with weights; where a file names none, they count by kind as `conv2d_1`, `conv2d_2`, …"""

    name: str
    tensors: tuple[Tensor, ...]

    @property
    def kind(self) -> str:
        """Its Keras class in snake case: an automatic name tells, else shapes do."""
        last = self.name.rpartition("/")[2]
        if AUTOMATIC.fullmatch(last):
            return CLASSES[re.sub(r"_\d+$", "", last)]
        return kind([tensor.shape for tensor in self.tensors])


@dataclasses.dataclass(frozen=True)
class KerasFile:
    """A weight file, open until `close()`; a context manager.

    Attributes:
        path: of the file.
        hashing: the computation of the whole file's SHA-256, which runs while the arrays are read.
        layout: "keras0.3-sequential", "keras0.3-graph", "keras1", "keras2" (names in attributes, as Keras 2 and the
            legacy h5 of Keras 3 write), or "keras3".
        container: "weights", "model" (a whole model with its optimizer) or "keras" (a zip).
        keras_version, backend: as the file states them, or None.
        weightless: the layers without weights that the file lists; files of Keras 3 list none.
        layers: those with weights, in the file's order. Nested models are flattened; the optimizer and the state of
            random layers are left out.
    """

    path: Path
    hashing: Future[str]
    layout: str
    container: str
    keras_version: str | None
    backend: str | None
    layers: tuple[Layer, ...]
    weightless: tuple[str, ...]
    close: Callable[[], None]

    @property
    def sha256(self) -> str:
        """The hash of the whole file, hexadecimal; of shards, see `content_hash`."""
        self.hashing.result()
        return content_hash(self.path)

    @property
    def md5(self) -> str:
        """The hash of the whole file, hexadecimal; Keras publishes it."""
        self.hashing.result()
        return fetch.file_hash(self.path, "md5")

    def __enter__(self) -> "KerasFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None):
        self.close()


def content_hash(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal. That of an index of shards is the hash of theirs, a line each in order."""
    shards = _shards(path)
    if not shards:
        return fetch.file_hash(path, "sha256")
    lines = "".join(f"{fetch.file_hash(shard, 'sha256')}\n" for shard in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def read(path: str | os.PathLike[str]) -> KerasFile:
    """Opens a weight file of any generation; arrays are read when they are asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another library, truncated, no weight file of Keras, or links to other files.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = f"is a folder; {_KERAS_ONLY}" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"the weight file {path} {what}")
    if foreign := _foreign(path):
        raise ValueError(f"{path} is {foreign}")
    shards = _shards(path)
    opened: list[Any] = []

    def close() -> None:
        for file in reversed(opened):
            file.close()

    try:
        zipped = not shards and zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                info = archive.getinfo(_MEMBER)
            _require_stored(info.file_size, info.compress_size, _MEMBER)
            opened.append(hdf5_probe.open_member(path, _MEMBER))
        for part in shards or (path,):
            if wrong := hdf5_probe.probe(part, _MEMBER if zipped else None):
                raise OSError(f"{part.name}: {wrong}" if shards else wrong)
        if shards:
            opened.append(_merged(shards))
        else:
            opened.append(h5py.File(opened[-1] if zipped else path, "r"))
        found = _layout(opened[-1])
    except _BROKEN as error:
        close()
        raise ValueError(
            f"{path} is not a whole Keras weight file ({error}); {_KERAS_ONLY}. If it was downloaded, {_AGAIN}"
        ) from error
    except ValueError as error:
        close()
        raise ValueError(f"{path}: {error}") from error
    found["layers"] = tuple(
        Layer(layer.name, tuple(dataclasses.replace(tensor, path=path) for tensor in layer.tensors))
        for layer in found["layers"]
    )
    container = "keras" if zipped else "shards" if shards else found.pop("container")
    found = {"weightless": (), **found}
    found.pop("container", None)
    # Only a file that names no backend is looked up among the published ones; reading for md5 gives sha256 as well.
    hash_kind = "md5" if found["backend"] is None and found["layout"] != "keras3" else "sha256"
    thread = ThreadPoolExecutor(1)  # beside the reading, on another core
    hashing = thread.submit(fetch.file_hash, path, hash_kind)
    thread.shutdown(wait=False)
    return KerasFile(path=path, hashing=hashing, container=container, close=close, **found)


def _shards(path: Path) -> list[Path]:
    """The files that an index of Keras 3 (`.weights.json`) names, which lie beside it; none if `path` is no index.

    Raises:
        ValueError: the index is malformed, or names a file that is not there.
    """
    with path.open("rb") as file:
        if not file.read(4096).lstrip().startswith(b"{") or path.stat().st_size > _MAX_INDEX_BYTES:
            return []
    try:
        places = json.loads(path.read_text("utf-8"))["weight_map"].values()
        names = {name for place in places for name in ([place] if isinstance(place, str) else place)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is JSON, but no index of weights in shards, which has a weight_map") from error
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{path}: weight_map must name files that lie beside it")
    if missing := sorted(name for name in names if not path.with_name(name).is_file()):
        raise ValueError(
            f"{path} is an index of shards ({len(names)}), of which {', '.join(missing[:3])} "
            f"{'are' if missing[1:] else 'is'} not beside it; put them there"
        )
    return [path.with_name(name) for name in sorted(names)]


def _merged(shards: Sequence[Path]) -> h5py.File:
    """The shards as one file, in memory."""
    whole = h5py.File(shards[0].name, "w", driver="core", backing_store=False)
    for shard in shards:
        with h5py.File(shard, "r") as file:
            seen = {_address(file)}
            for key in list(file):
                _copy(file, whole, str(key), seen)
    return whole


def _address(found: Any) -> int:
    """Where a group or an array lies in its file."""
    return h5py.h5o.get_info(found.id).addr  # pyright: ignore[reportAttributeAccessIssue]


def _copy(source: h5py.Group, target: h5py.Group, key: str, seen: set[int]) -> None:
    """A group or array of `source`, into what `target` has of it already; `seen` are the places in the file so far.

    Hard links can make 2**40 copies of one array.
    """
    found = _child(source, key)
    if _address(found) in seen:
        raise ValueError(f"{found.name} is a second name of what the shard holds already; weight files have none")
    seen.add(_address(found))
    if isinstance(found, h5py.Dataset):
        target.create_dataset(key, data=found[()])
        return
    inner = target.require_group(key)
    for name, value in found.attrs.items():
        inner.attrs[name] = value
    for child in list(found):
        _copy(found, inner, str(child), seen)


def _foreign(path: Path) -> str | None:
    """What a file of another kind is, and what to do about it; None for HDF5, a .keras zip and the unknown."""
    if h5py.is_hdf5(path):
        return None
    with path.open("rb") as file:
        start = file.read(4096)
    names: list[str] = []
    with contextlib.suppress(*_BROKEN, ValueError), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if _MEMBER in names:
        return None
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights it stands for: run `git lfs pull` in its repository"
    if any(name.endswith("data.pkl") for name in names) or start.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF"):
        return f"a PyTorch file, a pickle that could run code when it is read. {_OTHERS}"
    if start.startswith(b"\x80") or path.suffix in (".pth", ".pt", ".ckpt", ".pkl", ".pickle"):
        return f"a pickle or a checkpoint of another library, as PyTorch writes them. {_OTHERS}"
    if start.startswith(b"\x93NUMPY") or any(name.endswith(".npy") for name in names):
        return f"a NumPy file of arrays, which does not say what its layers are. {_OTHERS}"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return f"a safetensors file. {_OTHERS}"
    if start.startswith(b"\x1f\x8b"):
        return "compressed with gzip: unpack it first"
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or start.lstrip()[:5].lower() == b"<html":
        return "a web page, maybe one that asks to log in: download the file itself"
    if names:
        return f"a zip without {_MEMBER}, so not a .keras file. It holds {', '.join(names[:3])}; {_KERAS_ONLY}"
    return None


def _layout(file: h5py.File) -> dict[str, Any]:
    root: Any = _child(file, "model_weights") if "model_weights" in file else file
    stated = {key: _text(file.attrs.get(key, root.attrs.get(key))) for key in ("keras_version", "backend")}
    stated["container"] = "weights" if root is file else "model"
    if "nb_layers" in root.attrs:
        groups = [_child(root, f"layer_{k}") for k in range(int(root.attrs["nb_layers"]))]
        tensors = (_numbered(group) for group in groups)
        return stated | {"layout": "keras0.3-sequential", "layers": _counted(found for found in tensors if found)}
    if "graph" in root:
        group = _child(root, "graph")
        pairs = _pairs(_numbered(group))
        return stated | {"layout": "keras0.3-graph", "layers": _counted(pairs)}
    if names := _names(root, "layer_names"):
        version = stated["keras_version"]
        layers = [layer for name in names for layer in _named(name, _child(root, name))]
        layout = "keras1" if version is None or version.startswith("1") else "keras2"
        weighted = {name for name in names if len(_names(_child(root, name), "weight_names"))}
        weightless = tuple(name for name in names if name not in weighted)
        return stated | {"layout": layout, "layers": tuple(layers), "weightless": weightless}
    layers = tuple(_keras3(root))
    if not layers:
        raise ValueError(
            "an HDF5 file, but not of Keras: it has neither layer_names nor nb_layers, and no group called vars; "
            f"it holds {', '.join(list(root)[:5]) or 'nothing'}"
        )
    return stated | {"layout": "keras3", "layers": layers}


def _child(group: Any, path: str) -> Any:
    """The group or dataset at `path`, which must lie in this very file: links and outside storage are refused."""
    for part in path.split("/"):
        if not isinstance(group, h5py.Group) or part not in group:
            raise ValueError(f"{group.name} lacks {path}, which the file's own attributes or numbering promise")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{group.name}/{part} is a link, maybe out of the file; weight files have none")
        group = group[part]
    if isinstance(group, h5py.Dataset):
        if group.is_virtual or group.external:
            raise ValueError(f"{group.name} keeps its data in another file; weight files keep their own")
        if group.dtype.kind not in "fiu" and group.dtype != _BFLOAT16:
            raise ValueError(f"{group.name} holds {group.dtype}, not numbers")
        _require_stored(math.prod(group.shape or (0,)) * group.dtype.itemsize, group.id.get_storage_size(), group.name)
    return group


def _require_stored(size: int, stored: int, name: Any) -> None:
    if not hdf5_probe.is_stored(size, stored):
        raise ValueError(f"{name} would be {size:,} bytes when read, of {stored:,} that are stored; weights are not so")


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else None if value is None else str(value)


def _names(group: h5py.Group, key: str) -> list[str]:
    """An attribute of names, in chunks `key0`, `key1`, … where it is long; an empty one may be of any dtype."""
    chunks = [key] if key in group.attrs else []
    while f"{key}{len(chunks)}" in group.attrs and chunks != [key] and len(chunks) < _MAX_NAMES:
        chunks.append(f"{key}{len(chunks)}")
    return [_text(name) or "" for chunk in chunks for name in np.asarray(group.attrs[chunk]).ravel().tolist()]


def _numbered(group: h5py.Group) -> tuple[Tensor, ...]:
    count = int(group.attrs.get("nb_params", len(group)))
    if not 0 <= count <= len(group):
        raise ValueError(f"{group.name} promises {count:,} arrays in nb_params, and holds {len(group)}")
    paths = [f"param_{n}" for n in range(count)]
    return tuple(Tensor(f"{group.name}/{path}".lstrip("/"), _child(group, path)) for path in paths)


def _counted(layers: Iterable[tuple[Tensor, ...]]) -> tuple[Layer, ...]:
    """Layers without names get those that Keras 1 would have given: the kind, counted from 1."""
    counts: dict[str, int] = {}
    named = []
    for tensors in layers:
        stem = kind([tensor.shape for tensor in tensors])
        counts[stem] = counts.get(stem, 0) + 1
        named.append(Layer(f"{stem}_{counts[stem]}", tensors))
    return tuple(named)


def _pairs(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The layers of a list of arrays: a matrix or a kernel begins one, the vector after it is its bias."""
    current: list[Tensor] = []
    for tensor in tensors:
        if len(tensor.shape) > 1 and current:
            yield tuple(current)
            current = []
        current.append(tensor)
    if current:
        yield tuple(current)


def _named(name: str, group: h5py.Group) -> Iterator[Layer]:
    """The layers of one entry of `layer_names`: several where the entry is a nested model."""
    owners: dict[str, list[Tensor]] = {}
    for stored in _names(group, "weight_names"):
        bare = re.sub(r":\d+$", "", stored)
        if bare.rpartition("/")[2] in _RANDOM_STATE:
            continue
        keras1 = _KERAS1_FIELD.fullmatch(bare)
        owner = bare.rpartition("/")[0] or (keras1[1] if keras1 else name)
        owners.setdefault(owner, []).append(Tensor(stored, _child(group, stored)))
    if len(owners) == 1:  # the entry's own name says more than prefixes of scopes and copies
        yield Layer(name, tuple(*owners.values()))
    else:
        yield from (Layer(owner, tuple(tensors)) for owner, tensors in owners.items())


def _keras3(group: h5py.Group, prefix: str = "", visited: list[str] | None = None) -> Iterator[Layer]:
    """Depth first; siblings of one class in the order of their numbers, which is the order of the model's layers.

    Nested models come before the layers beside them: a backbone comes before its head.
    """

    visited = [] if visited is None else visited
    visited.append(prefix)
    if len(visited) > _MAX_GROUPS or prefix.count("/") > 50:
        raise ValueError(
            f"it has more than {_MAX_GROUPS:,} groups, or more than 50 in one another; weight files do not"
        )

    def is_group(parent: h5py.Group, key: str) -> bool:
        own = isinstance(parent.get(key, getlink=True), h5py.HardLink)  # following a link could open another file
        return own and parent.get(key, getclass=True) is h5py.Group

    def numbered(key: str) -> tuple[bool, str, int]:
        child: Any = group[key] if is_group(group, key) else {}
        nested = any(is_group(child, inner) for inner in child if inner != "vars")
        stem, _, number = key.rpartition("_")
        return (not nested, stem, int(number)) if stem and number.isdecimal() else (not nested, key, 0)

    for key in sorted(group, key=numbered):
        if key in _RANDOM_STATE or not prefix and key in ("optimizer", "vars"):
            continue
        child = _child(group, key)
        path = f"{prefix}/{key}".lstrip("/")
        if not isinstance(child, h5py.Group):
            continue
        if key != "vars":
            yield from _keras3(child, path, visited)
        elif len(child):
            tensors = [Tensor(f"{path}/{n}", _child(child, n)) for n in sorted(child, key=lambda n: (len(n), n))]
            name, attribute = _text(child.attrs.get("name")), prefix.rpartition("/")[2]
            # A subclassed model keys a layer by its attribute, which says more than an automatic name.
            keyed = name is None or AUTOMATIC.fullmatch(name) and not AUTOMATIC.fullmatch(attribute)
            yield Layer(attribute if keyed or name is None else name, tuple(tensors))


@dataclasses.dataclass(frozen=True)
class Written:
    """A layer to write: its name, Keras class in snake case, arrays by Keras's field, and the models that it lies in,
    from the outside, as Keras numbers them ("functional", "sequential_1")."""

    name: str
    kind: str
    fields: Mapping[str, np.ndarray]
    within: tuple[str, ...] = ()


def write(path: Path, layers: Sequence[Written]) -> None:
    """Writes layers as Keras 3 (`.weights.h5`) or 2 (`.h5`) does. A failure leaves what was there.

    Raises:
        ValueError: another suffix.
        OSError: the folder cannot be written to.
    """
    if path.suffix not in (".h5", ".hdf5"):
        raise ValueError(f"{path}: Keras loads weights from .weights.h5 (its version 3) or .h5 (version 2) files")

    def fill(partial: Path) -> None:
        with h5py.File(partial, "w") as file:
            (_write_keras3 if path.name.endswith(".weights.h5") else _write_keras2)(file, layers)

    write_whole(path, fill)


def _write_keras2(file: h5py.File, layers: Sequence[Written]) -> None:
    file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.15.0"
    entries: dict[str, list[Written]] = {}
    for layer in layers:
        entries.setdefault(f"{NESTED}_{layer.within[0]}" if layer.within else layer.name, []).append(layer)
    # What lies in a model is written before what follows it; Keras goes by the order.
    file.attrs["layer_names"] = [name.encode() for name in entries]
    for name, inside in sorted(entries.items()):
        group = file.create_group(name)
        fields = [(f"{layer.name}/{field}:0", array) for layer in inside for field, array in layer.fields.items()]
        if len(inside) > 1:  # Keras lists what it trains of a nested model, then its running statistics
            fields.sort(key=lambda entry: entry[0].rpartition("/")[2] in _STATISTICS)
        group.attrs["weight_names"] = [field.encode() for field, _ in fields]
        for field, array in fields:
            group[field] = array


def _write_keras3(file: h5py.File, layers: Sequence[Written]) -> None:
    counts: dict[tuple[tuple[str, ...], str], int] = {}
    for layer in layers:
        key = (layer.within, layer.kind)
        number = counts[key] = counts.get(key, -1) + 1
        prefix = "".join(f"layers/{model}/" for model in layer.within)
        place = f"{prefix}layers/{layer.kind}_{number}" if number else f"{prefix}layers/{layer.kind}"
        group = file.create_group(f"{place}/vars")
        group.attrs["name"] = layer.name
        for n, array in enumerate(layer.fields.values()):
            group[str(n)] = array
