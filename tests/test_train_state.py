from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Tiny, variables

from jaxft import masking, optim, train_state
from jaxft.phase import Phase

RATE = optim.Constant(0.1)
MASK = {layer: {name: name == "kernel" for name in leaves} for layer, leaves in variables(Tiny())["params"].items()}


@jax.jit
def loss_of(params):
    """A bowl around 1, 2, 3, … in the order of the layers."""
    return sum(((leaf - n) ** 2).sum() for n, leaf in enumerate(jax.tree.leaves(params), 1))


def update(state):
    """One update of that loss; the batch statistics move by 1."""
    trainable, frozen = masking.split(state.params, state.labels)
    loss, grads = jax.value_and_grad(lambda some: loss_of(masking.merge(some, frozen, state.params)))(trainable)
    grads = masking.merge(grads, jax.tree.map(jnp.zeros_like, frozen), state.params)
    tx = state.tx(state.lr_scale)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss, grad=grads)
    stats = {
        k: v if state.labels[k] == "frozen" else jax.tree.map(lambda x: x + 1, v) for k, v in state.batch_stats.items()
    }
    params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, batch_stats=stats, opt_state=opt_state)
    return state.replace(average=train_state.averaged(state))


step = jax.jit(update, donate_argnums=0)


def start(phase, *, frozen=(), seed=0):
    net = Tiny(frozen=frozenset(frozen))
    return train_state.create(net, variables(net), phase, seed=seed)


def trained(state, steps=3):
    for _ in range(steps):
        state = step(state)
    return state


def equal(a, b):
    """Whether two trees hold the same bits under the same names, typed keys included."""

    def plain(tree):
        is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(tree)]
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {k: jax.random.key_data(x) if typed else x for (k, x), typed in zip(leaves, is_key, strict=True)}

    a, b = plain(a), plain(b)
    return list(a) == list(b) and all(np.array_equal(a[path], b[path]) for path in a)


def moments(state, name="trace"):
    """layer → the kernel's leaf of that name in the optimizer's state, for the layers that have one."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        if name in keys and keys[-1] == "kernel":
            found[keys[-2]] = np.asarray(leaf)
    return found


def counts(state):
    """What the optimizer's state counts, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return [int(leaf) for path, leaf in leaves if getattr(path[-1], "name", "") == "count"]


OPTIMIZERS = {
    "nesterov": optim.NesterovSGD(l2=0.01),
    "sgd": optim.SGD(0.9),
    "adamw": optim.AdamW(),
    "adam": optax.adam,
    "prodigy": optax.contrib.prodigy,
    "reduce_on_plateau": lambda rate: optax.chain(optax.sgd(rate), optax.contrib.reduce_on_plateau()),
    "polyak": lambda rate: optax.chain(optax.polyak_sgd(), optax.scale_by_schedule(rate)),
    "inject": lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "multi_steps": lambda rate: optax.MultiSteps(optax.adam(rate), 2).gradient_transformation(),
    "mask_as_tree": lambda rate: optax.adamw(rate, mask=MASK),
    "mask_of_layers": lambda rate: optax.adamw(rate, mask={layer: layer != "bn1" for layer in MASK}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_transform_of_a_schedule_trains(name):
    """Bug: a buffer given twice to a step that donates it, an argument that does not reach the transform, or a mask
    that names frozen layers ends the run."""
    groups = {"body": "stage:body"}
    state = start(Phase(1, RATE, OPTIMIZERS[name], groups=groups, clip_norm=1e3, average=0.9), frozen={"conv1", "bn1"})
    before = jax.device_get((state.params, loss_of(state.params)))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.replace(rng=None))]
    assert len(set(pointers)) == len(pointers)
    state = trained(state, 4)
    assert float(loss_of(state.params)) < before[1]
    assert equal({k: state.params[k] for k in ("conv1", "bn1")}, {k: before[0][k] for k in ("conv1", "bn1")})


def test_a_transform_is_told_the_loss():
    """Bug: `value` is not the loss, so that optax's own plateau never sees one."""
    reduce = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    state = start(Phase(1, optim.Constant(0.0), lambda rate: optax.chain(optax.sgd(rate), reduce)))
    scale = trained(state, 5).opt_state.inner_states["trainable"].inner_state[1].scale
    assert float(scale) < 0.5


