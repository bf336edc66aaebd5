"""Tasks: what a net is trained for. A task says what a label is, what is minimised, predicted and measured.

Your own loss is a field of a task:

    def squared_hinge(logits, targets):  # logits and targets [B, C] → [B], one loss for each image
        return jnp.square(jnp.maximum(0, 1 - logits * (2 * targets - 1))).sum(-1)

    hinge = dataclasses.replace(task.classification(), losses=squared_hinge)

The same holds for `outputs`, `score`, `metrics`, `monitor` and `best`. `options` describe the task as it was made:
whoever opens such a run later replaces the functions again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.checks import check_count, check_real, is_real
from jaxft.predict import Predictions

if TYPE_CHECKING:
    from jaxft.data import Dataset

Loss = Callable[[jax.Array, jax.Array], jax.Array]

LOG_LOSS_CLIP = 1e-15  # as Kaggle's multi-class log loss
ECE_BINS = 15


@dataclass(frozen=True)
class Task:
    """What a net is trained for; B images, C outputs.

    Attributes:
        name: "classification", "multilabel" or "regression", a key of `TASKS`.
        target: the kind of labels, as `Dataset.target`.
        options: JSON values; `TASKS[name](**options)` makes the task again.
        encode: (labels of a batch, C) → targets float32 [B, C]. Runs on the device.
        losses: (logits, targets), each float32 [B, C] → float32 of the shape of the labels: [B] for classes, [B, C] for
            labels and values. Targets may be soft, as mixing makes them. The caller leaves unknown labels out.
        outputs: logits [B, C] → what is predicted, float32 [B, C]: probabilities, or values.
        score: the name of what training shows beside the loss, and a function like `losses` that computes it.
        metrics: predictions → every figure by name, "loss" first. Unknown labels are left out of each. A figure that is
            not defined on these labels is NaN.
        monitor: the figure of `metrics` by which the best epoch is chosen.
        best: whether its best value is the lowest or the highest.
    """

    name: str
    target: Literal["class", "labels", "values"]
    options: Mapping[str, Any]
    encode: Callable[[jax.Array, int], jax.Array]
    losses: Loss
    outputs: Callable[[jax.Array], jax.Array]
    score: tuple[str, Loss]
    metrics: Callable[[Predictions], dict[str, float]]
    monitor: str = "loss"
    best: Literal["lowest", "highest"] = "lowest"


def classification(label_smoothing: float = 0.0, focal: float = 0.0, top_k: int = 5) -> Task:
    """One class for each image: softmax cross-entropy in nats.

    Args:
        label_smoothing: s in [0, 1): the target is 1 - s + s/C for the class and s/C for every other one, as in Keras.
        focal: gamma of the focal loss, which weighs easy images down; 0 is cross-entropy.
        top_k: the k of top-k accuracy; at most C - 1 is measured, and nothing for two classes.

    The loss among the metrics is the plain log loss, as Kaggle computes it.

    Raises:
        ValueError: an option out of its range.

    Source: Lin et al. 2017, equation 4 (focal loss); Keras's `CategoricalFocalCrossentropy` with alpha 1.
    """
    label_smoothing, focal = _loss_options(label_smoothing, focal)
    check_count("top_k", top_k, 1)
    top_k = int(top_k)

    def losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(targets, label_smoothing)
        if not focal:
            return optax.softmax_cross_entropy(logits, targets)
        log_p = jax.nn.log_softmax(logits)
        return -(targets * _focal_weight(jnp.exp(log_p), focal) * log_p).sum(-1)

    def correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return (logits.argmax(-1) == targets.argmax(-1)).astype(jnp.float32)

    return Task(
        name="classification",
        target="class",
        options={"label_smoothing": label_smoothing, "focal": focal, "top_k": top_k},
        encode=lambda labels, num_outputs: jax.nn.one_hot(labels, num_outputs, dtype=jnp.float32),
        losses=losses,
        outputs=jax.nn.softmax,
        score=("accuracy", correct),
        metrics=lambda predictions: _class_metrics(predictions, top_k),
    )


def multilabel(threshold: float | Sequence[float] = 0.5, label_smoothing: float = 0.0, focal: float = 0.0) -> Task:
    """Any number of C labels for each image, each true or false: sigmoid cross-entropy in nats.

    Args:
        threshold: in (0, 1); what is more probable is predicted. One for all labels, or one for each.
        label_smoothing: s in [0, 1): the target t becomes t (1 - s) + s/2, as in Keras.
        focal: gamma of the focal loss, which weighs easy labels down; 0 is cross-entropy.

    Raises:
        ValueError: an option out of its range.

    Source: Lin et al. 2017, equation 4 (focal loss); Keras's `BinaryFocalCrossentropy` without class balancing.
    """
    label_smoothing, focal = _loss_options(label_smoothing, focal)
    try:
        thresholds = np.asarray(threshold, np.float64)
    except (TypeError, ValueError):  # a text, say, or lists of different lengths
        thresholds = np.empty(0)
    if thresholds.ndim > 1 or not thresholds.size or not ((thresholds > 0) & (thresholds < 1)).all():
        raise ValueError(f"threshold is {threshold!r}; give a number between 0 and 1, or a list of one for each label")

    def losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
        plain = optax.sigmoid_binary_cross_entropy(logits, targets)
        if not focal:
            return plain
        p = jax.nn.sigmoid(logits)
        return _focal_weight(targets * p + (1 - targets) * (1 - p), focal) * plain

    def correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
        predicted = jax.nn.sigmoid(logits) > thresholds.astype(np.float32)
        return (predicted == (targets > 0.5)).astype(jnp.float32)

    return Task(
        name="multilabel",
        target="labels",
        options={"threshold": thresholds.tolist(), "label_smoothing": label_smoothing, "focal": focal},
        encode=lambda labels, num_outputs: jnp.asarray(labels, jnp.float32),
        losses=losses,
        outputs=jax.nn.sigmoid,
        score=("accuracy", correct),
        metrics=lambda predictions: _label_metrics(predictions, thresholds.astype(np.float32)),
    )


def regression(range: Sequence[float] | None = None) -> Task:
    """One or several values for each image: squared error.

    Args:
        range: (lo, hi), which every value lies in: the output is lo + (hi - lo) sigmoid(logit). None: the logit itself.

    Raises:
        ValueError: the range is empty or not finite.
    """
    if range is not None:
        bounds = list(range) if isinstance(range, list | tuple | np.ndarray) else []
        if len(bounds) != 2 or not all(map(is_real, bounds)) or not bounds[0] < bounds[1]:
            raise ValueError(f"range is {range!r}; give two finite numbers, the lower one first, or None")
        low, high = bounds = [float(bound) for bound in bounds]
    else:
        low, high, bounds = 0.0, 1.0, None

    def outputs(logits: jax.Array) -> jax.Array:
        return logits if bounds is None else low + (high - low) * jax.nn.sigmoid(logits)

    return Task(
        name="regression",
        target="values",
        options={"range": bounds},
        encode=lambda labels, num_outputs: jnp.asarray(labels, jnp.float32),
        losses=lambda logits, targets: jnp.square(outputs(logits) - targets),
        outputs=outputs,
        score=("mae", lambda logits, targets: jnp.abs(outputs(logits) - targets)),
        metrics=_value_metrics,
    )


TASKS: dict[str, Callable[..., Task]] = {
    "classification": classification,
    "multilabel": multilabel,
    "regression": regression,
}


def check(task: Task, dataset: "Dataset", num_outputs: int) -> None:
    """Refuses a task, a dataset and a number of outputs that do not fit each other.

    Raises:
        ValueError: the kinds of labels differ, the net has another number of outputs than there are classes, no label
            is known, the monitored figure does not exist, there are not as many thresholds as labels, or a value lies
            out of the task's range.
    """
    if dataset.target != task.target:
        fitting = next((name for name, make in TASKS.items() if make().target == dataset.target), "another task")
        raise ValueError(
            f"{task.name} takes labels of the kind {task.target!r}, but those of dataset {dataset.name!r} are "
            f"{dataset.target!r}; use task.{fitting}(), or a dataset with target={task.target!r}"
        )
    if num_outputs != len(dataset.classes):
        raise ValueError(
            f"the net has {num_outputs} outputs, dataset {dataset.name!r} has {len(dataset.classes)} classes; "
            f"make the net with num_classes={len(dataset.classes)}"
        )
    if not dataset.known.any():
        raise ValueError(f"no label of dataset {dataset.name!r} is known; a net needs some labels to learn from")
    unknown = np.zeros((1,) if task.target == "class" else (1, num_outputs), bool)
    none = Predictions(np.zeros(1, int), unknown.astype(int), unknown, np.zeros((1, num_outputs), np.float32))
    if task.monitor not in (figures := task.metrics(none)) or task.best not in ("lowest", "highest"):
        raise ValueError(
            f"monitor={task.monitor!r}, best={task.best!r}: monitor must be one of {', '.join(figures)}, "
            "and best 'lowest' or 'highest'"
        )
    threshold = task.options.get("threshold")
    if isinstance(threshold, Sequence) and len(threshold) != num_outputs:
        raise ValueError(
            f"{len(threshold)} thresholds for {num_outputs} labels; give one for each label, or one number"
        )
    if task.options.get("range") is not None:
        low, high = task.options["range"]
        values = np.asarray(dataset.labels)[dataset.known]
        if values.min() < low or values.max() > high:
            raise ValueError(
                f"the values of dataset {dataset.name!r} go from {values.min():g} to {values.max():g}, outside "
                f"the range {low:g} to {high:g}; widen the range, or leave it out"
            )


def class_losses(predictions: Predictions) -> np.ndarray:
    """float64 [n]: -log of the label's probability, clipped to [1e-15, 1 - 1e-15] as Kaggle does; NaN if unknown."""
    losses = np.full(len(predictions), np.nan)
    rows = np.flatnonzero(predictions.known)
    own = predictions.outputs[rows, predictions.label[rows]].astype(np.float64)
    losses[rows] = -np.log(own.clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP))
    return losses


