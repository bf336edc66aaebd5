import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import Tiny, variables

from jaxft import lr_finder, model, optim, task, train_state
from jaxft.data import Dataset, Inputs
from jaxft.phase import Phase

ONE = optim.Constant(1.0)
CURVATURE = 4.0  # SGD on a parabola of this curvature diverges at rates above 2 / 4


@jax.jit
def loss_of(params, noise):
    return 1.0 + sum(CURVATURE / 2 * ((leaf - noise) ** 2).mean() * leaf.size for leaf in jax.tree.leaves(params))


def _step(state, noise):
    loss, grads = jax.value_and_grad(loss_of)(state.params, noise)
    updates, opt_state = state.tx(state.lr_scale).update(grads, state.opt_state, state.params, value=loss, grad=grads)
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    return state, {"loss": loss}


step = jax.jit(_step, donate_argnums=0)


def noise(scale=0.01):
    rng = np.random.default_rng(0)
    return (jnp.float32(rng.normal(0, scale)) for _ in itertools.count())


def state_of(schedule=ONE, **settings):
    net = Tiny()
    return train_state.create(net, variables(net), Phase(1, schedule, optim.SGD(), **settings))


def test_it_suggests_a_rate_that_trains():
    """Bug: the rate set is not the rate used, the smoothing lags, or the divergence draws the suggestion."""
    curve = lr_finder.range_test(state_of(), step, noise(), highest=100.0, steps=120)
    assert 1e-4 < curve.suggestion < 2 / CURVATURE
    assert len(curve.rates) == len(curve.losses) < 120
    assert 2 / CURVATURE < curve.rates[-1] < 10  # it stopped soon after it diverged
    assert np.isfinite(curve.losses).all()
    assert curve.rates[0] == pytest.approx(1e-7)
    np.testing.assert_allclose(np.diff(np.log(curve.rates)), np.log(1e9) / 119, rtol=1e-6)
    trained = state_of(optim.Constant(curve.suggestion))
    for value in itertools.islice(noise(), 50):
        trained, figures = step(trained, value)
    assert float(figures["loss"]) < curve.losses[0] / 2


def test_it_leaves_no_trace():
    """Bug: the state that it was given is trained, donated, or left with another rate."""
    state = state_of(average=0.9)
    kept = jax.tree.map(np.array, state.replace(rng=jax.random.key_data(state.rng)))
    lr_finder.range_test(state, step, noise(), steps=20)
    after = jax.tree.map(np.array, state.replace(rng=jax.random.key_data(state.rng)))
    assert all(map(np.array_equal, jax.tree.leaves(kept), jax.tree.leaves(after)))
    step(state, jnp.float32(0.0))


def test_a_loss_that_is_not_finite_ends_it():
    """Bug: NaN becomes a point of the curve, or the suggestion."""

    def diverges(state, batch):
        state, figures = step(state, batch)
        return state, {"loss": np.where(int(state.step) > 15, np.nan, figures["loss"])}

    curve = lr_finder.range_test(state_of(), diverges, noise(), steps=30)
    assert len(curve.losses) == 15 and np.isfinite(curve.losses).all()


def test_a_loss_that_never_falls_has_no_suggestion():
    """Bug: the first rate is suggested where no rate trains."""
    rates = np.geomspace(1e-5, 1, 50)
    assert lr_finder.suggest(rates, np.linspace(1, 2, 50)) is None
    assert lr_finder.suggest(rates[:2], np.array([2.0, 1.0])) is None
    falls = 1 - 0.5 / (1 + np.exp(-4 * (np.log10(rates) + 3)))  # steepest at 1e-3
    assert lr_finder.suggest(rates, falls) == pytest.approx(1e-3, rel=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3}, "steps of a range test"),
        ({"lowest": 0.0}, "lowest wants"),
        ({"lowest": 0.1, "highest": 0.01}, "above lowest=0.1"),
    ],
)
def test_ranges_that_cannot_be(settings, message):
    """Bug: an empty or reversed range gives a curve without meaning."""
    with pytest.raises(ValueError, match=message):
        lr_finder.range_test(state_of(), step, noise(), **settings)


def test_the_phase_must_leave_the_rate_to_the_test():
    """Bug: the schedule multiplies the rates, and the curve shows others than were used."""
    for schedule in (optim.Constant(0.1), optim.Cosine(1.0, 50)):
        with pytest.raises(ValueError, match=r"make its phase with optim.Constant\(1.0\)"):
            lr_finder.range_test(state_of(schedule), step, noise(), steps=20)
    with pytest.raises(ValueError, match="wants as many batches, not 5; give it more"):
        lr_finder.range_test(state_of(), step, itertools.islice(noise(), 5), steps=20)


def test_find_tests_a_phase_as_finetune_would_train_it(tmp_path):
    """Bug: the model is changed, groups lose their ratios, or the frozen layers are trained."""
    net = tiny.Tiny()
    start = model.Model(net, jax.device_get(tiny.variables(net)), "torch")
    before = jax.tree.map(np.array, start.variables)
    whole = tiny.batch(0, size=24)
    names = tuple(f"{i}.png" for i in range(24))
    bright = Dataset("bright", list(whole["image"]), whole["label"], names, names, ("red", "green", "blue"))
    schedules = {"trainable": optim.Cosine(0.3, 9, warmup=2), "body": optim.Constant(0.1)}  # the first rate is 0
    phase = Phase(1, schedules, frozen="through:stem", groups={"body": "stage:body"})
    inputs = Inputs(bright, np.arange(24), (8, 8), 8)
    with pytest.raises(ValueError, match="the folder of picture=.* does not exist"):
        lr_finder.find(start, task.classification(), inputs, phase, picture=tmp_path / "none" / "lr.png")
    curve = lr_finder.find(start, task.classification(), inputs, phase, picture=tmp_path / "lr.png", steps=20)
    assert len(curve.rates) == len(curve.losses) and np.isfinite(curve.losses).all() and curve.rates[0] == 1e-7
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    jax.tree.map(np.testing.assert_array_equal, start.variables, before)


def test_noise_at_the_start_is_no_descent():
    """Bug: the first losses, which no mean has smoothed, fall most steeply by chance, and the rate is far too low."""
    rates = np.geomspace(1e-6, 1.0, 60)
    falls = 0.45 - 0.3 / (1 + np.exp(-3 * (np.log10(rates) + 2.5)))  # about 10^-2.5
    noise = np.random.default_rng(0).normal(0, 0.06, 60)
    noise[:3] += [0.1, 0.2, -0.1]
    assert 3e-4 < lr_finder.suggest(rates, falls + noise) < 3e-2
    assert lr_finder.suggest(rates, np.linspace(1, 2, 60)) is None and lr_finder.suggest(rates[:2], falls[:2]) is None
