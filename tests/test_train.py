import dataclasses
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
from tiny import assert_same, kept_programs, leaves  # noqa: F401

from jaxft import devices, feed, optim, predict, task, train, train_state
from jaxft.checkpoint import Checkpoints
from jaxft.data import Inputs, loader
from jaxft.phase import Phase

pytestmark = pytest.mark.usefixtures("kept_programs")

GOAL = task.classification()


def make_state(net=None, frozen=(), phase=None, **options):
    net = net or tiny.Tiny(frozen=frozenset(frozen))
    return train_state.create(net, tiny.variables(net), phase or Phase(1, optim.Constant(0.1)), **options)


def make_step(goal=GOAL, num_outputs=3):
    return train.make_train_step(goal, num_outputs, tiny.prepare_labelled)


def test_the_loss_falls():
    """Bug: the sign of the update is wrong, or gradients do not reach the parameters."""
    step, state = make_step(), make_state()
    losses = []
    for t in range(40):
        state, metrics = step(state, tiny.batch(t))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert int(state.step) == 40


def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one_moves():
    """Bug: frozen leaves drift by a bit, frozen statistics move with the batch, or a trainable leaf stands still."""
    frozen = {"conv1", "bn1"}
    step, state = make_step(), make_state(frozen=frozen)
    params, stats = leaves(state.params), leaves(state.batch_stats)
    for t in range(3):
        state, _ = step(state, tiny.batch(t))
    for name, leaf in leaves(state.params).items():
        assert np.array_equal(leaf, params[name]) == any(layer in name for layer in frozen), name
    assert_same(leaves(state.batch_stats), stats)


def test_unfrozen_statistics_move():
    """Bug: the step drops the updated statistics, so that inference keeps those of ImageNet."""
    step, state = make_step(), make_state()
    before = leaves(state.batch_stats)
    state, _ = step(state, tiny.batch(0))
    assert all(not np.array_equal(leaf, before[name]) for name, leaf in leaves(state.batch_stats).items())


def test_a_frozen_layer_costs_no_gradient():
    """Bug: the step differentiates frozen leaves too, as a logged gradient norm makes XLA do."""

    def flops(frozen):
        lowered = make_step().lower(make_state(frozen=frozen), tiny.batch(0, size=32))
        return lowered.compile().cost_analysis()["flops"]

    everything, head_only = flops(()), flops(("conv1", "bn1", "conv2"))
    images = jnp.zeros((32, 8, 8, 3))
    net = tiny.Tiny(frozen=frozenset(["bn1"]))
    forward = jax.jit(lambda v: net.apply(v, images)[0]).lower(tiny.variables(net)).compile().cost_analysis()["flops"]
    assert head_only < 1.25 * forward < 0.6 * everything


def test_the_gradient_norm_is_that_of_the_trainable_leaves():
    """Bug: clipping divides by a norm that frozen layers take part in."""
    clip = 1e-3
    schedules = {"trainable": optim.Constant(1.0), "fast": optim.Constant(1.0)}
    phase = Phase(1, schedules, optim.SGD(), groups={"fast": "predictions"}, clip_norm=clip)
    state = make_state(frozen=("conv1", "bn1"), phase=phase)
    before = leaves(state.params)
    state, metrics = make_step()(state, tiny.batch(0))
    moved = math.sqrt(sum(float(((leaf - before[name]) ** 2).sum()) for name, leaf in leaves(state.params).items()))
    assert float(metrics["grad_norm"]) > 10 * clip
    assert moved == pytest.approx(clip, rel=1e-3)  # over both groups together, not clip for each


def test_the_step_is_compiled_once():
    """Bug: a Python number or a fresh closure in the state makes every step compile again, or a new scale does."""
    step, state = make_step(), make_state(phase=Phase(1, optim.InverseTime(0.1, 1e-2)))
    for t in range(3):
        state, _ = step(state.replace(lr_scale=jnp.float32(0.5**t)), tiny.batch(t))
    assert step._cache_size() == 1


def test_random_numbers_are_a_function_of_seed_and_step():
    """Bug: dropout draws from a stream, so that a resumed step differs from the same step of a whole run."""
    net = tiny.Tiny(dropout=0.5)
    step = make_step()

    def loss(seed, t):
        state = make_state(net, seed=seed)
        return float(step(state.replace(step=jnp.asarray(t, jnp.int32)), tiny.batch(0))[1]["loss"])

    assert loss(0, 5) == loss(0, 5)
    assert len({loss(0, 5), loss(0, 6), loss(1, 5)}) == 3


