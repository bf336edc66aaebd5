"""The range test: which learning rates a net trains at, found by raising the rate until the loss grows."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft import devices, feed, masking, optim, report, train, train_state
from jaxft.checks import check_count, check_real
from jaxft.data import Inputs, loader
from jaxft.model import Model
from jaxft.phase import Phase
from jaxft.task import Task, check
from jaxft.train_state import TrainState, copied

SMOOTHING = 0.9  # share of the mean before in the running mean of the losses
DIVERGED = 4.0  # times the best running mean, at which the test ends


@dataclasses.dataclass(frozen=True, eq=False)
class LrCurve:
    """What a range test found; `report.lr_curve` draws it.

    Attributes:
        rates: float64 [n], rising, each the rate of one update.
        losses: float64 [n], finite: the loss of the batch before that update.
        suggestion: the rate about which the loss falls most steeply, as `suggest` finds it; None if it does not fall.
    """

    rates: np.ndarray
    losses: np.ndarray
    suggestion: float | None


def find(
    model: Model,
    task: Task,
    inputs: Inputs,
    phase: Phase,
    *,
    seed: int = 0,
    picture: str | pathlib.Path | None = None,
    **limits: Any,
) -> LrCurve:
    """The range test of a phase as `finetune` would train it; the model stays as it is.

    Args:
        model, task, inputs: as of `finetune.finetune`.
        phase: of its schedules, only the ratios of the groups' highest rates count.
        seed: of the order of images, augmentation and dropout.
        picture: a file for the curve, PNG.
        limits: `lowest`, `highest` and `steps` of `range_test`.

    Raises:
        ValueError: as `range_test`, `train_state.create` and `task.check`.
    """
    check(task, inputs.dataset, model.net.num_classes)
    check_count("seed of a range test", seed, 0)
    if picture is not None and not pathlib.Path(picture).expanduser().absolute().parent.is_dir():
        raise ValueError(f"the folder of picture={str(picture)!r} does not exist; make it first")
    updates = np.linspace(0, phase.epochs * inputs.steps_per_epoch - 1, 50).astype(int).tolist()
    peaks = {label: max(phase.rates(update)[label] for update in updates) for label in phase.rates(0)}
    ones = {label: optim.Scaled(optim.Constant(1.0), peak / max(peaks.values())) for label, peak in peaks.items()}
    phase = dataclasses.replace(phase, schedule=ones if len(ones) > 1 else optim.Constant(1.0))
    net = model.net.clone(frozen=masking.frozen_layers(model.net, phase.frozen, model.variables["params"]))
    mesh = devices.mesh()
    state = devices.replicate(train_state.create(net, model.variables, phase, seed=seed), mesh)
    step = train.make_train_step(task, len(inputs.dataset.classes), feed.prepare(inputs, model.preprocessing))
    stream = loader.train_batches(inputs, inputs.dataset.images, seed=seed, process=devices.process())
    with closing(stream):
        curve = range_test(state, step, (devices.shard(batch, mesh) for batch in stream), **limits)
    if picture is not None and devices.is_writer():
        report.lr_curve(
            pathlib.Path(picture).expanduser(), curve.rates.tolist(), curve.losses.tolist(), curve.suggestion
        )
    return curve


def range_test(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    batches: Iterable[Any],
    *,
    lowest: float = 1e-7,
    highest: float = 1.0,
    steps: int = 100,
) -> LrCurve:
    """Trains a copy of `state` for `steps` updates at rates from `lowest` to `highest`, in equal ratios.

    The test ends early when the loss is not finite, or its running mean exceeds 4 times the best one. The given state
    stays as it is, and usable.

    >>> phase = Phase(1, optim.Constant(1.0), optim.NesterovSGD())  # the optimizer to find a rate for, at a rate of 1
    >>> curve = range_test(train_state.create(net, variables, phase), train_step, batches)

    Args:
        state: of a phase whose schedule is `optim.Constant(1.0)`, as the test sets the rate through `lr_scale`. With
            groups, schedules that multiply it keep their ratios, and the rates are those of the fastest group.
        train_step: (state, batch) → (state, figures), of which "loss" is read, as `train.make_train_step` gives it.
        batches: `steps` or more, placed on the devices.

    Raises:
        ValueError: the range or the phase is not as above, or there are too few batches.

    Source: Smith 2015, "Cyclical Learning Rates for Training Neural Networks"; the steepest descent for a suggestion is
    fastai's.
    """
    check_count("steps of a range test", steps, 10)
    check_real("lowest", lowest, lambda rate: rate > 0, "a finite rate above 0")
    check_real("highest", highest, lambda rate: rate > lowest, f"a finite rate above lowest={lowest}")
    phase = state.tx.phase
    if max(phase.rates(0).values()) != 1.0 or phase.rates(0) != phase.rates(steps):
        raise ValueError(f"a range test sets the rate itself: make its phase with optim.Constant(1.0), not {phase!r}")
    state = copied(state)
    source = iter(batches)
    rates = np.geomspace(lowest, highest, steps)
    losses: list[float] = []
    mean, best = 0.0, math.inf
    for done, rate in enumerate(rates):
        batch = next(source, None)
        if batch is None:
            raise ValueError(
                f"a range test of {steps} steps wants as many batches, not {done}; give it more, or fewer steps"
            )
        state = dataclasses.replace(state, lr_scale=jnp.full_like(state.lr_scale, rate))
        state, figures = train_step(state, batch)
        loss = float(figures["loss"])
        if not math.isfinite(loss):
            break
        losses.append(loss)
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth = mean / (1 - SMOOTHING ** len(losses))
        best = min(best, smooth)
        if smooth > DIVERGED * best:
            break
    found = np.asarray(losses)
    return LrCurve(rates[: len(found)], found, suggest(rates[: len(found)], found))


def suggest(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """The rate about which the loss falls most steeply by the logarithm of the rate.

    A line is laid through each fifth of the curve, at least three losses in a row, as single losses are noisy; the
    suggestion is the middle of the steepest one. None where the loss falls nowhere, or there are less than three rates.
    """
    width = max(3, len(losses) // 5)
    places = range(len(losses) - width + 1)
    slopes = [np.polyfit(np.log(rates[i : i + width]), losses[i : i + width], 1)[0] for i in places]
    if not slopes or min(slopes) >= 0:
        return None
    steepest = int(np.argmin(slopes))
    return float(np.exp(np.log(rates[steepest : steepest + width]).mean()))
