"""The feature cache: what a wholly frozen prefix of stages gives, computed once and read from disk in every epoch.

Its inputs must repeat: images without augmentation, or a fixed number of augmented views of each. Training on cached
features gives the same losses as computing them at every step, as both run the same steps: on a CPU bit for bit, though
those on vectors run several in one dispatch.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft import devices, masking, preprocess
from jaxft.data import Augment, Dataset, Inputs, augment, loader
from jaxft.data.rows import CacheError, Rows, no_room
from jaxft.predict import EvalStep, make_eval_step, real_rows
from jaxft.progress import bar
from jaxft.task import Task

Pool = Literal["mean", "max", "std"]
POOLS = {"mean": jnp.mean, "max": jnp.max, "std": jnp.std}

Prefix = jax.stages.Wrapped
"""Jitted: (variables, uint8 images [B, H, W, 3], None or the `row` of each) → what the last frozen stage gives."""


class Wanted(NamedTuple):
    """Features that a run reads: of which images, in which view.

    Attributes:
        inputs: what makes the inputs of the prefix, as JSON values, the view apart.
        view: the number of an augmented view; None for the images as they are.
        indices: the images, int [n].
        examples: how many the dataset has.
        plain_view: the first view is the images as they are.
        batches: image indices, int [m] → their batches in order, as `loader.eval_batches` gives them.
    """

    inputs: Mapping[str, Any]
    view: int | None
    indices: np.ndarray
    examples: int
    plain_view: bool
    batches: Callable[[np.ndarray], Iterator[dict[str, Any]]]


def cut(net: Any, weighted: Sequence[str]) -> str | None:
    """The last stage of the longest prefix of `net` that is wholly frozen and the same in every pass; None if none is.

    A stage with active dropout ends the prefix. Auxiliary heads, which read inner stages, allow none.

    Args:
        net: its `frozen` field says what is.
        weighted: the layers with weights, the keys of `params`.
    """
    stage = masking.frozen_prefix(net, net.frozen, weighted)
    if stage is None or getattr(net, "auxiliary", False):
        return None
    last = None
    for name, layers in net.layers().items():
        if getattr(net, "dropout", 0.0) and any("dropout" in layer for layer in layers):
            break
        last = name
        if name == stage:
            break
    return last


def row(view: int, index: np.ndarray, examples: int, *, plain_view: bool = False) -> np.ndarray:
    """The number, int32 [B], of a view of each of the images `index`, from which its augmentation is drawn.

    With `plain_view` the first view is -1 throughout: it is not augmented.
    """
    if plain_view and view == 0:
        return np.full(len(index), -1, np.int32)
    return (view * examples + index).astype(np.int32)


def make_prefix(
    net: nn.Module,
    stage: str | None,
    normalise: Callable[[jax.Array], jax.Array],
    change: Augment | None = None,
    seed: int = 0,
    *,
    plain_view: bool = False,
) -> Prefix:
    """The jitted net up to `stage`, None for preprocessing alone; images that come with rows are augmented by row.

    With `plain_view` those of rows below 0 are not.
    """

    @jax.jit
    def prefix(variables: Mapping[str, Any], images: jax.Array, rows: jax.Array | None) -> jax.Array:
        if rows is not None and change is not None:
            changed = _view(change, seed, images, rows)
            images = jnp.where(rows.reshape(-1, 1, 1, 1) < 0, images, changed) if plain_view else changed
        images = normalise(images)
        return images if stage is None else net.apply(variables, images, train=False)[1][stage]  # type: ignore[index]

    return prefix


def _view(change: Augment, seed: int, images: jax.Array, rows: jax.Array) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
    return augment.one_by_one(change, keys, images, {})[0]


def make_view(change: Augment, seed: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(uint8 images [B, H, W, C], the `row` of each) → float32 images, each augmented by its row alone."""
    view = jax.jit(lambda images, rows: _view(change, seed, images, rows))
    return lambda images, rows: np.asarray(view(images, rows))


