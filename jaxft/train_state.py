"""What a run carries from step to step, and from phase to phase."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.core import FrozenDict
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxft import masking
from jaxft.masking import FROZEN, TRAINABLE, Net, Params
from jaxft.optim import Schedule
from jaxft.phase import Phase

# What holds the counts that schedules are read at; the second is that of `optax.inject_hyperparams`.
SCHEDULE_STATES = (optax.ScaleByScheduleState, get_type_hints(optax.schedules.WrappedSchedule.init)["return"])


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """The optimizer of a phase over all layers: the factor on its rates → a transform.

    The train step calls it inside jit with the state's `lr_scale`, so that a new scale needs no new compilation; ×1 is
    exact, so that a scale of 1 gives the bits of none. The structure of the optimizer's state does not depend on it.
    """

    phase: Phase
    labels: FrozenDict[str, str]

    def __call__(self, lr_scale: ArrayLike) -> optax.GradientTransformationExtraArgs:
        used = set(self.labels.values())
        schedules = {label: schedule for label, schedule in self.phase.schedules().items() if label in used}
        transforms = {label: self.phase.optimizer(_scaled(schedule, lr_scale)) for label, schedule in schedules.items()}
        tx = masking.freeze(transforms, self.labels)
        if self.phase.clip_norm is not None:  # outside the groups: one norm over all of them
            tx = optax.chain(optax.clip_by_global_norm(self.phase.clip_norm), tx)
        return optax.with_extra_args_support(tx)

    def groups(self, opt_state: Any) -> Mapping[str, Any]:
        """Label → that part of the state of this transform."""
        return (opt_state if self.phase.clip_norm is None else opt_state[1]).inner_states

    def regroup(self, opt_state: Any, groups: Mapping[str, Any]) -> Any:
        """A state of this transform with other parts."""
        if self.phase.clip_norm is None:
            return opt_state._replace(inner_states=groups)
        return (opt_state[0], opt_state[1]._replace(inner_states=groups))


def _scaled(schedule: Schedule, lr_scale: ArrayLike) -> Schedule:
    def scaled(count: Any) -> Any:
        rate = schedule(count)
        if not isinstance(rate, Tracer):
            # XLA would take a constant rate out of the loop over several steps, and these would round differently from
            # single ones; so this one depends on the count, too.
            rate = jnp.where(count >= 0, rate, 0.0)
        return rate * lr_scale

    return scaled


@struct.dataclass
class TrainState:
    """The state of a run; a pytree, donated to the train step.

    Attributes:
        step: int32 scalar, updates done; with `rng` it determines every random number of the next one.
        params: layer → leaves, float32.
        batch_stats: layer → running mean and variance, float32; empty where a net has no BatchNorm.
        opt_state: of `tx`; holds nothing for frozen layers.
        rng: the run's key, never consumed: step t uses `jax.random.fold_in(rng, t)`.
        lr_scale: float32 scalar, the factor on every scheduled rate: 1, or what a Plateau has made of it.
        average: the moving average, {"params", "batch_stats"} of the layers that are not frozen; None if there is none.
        apply_fn: `net.apply`.
        tx: `lr_scale` → the optimizer over all of `params`, whose update takes `value` (the loss) and `grad` too.
        labels: layer → "frozen", "trainable" or a learning-rate group.
        decay: of the average; None if there is none.
    """

    step: jax.Array
    params: Params
    batch_stats: Params
    opt_state: optax.OptState
    rng: jax.Array
    lr_scale: jax.Array
    average: dict[str, Params] | None
    apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
    tx: Transform = struct.field(pytree_node=False)
    labels: FrozenDict[str, str] = struct.field(pytree_node=False)
    decay: float | None = struct.field(pytree_node=False)

    def variables(self, average: bool = False) -> dict[str, Params]:
        """What `apply_fn` takes first: the raw values, or the averaged ones with the frozen layers as they are.

        Raises:
            ValueError: the average is wanted and there is none.
        """
        raw = {"params": self.params, "batch_stats": self.batch_stats}
        if not average:
            return raw
        if self.average is None:
            raise ValueError("this state keeps no average; ask for one with Phase(average=0.999)")
        return {kind: {**layers, **self.average[kind]} for kind, layers in raw.items()}


def create(net: Net, variables: Mapping[str, Mapping[str, Any]], phase: Phase, *, seed: int = 0) -> TrainState:
    """The state before the first update of a run's first phase.

    Every buffer is copied: the variables stay usable when the state is donated.

    Args:
        net: the backbone; its field `frozen` says which layers are frozen.
        variables: {"params", "batch_stats"}, as `port_weights.load` or `net.init` give them.
        phase: optimizer, schedules, groups, clipping and average. Its `frozen` is what the net's was made from:
            `net.clone(frozen=masking.frozen_layers(net, phase.frozen, params))`; "none" leaves it to the net.
        seed: of dropout and augmentation.

    Raises:
        ValueError: nothing is left to train, the frozen layers of the net are not the ones of the phase, a group names
            no layer, or layers have no schedule.
    """
    params, stats = copied(dict(variables["params"])), copied(dict(variables.get("batch_stats", {})))
    tx = _transform(net, params, phase)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=stats,
        opt_state=_init(tx, params),
        rng=jax.random.key(seed),
        lr_scale=jnp.ones((), jnp.float32),
        average=_average(phase, tx.labels, params, stats),
        apply_fn=net.apply,
        tx=tx,
        labels=tx.labels,
        decay=phase.average,
    )


def next_phase(state: TrainState, net: Net, phase: Phase) -> TrainState:
    """The state before the first update of a phase that follows another: the same step, params, statistics and key.

    The schedules' counts start at 0 again and `lr_scale` at 1. With `momentum="carry"`, everything that the optimizer
    holds of a layer trainable before and now is carried, also from one group to another; a count that is the
    optimizer's own, such as Adam's, is that of the same group before, or, for a new group, of the group its layers come
    from. The average goes on for layers that have one and starts from the present values for others.
    Every buffer is copied: the given state stays usable.

    Raises:
        ValueError: as `create`; or the optimizer's state is to be carried, and nothing of it fits the new one.
    """
    params, stats = copied(state.params), copied(state.batch_stats)
    tx = _transform(net, params, phase)
    opt_state = _init(tx, params)
    if phase.momentum == "carry":
        opt_state = _carry(state, tx, opt_state)
    average = _average(phase, tx.labels, params, stats)
    if average is not None and state.average is not None:
        old = state.average
        average = {
            kind: {layer: copied(old[kind].get(layer, leaves)) for layer, leaves in layers.items()}
            for kind, layers in average.items()
        }
    return dataclasses.replace(
        state,
        step=copied(state.step),
        params=params,
        batch_stats=stats,
        opt_state=opt_state,
        rng=copied(state.rng),
        lr_scale=jnp.ones_like(state.lr_scale),
        average=average,
        apply_fn=net.apply,
        tx=tx,
        labels=tx.labels,
        decay=phase.average,
    )


def averaged(state: TrainState) -> dict[str, Params] | None:
    """The moving average after an update, of a state whose other fields are those after it; None if it keeps none.

    average ← average + (1 − d)(value − average) with d = min(decay, (1 + t) / (10 + t)), t the run's count of updates.
    It starts from the values themselves, so it needs no correction of bias; the smaller decays of a run's first updates
    let it forget the random values of a new head. The average of a value that does not move does not move either.

    Source: `tf.train.ExponentialMovingAverage` with num_updates.
    """
    if state.average is None:
        return None
    rest = 1.0 - jnp.minimum(jnp.float32(state.decay), (1.0 + state.step) / (10.0 + state.step))
    raw = {"params": state.params, "batch_stats": state.batch_stats}
    now = {kind: {layer: raw[kind][layer] for layer in layers} for kind, layers in state.average.items()}
    return jax.tree.map(lambda mean, value: mean + rest * (value - mean), state.average, now)


def copied(tree: Any) -> Any:
    """The same tree on buffers of its own: a donated state may hold none twice, and none that its caller keeps."""

    def copy(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(copy(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jnp.array(leaf, copy=True)

    return jax.tree.map(copy, tree)


def _transform(net: Net, params: Params, phase: Phase) -> Transform:
    frozen = frozenset(net.frozen) if not isinstance(net.frozen, str) else net.frozen
    if phase.frozen != "none" and (said := masking.frozen_layers(net, phase.frozen, params)) != frozen:
        raise ValueError(
            f"the phase freezes {phase.frozen!r} ({len(said)} layers), but net.frozen holds {len(frozen)}; make the "
            "net with net.clone(frozen=masking.frozen_layers(net, phase.frozen, params))"
        )
    labels = masking.labels(params, frozen, masking.grouped(net, phase.groups, params))
    if rest := [layer for layer, label in labels.items() if label not in (FROZEN, *phase.schedules())]:
        raise ValueError(f"no schedule for {', '.join(rest)}, which are in no group; add one for {TRAINABLE!r}")
    for label, schedule in phase.schedules().items():
        _check_traced(label, schedule)
    return Transform(phase, FrozenDict(labels))


def _check_traced(label: str, schedule: Schedule) -> None:
    try:
        rate = jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the schedule of {label!r}, {schedule!r}, fails on a count that is traced by jit: write "
            "jnp.where(count < 100, 0.1, 0.01) for 0.1 if count < 100 else 0.01, and use jax.numpy for numpy. "
            f"JAX says: {error}"
        ) from error
    if getattr(rate, "shape", None) != ():
        raise ValueError(f"the schedule of {label!r}, {schedule!r}, gives {rate} and not one number, the rate")


def _init(tx: Transform, params: Params) -> optax.OptState:
    try:
        return copied(tx(1.0).init(params))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the optimizer {tx.phase.optimizer!r} fails on these parameters: {error}. It takes a schedule, a function "
            "of the update count, and gives an optax transform; a mask is a function of the parameters "
            "(mask=masking.kernels) or a tree of all layers"
        ) from error


def _average(phase: Phase, labels: Mapping[str, str], params: Params, stats: Params) -> dict[str, Params] | None:
    """The present values as a first average."""
    if phase.average is None:
        return None
    raw = {"params": params, "batch_stats": stats}
    return {
        kind: copied({layer: leaves for layer, leaves in layers.items() if labels.get(layer) != FROZEN})
        for kind, layers in raw.items()
    }


def _carry(state: TrainState, tx: Transform, fresh: optax.OptState) -> optax.OptState:
    """`fresh`, with what the state's optimizer holds of layers that are trainable before and now."""
    before = {str(label): _flat(group) for label, group in state.tx.groups(state.opt_state).items()}
    leaves_of = {path: path[0].key for path in _flat(state.params)}
    carried = 0

    def carry(label: str, group: Any) -> Any:
        sources = [str(state.labels[layer]) for layer, now in tx.labels.items() if now == label]
        sources = [source for source in sources if source != FROZEN]
        own = label if label in sources else next(iter(sources), FROZEN)  # the source of what belongs to no layer
        counts = _flat(group, lambda node: isinstance(node, SCHEDULE_STATES))
        counts = [path for path, node in counts.items() if isinstance(node, SCHEDULE_STATES)]

        def leaf_of(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            nonlocal carried
            if any(path[: len(prefix)] == prefix for prefix in counts):
                return leaf
            layer = next((leaves_of[path[i:]] for i in range(len(path)) if path[i:] in leaves_of), None)
            source = own if layer is None else str(state.labels[layer])
            old = before[source].get(path)
            if old is None or (old.shape, old.dtype) != (leaf.shape, leaf.dtype):
                return leaf
            carried += 1
            return copied(old)

        return jax.tree_util.tree_map_with_path(leaf_of, group)

    groups = {label: group if label == FROZEN else carry(label, group) for label, group in tx.groups(fresh).items()}
    if not carried:
        raise ValueError(
            f'momentum="carry" finds nothing to carry from {state.tx.phase.optimizer!r} to {tx.phase.optimizer!r}: '
            'they hold nothing of one kind and shape of a layer that is trainable before and now; say momentum="anew"'
        )
    return tx.regroup(fresh, groups)


def _flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[tuple[Any, ...], Any]:
    """Path → leaf."""
    return dict(jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0])
