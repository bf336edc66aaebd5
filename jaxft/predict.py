"""Predictions: every image of a set once, and the figures that are computed from them."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.train_state import TrainState

Batch = dict[str, Any]
EvalStep = Callable[[TrainState, jax.Array], jax.Array]

LOG_LOSS_CLIP = 1e-15  # as Kaggle's multi-class log loss


def data_mesh() -> Mesh:
    """All devices of the run in one axis called "data"."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def replicate(state: TrainState, mesh: Mesh) -> TrainState:
    """The state, whole on every device of the mesh."""
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def shard(batch: Batch, mesh: Mesh) -> Batch:
    """A host's rows of a batch, or of several [K, B, …] → global arrays, split by rows over the devices of the mesh.

    Raises:
        ValueError: the global batch does not divide into the devices.
    """
    *several, rows = batch["label"].shape
    rows *= jax.process_count()
    if rows % mesh.size:
        raise ValueError(f"a batch of {rows} does not divide over {mesh.size} devices; use a multiple of {mesh.size}")
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * len(several), "data"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def make_eval_step(prepare: Callable[[jax.Array], jax.Array], start: str | None = None) -> EvalStep:
    """The jitted eval step: uint8 images [B, H, W, 3] → probabilities float32 [B, num_classes].

    With `start` it takes the output of the stage of that name instead of images.
    """

    @jax.jit
    def eval_step(state: TrainState, images: jax.Array) -> jax.Array:
        return jax.nn.softmax(state.apply_fn(state.variables(), prepare(images), train=False, start=start)[0])

    return eval_step


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The net's word on a set of n images, in the set's order.

    Attributes:
        index: int32 [n], the images' places in the dataset.
        label: int32 [n].
        probabilities: float32 [n, C], rows sum to 1.
    """

    index: np.ndarray
    label: np.ndarray
    probabilities: np.ndarray

    def accuracy(self) -> float:
        """Fraction of images whose most probable class is the label."""
        return float((self.probabilities.argmax(1) == self.label).mean())

    def losses(self) -> np.ndarray:
        """float64 [n]: -log of the label's probability, clipped to [1e-15, 1 - 1e-15] as Kaggle does."""
        own = self.probabilities[np.arange(len(self.label)), self.label].astype(np.float64)
        return -np.log(own.clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP))

    def log_loss(self) -> float:
        """The mean of `losses`, in nats."""
        return float(self.losses().mean())


def evaluate(state: TrainState, eval_step: EvalStep, batches: Iterable[Batch], mesh: Mesh) -> Predictions:
    """Predicts every image of `batches` once; rows whose `weight` is 0 pad the last batch and are left out."""
    parts = []

    def settle(columns: Batch) -> None:
        columns = jax.device_get(columns)
        real = columns["weight"] > 0
        parts.append([columns[name][real] for name in ("index", "label", "probabilities")])

    pending = None
    for batch in batches:
        columns = {name: batch[name] for name in ("index", "label", "weight")}
        columns["probabilities"] = eval_step(state, shard(batch, mesh)["image"])
        if jax.process_count() > 1:  # each host holds its own rows
            columns = {name: multihost_utils.process_allgather(rows, tiled=True) for name, rows in columns.items()}
        if pending:
            settle(pending)  # while the device computes this batch
        pending = columns
    if pending:
        settle(pending)
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))