def eval_step(net: nn.Module, weighted: Sequence[str], preprocessing: str, task: Task) -> EvalStep:
    """The eval step of a net: two programs where its first stages are frozen, so that cached features round alike."""
    normalise, stage = preprocess.get(preprocessing), cut(net, weighted)
    if stage is None:
        return make_eval_step(net.apply, task.outputs, normalise)
    prefix = make_prefix(net, stage, normalise)
    rest = eval_step_after(net, stage, task)
    return lambda variables, images: rest(variables, prefix(variables, images, None))


def eval_step_after(net: nn.Module, stage: str, task: Task) -> EvalStep:
    """The eval step that takes the output of a stage, such as a cached one."""
    return make_eval_step(net.apply, task.outputs, lambda x: x, stage)


def of(
    model: Any,
    stage: str,
    images: Any,
    *,
    pool: bool = True,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """The output of a stage for each of some images: bottleneck features.

    Args:
        model: a `Model`, from `model.load` or `model.open`.
        stage: a stage of its net, a key of `model.net.layers()`.
        images: an `Inputs` (without its augmentation, in the order of its indices), a `Dataset`, or a list of images,
            each the bytes of a file or uint8 [H, W, C].
        pool: take the mean over places, of a stage that has them.
        image_size: (height, width) in pixels; by default that of the inputs, or that the model was trained at.
        batch_size: images at once; another one may round differently.

    Returns:
        float32 [n, channels], or without pooling [n, …] as the stage gives it.

    Raises:
        ValueError: no such stage, or no size of images; or as `decode.pixels`.
    """

    def one(found: Mapping[str, jax.Array]) -> jax.Array:
        return found[stage].mean((-3, -2)) if pool and found[stage].ndim >= 4 else found[stage]

    return _whole(model, [stage], _inputs(model, images, image_size, batch_size), one)


def of_stages(
    model: Any,
    stages: Sequence[str],
    images: Any,
    pools: Sequence[Pool] = ("mean",),
    *,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    """Several stages, pooled in several ways over their places, side by side: float32 [n, features].

    Arguments and errors are as in `of`; `pools` are some of `POOLS`.
    """
    if not pools or not set(pools) <= set(POOLS):
        raise ValueError(f"pools={tuple(pools)}, expected some of {', '.join(POOLS)}")

    def beside(found: Mapping[str, jax.Array]) -> jax.Array:
        columns = []
        for stage in stages:
            x = found[stage].astype(jnp.float32)
            columns += [POOLS[name](x, (-3, -2)) for name in pools] if x.ndim >= 4 else [x]
        return jnp.concatenate([column.reshape(len(column), -1) for column in columns], 1)

    return _whole(model, stages, _inputs(model, images, image_size, batch_size), beside)


def on_disk(model: Any, stage: str, inputs: Inputs) -> Rows:
    """The output of a stage for each image, in one file of the cache folder, in the order of the inputs' indices.

    It takes no more memory than a batch, and is computed once; a run that dies loses at most 64 MB of it.

    Raises:
        ValueError: no such stage; or as `decode.pixels`.
        OSError: the disk is full or cannot be written to.
    """

    def plain(found: Mapping[str, jax.Array]) -> jax.Array:
        return found[stage]

    _check_stages(model, [stage])
    height, width = inputs.image_size
    images = jax.ShapeDtypeStruct((inputs.batch_size, height, width, inputs.decode.channels), np.uint8)
    prefix = make_prefix(model.net, stage, preprocess.get(model.preprocessing))
    lowered = prefix.lower(model.variables, images, None)
    shape = lowered.out_info.shape[1:]
    made = {"data": inputs.dataset.fingerprint, "size": inputs.image_size, "decode": dataclasses.asdict(inputs.decode)}
    made["program"] = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    found = identity(model.net, model.variables, stage, preprocessing=model.preprocessing, **made)
    rows = Rows("features", f"{found['net'].lower()}-{stage}", found, inputs.indices, shape, np.float32)
    if reason := no_room([rows]):
        raise OSError(reason)
    rows.fill(lambda indices: _computed(model, [stage], dataclasses.replace(inputs, indices=indices), plain))
    return rows


def _inputs(model: Any, images: Any, image_size: tuple[int, int] | None, batch_size: int) -> Inputs:
    from jaxft.model import unlabelled

    if isinstance(images, Inputs):
        return images
    size = image_size or model.image_size
    if size is None:
        raise ValueError("the size of the images is not known: say image_size=(224, 224)")
    data = images if isinstance(images, Dataset) else unlabelled(images, ("none",), "class")
    return Inputs(data, np.arange(len(data)), size, batch_size, decode=model.decode)


def _whole(
    model: Any, stages: Sequence[str], inputs: Inputs, function: Callable[[Mapping[str, jax.Array]], jax.Array]
) -> np.ndarray:
    parts = []
    with bar("features", len(inputs)) as advance:
        for part in _computed(model, stages, inputs, function):
            parts.append(part)
            advance(len(part))
    return np.concatenate(parts)


def _check_stages(model: Any, stages: Sequence[str]) -> None:
    names = list(model.net.layers())
    if unknown := [stage for stage in stages if stage not in names]:
        raise ValueError(f"{unknown[0]!r} is not a stage of this net; its stages are {', '.join(names)}")


def _computed(
    model: Any, stages: Sequence[str], inputs: Inputs, function: Callable[[Mapping[str, jax.Array]], jax.Array]
) -> Iterator[np.ndarray]:
    """What a function makes of the outputs of stages, float32 [B, …], batch by batch."""
    _check_stages(model, stages)
    normalise = preprocess.get(model.preprocessing)

    @jax.jit
    def compute(variables: Mapping[str, Any], batch: jax.Array) -> jax.Array:
        return function(model.net.apply(variables, normalise(batch), train=False)[1]).astype(jnp.float32)

    mesh = devices.mesh()
    variables = {kind: model.variables.get(kind, {}) for kind in ("params", "batch_stats")}
    batches = loader.eval_batches(inputs, inputs.dataset.images, process=devices.process())
    for rows in real_rows(compute, devices.replicate(variables, mesh), batches, mesh):
        yield rows["outputs"]


def identity(net: nn.Module, variables: Mapping[str, Any], stage: str, **inputs: Any) -> dict[str, Any]:
    """What the features depend on, as JSON values; with the program that `open_cache` adds, to the bit.

    Args:
        net, variables: the backbone and what fills it; weights after `stage` do not count.
        stage: where it is cut.
        inputs: what makes the inputs: the images, their size, preprocessing, augmentation and view.
    """
    weights = hashlib.sha256()
    prefix = {layer for name, layers in _until(net.layers(), stage) for layer in layers}  # type: ignore[attr-defined]
    for collection in ("params", "batch_stats"):
        for layer in sorted(prefix & set(variables.get(collection, {}))):
            for leaf, value in sorted(variables[collection][layer].items()):
                weights.update(f"{collection}/{layer}/{leaf}".encode())
                weights.update(np.ascontiguousarray(value).data)
    found = {"net": type(net).__name__, "stage": stage, "weights": weights.hexdigest(), **inputs}
    versions = devices.versions()
    return json.loads(json.dumps(found | {"jax": versions["jaxlib"], "device": versions["device"]}))


def _until(stages: Mapping[str, Any], last: str) -> Iterator[tuple[str, Any]]:
    for name, layers in stages.items():
        yield name, layers
        if name == last:
            return


def seconds(compute: Callable[[], Any]) -> float:
    """Seconds of the second call; the first one compiles."""
    jax.block_until_ready(compute())
    began = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - began


def write_rate(folder: pathlib.Path) -> float:
    """Bytes a second that reach the disk of `folder`, measured with 32 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    probe, content = folder / f"probe-{os.getpid()}", os.urandom(2**20)
    try:
        with probe.open("wb") as file:
            began = time.perf_counter()
            for _ in range(32):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            return 32 * len(content) / (time.perf_counter() - began)
    finally:
        probe.unlink(missing_ok=True)


def pays(caches: Sequence[Rows], uses: int, image_seconds: float) -> tuple[bool, str]:
    """(whether the caches save time, a line that says why).

    Args:
        caches: what would be made.
        uses: images that the run sends through the prefix without a cache, each as often as it is used.
        image_seconds: measured, of the prefix for one image.
    """
    todo, row_bytes = sum(cache.missing() for cache in caches), caches[0].row_bytes
    row_seconds = row_bytes / write_rate(caches[0].folder.parent)  # reading is no slower than writing
    with_it = todo * (image_seconds + row_seconds) + uses * row_seconds
    without = uses * image_seconds
    size = sum(cache.bytes for cache in caches) / 1e6
    return with_it < without, (
        f"features of {caches[0].identity['stage']!r}: {with_it:.0f} s to make and read ({todo} images to compute, "
        f"{size:.0f} MB), {without:.0f} s to compute every time"
    )


def open_cache(
    prefix: Prefix,
    variables: Mapping[str, Any],
    identity: Mapping[str, Any],
    wanted: Mapping[str, Wanted],
    *,
    uses: int,
    required: bool,
) -> dict[str, Rows] | None:
    """All wanted features, computed where the disk does not hold them; None where that does not pay.

    Args:
        prefix, variables: what computes them.
        identity: from the function of that name. The lowered program is added, so that features which another batch
            size or another version of jaxft gave, with other rounding, are not taken for these.
        wanted: by any name.
        uses: images that go through the prefix in the run without a cache.
        required: make the caches even where they do not pay.

    Raises:
        OSError: they are required and do not fit on the disk, or it cannot be written to.
    """

    def inputs(of: Wanted, batch: dict[str, Any]) -> tuple[Any, Any]:
        if of.view is None:
            return batch["image"], None
        return batch["image"], row(of.view, batch["index"], of.examples, plain_view=of.plain_view)

    def compute(of: Wanted, indices: np.ndarray) -> Iterator[np.ndarray]:
        for batch in of.batches(indices):
            yield np.asarray(prefix(variables, *inputs(of, batch)))[batch["real"]]

    caches, first = {}, None
    for name, of in wanted.items():
        batch = inputs(of, next(iter(of.batches(of.indices))))
        lowered = prefix.lower(variables, *batch)
        first, like = first or batch, lowered.out_info
        program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        found = {**identity, **of.inputs, "program": program, "view": of.view}
        caches[name] = Rows(
            "features", f"{identity['net'].lower()}-{identity['stage']}", found, of.indices, like.shape[1:], like.dtype
        )
    assert first is not None
    if not required:
        if any(cache.missing() for cache in caches.values()):
            image_seconds = seconds(lambda: prefix(variables, *first)) / len(first[0])
            worth_it, why = _pays_here(list(caches.values()), uses, image_seconds)
            print(f"feature cache {'on' if worth_it else 'off'}: {why}", flush=True)
            if not worth_it:
                return None
    elif reason := no_room(caches.values()):
        raise OSError(reason)
    size, folder = sum(cache.bytes for cache in caches.values()) / 1e6, next(iter(caches.values())).folder.parent
    print(f"features of {identity['stage']!r} come from {folder} ({size:.0f} MB)", flush=True)
    for name, cache in caches.items():
        try:
            cache.fill(partial(compute, wanted[name]))
        except CacheError as error:
            if required:
                raise
            print(f"feature cache off: {error}", flush=True)
            return None
    return caches


def _pays_here(caches: Sequence[Rows], uses: int, image_seconds: float) -> tuple[bool, str]:
    """As `pays`; a disk that is full or cannot be written to pays never."""
    if reason := no_room(caches):
        return False, reason
    try:
        return pays(caches, uses, image_seconds)
    except OSError as error:  # of the probe's writing: nothing else is read or written here
        return False, str(error)
