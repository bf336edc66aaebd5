import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Tiny, variables

from jaxft import nets, optim
from jaxft.phase import Phase


def keras_sgd(params, grads, *, lr, decay, momentum):
    """SGD.get_updates of Keras 1.2 and 2.0 in float64, nesterov=True, written from its published update rule."""
    velocity = np.zeros_like(params)
    for t, grad in enumerate(grads):
        rate = lr * (1.0 / (1.0 + decay * t))
        velocity = momentum * velocity - rate * grad
        params = params + momentum * velocity - rate * grad
        yield params


@pytest.mark.parametrize(("lr", "decay"), [(1e-3, 1e-6), (0.1, 0.5)])
def test_nesterov_sgd_is_keras_step_by_step(lr, decay):
    """Bug: optax.sgd's order, rate outside the momentum buffer, which differs as soon as the rate changes."""
    rng = np.random.default_rng(0)
    params = rng.normal(size=7)
    grads = rng.normal(size=(50, 7))
    with jax.enable_x64(True):
        tx = optim.NesterovSGD()(optim.InverseTime(lr, decay))
        ours, state = jnp.asarray(params), tx.init(jnp.asarray(params))
        for grad, expected in zip(grads, keras_sgd(params, grads, lr=lr, decay=decay, momentum=0.9), strict=True):
            updates, state = tx.update(jnp.asarray(grad), state, ours)
            ours = optax.apply_updates(ours, updates)
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, expected, rtol=1e-13, atol=0)


def test_the_optax_order_fails_that_comparison():
    """Bug: the test above is too loose to tell the two orders apart."""
    grads = np.random.default_rng(0).normal(size=(10, 7))
    expected = list(keras_sgd(np.zeros(7), grads, lr=0.1, decay=0.5, momentum=0.9))[-1]
    tx = optim.SGD(0.9, nesterov=True)(optim.InverseTime(0.1, 0.5))
    ours, state = jnp.zeros(7), tx.init(jnp.zeros(7))
    for grad in grads:
        updates, state = tx.update(jnp.asarray(grad, jnp.float32), state, ours)
        ours = optax.apply_updates(ours, updates)
    assert np.abs(ours - expected).max() > 1e-2


def test_agrees_with_keras_3_at_a_constant_rate():
    """Bug: sign or momentum differ from the optimizer that Keras ships today."""
    import keras

    grads = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    variable = keras.Variable(np.ones(5, np.float32))
    theirs = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
    tx = optim.NesterovSGD()(optim.Constant(0.01))
    ours, state = jnp.ones(5), tx.init(jnp.ones(5))
    for grad in grads:
        theirs.apply([jnp.asarray(grad)], [variable])
        updates, state = tx.update(jnp.asarray(grad), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, np.asarray(variable.value), rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optim.NesterovSGD(0.0, l2=0.01), optim.SGD(l2=0.01)])