@pytest.mark.parametrize("target", ["class", "labels", "values"])
def test_unknown_labels_take_no_part_in_a_step(target):
    """Bug: what stands in for an unknown label is learnt, or counts in the mean."""
    goal = tiny.TASKS[target]()
    data = tiny.dataset(8, target)
    batch = tiny.batch(0) | {"label": np.asarray(data.labels), "known": np.ones(data.labels.shape, bool)}
    hidden = np.zeros(data.labels.shape, bool)
    hidden[[0, 3, 6]] = True
    results = []
    for fill in (0, 1, 2 if target == "class" else 1):
        label = np.where(hidden, fill, batch["label"]).astype(batch["label"].dtype)
        state, figures = make_step(goal)(make_state(frozen={"bn1"}), batch | {"label": label, "known": ~hidden})
        results.append((leaves(state.params), {name: float(value) for name, value in figures.items()}))
    for params, figures in results[1:]:
        assert figures == results[0][1]
        assert_same(params, results[0][0])
    rest = {name: column[~hidden.reshape(8, -1)[:, 0]] for name, column in batch.items()}
    state, figures = make_step(goal)(make_state(frozen={"bn1"}), rest)  # as if the images were not there
    np.testing.assert_allclose(float(figures["loss"]), results[0][1]["loss"], rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), leaves(state.params), results[0][0])
    _, figures = make_step(goal)(make_state(), batch | {"known": np.zeros(data.labels.shape, bool)})
    assert float(figures["loss"]) == 0 and float(figures["grad_norm"]) == 0


def test_sample_weights_are_keras():
    """Bug: weights are normalised by their sum, where Keras divides the weighted losses by the count."""
    import keras

    batch = tiny.batch(0) | {"weight": np.linspace(0, 3, 8, dtype=np.float32)}
    net = tiny.Tiny()
    variables = tiny.variables(net)
    (logits, _), _ = net.apply(
        variables, tiny.prepare(None, batch["image"]), train=True, mutable=["batch_stats"], rngs={}
    )
    theirs = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    expected = float(theirs(batch["label"], np.asarray(logits), sample_weight=batch["weight"]))
    _, figures = make_step()(make_state(), batch)
    assert float(figures["loss"]) == pytest.approx(expected, rel=1e-5)


def test_a_label_mixed_with_an_unknown_one_is_unknown():
    """Bug: mixing blends an unknown label into a known one, and half of it is learnt; or known ones are lost."""
    known = jnp.asarray([1.0, 0.3 + 0.7, 0.7, 0.0])
    values = jnp.asarray([1.0, 2.0, 4.0, 8.0])
    assert float(train.mean(values, {"known": known})) == 1.5
    weight = jnp.asarray([2.0, 1.0, 1.0, 1.0])
    assert float(train.mean(values, {"known": known}, weight)) == 2.0


def test_an_optimizer_gets_the_loss():
    """Bug: a transform with extra arguments, such as reduce_on_plateau, fails or sees no value."""
    seen = []

    def optimizer(schedule):
        def update(updates, state, params=None, *, value, grad, **_):
            jax.debug.callback(lambda x, g: seen.append((float(x), float(g))), value, optax.tree.norm(grad))
            return updates, state

        return optax.chain(
            optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update), optax.sgd(schedule)
        )

    _, figures = make_step()(make_state(phase=Phase(1, optim.Constant(0.1), optimizer)), tiny.batch(0))
    jax.effects_barrier()
    assert seen == [(pytest.approx(float(figures["loss"])), pytest.approx(float(figures["grad_norm"])))]


def eval_batches(n, size=4):
    """n images in batches of `size`, the last one padded, as the loader gives them."""
    whole = tiny.batch(0, size=n)
    del whole["weight"]
    for first in range(0, n, size):
        rows = np.arange(first, first + size).clip(max=n - 1)
        yield {name: column[rows] for name, column in whole.items()} | {"real": np.arange(first, first + size) < n}


def make_eval_step():
    return predict.make_eval_step(tiny.Tiny().apply, GOAL.outputs, partial(tiny.prepare, None))


