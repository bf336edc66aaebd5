"""What a run carries from step to step."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.core import FrozenDict

from jaxft import masking


@struct.dataclass
class TrainState:
    """The state of a run; a pytree, donated to the train step.

    Attributes:
        step: int32 scalar, updates done; with `rng` it determines every random number of the next one.
        params: layer → leaves, float32.
        batch_stats: layer → running mean and variance, float32; empty where a net has no BatchNorm.
        opt_state: of `tx`; holds nothing for frozen layers.
        rng: the run's key, never consumed: step t uses `jax.random.fold_in(rng, t)`.
        apply_fn: `net.apply`.
        tx: the optimizer over all of `params`, `masking.freeze` included.
        labels: layer → "frozen", "trainable" or a learning-rate group.
    """

    step: jax.Array
    params: masking.Params
    batch_stats: masking.Params
    opt_state: optax.OptState
    rng: jax.Array
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    labels: FrozenDict[str, str] = struct.field(pytree_node=False)

    def variables(self) -> dict[str, masking.Params]:
        """What `apply_fn` takes first."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create(
    net: nn.Module,
    variables: Mapping[str, masking.Params],
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    *,
    frozen: Collection[str] = (),
    groups: Mapping[str, str] | None = None,
    clip_norm: float | None = None,
    seed: int = 0,
) -> TrainState:
    """The state before the first update.

    Args:
        net: the backbone, made with the same `frozen` set.
        variables: {"params", "batch_stats"}, as `port_weights.load` or `net.init` give them.
        tx: one transform for all trainable layers, or one for each label of `groups`.
        frozen: names of layers to freeze, from `masking.frozen_layers`.
        groups: layer → label, for layers that want a transform of their own.
        clip_norm: largest global gradient norm over all trainable leaves; None clips nothing.
        seed: of dropout and augmentation.

    Raises:
        ValueError: nothing is left to train, or labels and transforms do not match.
    """
    params = jax.tree.map(jnp.asarray, dict(variables["params"]))
    labels = masking.labels(params, frozen, groups)
    tx = masking.freeze(tx, labels)
    if clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)  # outside freeze: one norm over every group
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=jax.tree.map(jnp.asarray, dict(variables.get("batch_stats", {}))),
        opt_state=tx.init(params),
        rng=jax.random.key(seed),
        apply_fn=net.apply,
        tx=tx,
        labels=FrozenDict(labels),
    )