def test_variables_stay_usable():
    """Bug: a returned model's arrays are donated to the next run: "Array has been deleted"."""
    net = Tiny()
    values = variables(net)
    kept = jax.tree.map(np.array, values)
    for _ in range(2):
        trained(train_state.create(net, values, Phase(1, RATE, average=0.9)))
    assert equal(values, kept)
    trained(train_state.create(net, kept, Phase(1, RATE)))  # NumPy arrays serve as well


def test_a_scale_of_one_gives_the_bits_of_none():
    """Bug: the factor for plateaus changes the arithmetic of runs that have none."""
    rate = optim.InverseTime(0.013, 0.01)
    state = start(Phase(1, rate))
    tx = masking.freeze(optim.NesterovSGD()(rate), state.labels)

    @jax.jit
    def plain(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss_of)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = state.params, tx.init(state.params)
    expected = jax.tree.map(jnp.copy, params)
    for _ in range(10):
        expected, opt_state = plain(expected, opt_state)
    assert equal(trained(state, 10).params, expected)


def test_a_scale_needs_no_new_compilation():
    """Bug: the scale is baked into the step, which is compiled anew for each, or never follows it."""
    compiled = jax.jit(update)
    state = start(Phase(1, RATE, optim.SGD()))
    moves = []
    for scale in (1.0, 0.5, 0.25):
        after = compiled(state.replace(lr_scale=jnp.float32(scale)))
        moves.append(float(jnp.abs(after.params["conv2"]["kernel"] - state.params["conv2"]["kernel"]).max()))
    assert moves == pytest.approx([moves[0], moves[0] / 2, moves[0] / 4], rel=1e-5)
    assert compiled._cache_size() == 1


def test_groups_follow_their_own_schedules():
    """Bug: a group trains at the rate of another."""
    groups, schedules = {"body": "stage:body"}, {"trainable": RATE, "body": optim.Scaled(RATE, 0.5)}
    state = start(Phase(1, schedules, optim.SGD(), groups=groups))
    grads = jax.device_get(jax.grad(loss_of)(state.params))
    before = jax.device_get(state.params)
    after = step(state).params
    for layer, rate in {"conv1": 0.1, "conv2": 0.05, "predictions": 0.1}.items():
        moved = after[layer]["kernel"] - before[layer]["kernel"]
        np.testing.assert_allclose(moved, -rate * grads[layer]["kernel"], rtol=1e-4, atol=1e-5)


def test_clipping_takes_one_norm_over_all_groups():
    """Bug: each group is clipped by its own norm, or frozen layers count."""
    phase = Phase(1, optim.Constant(1.0), optim.SGD(), groups={"body": "stage:body"}, clip_norm=0.5)
    state = start(phase, frozen={"conv1"})
    before = jax.device_get(state.params)
    moved = jax.tree.map(lambda a, b: a - b, step(state).params, before)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.5, rel=1e-5)


def test_what_is_frozen_is_said_once():
    """Bug: a phase that freezes layers trains a net whose batch statistics still move, or the reverse."""
    phase = Phase(1, RATE, frozen="through:stem")
    with pytest.raises(ValueError, match=r"freezes 'through:stem' \(2 layers\), but net.frozen holds 0; .*net.clone"):
        start(phase)
    net = Tiny()
    values = variables(net)
    net = net.clone(frozen=masking.frozen_layers(net, phase.frozen, values["params"]))
    assert set(train_state.create(net, values, phase).labels.values()) == {"frozen", "trainable"}
    with pytest.raises(ValueError, match="frozen names layers without weights: .'conv9'."):
        start(Phase(1, RATE), frozen={"conv9"})
    with pytest.raises(ValueError, match="nothing to train"):
        start(Phase(1, RATE), frozen={"conv1", "bn1", "conv2", "predictions"})


def test_layers_without_a_schedule_are_named():
    """Bug: a layer in no group, or a misspelt group, fails in the words of optax."""
    body = {"body": "stage:body"}
    with pytest.raises(ValueError, match="no schedule for conv1, predictions, which are in no group.*'trainable'"):
        start(Phase(1, {"body": RATE}, groups=body), frozen={"bn1"})
    with pytest.raises(ValueError, match="group body='stage:bdy' does not name a stage"):
        start(Phase(1, RATE, groups={"body": "stage:bdy"}))