def test_two_devices_compute_what_one_does():
    """Bug: the batch is not shared out, gradients are not averaged over devices, or the last rows are lost."""
    script = """
        import jax, tiny, test_train
        from jaxft import devices, feed, predict, train
        mesh = devices.mesh()
        step, state = test_train.make_step(), devices.replicate(test_train.make_state(), mesh)
        for t in range(3):
            batch = devices.shard(tiny.batch(t), mesh)
            assert len(batch["image"].sharding.device_set) == mesh.size
            state, metrics = step(state, batch)
        several = train.several(step)
        for t in (3, 5):
            batch = devices.shard(feed.several(map(tiny.batch, (t, t + 1)), 2), mesh, stacked=True)
            assert batch["image"].sharding.shard_shape(batch["image"].shape)[:2] == (2, 8 // mesh.size)
            state, metrics = several(state, batch)
        assert several._cache_size() == 1 and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
        metrics = {name: values[-1] for name, values in metrics.items()}
        eval_step = test_train.make_eval_step()
        found = predict.evaluate(eval_step, state.variables(), test_train.eval_batches(10), mesh)
        loss = test_train.GOAL.metrics(found)["loss"]
        print(mesh.size, float(metrics["loss"]), float(metrics["grad_norm"]), loss, len(found.index))
    """
    results = []
    for count in (1, 2):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append([float(value) for value in done.stdout.split()])
    assert [result[0] for result in results] == [1, 2]
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-4)


def singles(first, last):
    return map(train.Dispatch, map(tiny.batch, range(first, last)))


def run(folder, *, phase=None, number=0, batches=singles, save_every=None, train_step=None, judged=None):
    """One phase of `fit` in a folder, four steps an epoch; returns (state, history)."""
    phase = phase or Phase(3, optim.Constant(0.1))
    mesh = devices.mesh()
    state = devices.replicate(make_state(tiny.Tiny(dropout=0.3), phase=phase), mesh)
    eval_step = make_eval_step()
    checkpoints = Checkpoints(folder / "checkpoints", {"lr": 0.1})

    def judge(state, row):
        found = predict.evaluate(eval_step, state.variables(), eval_batches(10), mesh)
        row |= {f"val_{name}": value for name, value in GOAL.metrics(found).items()}
        if judged:
            judged(state, row)

    progress = train.Progress(phase=number)
    try:
        if checkpoints.latest() is not None:
            progress = train.Progress(**checkpoints.run()["progress"])
            state = checkpoints.restore(state)
        plan = train.Plan(phase, number, 4, 8, "loss", "lowest", save_every, mesh)
        state = train.fit(state, train_step or make_step(), batches, plan, progress, checkpoints, judge)
        return state, progress.history
    finally:
        checkpoints.close()


def acting_at(step_of_act, act):
    """Batches that act while the given step's batch is fetched."""

    def batches(first, last):
        for step in range(first, last):
            if step == step_of_act:
                act()
            yield train.Dispatch(tiny.batch(step))

    return batches


def without_rate(history):
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in history]


def everything(state):
    return leaves((state.params, state.opt_state, state.batch_stats, state.step, state.lr_scale))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, number):
    """Bug: resuming repeats or skips a batch, loses momentum, or starts the epoch's means anew."""
    state, history = run(tmp_path / "whole")
    with pytest.raises(train.Stopped, match="step 7 is saved") as stopped:
        run(tmp_path / "parts", batches=acting_at(6, partial(tiny.stop, number)))
    assert stopped.value.signum == number
    resumed, resumed_history = run(tmp_path / "parts")
    assert without_rate(resumed_history) == without_rate(history)
    assert_same(everything(resumed), everything(state))
    assert [row["epoch"] for row in resumed_history] == [1, 2, 3]


class Killed(BaseException):
    pass


def kill():
    raise Killed


def test_a_killed_run_loses_no_more_than_save_every(tmp_path):
    """Bug: the state is saved at epochs' ends alone, or a save that is under way spoils the one before."""
    with pytest.raises(Killed):
        run(tmp_path, batches=acting_at(7, kill), save_every=2)
    firsts = []

    def resumed(first, last):
        firsts.append((first, last))
        return singles(first, last)

    run(tmp_path, batches=resumed, save_every=2)
    assert firsts == [(6, 12)]


def test_several_steps_at_once_count_as_so_many(tmp_path, monkeypatch):
    """Bug: three steps in one dispatch count as one, a batch has as many images as steps, or compiling is timed."""
    clock, seen = [0.0], set()
    several = train.several(make_step())

    def train_step(state, batch):
        steps = len(batch["label"])
        clock[0] += 0.5 * steps if steps in seen else 1000.0
        seen.add(steps)
        return several(state, batch)

    def batches(first, last):
        for start, count in ((0, 3), (3, 1), (4, 3), (7, 1), (8, 1), (9, 3)):
            batch = feed.several(map(tiny.batch, itertools.count(start)), count)
            yield train.Dispatch(batch, count, stacked=True)

    with monkeypatch.context() as patched:
        patched.setattr("jaxft.meter.time.perf_counter", lambda: clock[0])
        state, history = run(tmp_path / "several", batches=batches, train_step=train_step)
    assert [row["images_per_second"] for row in history] == [None, 16.0, 16.0]
    expected, expected_history = run(tmp_path / "single")
    for row, expected_row in zip(history, expected_history, strict=True):
        row, expected_row = ({**side, "images_per_second": 0} for side in (row, expected_row))
        assert row == pytest.approx(expected_row, rel=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), state.params, expected.params)


