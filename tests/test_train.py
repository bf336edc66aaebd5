import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxft import feed, optim, predict, train, train_state
from jaxft.checkpoint import CheckpointError, Checkpoints


def make_state(net=None, frozen=(), tx=None, **options):
    net = net or tiny.Tiny(frozen=frozenset(frozen))
    tx = tx or optim.nesterov_sgd(0.1)
    return train_state.create(net, tiny.variables(net), tx, frozen=frozen, **options)


def leaves(tree):
    """Copies on the host, which the next step's donation leaves alone."""
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_the_loss_falls():
    """Bug: the sign of the update is wrong, or gradients do not reach the parameters."""
    step, state = train.make_train_step(tiny.prepare), make_state()
    losses = []
    for t in range(40):
        state, metrics = step(state, tiny.batch(t))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert int(state.step) == 40


def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one_moves():
    """Bug: frozen leaves drift by a bit, frozen statistics move with the batch, or a trainable leaf stands still."""
    frozen = {"conv1", "bn1"}
    step, state = train.make_train_step(tiny.prepare), make_state(frozen=frozen)
    params, stats = leaves(state.params), leaves(state.batch_stats)
    for t in range(3):
        state, _ = step(state, tiny.batch(t))
    for name, leaf in leaves(state.params).items():
        assert np.array_equal(leaf, params[name]) == any(layer in name for layer in frozen), name
    for name, leaf in leaves(state.batch_stats).items():
        np.testing.assert_array_equal(leaf, stats[name])


def test_unfrozen_statistics_move():
    """Bug: the step drops the updated statistics, so that inference keeps those of ImageNet."""
    step, state = train.make_train_step(tiny.prepare), make_state()
    before = leaves(state.batch_stats)
    state, _ = step(state, tiny.batch(0))
    assert all(not np.array_equal(leaf, before[name]) for name, leaf in leaves(state.batch_stats).items())


def test_a_frozen_layer_costs_no_gradient():
    """Bug: the step differentiates frozen leaves too, as a logged gradient norm makes XLA do."""

    def flops(frozen):
        lowered = train.make_train_step(tiny.prepare).lower(make_state(frozen=frozen), tiny.batch(0, size=32))
        return lowered.compile().cost_analysis()["flops"]

    everything, head_only = flops(()), flops(("conv1", "bn1", "conv2"))
    images = jnp.zeros((32, 8, 8, 3))
    net = tiny.Tiny(frozen=frozenset(["bn1"]))
    forward = jax.jit(lambda v: net.apply(v, images)[0]).lower(tiny.variables(net)).compile().cost_analysis()["flops"]
    assert head_only < 1.25 * forward < 0.6 * everything


def test_the_gradient_norm_is_that_of_the_trainable_leaves():
    """Bug: clipping divides by a norm that frozen layers take part in."""
    batch, clip = tiny.batch(0), 1e-3
    step = train.make_train_step(tiny.prepare)
    groups = {"predictions": "fast"}
    tx = {"trainable": optax.sgd(1.0), "fast": optax.sgd(1.0)}
    state = make_state(frozen=("conv1", "bn1"), tx=tx, groups=groups, clip_norm=clip)
    before = leaves(state.params)
    state, metrics = step(state, batch)
    moved = math.sqrt(sum(float(((leaf - before[name]) ** 2).sum()) for name, leaf in leaves(state.params).items()))
    assert float(metrics["grad_norm"]) > 10 * clip
    assert moved == pytest.approx(clip, rel=1e-3)  # over both groups together, not clip for each


def test_label_smoothing_is_keras():
    """Bug: smoothing spreads over the other classes alone, s/(C-1), where Keras uses s/C over all."""
    import keras

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4)).astype(np.float32), np.array([0, 1, 2, 3, 1])
    for smoothing in (0.0, 0.1):
        theirs = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
        expected = float(theirs(np.eye(4, dtype=np.float32)[labels], logits))
        assert float(train.cross_entropy(logits, labels, smoothing)) == pytest.approx(expected, rel=1e-6)


def test_the_step_is_compiled_once():
    """Bug: a Python number or a fresh closure in the state makes every step compile again."""
    step, state = train.make_train_step(tiny.prepare), make_state(tx=optim.nesterov_sgd(optim.inverse_time(0.1, 1e-2)))
    for t in range(3):
        state, _ = step(state, tiny.batch(t))
    assert step._cache_size() == 1


