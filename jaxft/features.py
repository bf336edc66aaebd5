"""The feature cache: what a wholly frozen prefix of stages gives, computed once and read from disk in every epoch.

Its inputs must repeat: images without augmentation, or a fixed number of augmented views of each. Training on cached
features gives the same losses as computing them at every step, as both run the same steps: on a CPU bit for bit, though
those on vectors run several in one dispatch.
"""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxft import masking, report
from jaxft.data.augment import warp
from jaxft.data.cache import Cache, no_room

Prefix = jax.stages.Wrapped
"""Jitted: (variables, uint8 images [B, H, W, 3], None or the `row` of each) → what the last frozen stage gives."""


def cut(net: Any, frozen: frozenset[str], weighted: Sequence[str]) -> str | None:
    """The last stage of the longest prefix of `net` that is wholly frozen and the same in every pass; None if none is.

    A stage with active dropout ends the prefix. Auxiliary heads, which read inner stages, allow none.
    """
    stage = masking.frozen_prefix(net, frozen, weighted)
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


def row(view: int, index: np.ndarray, examples: int) -> np.ndarray:
    """The number, int32 [B], of a view of each of the images `index`, from which its augmentation is drawn."""
    return (view * examples + index).astype(np.int32)


def make_prefix(
    net: nn.Module,
    stage: str | None,
    normalise: Callable[[jax.Array], jax.Array],
    augmentation: Mapping[str, Any],
    seed: int,
) -> Prefix:
    """The jitted net up to `stage`, None for preprocessing alone; images that come with rows are augmented by row."""

    @jax.jit
    def prefix(variables: Mapping[str, Any], images: jax.Array, rows: jax.Array | None) -> jax.Array:
        if rows is not None:
            images = warp(jax.random.key(seed), images, rows, **augmentation)
        images = normalise(images)
        return images if stage is None else net.apply(variables, images, train=False)[1][stage]  # type: ignore[index]

    return prefix


def identity(net: nn.Module, variables: Mapping[str, Any], stage: str, **inputs: Any) -> dict[str, Any]:
    """What the features depend on, as JSON values; with the program that `open_cache` adds, to the bit.

    Args:
        net, variables: the backbone and what fills it; weights behind `stage` do not count.
        stage: where it is cut.
        inputs: what makes the inputs: the images, their size, preprocessing, augmentation and view.
    """
    weights = hashlib.sha256()
    prefix = {layer for name, layers in _until(net.layers(), stage) for layer in layers}  # type: ignore[attr-defined]
    for collection in ("params", "batch_stats"):
        for layer in sorted(prefix & set(variables.get(collection, {}))):
            for leaf, value in sorted(variables[collection][layer].items()):
                weights.update(f"{collection}/{layer}/{leaf}".encode())
                weights.update(np.ascontiguousarray(value))
    found = {"net": type(net).__name__, "stage": stage, "weights": weights.hexdigest(), **inputs}
    versions = report.versions()
    return json.loads(json.dumps(found | {"jax": versions["jaxlib"], "device": versions["device"]}))


def _until(stages: Mapping[str, Any], last: str) -> Iterator[tuple[str, Any]]:
    for name, layers in stages.items():
        yield name, layers
        if name == last:
            return


def seconds(compute: Callable[[], Any]) -> float:
    """Of the second call; the first one compiles."""
    jax.block_until_ready(compute())
    began = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - began


def write_rate(folder: pathlib.Path) -> float:
    """Bytes a second that reach the disk of `folder`, of 32 MB."""
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


def pays(caches: Sequence[Cache], uses: int, image_seconds: float) -> tuple[bool, str]:
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
    batches: Callable[[np.ndarray], Iterator[dict[str, np.ndarray]]],
    wanted: Mapping[int | None, np.ndarray],
    *,
    examples: int,
    uses: int,
    required: bool,
) -> dict[int | None, Cache] | None:
    """The features of every wanted view, computed where the disk does not hold them; None where that does not pay.

    Args:
        prefix, variables: what computes them.
        identity: from the function of that name. The lowered program is added, so that features which another batch
            size or another version of jaxft gave, with other rounding, are not taken for these.
        batches: image indices, int [m] → their batches in order, as `loader.eval_batches` gives them.
        wanted: number of a view, None without augmentation → images, int [n].
        examples: in the dataset.
        uses: images that go through the prefix in the run without a cache.
        required: make the caches even where they do not pay.

    Raises:
        OSError: they are required and do not fit on the disk, or it cannot be written to.
    """

    def inputs(view: int | None, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
        return batch["image"], None if view is None else row(view, batch["index"], examples)

    def compute(view: int | None, indices: np.ndarray) -> Iterator[np.ndarray]:
        for batch in batches(indices):
            yield np.asarray(prefix(variables, *inputs(view, batch)))[batch["weight"] > 0]

    first_view, first_indices = next(iter(wanted.items()))
    first = inputs(first_view, next(iter(batches(first_indices))))
    lowered = prefix.lower(variables, *first)
    like, program = lowered.out_info, hashlib.sha256(lowered.as_text().encode()).hexdigest()
    name, identity = f"{identity['net'].lower()}-{identity['stage']}", {**identity, "program": program}
    caches = {
        view: Cache("features", name, {**identity, "view": view}, indices, like.shape[1:], like.dtype)
        for view, indices in wanted.items()
    }
    try:
        if reason := no_room(caches.values()):
            raise OSError(reason)
        if not required and any(cache.missing() for cache in caches.values()):
            image_seconds = seconds(lambda: prefix(variables, *first)) / len(first[0])
            worth_it, why = pays(list(caches.values()), uses, image_seconds)
            print(f"feature cache {'on' if worth_it else 'off'}: {why}", flush=True)
            if not worth_it:
                return None
        size, folder = sum(cache.bytes for cache in caches.values()) / 1e6, caches[first_view].folder.parent
        print(f"features of {identity['stage']!r} come from {folder} ({size:.0f} MB)", flush=True)
        for view, cache in caches.items():
            cache.fill(partial(compute, view))
    except OSError as error:
        if required:
            raise
        print(f"feature cache off: {error}", flush=True)
        return None
    return caches