def test_l2_adds_twice_lambda_w_to_kernels(optimizer):
    """Bug: λ·w instead of Keras's gradient 2λ·w, or decay of biases."""
    params = {"layer": {"kernel": jnp.full(2, 3.0), "bias": jnp.full(2, 3.0)}}
    tx = optimizer(optim.Constant(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.06, rtol=1e-6)
    np.testing.assert_array_equal(updates["layer"]["bias"], 0.0)


def test_schedules():
    """Bug: off by one in the update count, or a decay that starts before the warm-up ends."""
    assert [optim.Constant(0.3)(t) for t in (0, 9)] == [0.3, 0.3]
    assert [float(optim.InverseTime(1.0, 0.5)(t)) for t in (0, 1, 2)] == pytest.approx([1, 1 / 1.5, 0.5])
    steps = optim.StepDecay(1.0, every=10, factor=0.1)
    assert [float(steps(t)) for t in (0, 9, 10, 19, 20, 29)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    warm = optim.Cosine(2.0, total=110, warmup=10)
    assert [float(warm(t)) for t in (0, 5, 10, 60, 110)] == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)
    cold = optim.Cosine(2.0, total=100)
    assert [float(cold(t)) for t in (0, 50, 100)] == pytest.approx([2, 1, 0], abs=1e-6)
    assert optim.Scaled(cold, 0.5)(0) == pytest.approx(1.0)


def test_one_cycle():
    """Bug: the peak is at another update, or the last rate is not lr / (start · end)."""
    cosine = optim.OneCycle(1.0, total=100, warmup=0.3, start=10.0, end=100.0)
    assert [float(cosine(t)) for t in (0, 15, 30, 65, 100)] == pytest.approx([0.1, 0.55, 1, 0.5005, 0.001], rel=1e-5)
    linear = optim.OneCycle(1.0, total=100, warmup=0.3, start=10.0, end=100.0, shape="linear")
    assert [float(linear(t)) for t in (0, 15, 30, 85, 100)] == pytest.approx([0.1, 0.55, 1, 0.1, 0.001], rel=1e-5)
    shortest = optim.OneCycle(1.0, total=2, warmup=0.5)
    assert [float(shortest(t)) for t in (0, 1)] == pytest.approx([0.04, 1.0])


@pytest.mark.parametrize(
    "schedule",
    [
        optim.Constant(0.1),
        optim.InverseTime(0.1, 1e-3),
        optim.StepDecay(0.1, 3, 0.5),
        optim.Cosine(0.1, 20, 4),
        optim.OneCycle(0.1, 20),
        optim.Plateau(0.1),
        optim.Scaled(optim.Cosine(0.1, 20), 0.3),
    ],
)
def test_a_schedule_is_the_same_on_the_host_and_on_the_device(schedule):
    """Bug: a schedule that cannot be traced, or a history that shows another rate than the one used."""
    on_device = jax.jit(lambda count: jnp.asarray(schedule(count), jnp.float32))
    for t in (0, 1, 3, 5, 19, 20, 30):
        assert float(on_device(jnp.int32(t))) == pytest.approx(float(schedule(t)), rel=1e-5, abs=1e-9)


def test_values_show_all_their_settings():
    """Bug: a run's record leaves out a setting, so that it cannot be made again."""
    for value in (optim.OneCycle(0.1, 20, shape="linear"), optim.Plateau(0.1, floor=0.01), optim.AdamW(b2=0.95)):
        assert eval(repr(value), vars(optim)) == value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.Constant(-1), "lr of Constant wants a finite number, 0 or above, not -1"),
        (lambda: optim.Constant(float("nan")), "not nan"),
        (lambda: optim.Constant(float("inf")), "not inf"),
        (lambda: optim.Constant("0.1"), "not '0.1'"),
        (lambda: optim.Constant(True), "not True"),
        (lambda: optim.InverseTime(0.1, -1e-6), "decay of InverseTime"),
        (lambda: optim.StepDecay(0.1, 0, 0.5), "every of StepDecay wants an integer of at least 1"),
        (lambda: optim.StepDecay(0.1, 2.5, 0.5), "not 2.5"),
        (lambda: optim.StepDecay(0.1, 10, 0.0), "factor of StepDecay"),
        (lambda: optim.Cosine(0.1, 10, warmup=10), "warmup=10 of Cosine is not shorter than total=10"),
        (lambda: optim.Cosine(0.1, 0), "total of Cosine"),
        (lambda: optim.OneCycle(0.1, 3), "peak at update 0"),
        (lambda: optim.OneCycle(0.1, 100, warmup=0.9, shape="linear"), "from 1 to 84"),
        (lambda: optim.OneCycle(0.1, 100, shape="square"), "shape of OneCycle"),
        (lambda: optim.Plateau(0.0), "above 0"),
        (lambda: optim.Plateau(0.1, factor=1.0), "factor of Plateau"),
        (lambda: optim.Plateau(0.1, patience=0), "patience of Plateau"),
        (lambda: optim.Plateau(0.1, floor=0.2), "a rate from 0 to lr=0.1"),
        (lambda: optim.Plateau(0.1).scale([1.0], "min"), "lowest"),
        (lambda: optim.Scaled(0.1, 0.5), r"say optim.Constant\(0.1\)"),
        (lambda: optim.Scaled(np.float32(0.1), 0.5), r"not the number 0.1; say optim.Constant\(0.1\)"),
        (lambda: optim.Scaled(jnp.float32(0.1), 0.5), r"say optim.Constant\(0.1\)"),
        (lambda: optim.Constant(jnp.float32(0.1)), "give the plain number 0.1"),
        (lambda: optim.Scaled(optim.Constant(0.1), -1.0), "factor of Scaled"),
        (lambda: optim.NesterovSGD(1.0), "momentum of NesterovSGD"),
        (lambda: optim.NesterovSGD(l2=-0.1), "l2 of NesterovSGD"),
        (lambda: optim.SGD(nesterov=True), "momentum above 0"),
        (lambda: optim.AdamW(-0.1), "weight_decay of AdamW"),
        (lambda: optim.AdamW(eps=0.0), "eps of AdamW"),
        (lambda: optim.by_depth(Tiny(), 0.1, 0.5), "optim.Constant"),
        (lambda: optim.by_depth(Tiny(), optim.Constant(0.1), 0.0), "factor of by_depth"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    """Bug: a rate of -1 or NaN, a float count or a misspelt word is taken, and the loss makes no sense."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("best", ["lowest", "highest"])
@pytest.mark.parametrize(
    "settings",
    [
        {"factor": 0.5, "patience": 2},
        {"factor": 0.1, "patience": 1, "cooldown": 3},
        {"factor": 0.3, "patience": 3, "min_delta": 0.2},
        {"factor": 0.5, "patience": 1, "floor": 0.003},
    ],
)
def test_plateau_is_keras_step_by_step(settings, best):
    """Bug: patience, cooldown, the least change or the lowest rate do not count as in Keras."""
    import keras

    class Model:
        optimizer = keras.optimizers.SGD(0.01)

    rng = np.random.default_rng(3)
    values = (np.linspace(1, 0.2, 60) * (1 if best == "lowest" else -1) + rng.normal(0, 0.1, 60)).tolist()
    values[7] = float("nan")
    keras_settings = {"min_lr" if key == "floor" else key: value for key, value in settings.items()}
    theirs = keras.callbacks.ReduceLROnPlateau("loss", mode="min" if best == "lowest" else "max", **keras_settings)
    model = Model()
    theirs.set_model(model)
    theirs.on_train_begin()
    ours = optim.Plateau(0.01, **settings)
    rates = []
    for epoch, value in enumerate(values):
        theirs.on_epoch_end(epoch, {"loss": value})
        rates.append(float(model.optimizer.learning_rate))
        assert ours.lr * ours.scale(values[: epoch + 1], best) == pytest.approx(rates[-1], rel=1e-5)
    assert len(set(rates)) > 1  # it did reduce


def test_adamw_spares_biases_and_batch_norm():
    """Bug: weight decay pulls BatchNorm's scale towards 0, or does not reach the kernels."""
    params = variables(Tiny())["params"]
    tx = optim.AdamW(weight_decay=0.1)(optim.Constant(0.5))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for layer, leaves in updates.items():
        for name, update in leaves.items():
            expected = -0.05 * params[layer][name] if name == "kernel" else jnp.zeros_like(update)
            np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_by_depth_multiplies_once_a_stage():
    """Bug: the factor counts stages without weights, or the head does not learn at the full rate."""
    base = optim.Cosine(0.1, 10)
    groups, schedules = optim.by_depth(Tiny(), base, 0.5)
    assert groups == {"stem": "stage:stem", "body": "stage:body"}
    assert schedules == {"stem": optim.Scaled(base, 0.25), "body": optim.Scaled(base, 0.5), "trainable": base}
    phase = Phase(1, schedules, groups=groups)
    assert phase.rates(0) == pytest.approx({"stem": 0.025, "body": 0.05, "trainable": 0.1})


def test_by_depth_of_a_net_of_the_zoo():
    """Bug: hidden layers, which start from random values, learn at a fraction of the rate; or a headless net fails."""
    net = nets.create("vgg16", 5, fc=False, hidden=(8,))
    groups, schedules = optim.by_depth(net, optim.Constant(1.0), 0.5)
    assert list(groups) == ["block1", "block2", "block3", "block4", "block5"]
    assert schedules["block1"](0) == 1 / 32 and schedules["block5"](0) == 1 / 2
    groups, schedules = optim.by_depth(nets.create("vgg16", None), optim.Constant(1.0), 0.5)
    assert list(groups) == ["block1", "block2", "block3", "block4"] and schedules["block4"](0) == 1 / 2