def label_losses(predictions: Predictions) -> np.ndarray:
    """float64 [n, C]: -log of the probability of what the label is, clipped as in `class_losses`; NaN if unknown."""
    p = predictions.outputs.astype(np.float64)
    own = np.where(predictions.label > 0.5, p, 1 - p)
    return np.where(predictions.known, -np.log(own.clip(LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP)), np.nan)


def _loss_options(label_smoothing: float, focal: float) -> tuple[float, float]:
    """Both as plain floats."""
    check_real("label_smoothing", label_smoothing, lambda share: 0 <= share < 1, "a number from 0 to below 1, 0.1 say")
    check_real("focal", focal, lambda gamma: gamma >= 0, "a finite number from 0 (cross-entropy), 2 say")
    return float(label_smoothing), float(focal)


def _focal_weight(p: jax.Array, gamma: float) -> jax.Array:
    # The gradient of x ** gamma is infinite at 0 for gamma below 1, hence the clip; Keras clips at the same place.
    return (1 - jnp.clip(p, 0, 1 - 1e-7)) ** gamma


def _class_metrics(predictions: Predictions, top_k: int) -> dict[str, float]:
    from sklearn import metrics  # takes a second to import

    rows = predictions.known
    y, p = predictions.label[rows], predictions.outputs[rows]
    classes = np.arange(p.shape[1])
    k = min(top_k, len(classes) - 1)
    names = ["loss", "accuracy", *([f"top{k}_accuracy"] if k > 1 else []), "balanced_accuracy", "macro_f1", "roc_auc"]
    figures: dict[str, Any] = dict.fromkeys([*names, "average_precision", "ece"], math.nan)
    if not len(y) or not np.isfinite(p).all():
        return figures
    guess = p.argmax(1)
    figures["loss"] = class_losses(predictions)[rows].mean()
    figures["accuracy"] = metrics.accuracy_score(y, guess)
    if k > 1:
        figures[f"top{k}_accuracy"] = metrics.top_k_accuracy_score(y, p, k=k, labels=classes)
    # The mean recall of the classes that occur; scikit-learn's balanced accuracy is the same, and warns of the others.
    figures["balanced_accuracy"] = metrics.recall_score(y, guess, labels=np.unique(y), average="macro")
    figures["macro_f1"] = metrics.f1_score(y, guess, average="macro")
    if len(classes) > 1 and np.isin(classes, y).all():
        # One class against the rest; of two classes, the second.
        truth, scores = (y, p[:, 1]) if len(classes) == 2 else ((y[:, None] == classes).astype(np.int8), p)
        figures["roc_auc"] = metrics.roc_auc_score(truth, scores)
        figures["average_precision"] = metrics.average_precision_score(truth, scores)
    figures["ece"] = calibration_error(p.max(1), guess == y)
    return {name: float(figure) for name, figure in figures.items()}


