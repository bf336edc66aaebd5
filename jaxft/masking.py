"""Which layers are frozen: a specification → a set of layer names → labels → `optax.multi_transform`.

The one set is read by the optimizer (`freeze`), the gradient (`split`), BatchNorm (the `frozen` field of the nets)
and the feature cut (`frozen_prefix`).
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax
import optax

Params = dict[str, Any]

TRAINABLE, FROZEN = "trainable", "frozen"


class Net(Protocol):
    """What masking needs to know of a backbone."""

    def layers(self) -> dict[str, tuple[str, ...]]: ...

    def head_layers(self) -> tuple[str, ...]: ...


def frozen_layers(net: Net, spec: str, weighted: Collection[str]) -> frozenset[str]:
    """The names of the layers that `spec` freezes.

    Args:
        net: the backbone; its `layers()` give the order that `first:N` and `through:STAGE` count in.
        spec: `none`; `all-but-head` (all but the layers that are new to the task); `through:STAGE`, that stage and all
            before it but layers new to the task; `first:N`, the first N layers as Keras counts them in the origin's
            model, padding and pooling included; or a regular expression that matches whole layer names.
        weighted: the layers that have weights, i.e. the keys of `params`.

    Raises:
        ValueError: the specification is malformed or freezes no layer.
    """
    stages = net.layers()
    ordered = [layer for layers in stages.values() for layer in layers]
    kind, _, argument = spec.partition(":")
    if spec == "none":
        return frozenset()
    if spec == "all-but-head":
        chosen = set(ordered) - set(net.head_layers())
    elif kind == "through":
        if argument not in stages:
            raise ValueError(f"freeze={spec!r} names no stage; the stages are {', '.join(stages)}")
        last = list(stages).index(argument)
        chosen = {layer for layers in list(stages.values())[: last + 1] for layer in layers} - set(net.head_layers())
    elif kind == "first":
        if not re.fullmatch(r"[0-9]+", argument) or not 1 <= int(argument) <= len(ordered):
            raise ValueError(f"freeze={spec!r} wants a count from 1 to {len(ordered)}, the layers of the net")
        chosen = set(ordered[: int(argument)])
    else:
        try:
            pattern = re.compile(spec)
        except re.error as error:
            raise ValueError(f"freeze={spec!r} is no regular expression: {error}") from None
        chosen = {layer for layer in weighted if pattern.fullmatch(layer)}
    frozen = frozenset(chosen & set(weighted))
    if not frozen:
        names = [layer for layer in ordered if layer in weighted]
        raise ValueError(
            f"freeze={spec!r} matches no layer with weights; use none, all-but-head, through:STAGE, first:N or a "
            f"regular expression over whole layer names, which are {', '.join(names)}"
        )
    return frozen


def frozen_prefix(net: Net, frozen: Collection[str], weighted: Collection[str]) -> str | None:
    """The last stage of the longest wholly frozen prefix, where features may be cut; None if the first is trained."""
    cut = None
    for stage, layers in net.layers().items():
        if not set(layers) & set(weighted) <= set(frozen):
            break
        cut = stage
    return cut


def labels(params: Params, frozen: Collection[str], groups: Mapping[str, str] | None = None) -> dict[str, str]:
    """One label a layer: `frozen`, a learning-rate group of `groups` (layer → label), else `trainable`.

    Raises:
        ValueError: nothing is left to train, or `groups` names layers that `params` lacks.
    """
    groups = groups or {}
    if unknown := set(groups) - set(params):
        raise ValueError(f"groups name layers that the net lacks: {sorted(unknown)}; it has {', '.join(params)}")
    if set(params) <= set(frozen):
        raise ValueError("every layer is frozen, so there is nothing to train; freeze fewer (all-but-head, say)")
    return {layer: FROZEN if layer in frozen else groups.get(layer, TRAINABLE) for layer in params}


def freeze(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation], labels: Mapping[str, str]
) -> optax.GradientTransformation:
    """`tx` on the trainable layers, or the transform of each label on its group; frozen ones get no update, no state.

    >>> tx = freeze(optax.sgd(0.1), {"conv": "frozen", "head": "trainable"})
    >>> params = {"conv": jnp.ones(2), "head": jnp.ones(2)}
    >>> tx.update(params, tx.init(params))[0]
    {'conv': Array([0., 0.], dtype=float32), 'head': Array([-0.1, -0.1], dtype=float32)}

    Raises:
        ValueError: a label has no transform.
    """
    groups = tx if isinstance(tx, Mapping) else {TRAINABLE: tx}
    if missing := set(labels.values()) - set(groups) - {FROZEN}:
        raise ValueError(f"layers are labelled {sorted(missing)}, but there are transforms for {sorted(groups)} only")
    return optax.multi_transform({**groups, FROZEN: optax.set_to_zero()}, dict(labels))


def split(params: Params, labels: Mapping[str, str]) -> tuple[Params, Params]:
    """(trainable layers, frozen layers), to differentiate with respect to the first alone."""
    trainable = {layer: leaves for layer, leaves in params.items() if labels[layer] != FROZEN}
    frozen = {layer: leaves for layer, leaves in params.items() if labels[layer] == FROZEN}
    return trainable, frozen


def merge(trainable: Params, frozen: Params, like: Params) -> Params:
    """The inverse of `split`, with the layers in the order of `like`."""
    return {layer: trainable[layer] if layer in trainable else frozen[layer] for layer in like}


def kernels(params: Params) -> Params:
    """A mask of the same tree, true at kernels: what weight decay touches, as Keras's `kernel_regularizer` does."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1] == jax.tree_util.DictKey("kernel"), params)