def test_a_schedule_that_jit_cannot_trace_names_the_remedy():
    """Bug: an `if` on the count, or a schedule that returns nothing, fails inside the first step."""
    with pytest.raises(ValueError, match=r"(?s)schedule of 'trainable'.*jnp.where\(count < 100.*JAX says: "):
        start(Phase(1, lambda count: 0.1 if count < 100 else 0.01))
    with pytest.raises(ValueError, match="not one number"):
        start(Phase(1, lambda count: None))
    start(Phase(1, lambda count: 0.1))


def test_an_optimizer_that_cannot_be_names_the_remedy():
    """Bug: a mask of some layers, or a rate taken for a number, fails with an error of pytrees."""
    with pytest.raises(ValueError, match="mask=masking.kernels"):
        start(Phase(1, RATE, lambda rate: optax.adamw(rate, mask={"conv2": True})))
    with pytest.raises(ValueError, match="It takes a schedule"):
        start(Phase(1, RATE, lambda rate: optax.scale(-rate)))
    with pytest.raises(ValueError, match="It takes a schedule"):
        start(Phase(1, RATE, lambda rate: None))


def test_the_average_by_hand():
    """Bug: the decay is off by one step, the statistics are left out, or frozen layers drift."""
    state = start(Phase(1, RATE, average=0.3), frozen={"conv1"})
    mean = np.asarray(state.params["conv2"]["kernel"], np.float64)
    stat = np.asarray(state.batch_stats["bn1"]["mean"], np.float64)
    for decay in (2 / 11, 3 / 12, 0.3, 0.3):
        state = step(state)
        mean = decay * mean + (1 - decay) * np.asarray(state.params["conv2"]["kernel"])
        stat = decay * stat + (1 - decay) * np.asarray(state.batch_stats["bn1"]["mean"])
    average = state.variables(average=True)
    np.testing.assert_allclose(average["params"]["conv2"]["kernel"], mean, rtol=1e-5)
    np.testing.assert_allclose(average["batch_stats"]["bn1"]["mean"], stat, rtol=1e-5)
    assert set(state.average["params"]) == {"bn1", "conv2", "predictions"}
    assert list(average["params"]) == list(state.params)
    assert equal(average["params"]["conv1"], state.params["conv1"])
    assert state.variables()["params"] is state.params


def test_a_frozen_layer_is_the_same_in_both():
    """Bug: the average of a running statistic that does not move differs from it in the last bit."""
    state = trained(start(Phase(1, RATE, average=0.99), frozen={"conv1", "bn1"}), 5)
    assert equal(state.variables(average=True)["batch_stats"], state.batch_stats)


def test_no_average_is_no_average():
    """Bug: the raw values are taken for an average that was never asked for."""
    state = trained(start(Phase(1, RATE)), 1)
    assert state.average is None
    with pytest.raises(ValueError, match=r"Phase\(average=0.999\)"):
        state.variables(average=True)


def test_the_same_bits_twice():
    """Bug: the average, the key or the optimizer depends on something other than the seed and the step."""
    phase = Phase(1, optim.Cosine(0.1, 20, 3), optim.AdamW(), average=0.9, clip_norm=1.0)
    assert equal(*(trained(start(phase, seed=4), 7) for _ in range(2)))
    assert not equal(start(phase, seed=4).rng, start(phase, seed=5).rng)


@pytest.mark.parametrize("optimizer", [optim.NesterovSGD(), optax.adam, optim.AdamW(), OPTIMIZERS["inject"]])
def test_carrying_on_is_not_stopping(optimizer):
    """Bug: a border between phases loses a moment, a count, the average or a bit of anything."""
    net = Tiny(frozen=frozenset({"conv1"}))
    phase = Phase(1, RATE, optimizer, average=0.9, momentum="carry")
    half = trained(start(phase, frozen={"conv1"}), 4)
    whole = trained(start(phase, frozen={"conv1"}), 8)
    resumed = trained(train_state.next_phase(half, net, phase), 4)
    for name in ("step", "params", "batch_stats", "rng", "lr_scale", "average"):
        assert equal(getattr(resumed, name), getattr(whole, name)), name
    anew = trained(train_state.next_phase(half, net, replace(phase, momentum="anew")), 4)
    assert not equal(anew.params, whole.params)