def test_random_numbers_are_a_function_of_seed_and_step():
    """Bug: dropout draws from a stream, so that a resumed step differs from the same step of a whole run."""
    net = tiny.Tiny(dropout=0.5)
    step = train.make_train_step(tiny.prepare)

    def loss(seed, t):
        state = make_state(net, seed=seed)
        return float(step(state.replace(step=jnp.asarray(t, jnp.int32)), tiny.batch(0))[1]["loss"])

    assert loss(0, 5) == loss(0, 5)
    assert len({loss(0, 5), loss(0, 6), loss(1, 5)}) == 3


def eval_batches(n, size=4):
    """n images in batches of `size`, the last one padded, as the loader gives them."""
    whole = tiny.batch(0, size=n)
    for first in range(0, n, size):
        rows = np.arange(first, first + size).clip(max=n - 1)
        weight = (np.arange(first, first + size) < n).astype(np.float32)
        yield {name: column[rows] for name, column in whole.items()} | {"weight": weight}


def test_evaluation_counts_each_image_once():
    """Bug: the padding of the last batch is scored, or the batch is dropped."""
    state, mesh = make_state(), predict.data_mesh()
    eval_step = predict.make_eval_step(lambda images: tiny.prepare(None, images))
    whole = predict.evaluate(state, eval_step, eval_batches(10, size=10), mesh)
    parts = predict.evaluate(state, eval_step, eval_batches(10, size=4), mesh)
    np.testing.assert_array_equal(parts.index, np.arange(10))
    np.testing.assert_array_equal(parts.label, tiny.batch(0, size=10)["label"])
    np.testing.assert_allclose(parts.probabilities, whole.probabilities, rtol=1e-5)
    np.testing.assert_allclose(parts.probabilities.sum(1), 1, rtol=1e-5)
    assert parts.log_loss() == pytest.approx(whole.log_loss(), rel=1e-5)


def test_log_loss_is_clipped_as_kaggle_clips():
    """Bug: a confident mistake gives an infinite score."""
    certain = predict.Predictions(np.array([0, 1]), np.array([0, 0]), np.array([[1.0, 0.0], [0.0, 1.0]], np.float32))
    assert certain.accuracy() == 0.5
    assert certain.log_loss() == pytest.approx(-math.log(1e-15) / 2)


def test_a_batch_that_does_not_divide_over_the_devices():
    """Bug: the error is XLA's, which names neither the batch nor the devices."""

    class FourDevices:
        size = 4

    with pytest.raises(ValueError, match="batch of 6 does not divide over 4"):
        predict.shard(tiny.batch(0, size=6), FourDevices())


def test_two_devices_compute_what_one_does():
    """Bug: the batch is not shared out, gradients are not averaged over devices, or the last rows are lost."""
    script = """
        import jax, tiny, test_train
        from jaxft import feed, predict, train
        mesh = predict.data_mesh()
        step, state = train.make_train_step(tiny.prepare), predict.replicate(test_train.make_state(), mesh)
        for t in range(3):
            batch = predict.shard(tiny.batch(t), mesh)
            assert len(batch["image"].sharding.device_set) == mesh.size
            state, metrics = step(state, batch)
        several = train.several(step)
        for t in (3, 5):
            batch = predict.shard(feed.several(map(tiny.batch, (t, t + 1)), 2), mesh)
            assert batch["image"].sharding.shard_shape(batch["image"].shape)[:2] == (2, 8 // mesh.size)
            state, metrics = several(state, batch)
        assert several._cache_size() == 1 and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
        metrics = {name: values[-1] for name, values in metrics.items()}
        eval_step = predict.make_eval_step(lambda images: tiny.prepare(None, images))
        found = predict.evaluate(state, eval_step, test_train.eval_batches(10), mesh)
        print(mesh.size, float(metrics["loss"]), float(metrics["grad_norm"]), found.log_loss(), len(found.index))
    """
    results = []
    for devices in (1, 2):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        environment["PYTHONPATH"] = str(Path(__file__).parent)
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        results.append([float(value) for value in done.stdout.split()])
    assert [result[0] for result in results] == [1, 2]
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-4)


def run(folder, config=None, *, epochs=3, batches=None, save_every=None, steps_per_epoch=4, train_step=None):
    """A short run of `fit` in a folder; returns (state, history)."""
    mesh = predict.data_mesh()
    state = predict.replicate(make_state(tiny.Tiny(dropout=0.3)), mesh)
    eval_step = predict.make_eval_step(lambda images: tiny.prepare(None, images))
    checkpoints = Checkpoints(folder / "checkpoints", config or {"lr": 0.1})
    try:
        return train.fit(
            state,
            train_step or train.make_train_step(tiny.prepare),
            batches or (lambda step: map(tiny.batch, itertools.count(step))),
            lambda state: predict.evaluate(state, eval_step, eval_batches(10), mesh),
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            schedule=optax.constant_schedule(0.1),
            checkpoints=checkpoints,
            history_file=folder / "history.csv",
            mesh=mesh,
            save_every=save_every,
        )
    finally:
        checkpoints.close()