def test_a_finished_run_trains_no_further(tmp_path):
    """Bug: running the command again trains past the end, or fails on an empty stream."""
    state, history = run(tmp_path)
    again, history_again = run(tmp_path)
    assert int(again.step) == int(state.step) == 12
    assert history_again == history


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Bug: a run goes on for hours with NaN parameters, or saves them over the last good checkpoint."""

    def batches(first, last):
        for step in range(first, last):
            batch = tiny.batch(step)
            bad = {"image": np.full((8, 8, 8, 3), np.nan, np.float32)}
            yield train.Dispatch(batch if step != 6 else batch | bad)

    with pytest.raises(train.Diverged, match="the checkpoint of step 4 is intact"):
        run(tmp_path, batches=batches)
    state, _ = run(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in leaves(state.params).values())


def scored(values):
    """A judge that replaces the held-out losses of the epochs."""
    values = iter(values)
    return lambda state, row: row.update(val_loss=next(values))


@pytest.mark.parametrize(
    ("values", "patience", "epochs"),
    [
        ([3.0, 2.0, 2.5, 2.5, 1.0], 2, 4),
        ([3.0, 2.0, 2.0, 1.0, 1.0, 1.0], 1, 3),  # an equal value is no better one
        ([math.nan, 2.0, math.nan, math.nan, 1.0], 2, 4),
        ([math.nan] * 6, 3, 4),
        ([3.0, 2.0, 1.0, 0.9, 0.8, 0.7], 1, 6),
    ],
    ids=["waits", "equal", "NaN is never best", "all NaN", "improves"],
)
def test_patience(tmp_path, values, patience, epochs):
    """Bug: the wait is counted from the last value, NaN counts as best, or the phase ends an epoch too late."""
    phase = Phase(6, optim.Constant(0.1), patience=patience)
    state, history = run(tmp_path, phase=phase, judged=scored(values))
    assert len(history) == epochs and int(state.step) == 4 * epochs


@pytest.mark.parametrize(
    ("values", "best", "place"),
    [
        ([math.nan, 1.0, 2.0], "lowest", 1),
        ([1.0, math.nan, 2.0], "lowest", 0),
        ([1.0, math.nan, 2.0], "highest", 2),
        ([2.0, 1.0, 1.0], "lowest", 1),
        ([math.nan, math.nan], "lowest", None),
        ([], "lowest", None),
    ],
)
def test_the_best_value(values, best, place):
    """Bug: a comparison with NaN is false, so that NaN stays best; or the last of equal values wins."""
    assert train.best_place(values, best) == place


def test_the_rates_of_the_history_are_those_of_the_last_update(tmp_path):
    """Bug: the logged rate is that of another update, forgets the plateau, or comes from a setting of its own."""
    plateau = optim.Plateau(0.1, factor=0.5, patience=1)
    groups = {"head": "predictions"}
    phase = Phase(4, {"head": plateau, "trainable": optim.Scaled(plateau, 0.1)}, groups=groups)
    state, history = run(tmp_path / "plateau", phase=phase, judged=scored([1.0, 2.0, 2.0, 0.5]))
    assert [row["lr_head"] for row in history] == [0.1, 0.1, 0.05, 0.025]
    assert [row["lr_trainable"] for row in history] == pytest.approx([0.01, 0.01, 0.005, 0.0025])
    assert float(state.lr_scale) == np.float32(0.25)
    _, history = run(tmp_path / "inverse", phase=Phase(2, optim.InverseTime(0.1, 0.5)))
    assert [row["lr"] for row in history] == [0.1 / (1 + 0.5 * 3), 0.1 / (1 + 0.5 * 7)]


@pytest.fixture
def usual():
    """The handlers of signals as Python starts with; one that was started in the background ignores SIGINT."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield handlers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("when", ["evaluation", "save"])
