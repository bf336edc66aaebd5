"""How much memory a train step takes, from shapes alone, the batch that fits, and what compilation leaves behind."""

import ctypes
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import masking, train_state
from jaxft.data import Inputs
from jaxft.model import Model
from jaxft.phase import Phase
from jaxft.task import Task

SHARE = 0.8  # of the free memory that a step may take
PROCESS = 1000 * 2**20  # bytes: what Python, JAX and compilation hold beside
WORKING = 5  # times the largest array of the forward pass, for the operation that is under way
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event at the end of a compilation
LONG = 1.0  # seconds of a compilation that takes much memory
CGROUPS = ("memory.max", "memory/memory.limit_in_bytes"), ("memory.current", "memory/memory.usage_in_bytes")


def largest_batch(model: Model, task: Task, phase: Phase, inputs: Inputs, batch_size: int) -> int:
    """`batch_size`, or the half, quarter, … of it for which a train step fits into the memory that is free.

    Args:
        model, task, phase, inputs: as of `finetune.finetune`; of `inputs`, the size of the images counts.
        batch_size: images a step that are wanted.

    Raises:
        ValueError: not even one image on each device fits; the message says how much is wanted and what to change.
    """
    free = free_bytes()
    if free is None:
        return batch_size
    size, least = batch_size, jax.device_count()
    while step_bytes(model, task, phase, inputs, -(-size // least)) > SHARE * free:
        if size <= least:
            wanted = step_bytes(model, task, phase, inputs, 1)
            pixels, name = "×".join(map(str, inputs.image_size)), model.name or type(model.net).__name__
            raise ValueError(
                f"{name} at {pixels} pixels takes about {wanted / 2**30:.1f} GiB for one "
                f"image a step, and {SHARE * free / 2**30:.1f} GiB can be had; take smaller images (--image-size), "
                f"freeze more (--freeze), or take a smaller net (--net)"
            )
        size = max(least, size // 2 // least * least)
    return size


def step_bytes(model: Model, task: Task, phase: Phase, inputs: Inputs, batch_size: int) -> int:
    """About how many bytes a train step holds at its peak on one device: the state, and what the gradient needs again.

    Nothing is compiled: JAX says which arrays a gradient keeps from the forward pass. On two cores of a CPU at batch 16
    the estimate was within 15 % of the peak for VGG16, ResNet-50, GoogLeNet and DenseNet-121. Compilation may take more
    than the steps, for a while.
    """
    net = model.net.clone(frozen=masking.frozen_layers(model.net, phase.frozen, model.variables["params"]))
    state: Any = jax.eval_shape(lambda variables: train_state.create(net, variables, phase), model.variables)
    images = jax.ShapeDtypeStruct((batch_size, *inputs.image_size, inputs.decode.channels), jnp.float32)

    def logits(params: Any, batch_stats: Any, images: jax.Array) -> Any:
        (found, _), _ = net.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return found

    def kept(params: Any, batch_stats: Any, images: jax.Array) -> Any:
        trainable, frozen = masking.split(params, state.labels)
        return jax.vjp(lambda part: logits(masking.merge(part, frozen, params), batch_stats, images), trainable)[1]

    residuals = jax.eval_shape(kept, state.params, state.batch_stats, images)
    forward = jax.make_jaxpr(logits)(state.params, state.batch_stats, images)
    largest = max(_bytes(variable.aval) for equation in forward.eqns for variable in equation.outvars)
    return _bytes(state) + _bytes(state.params) + _bytes(residuals) + WORKING * largest + PROCESS


@functools.cache
def give_back_after_compiling() -> None:
    """From now on, memory that a compilation took is handed back to Linux when it ends, before the program runs.

    XLA's compiler frees a gigabyte or two for a large net, which glibc would keep beside what the steps take: at batch
    16 the peak of DenseNet-121's steps is 3.7 GB in place of 5.1, of GoogLeNet's 2.0 in place of 4.1. Other systems
    are left as they are.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None

    def ended(event: str, seconds: float, **_: Any) -> None:
        if trim is not None and event == COMPILED and seconds > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(ended)


def free_bytes() -> int | None:
    """The bytes that a program could still take, of the device, or of the host where that is a CPU; None if unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    found = []
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    for limit, used in zip(*CGROUPS, strict=True):  # of a container, by versions 2 and 1
        try:
            words = [pathlib.Path("/sys/fs/cgroup", name).read_text(encoding="ascii") for name in (limit, used)]
            found.append(int(words[0]) - int(words[1]))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return min(found, default=None)


def _bytes(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(leaf.size * (leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 4) for leaf in leaves)