def _label_metrics(predictions: Predictions, thresholds: np.ndarray) -> dict[str, float]:
    known, p = predictions.known, predictions.outputs
    names = ("loss", "accuracy", "exact_match", "macro_f1", "roc_auc", "average_precision", "ece")
    if not known.any() or not np.isfinite(p[known]).all():
        return dict.fromkeys(names, math.nan)
    truth, guess = predictions.label > 0.5, p > thresholds
    whole = known.all(1)
    by_label = label_figures(predictions, thresholds)
    figures = (
        label_losses(predictions)[known].mean(),
        (truth == guess)[known].mean(),
        (truth == guess)[whole].all(1).mean() if whole.any() else math.nan,  # only rows with every label known
        *(_mean_of_defined(by_label[name]) for name in ("f1", "roc_auc", "average_precision")),
        calibration_error(p[known], truth[known]),
    )
    return {name: float(figure) for name, figure in zip(names, figures, strict=True)}


def label_figures(predictions: Predictions, thresholds: float | np.ndarray = 0.5) -> dict[str, list[float]]:
    """Figures of each label by itself: `f1`, `roc_auc`, `average_precision`, and `positives`, a count.

    NaN where undefined: F1 of a label that is neither there nor predicted, the other two where all labels are equal.
    """
    from sklearn import metrics  # takes a second to import

    figures: dict[str, list[float]] = {"f1": [], "roc_auc": [], "average_precision": [], "positives": []}
    guesses = predictions.outputs > thresholds
    for c in range(predictions.outputs.shape[1]):
        rows = predictions.known[:, c]
        y, p, guess = predictions.label[rows, c] > 0.5, predictions.outputs[rows, c], guesses[rows, c]
        figures["f1"].append(metrics.f1_score(y, guess) if (y | guess).any() else math.nan)
        both = y.any() and not y.all()
        figures["roc_auc"].append(metrics.roc_auc_score(y, p) if both else math.nan)
        figures["average_precision"].append(metrics.average_precision_score(y, p) if both else math.nan)
        figures["positives"].append(int(y.sum()))
    return figures