def signalled_at(step_of_signal, number):
    """Batches that send this process a signal while the given step's batch is fetched."""

    def batches(first):
        for step in itertools.count(first):
            if step == step_of_signal:
                os.kill(os.getpid(), number)
            yield tiny.batch(step)

    return batches


def without_rate(history):
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in history]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, number):
    """Bug: resuming repeats or skips a batch, loses momentum, or starts the epoch's means anew."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    state, history = run(tmp_path / "whole")
    with pytest.raises(train.Stopped, match="step 7 is saved") as stopped:
        run(tmp_path / "parts", batches=signalled_at(6, number))
    assert stopped.value.signum == number
    resumed, resumed_history = run(tmp_path / "parts")
    assert without_rate(resumed_history) == without_rate(history)
    for name, leaf in leaves({"p": resumed.params, "o": resumed.opt_state, "b": resumed.batch_stats}).items():
        np.testing.assert_array_equal(
            leaf, leaves({"p": state.params, "o": state.opt_state, "b": state.batch_stats})[name]
        )
    rows = list(csv.DictReader((tmp_path / "parts" / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]


def test_a_killed_run_loses_no_more_than_save_every(tmp_path):
    """Bug: the state is saved at epochs' ends alone, or a save that is under way spoils the one before."""

    class Killed(BaseException):
        pass

    def batches(first):
        for step in itertools.count(first):
            if step == 7:
                raise Killed
            yield tiny.batch(step)

    with pytest.raises(Killed):
        run(tmp_path, batches=batches, save_every=2)
    firsts = []

    def resumed(first):
        firsts.append(first)
        return map(tiny.batch, itertools.count(first))

    run(tmp_path, batches=resumed, save_every=2)
    assert firsts == [6]


def test_several_steps_at_once_count_as_so_many(tmp_path, monkeypatch):
    """Bug: three steps in one dispatch count as one, a batch has as many images as steps, or compiling is timed."""
    clock, seen = [0.0], set()
    several = train.several(train.make_train_step(tiny.prepare))

    def train_step(state, batch):
        steps = len(batch["label"])
        clock[0] += 0.5 * steps if steps in seen else 1000.0
        seen.add(steps)
        return several(state, batch)

    def batches(first):
        for start, count in ((0, 3), (3, 1), (4, 3), (7, 1), (8, 1), (9, 3)):
            yield feed.several(map(tiny.batch, itertools.count(start)), count)

    (tmp_path / "several").mkdir()
    (tmp_path / "single").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(train.time, "perf_counter", lambda: clock[0])
        state, history = run(tmp_path / "several", batches=batches, train_step=train_step)
    assert [row["images_per_second"] for row in history] == [0.0, 16.0, 16.0]
    expected, expected_history = run(tmp_path / "single")
    for row, expected_row in zip(history, expected_history, strict=True):
        assert row == pytest.approx({**expected_row, "images_per_second": row["images_per_second"]}, rel=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), state.params, expected.params)


def test_a_finished_run_trains_no_further(tmp_path):
    """Bug: running the command again trains past the end, or fails on an empty stream."""
    state, history = run(tmp_path)
    again, history_again = run(tmp_path)
    assert int(again.step) == int(state.step) == 12
    assert history_again == history


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Bug: a run goes on for hours with NaN parameters, or saves them over the last good checkpoint."""

    def batches(first):
        for step in itertools.count(first):
            batch = tiny.batch(step)
            yield batch if step != 6 else batch | {"image": np.full((8, 8, 8, 3), np.nan, np.float32)}

    with pytest.raises(train.Diverged, match="the checkpoint of step 4 is intact"):
        run(tmp_path, batches=batches)
    state, _ = run(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in leaves(state.params).values())


def test_another_configuration_in_the_same_folder(tmp_path):
    """Bug: a run goes on from the checkpoint of one with other settings."""
    run(tmp_path, {"lr": 0.1, "seed": 0}, epochs=1)
    with pytest.raises(CheckpointError, match="lr: 0.1 → 0.2"):
        run(tmp_path, {"lr": 0.2, "seed": 0}, epochs=1)
