import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics

from jaxft import task
from jaxft.predict import Predictions

RNG = np.random.default_rng(0)


def class_predictions(n=60, classes=4, known=None, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(n) % classes).astype(np.int32)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[label]
    outputs = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    return Predictions(np.arange(n), label, np.ones(n, bool) if known is None else known, outputs)


def entry_predictions(kind, n=60, outputs=3, seed=0):
    rng = np.random.default_rng(seed)
    label = (
        (rng.random((n, outputs)) < 0.4).astype(np.float32) if kind == "multilabel" else rng.normal(size=(n, outputs))
    )
    found = np.clip(0.5 * label + 0.5 * rng.random((n, outputs)), 0, 1).astype(np.float32)
    return Predictions(np.arange(n), label.astype(np.float32), np.ones((n, outputs), bool), found)


def dataset(labels, classes, target):
    known = np.isfinite(labels) if target == "values" else labels >= 0
    return SimpleNamespace(name="cells", labels=labels, known=known, classes=classes, target=target)


def test_the_loss_is_the_one_that_optax_gives_to_the_bit():
    """Bug: a task changes a bit of the training loss, and no run repeats one of before."""
    logits = RNG.normal(size=(7, 5)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 4, 0, 2])
    for smoothing in (0.0, 0.1):
        made = task.classification(label_smoothing=smoothing)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 5), smoothing)
        expected = optax.softmax_cross_entropy(logits, targets)
        np.testing.assert_array_equal(made.losses(logits, made.encode(labels, 5)), expected)
    np.testing.assert_array_equal(
        task.multilabel().losses(logits, np.eye(5)[labels]),
        optax.sigmoid_binary_cross_entropy(logits, jnp.eye(5)[labels]),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("focal", [0.0, 0.5, 2.0])
def test_losses_are_those_of_keras(smoothing, focal):
    """Bug: smoothing spreads over the other classes alone, or the focal weight is of the wrong probability."""
    import keras

    logits = RNG.normal(size=(6, 4)).astype(np.float32)
    one_hot = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 1, 2]]
    several = (RNG.random((6, 4)) < 0.5).astype(np.float32)
    if focal:
        theirs = keras.losses.CategoricalFocalCrossentropy(1.0, focal, from_logits=True, label_smoothing=smoothing)
        binary = keras.losses.BinaryFocalCrossentropy(gamma=focal, from_logits=True, label_smoothing=smoothing)
    else:
        theirs = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
        binary = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=smoothing)
    found = task.classification(smoothing, focal).losses(logits, one_hot).mean()
    assert float(found) == pytest.approx(float(theirs(one_hot, logits)), rel=1e-5)
    found = task.multilabel(0.5, smoothing, focal).losses(logits, several).mean()
    assert float(found) == pytest.approx(float(binary(several, logits)), rel=1e-5)