def test_a_signal_during_the_last_evaluation_or_save_of_a_phase_stops_the_run(tmp_path, monkeypatch, usual, when):
    """Bug: the signal is caught and forgotten, so that the next phase, fold or run begins until the machine is gone."""
    if when == "save":
        save = Checkpoints.save

        def stopped_save(self, state, *args):
            save(self, state, *args)
            if int(state.step) == 8:
                tiny.stop()

        monkeypatch.setattr(Checkpoints, "save", stopped_save)
        judged = None
    else:
        judged = lambda state, row: tiny.stop() if row["step"] == 8 else None  # noqa: E731
    phase = Phase(2, optim.Constant(0.1))
    with pytest.raises(train.Stopped, match="step 8 is saved"):
        run(tmp_path, phase=phase, judged=judged)
    assert {number: signal.getsignal(number) for number in usual} == usual
    monkeypatch.undo()
    state, history = run(tmp_path, phase=phase)  # nothing is left to train
    assert int(state.step) == 8 and len(history) == 2
    assert {number: signal.getsignal(number) for number in usual} == usual


def test_a_signal_during_an_evaluation_stops_before_the_next_epoch_ends(tmp_path):
    """Bug: what comes during an evaluation waits for the end of the next epoch, which may be hours."""
    judged = lambda state, row: tiny.stop() if row["step"] == 4 else None  # noqa: E731
    with pytest.raises(train.Stopped, match="step [45] is saved"):
        run(tmp_path / "parts", judged=judged)
    resumed, history = run(tmp_path / "parts")
    state, expected = run(tmp_path / "whole")
    assert_same(everything(resumed), everything(state))
    assert without_rate(history) == without_rate(expected)


def test_a_second_signal_acts_as_usual(usual):
    """Bug: an impatient user cannot end a run whose save hangs."""
    with pytest.raises(KeyboardInterrupt), train.stop_signal() as received:
        tiny.stop(signal.SIGINT)
        assert received == [signal.SIGINT]
        tiny.stop(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in usual} == usual


def test_a_step_without_memory_says_which_batch_to_try(monkeypatch):
    """Bug: XLA's traceback of a hundred lines, which names no remedy; or every error of XLA is called that."""

    def fails(message):
        def train_step(state, batch):
            raise jax.errors.JaxRuntimeError(message)

        return train_step

    with pytest.raises(train.OutOfMemory, match="a step of 32 images .* try a batch of 16"):
        train._compiled(fails("RESOURCE_EXHAUSTED: Out of memory allocating"), make_state(), {}, 32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train._compiled(fails("INTERNAL: something else"), make_state(), {}, 32)


def test_progress_is_json_that_comes_back(tmp_path):
    """Bug: a field that JSON has no word for, so that a resumed run has other sums, or fails."""
    import json

    progress = train.Progress(1, ["conv1"], [{"epoch": 1, "val_loss": 0.1 + 0.2}], {"loss": 1 / 3, "steps": 2})
    assert train.Progress(**json.loads(json.dumps(dataclasses.asdict(progress)))) == progress


def test_soft_targets_are_learnt_in_place_of_labels(tmp_path):
    """Bug: the label is learnt all the same; an image without a label is left out though it has a target."""
    data = tiny.dataset()
    labels = data.labels.copy()
    labels[:5] = -1
    data = dataclasses.replace(data, labels=labels)
    targets = np.full((len(data), 3), np.nan, np.float32)
    targets[:5] = [0.2, 0.3, 0.5]
    inputs = Inputs(data, np.arange(5), (8, 8), 5, targets=targets)
    batch = next(iter(loader.train_batches(inputs, data.images, seed=0)))
    np.testing.assert_allclose(batch["target"], targets[:5])
    assert batch["known"].all()
    mixed = dataclasses.replace(inputs, indices=np.arange(3, 8))
    batch = next(iter(loader.train_batches(mixed, data.images, seed=0)))
    own = batch["index"] >= 5
    np.testing.assert_array_equal(batch["target"][own], np.eye(3)[labels[batch["index"][own]]])
    hard = targets.copy()
    hard[5:20] = np.roll(np.eye(3, dtype=np.float32)[labels[5:20]], 1, 1)  # all wrong
    kept = [
        tiny.run(tmp_path / str(i), data=data, inputs={"targets": t})[1] for i, t in enumerate((None, targets, hard))
    ]
    assert all(np.isfinite(found.outputs).all() for found in kept)
    assert np.abs(kept[0].outputs - kept[1].outputs).max() > 1e-4
    assert np.abs(kept[1].outputs - kept[2].outputs).max() > 1e-3
    for wrong, match in ((targets[:3], "expected floats \\[30, 3\\]"), (np.nan_to_num(targets), "sum")):
        with pytest.raises(ValueError, match=match):
            Inputs(data, np.arange(5), (8, 8), 5, targets=wrong)
