import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import optim


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
        tx = optim.nesterov_sgd(optim.inverse_time(lr, decay))
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
    tx = optax.sgd(optim.inverse_time(0.1, 0.5), 0.9, nesterov=True)
    ours, state = jnp.zeros(7), tx.init(jnp.zeros(7))
    for grad in grads:
        updates, state = tx.update(jnp.asarray(grad, jnp.float32), state)
        ours = optax.apply_updates(ours, updates)
    assert np.abs(ours - expected).max() > 1e-2


def test_agrees_with_keras_3_at_a_constant_rate():
    """Bug: sign or momentum differ from the optimizer that Keras ships today."""
    import keras

    grads = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    variable = keras.Variable(np.ones(5, np.float32))
    theirs = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
    tx = optim.nesterov_sgd(0.01)
    ours, state = jnp.ones(5), tx.init(jnp.ones(5))
    for grad in grads:
        theirs.apply([jnp.asarray(grad)], [variable])
        updates, state = tx.update(jnp.asarray(grad), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, np.asarray(variable.value), rtol=1e-6)


def test_l2_adds_twice_lambda_w_to_kernels():
    """Bug: λ·w instead of Keras's gradient 2λ·w, or decay of biases."""
    params = {"layer": {"kernel": jnp.full(2, 3.0), "bias": jnp.full(2, 3.0)}}
    tx = optim.nesterov_sgd(1.0, momentum=0.0, l2=0.01)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.06, rtol=1e-6)
    np.testing.assert_array_equal(updates["layer"]["bias"], 0.0)


def test_schedules():
    """Bug: off by one in the update count, or a decay that starts before the warm-up ends."""
    assert [float(optim.inverse_time(1.0, 0.5)(t)) for t in (0, 1, 2)] == pytest.approx([1, 1 / 1.5, 0.5])
    steps = optim.step_decay(1.0, every=10, factor=0.1, total=30)
    assert [float(steps(t)) for t in (0, 9, 10, 19, 20, 29)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    warm = optim.cosine(2.0, total=110, warmup=10)
    assert [float(warm(t)) for t in (0, 5, 10, 60, 110)] == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)
    cold = optim.cosine(2.0, total=100)
    assert [float(cold(t)) for t in (0, 50, 100)] == pytest.approx([2, 1, 0], abs=1e-6)
    with pytest.raises(ValueError, match="warmup"):
        optim.cosine(1.0, total=10, warmup=10)