@pytest.mark.parametrize("focal", [0.0, 0.5, 1.0, 2.0])
def test_gradients_of_certain_predictions_are_finite(focal):
    """Bug: the slope of (1 - p) ** gamma at p = 1 is infinite, and one easy image makes every parameter NaN."""
    logits, targets = jnp.array([[200.0, -200.0], [-200.0, 200.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    for made in (task.classification(focal=focal), task.multilabel(focal=focal)):
        gradient = jax.grad(lambda logits, losses=made.losses: losses(logits, targets).sum())(logits)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", task.TASKS)
def test_a_loss_has_the_shape_of_the_labels_and_takes_soft_targets(name):
    """Bug: mixed images, whose targets are soft, are learnt as if they were of one class."""
    made, logits = task.TASKS[name](), jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    first, second = (jax.nn.one_hot(jnp.arange(6) % 3, 3), jax.nn.one_hot(jnp.arange(1, 7) % 3, 3))
    losses = made.losses(logits, 0.3 * first + 0.7 * second)
    expected = (6,) if made.target == "class" else (6, 3)
    assert losses.shape == made.score[1](logits, first).shape == expected
    if name != "regression":  # cross-entropy is linear in the target
        parts = 0.3 * made.losses(logits, first) + 0.7 * made.losses(logits, second)
        np.testing.assert_allclose(losses, parts, rtol=1e-5)


def test_a_range_bounds_what_is_predicted():
    """Bug: the loss is of the logit while the prediction is of the squashed one."""
    made = task.regression(range=(10, 30))
    logits = jnp.array([[-100.0], [0.0], [100.0]])
    np.testing.assert_allclose(made.outputs(logits), [[10], [20], [30]])
    np.testing.assert_allclose(made.losses(logits, jnp.array([[10.0], [22.0], [30.0]])), [[0], [4], [0]])
    np.testing.assert_allclose(made.score[1](logits, jnp.array([[10.0], [22.0], [30.0]])), [[0], [2], [0]])


def test_class_figures_are_those_of_scikit_learn():
    """Bug: a figure is of another average, of other columns, or of the argmax where it wants probabilities."""
    p = class_predictions()
    found = task.classification(top_k=2).metrics(p)
    guess = p.outputs.argmax(1)
    scored = p.outputs.astype(float) / p.outputs.astype(float).sum(1, keepdims=True)
    expected = {
        "loss": metrics.log_loss(p.label, scored),
        "accuracy": metrics.accuracy_score(p.label, guess),
        "top2_accuracy": metrics.top_k_accuracy_score(p.label, p.outputs, k=2),
        "balanced_accuracy": metrics.balanced_accuracy_score(p.label, guess),
        "macro_f1": metrics.f1_score(p.label, guess, average="macro"),
        "roc_auc": metrics.roc_auc_score(p.label, scored, multi_class="ovr"),
        "average_precision": metrics.average_precision_score(np.eye(4)[p.label], p.outputs, average="macro"),
    }
    assert list(found)[0] == "loss" and found.pop("ece") > 0
    assert found == pytest.approx(expected, rel=1e-5)
    two = class_predictions(classes=2)
    found = task.classification().metrics(two)
    assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(two.label, two.outputs[:, 1]))
    assert not any(name.startswith("top") for name in found)


def test_label_figures_are_those_of_scikit_learn():
    """Bug: entries are averaged where labels should be, or thresholds are shifted by a label."""
    p = entry_predictions("multilabel")
    thresholds = [0.3, 0.5, 0.7]
    found = task.multilabel(thresholds).metrics(p)
    guess = p.outputs > np.array(thresholds)
    expected = {
        "loss": metrics.log_loss(p.label.ravel(), p.outputs.ravel().astype(float)),
        "accuracy": (guess == p.label).mean(),
        "exact_match": metrics.accuracy_score(p.label, guess),
        "macro_f1": metrics.f1_score(p.label, guess, average="macro"),
        "roc_auc": metrics.roc_auc_score(p.label, p.outputs),
        "average_precision": metrics.average_precision_score(p.label, p.outputs),
    }
    found.pop("ece")
    assert found == pytest.approx(expected, rel=1e-5)
    logits = jnp.log(p.outputs.clip(1e-6, 1 - 1e-6)) - jnp.log(1 - p.outputs.clip(1e-6, 1 - 1e-6))
    assert float(task.multilabel(thresholds).score[1](logits, p.label).mean()) == pytest.approx(expected["accuracy"])


def test_value_figures_are_those_of_scikit_learn():
    """Bug: the root is taken of each value's error before the mean, or a value's own figures are another's."""
    p = entry_predictions("regression")
    found = task.regression().metrics(p)
    assert found["loss"] == pytest.approx(metrics.mean_squared_error(p.label, p.outputs))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(p.label, p.outputs))
    assert found["rmse"] == pytest.approx(math.sqrt(found["loss"]))
    assert found["r2"] == pytest.approx(metrics.r2_score(p.label, p.outputs))
    assert found["mae_1"] == pytest.approx(metrics.mean_absolute_error(p.label[:, 1], p.outputs[:, 1]))
    one = task.regression().metrics(entry_predictions("regression", outputs=1))
    assert list(one) == ["loss", "mae", "rmse", "r2"]


def test_the_log_loss_is_clipped_as_kaggle_clips():
    """Bug: a confident mistake gives an infinite score."""
    certain = Predictions(np.arange(2), np.zeros(2, int), np.ones(2, bool), np.eye(2, dtype=np.float32))
    found = task.classification().metrics(certain)
    assert found["accuracy"] == 0.5 and found["loss"] == pytest.approx(-math.log(1e-15) / 2)


def test_calibration_error_by_hand():
    """Bug: every bin has the same weight, whatever it holds, or a probability of 1 falls out of the last one."""
    probability = np.array([1.0, 1.0, 1.0, 0.61, 0.62], np.float32)
    happened = np.array([True, True, False, True, True])
    expected = 3 / 5 * abs(1 - 2 / 3) + 2 / 5 * abs(0.615 - 1)
    assert task.calibration_error(probability, happened) == pytest.approx(expected)
    assert math.isnan(task.calibration_error(probability[:0], happened[:0]))


@pytest.mark.parametrize("name", task.TASKS)
def test_unknown_labels_enter_no_figure(name):
    """Bug: the label of an unknown image, -1 or 0, is scored as a class; a NaN spoils the mean of all."""
    made, rng = task.TASKS[name](), np.random.default_rng(1)
    if name == "classification":
        whole = class_predictions(80)
        known = rng.random(80) < 0.6
        kept = dataclasses.replace(
            whole, **{field: getattr(whole, field)[known] for field in ("index", "label", "known", "outputs")}
        )
        masked = dataclasses.replace(whole, label=np.where(known, whole.label, -1), known=known)
        assert made.metrics(masked) == made.metrics(kept)
        return
    whole = entry_predictions(name, n=80)
    known = rng.random((80, 3)) < 0.6
    junk = np.nan if name == "regression" else -1
    found = made.metrics(dataclasses.replace(whole, label=np.where(known, whole.label, junk), known=known))
    other = made.metrics(dataclasses.replace(whole, label=np.where(known, whole.label, 1), known=known))
    assert found == other and all(math.isfinite(figure) for figure in found.values())
    entries = known & True
    loss = found["loss"]
    if name == "regression":
        assert loss == pytest.approx(((whole.label - whole.outputs)[entries] ** 2).mean())
    else:
        p = np.where(whole.label > 0.5, whole.outputs, 1 - whole.outputs)[entries].astype(float)
        assert loss == pytest.approx(-np.log(p.clip(1e-15)).mean(), rel=1e-5)


@pytest.mark.parametrize("name", task.TASKS)
def test_nothing_known_gives_nan_and_no_crash(name):
    """Bug: an unlabelled test set cannot be predicted, because its figures divide by zero."""
    p = class_predictions(8) if name == "classification" else entry_predictions(name, 8)
    nothing = dataclasses.replace(p, known=np.zeros_like(p.known))
    found, whole = task.TASKS[name]().metrics(nothing), task.TASKS[name]().metrics(p)
    assert list(found) == list(whole) and all(math.isnan(figure) for figure in found.values())


@pytest.mark.parametrize("name", task.TASKS)
def test_outputs_that_are_not_finite_give_nan(name):
    """Bug: scikit-learn raises at the end of an epoch, and the run is lost where it should stop with its checkpoint."""
    p = class_predictions(12) if name == "classification" else entry_predictions(name, 12)
    found = task.TASKS[name]().metrics(dataclasses.replace(p, outputs=np.full_like(p.outputs, np.nan)))
    assert all(math.isnan(figure) for figure in found.values())


def test_what_is_undefined_is_nan_without_a_warning():
    """Bug: a class that the fold lacks ends the run with an error of scikit-learn, or counts as a perfect score."""
    p = class_predictions(40)
    absent = dataclasses.replace(p, known=p.label != 3)
    found = task.classification().metrics(absent)
    assert math.isnan(found["roc_auc"]) and math.isnan(found["average_precision"])
    assert 0 < found["balanced_accuracy"] < 1 and 0 < found["macro_f1"] < 1
    single = dataclasses.replace(p, known=p.label == 0)
    assert math.isnan(task.classification().metrics(single)["roc_auc"])
    q = entry_predictions("multilabel")
    labels = q.label.copy()
    labels[:, 0] = 0
    found = task.multilabel().metrics(dataclasses.replace(q, label=labels))
    both = [metrics.roc_auc_score(labels[:, c], q.outputs[:, c]) for c in (1, 2)]
    assert found["roc_auc"] == pytest.approx(np.mean(both))
    constant = dataclasses.replace(entry_predictions("regression"), label=np.ones((60, 3), np.float32))
    assert math.isnan(task.regression().metrics(constant)["r2"])
    many = Predictions(np.arange(30), np.arange(30), np.ones(30, bool), np.full((30, 40), 1 / 40, np.float32))
    assert task.classification().metrics(many)["accuracy"] == pytest.approx(1 / 30)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: task.classification(label_smoothing=2), "from 0 to below 1"),
        (lambda: task.classification(label_smoothing=math.nan), "from 0 to below 1"),
        (lambda: task.classification(focal=-1), "from 0"),
        (lambda: task.classification(label_smoothing="0.1"), "label_smoothing wants a number from 0 to below 1"),
        (lambda: task.multilabel(focal="2"), "focal wants a finite number from 0"),
        (lambda: task.classification(top_k=0), "integer of at least 1"),
        (lambda: task.multilabel(threshold="a"), "threshold is 'a'; give a number between 0 and 1"),
        (lambda: task.multilabel(threshold=[[0.5], [0.5, 0.5]]), "between 0 and 1"),
        (lambda: task.regression(range=5), "range is 5; give two finite numbers"),
        (lambda: task.regression(range="ab"), "range is 'ab'; give two finite numbers"),
        (lambda: task.multilabel(threshold=1.0), "between 0 and 1"),
        (lambda: task.multilabel(threshold=[0.5, math.nan]), "between 0 and 1"),
        (lambda: task.multilabel(threshold=[]), "between 0 and 1"),
        (lambda: task.regression(range=(3, 3)), "lower one first"),
        (lambda: task.regression(range=(0, math.inf)), "finite"),
        (lambda: task.regression(range=(0,)), "two finite"),
    ],
)
def test_options_out_of_range(make, says):
    """Bug: label smoothing of 2 is accepted, and the net learns the opposite."""
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("made", "data", "outputs", "says"),
    [
        (task.classification(), dataset(np.array([0, 6]), tuple("abcdefg"), "class"), 5, "num_classes=7"),
        (task.classification(), dataset(np.array([[0.5]]), ("age",), "values"), 1, r"task.regression\(\)"),
        (task.multilabel(), dataset(np.array([0, 1]), ("a", "b"), "class"), 2, r"task.classification\(\)"),
        (task.classification(), dataset(np.array([-1, -1]), ("a", "b"), "class"), 2, "no label"),
        (task.multilabel([0.5]), dataset(np.array([[0, 1]]), ("a", "b"), "labels"), 2, "1 thresholds for 2 labels"),
        (task.regression((0, 1)), dataset(np.array([[0.5], [3.0]]), ("age",), "values"), 1, "widen the range"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(made, data, outputs, says):
    """Bug: a net of 5 outputs meets a dataset of 7 classes in an IndexError at the first evaluation."""
    with pytest.raises(ValueError, match=says):
        task.check(made, data, outputs)


@pytest.mark.parametrize("change", [{"monitor": "acuracy"}, {"monitor": "top5_accuracy"}, {"best": "max"}])
def test_a_monitored_figure_that_does_not_exist(change):
    """Bug: a misspelt monitor is a KeyError at the end of the first epoch, after hours."""
    data = dataset(np.array([0, 1]), ("a", "b"), "class")
    with pytest.raises(ValueError, match="one of loss, accuracy, balanced_accuracy"):
        task.check(dataclasses.replace(task.classification(), **change), data, 2)


def test_a_task_that_fits_is_taken():
    """Bug: unknown labels among known ones, or one threshold for all labels, are refused."""
    task.check(task.classification(), dataset(np.array([0, -1, 1]), ("a", "b"), "class"), 2)
    task.check(task.multilabel(), dataset(np.array([[0, 1], [-1, -1]]), ("a", "b"), "labels"), 2)
    task.check(task.regression((0, 1)), dataset(np.array([[0.5], [np.nan]]), ("age",), "values"), 1)


@pytest.mark.parametrize(
    "made",
    [
        task.classification(0.1, 2.0, 3),
        task.multilabel((0.2, 0.8, 0.5), 0.1, 1.0),
        task.multilabel(0.4),
        task.regression((0, 5)),
        task.regression(),
    ],
)
def test_the_options_make_the_task_again(made):
    """Bug: a run opened from its folder has another task than the one it was trained for."""
    options = json.loads(json.dumps(made.options, allow_nan=False))
    again = task.TASKS[made.name](**options)
    assert again.options == made.options and again.name == made.name
    logits, targets = RNG.normal(size=(4, 3)).astype(np.float32), np.eye(4, 3, dtype=np.float32)
    np.testing.assert_array_equal(again.losses(logits, targets), made.losses(logits, targets))
    np.testing.assert_array_equal(again.score[1](logits, targets), made.score[1](logits, targets))


def test_a_loss_of_ones_own():
    """Bug: the targets that a replaced loss gets are smoothed already, or the task cannot be copied."""

    def squared_hinge(logits, targets):
        return jnp.square(jnp.maximum(0, 1 - logits * (2 * targets - 1))).sum(-1)

    made = dataclasses.replace(task.classification(label_smoothing=0.2), losses=squared_hinge)
    targets = made.encode(jnp.array([0, 2]), 3)
    np.testing.assert_array_equal(targets, np.eye(3)[[0, 2]])
    np.testing.assert_allclose(made.losses(jnp.zeros((2, 3)), targets), [3, 3])


def test_importing_tasks_does_not_import_scikit_learn():
    """Bug: every command waits a second for an import that only an evaluation needs."""
    command = [sys.executable, "-c", "import sys; from jaxft import task; print('sklearn' in sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