def test_a_phase_leaves_the_state_before_it_usable():
    """Bug: the next phase shares buffers with the state that it came from, and donates them."""
    phase = Phase(1, RATE, average=0.9, momentum="carry")
    state = trained(start(phase))
    kept = jax.tree.map(lambda x: jnp.array(x, copy=True), state.replace(rng=None))
    key = np.array(jax.random.key_data(state.rng))
    trained(train_state.next_phase(state, Tiny(), phase))
    assert equal(state.replace(rng=None), kept)
    np.testing.assert_array_equal(jax.random.key_data(state.rng), key)


def test_schedules_start_again_and_counts_of_the_optimizer_go_on():
    """Bug: the second phase's warm-up is skipped, or Adam corrects old moments as if they were new."""
    first = trained(start(Phase(1, RATE, optax.adam)).replace(lr_scale=jnp.float32(0.1)))
    assert counts(first) == [3, 3]
    carried = train_state.next_phase(first, Tiny(), Phase(1, RATE, optax.adam, momentum="carry"))
    assert counts(carried) == [3, 0]
    assert float(carried.lr_scale) == 1.0 and int(carried.step) == 3
    assert counts(train_state.next_phase(first, Tiny(), Phase(1, RATE, optax.adam))) == [0, 0]


def test_layers_carry_over_between_groups():
    """Bug: momentum is lost with a new label, taken from a wrong layer, or invented for a layer that was frozen."""
    first = trained(start(Phase(1, RATE, optax.adam, groups={"body": "stage:body"}), frozen={"conv1"}))
    before = moments(first, "mu")
    assert set(before) == {"conv2", "predictions"}
    groups = {"low": "conv1|conv2", "top": "stage:predictions"}
    second = Phase(1, RATE, optax.adam, groups=groups, clip_norm=1.0, momentum="carry")
    state = train_state.next_phase(first, Tiny(), second)
    after = moments(state, "mu")
    assert not after["conv1"].any()
    np.testing.assert_array_equal(after["conv2"], before["conv2"])
    np.testing.assert_array_equal(after["predictions"], before["predictions"])
    assert counts(state) == [3, 0] * 3  # trainable (bn1), low and top: Adam's and the schedule's
    frozen = train_state.next_phase(state, Tiny(frozen=frozenset({"conv2"})), second)
    assert set(moments(frozen, "mu")) == {"conv1", "predictions"}
    trained(frozen)


def test_nothing_to_carry_is_refused():
    """Bug: a momentum that was to be carried starts anew, and nobody is told."""
    state = trained(start(Phase(1, RATE)))
    with pytest.raises(ValueError, match=r"from NesterovSGD\(momentum=0.9, l2=0.0\) to AdamW\(.*\"anew\""):
        train_state.next_phase(state, Tiny(), Phase(1, RATE, optim.AdamW(), momentum="carry"))
    head = trained(start(Phase(1, RATE), frozen={"conv1", "bn1", "conv2"}))
    with pytest.raises(ValueError, match="trainable before and now"):
        net = Tiny(frozen=frozenset({"predictions"}))
        train_state.next_phase(head, net, Phase(1, RATE, momentum="carry"))


def test_the_average_over_phases():
    """Bug: a new phase forgets the average, or averages a layer from before it was trained."""
    first = trained(start(Phase(1, RATE, average=0.9), frozen={"conv1"}))
    state = train_state.next_phase(first, Tiny(), Phase(1, RATE, average=0.5))
    assert equal(state.average["params"]["conv2"], first.average["params"]["conv2"])
    assert equal(state.average["params"]["conv1"], first.params["conv1"])
    assert equal(state.average["batch_stats"], first.average["batch_stats"])
    assert state.decay == 0.5
    closed = train_state.next_phase(first, Tiny(frozen=frozenset({"conv1", "conv2"})), Phase(1, RATE, average=0.5))
    assert equal(closed.variables(average=True)["params"]["conv2"], first.params["conv2"])
    assert train_state.next_phase(first, Tiny(), Phase(1, RATE)).average is None
    late = train_state.next_phase(
        train_state.next_phase(first, Tiny(), Phase(1, RATE)), Tiny(), Phase(1, RATE, average=0.5)
    )
    assert equal(late.average["params"], first.params)
