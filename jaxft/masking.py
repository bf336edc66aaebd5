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
    """What training needs to know of a backbone."""

    @property
    def frozen(self) -> frozenset[str]: ...

    @property
    def init(self) -> Any: ...

    @property
    def apply(self) -> Any: ...

    def layers(self) -> dict[str, tuple[str, ...]]: ...

    def head_layers(self) -> tuple[str, ...]: ...


SPECIFICATIONS = "none, all-but-head, stage:STAGE, through:STAGE, from:STAGE, first:N"


def select(net: Net, spec: str, weighted: Collection[str], setting: str = "layers") -> frozenset[str]:
    """The names of the layers with weights that a specification stands for.

    Args:
        net: the backbone; its `layers()` give the order of stages and of layers.
        spec: `none`; `all-but-head`, all but the layers that are new to the task; `stage:STAGE`, that stage;
            `through:STAGE`, that stage and all before it but layers new to the task; `from:STAGE`, that stage and all
            after it; `first:N`, the first N layers as Keras counts them in the origin's model, padding and pooling
            included; or a regular expression that matches whole layer names. The origin is the Keras fine-tuning guide
            of 2016 and its scripts.
        weighted: the layers that have weights, i.e. the keys of `params`.
        setting: what messages call the specification.

    Raises:
        ValueError: the specification is malformed, or no layer fits it.
    """
    if not isinstance(spec, str):
        raise ValueError(
            f"{setting}={spec!r} is a {type(spec).__name__} and not a specification; to name several layers, write a "
            'regular expression: "conv1|conv2"'
        )
    stages = net.layers()
    names = list(stages)
    ordered = [layer for layers in stages.values() for layer in layers]
    head = set(net.head_layers())
    kind, colon, argument = spec.partition(":")
    if spec == "none":
        return frozenset()
    if spec == "all-but-head":
        chosen = set(ordered) - head
    elif colon and kind in ("stage", "through", "from"):
        if argument not in stages:
            raise ValueError(f"{setting}={spec!r} does not name a stage; the stages are {', '.join(stages)}")
        at = names.index(argument)
        part = {"stage": names[at : at + 1], "through": names[: at + 1], "from": names[at:]}[kind]
        chosen = {layer for stage in part for layer in stages[stage]} - (head if kind == "through" else set())
    elif colon and kind == "first":
        if not re.fullmatch(r"[0-9]+", argument) or not 1 <= int(argument) <= len(ordered):
            raise ValueError(f"{setting}={spec!r} wants a count from 1 to {len(ordered)}, the layers of the net")
        chosen = set(ordered[: int(argument)])
    else:
        try:
            pattern = re.compile(spec)
        except re.error as error:
            raise ValueError(f"{setting}={spec!r} is not a regular expression: {error}") from None
        chosen = {layer for layer in weighted if pattern.fullmatch(layer)}
    selected = frozenset(chosen & set(weighted))
    if not selected:
        raise ValueError(
            f"{setting}={spec!r} matches no layer with weights; use {SPECIFICATIONS} or a regular expression over "
            f"whole layer names, which are {', '.join(layer for layer in ordered if layer in weighted)}"
        )
    return selected


def frozen_layers(net: Net, spec: str, weighted: Collection[str]) -> frozenset[str]:
    """The names of the layers that `spec` freezes, a specification as in `select`: the value of the net's `frozen`.

    Raises:
        ValueError: the specification is malformed or freezes no layer.
    """
    return select(net, spec, weighted, "freeze")


def grouped(net: Net, groups: Mapping[str, str], weighted: Collection[str]) -> dict[str, str]:
    """Layer → label, for the layers of `groups`: label → specification, as in `select`.

    Raises:
        ValueError: a specification is malformed, no layer fits it, or two groups hold the same layer.
    """
    found: dict[str, str] = {}
    for label, spec in groups.items():
        layers = select(net, spec, weighted, f"group {label}")
        if double := [layer for layer in weighted if layer in layers and layer in found]:
            raise ValueError(
                f"groups overlap: {', '.join(double)} of {label!r} ({spec}) are in "
                f"{', '.join(sorted({repr(found[layer]) for layer in double}))} too; a layer has one group"
            )
        found |= dict.fromkeys(layers, label)
    return found


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
        ValueError: nothing is left to train, or `frozen` or `groups` names layers that `params` lacks.
    """
    groups = groups or {}
    if isinstance(frozen, str):
        raise ValueError(f"frozen is a set of layer names, not {frozen!r}; frozen_layers makes it of a specification")
    if unknown := set(frozen) - set(params):
        raise ValueError(f"frozen names layers without weights: {sorted(unknown)}; there are {', '.join(params)}")
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

    def of_leaves(params: Params) -> Params:  # leaf by leaf, so that a mask given as a tree of all layers still fits
        return jax.tree_util.tree_map_with_path(lambda path, _: labels[path[0].key], params)

    # The last argument: each group sees its own part of the argument `grad`, too.
    return optax.multi_transform({**groups, FROZEN: optax.set_to_zero()}, of_leaves, mask_compatible_extra_args=True)


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
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.endswith("kernel"), params)