def _value_metrics(predictions: Predictions) -> dict[str, float]:
    from sklearn import metrics  # takes a second to import

    known, values = predictions.known, predictions.outputs.astype(np.float64)
    names = ("loss", "mae", "rmse", "r2")

    def of(columns: Sequence[int]) -> dict[str, float]:
        """The figures of the entries of these columns; R² is the mean of those of each column."""
        entries = [(predictions.label[known[:, c], c].astype(np.float64), values[known[:, c], c]) for c in columns]
        truth, found = (np.concatenate(side) for side in zip(*entries, strict=True))
        if not len(truth) or not np.isfinite(found).all():
            return dict.fromkeys(names, math.nan)
        r2 = [metrics.r2_score(y, v) if len(y) > 1 and np.ptp(y) > 0 else math.nan for y, v in entries]
        return {
            "loss": float(metrics.mean_squared_error(truth, found)),
            "mae": float(metrics.mean_absolute_error(truth, found)),
            "rmse": float(metrics.root_mean_squared_error(truth, found)),
            "r2": _mean_of_defined(r2),
        }

    count = values.shape[1]
    figures = of(np.arange(count).tolist())
    if count > 1:
        for c in np.arange(count).tolist():
            figures |= {f"{name}_{c}": figure for name, figure in of([c]).items() if name != "loss"}
    return figures


def _mean_of_defined(figures: Sequence[float]) -> float:
    defined = [figure for figure in figures if not math.isnan(figure)]
    return float(np.mean(defined)) if defined else math.nan


def calibration_error(probability: np.ndarray, happened: np.ndarray) -> float:
    """Expected calibration error: mean distance of probability and frequency in 15 equal bins, weighted by counts.

    `probability` and `happened` (boolean) have shape [n]; NaN where n is 0.

    Source: Guo et al. 2017, equation 3.
    """
    if not len(probability):
        return math.nan
    probability = probability.astype(np.float64)
    bins = np.minimum((probability * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, probability - happened, ECE_BINS)  # count times (mean probability - frequency)
    return float(np.abs(gaps).sum() / len(probability))
