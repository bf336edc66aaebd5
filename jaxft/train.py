"""The jitted train step, and the loop over the steps of one phase."""

import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxft import devices, masking, train_state
from jaxft.checkpoint import Checkpoints
from jaxft.diverged import Diverged, Recent
from jaxft.meter import Meter
from jaxft.phase import Phase
from jaxft.progress import bar
from jaxft.task import Task
from jaxft.train_state import TrainState

Batch = dict[str, Any]
Labels = dict[str, jax.Array]
Prepare = Callable[[jax.Array, jax.Array, Labels], tuple[jax.Array, Labels]]
"""(key, images uint8, labels) → (float32 images that the net takes, labels), on the device."""
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]

KNOWN = 1 - 1e-6  # a label that is blended of known ones is known but for rounding


class OutOfMemory(ValueError):
    """A train step needs more memory than the device has."""


# From the keyboard, from a scheduler, and from a terminal that is closed, which Windows does not have.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(Exception):
    """A signal ended the run; its state is saved.

    Attributes:
        signum: the signal, one of `STOPS`.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class Dispatch(NamedTuple):
    """What one call of the train step takes.

    Attributes:
        batch: leaves [B, …], or [steps, B, …] where they are stacked.
        steps: the number of steps in it.
        stacked: whether the train step is one of `several`.
    """

    batch: Batch
    steps: int = 1
    stacked: bool = False


@dataclasses.dataclass
class Progress:
    """What a run knows beside its state; JSON values, which every checkpoint holds.

    Attributes:
        phase: the number of the phase under way, from 0.
        frozen: the names of its frozen layers.
        history: one row for each finished epoch.
        sums: of the epoch under way, as `meter.Meter` keeps them.
    """

    phase: int = 0
    frozen: list[str] = dataclasses.field(default_factory=list)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One phase as the loop runs it.

    Attributes:
        phase, number: the phase and its number in the run.
        steps_per_epoch, batch_size: of every epoch of the run; images a step.
        monitor: the figure of the task that is judged, and `best` which of its values is.
        save_every: steps between checkpoints beside those at epochs' ends; None for none.
        mesh: the devices that share each batch.
    """

    phase: Phase
    number: int
    steps_per_epoch: int
    batch_size: int
    monitor: str
    best: Literal["lowest", "highest"]
    save_every: int | None
    mesh: Mesh

    def values(self, history: Sequence[Mapping[str, Any]]) -> list[float]:
        """The monitored value of each epoch of this phase, in order; NaN where it is undefined."""
        return [judged(row, self.monitor) for row in history if row["phase"] == self.number + 1]

    def improved(self, history: Sequence[Mapping[str, Any]], kept: int | None) -> bool:
        """Whether the last epoch is better than the one of step `kept`, the best so far; None if none is kept."""
        rows = [*(row for row in history[:-1] if row["step"] == kept), history[-1]]
        return best_place([judged(row, self.monitor) for row in rows], self.best) == len(rows) - 1

    def first_step(self, history: Sequence[Mapping[str, Any]]) -> int:
        """The run's step at which the phase begins."""
        return self.steps_per_epoch * sum(row["phase"] <= self.number for row in history)

    def over(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the phase has had all its epochs, or its patience is at an end."""
        values = self.values(history)
        if len(values) >= self.phase.epochs:
            return True
        waited = len(values) - 1 - (best_place(values, self.best) or 0)
        return self.phase.patience is not None and waited >= self.phase.patience

    def lr_scale(self, history: Sequence[Mapping[str, Any]]) -> float:
        """The factor of the rates after the last epoch, which a schedule that watches the values may lower."""
        return self.phase.lr_scale(self.values(history), self.best)


def judged(row: Mapping[str, Any], monitor: str) -> float:
    """The figure called `monitor` of an epoch: of the averaged weights where there are any; NaN if it is undefined."""
    value = row.get(f"average_{monitor}", row.get(f"val_{monitor}"))
    return math.nan if value is None else value


def best_place(values: Sequence[float], best: str) -> int | None:
    """The place of the first best value; NaN is never best, and None is returned where all are NaN."""
    sign = 1.0 if best == "lowest" else -1.0
    ranked = [(sign * value, place) for place, value in enumerate(values) if not math.isnan(value)]
    return min(ranked)[1] if ranked else None


def batch_of(images: Any, labels: Any) -> Batch:
    """A batch for a loop of one's own: images [B, …] with labels that are all known and of equal weight."""
    labels = np.asarray(labels)
    return {
        "image": images,
        "label": labels,
        "known": np.ones(labels.shape, bool),
        "weight": np.ones(len(labels), np.float32),
    }


def make_train_step(
    task: Task, num_outputs: int, prepare: Prepare, start: str | None = None, *, layer_norms: bool = False
) -> TrainStep:
    """The jitted train step; the state is donated, so use only the one returned.

    A batch holds `image` uint8 [B, H, W, 3], `label`, `known` and `weight`, as `loader.train_batches` gives them, and
    `target` where something else is learnt than the label. With `start`, `image` is the output of the stage of that
    name and only what follows is run. The figures are float32 scalars: `loss` (the task's, weighted, over known
    labels), the task's score, and `grad_norm`, the global norm over the trainable leaves. Optimizers that want them get
    `value` (the loss) and `grad`. With `layer_norms`, an array of that name goes with them: the norm of each trainable
    layer's gradient, in the order of their names.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        prepare_key, dropout_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
        labels = {
            "target": batch["target"] if "target" in batch else task.encode(batch["label"], num_outputs),
            "known": batch["known"].astype(jnp.float32),
            "weight": batch["weight"],
        }
        images, labels = prepare(prepare_key, batch["image"], labels)
        trainable, frozen = masking.split(state.params, state.labels)

        def loss_of(trainable: masking.Params) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {"params": masking.merge(trainable, frozen, state.params), "batch_stats": state.batch_stats}
            (logits, _), updated = state.apply_fn(
                variables, images, train=True, start=start, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
            )
            heads = logits.reshape(-1, *logits.shape[-2:])  # GoogLeNet has three in training; their losses are added
            losses = [mean(task.losses(head, labels["target"]), labels, labels["weight"]) for head in heads]
            return sum(losses[1:], losses[0]), (heads[-1], updated)

        (loss, (logits, updated)), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        # The optimizer wants a tree of every layer; the zeros of frozen ones are constants that XLA removes.
        full = masking.merge(grads, jax.tree.map(jnp.zeros_like, frozen), state.params)
        tx = state.tx(state.lr_scale)
        updates: Any
        updates, opt_state = tx.update(full, state.opt_state, state.params, value=loss, grad=full)
        trainable: Any = optax.apply_updates(trainable, masking.split(updates, state.labels)[0])
        score, score_of = task.score
        figures = {
            "loss": loss,
            score: mean(score_of(logits, labels["target"]), labels),
            "grad_norm": optax.tree.norm(grads),
        }
        if layer_norms:
            figures["layer_norms"] = jnp.stack([optax.tree.norm(grads[layer]) for layer in sorted(grads)])
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=masking.merge(trainable, frozen, state.params),
            batch_stats=updated.get("batch_stats", state.batch_stats),
            opt_state=opt_state,
        )
        return dataclasses.replace(state, average=train_state.averaged(state)), figures

    return jax.jit(train_step, donate_argnums=0)


def mean(values: jax.Array, labels: Labels, weight: jax.Array | None = None) -> jax.Array:
    """The mean over known labels of values [B] or [B, C]; a weight [B] multiplies an example's values, as in Keras."""
    known = labels["known"] >= KNOWN
    count = jnp.maximum(known.sum(), 1)
    if weight is not None:
        values = values * weight.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.where(known, values, 0.0).sum() / count


def several(train_step: TrainStep) -> TrainStep:
    """`train_step` over K batches in one dispatch, leaves [K, B, …] → figures [K]: for steps as short as a dispatch."""
    return jax.jit(lambda state, batches: jax.lax.scan(train_step, state, batches), donate_argnums=0)


def fit(
    state: TrainState,
    train_step: TrainStep,
    dispatches: Callable[[int, int], Iterator[Dispatch]],
    plan: Plan,
    progress: Progress,
    checkpoints: Checkpoints,
    judge: Callable[[TrainState, dict[str, Any]], None],
) -> TrainState:
    """Trains to the end of a phase, from where `state` and `progress` are.

    Args:
        state: its buffers are donated.
        train_step: from `make_train_step`, or `several` of it.
        dispatches: (first step, step after the last) → what the train step takes, a pure function of the run's seed;
            several steps at once end where an epoch does and where the state is saved.
        plan: of the phase.
        progress: gets a row for each epoch.
        checkpoints: of the state, at every epoch's end, every `save_every` steps, and on SIGINT or SIGTERM.
        judge: (state, row) adds the held-out figures to the row of the epoch, and shows it.

    Returns:
        the state after the last step of the phase.

    Raises:
        Diverged, OutOfMemory, CheckpointError: the last checkpoint is from before.
        Stopped: a signal came; the state is saved.
    """
    first, step = plan.first_step(progress.history), int(state.step)
    last = first + plan.phase.epochs * plan.steps_per_epoch
    meter, seen = Meter(progress.sums), set()
    recent = Recent(sorted(masking.split(state.params, state.labels)[0]))
    pending: tuple[Any, int, Any] | None = None  # figures that are still being computed, their first step, its images

    stream = dispatches(step, last)
    with stop_signal() as stop, bar("training", last - first, step - first, unit="steps") as advance:
        while not plan.over(progress.history):
            dispatch = next(stream)
            batch = devices.shard(dispatch.batch, plan.mesh, stacked=dispatch.stacked)
            timed = dispatch.steps in seen
            if timed:
                meter.resume()
                state, figures = train_step(state, batch)
                meter.timed(dispatch.steps)
                pending = _settle(pending, meter, recent, checkpoints)  # while the device computes this one
            else:
                pending = _settle(pending, meter, recent, checkpoints)
                meter.pause()
                state, figures = _compiled(train_step, state, batch, plan.batch_size)
                seen.add(dispatch.steps)
            pending, step = (figures, step, dispatch.batch.get("index")), step + dispatch.steps
            advance(dispatch.steps, _note(plan, step, first, meter), timed=timed)
            ends_epoch, is_best = step % plan.steps_per_epoch == 0, False
            stops = devices.any_process(bool(stop))
            if not (stops or ends_epoch or (plan.save_every and step % plan.save_every == 0)):
                continue
            pending = _settle(pending, meter, recent, checkpoints)
            if not _all_finite(state.params):  # though the loss was, before the last update
                raise _diverged(f"the weights are not finite after the update of step {step - 1}", checkpoints, recent)
            meter.pause()
            if ends_epoch:
                row = _row(plan, step, step - 1 - first, state, meter)
                meter = Meter()
                judge(state, row)
                progress.history.append(row)
                is_best, state = plan.improved(progress.history, checkpoints.best()), _rescaled(state, plan, progress)
            progress.sums = meter.sums
            checkpoints.save(state, dataclasses.asdict(progress), is_best)
            if stops:
                break
        checkpoints.wait()
        if devices.any_process(bool(stop)):  # it may have come during the last evaluation or save
            raise _stopped(stop, step)
    return state


def _settle(pending: tuple[Any, int, Any] | None, meter: Meter, recent: Recent, checkpoints: Checkpoints) -> None:
    """Waits for the figures of steps, and adds them up; raises Diverged where their loss is not finite."""
    if pending is not None:
        figures, first, index = jax.device_get(pending)
        if (bad := recent.add(first, figures["loss"], figures.pop("layer_norms", None), index)) is not None:
            raise _diverged(f"the loss of step {bad} is not finite", checkpoints, recent)
        meter.add(figures)


def _rescaled(state: TrainState, plan: Plan, progress: Progress) -> TrainState:
    scale = jnp.asarray(plan.lr_scale(progress.history), jnp.float32)
    return dataclasses.replace(state, lr_scale=devices.replicate(scale, plan.mesh))


def _stopped(stop: list[int], step: int) -> Stopped:
    name = signal.Signals(stop[0]).name if stop else "a signal to another process"
    return Stopped(f"stopped by {name}; step {step} is saved", stop[0] if stop else signal.SIGTERM)


def _compiled(train_step: TrainStep, state: TrainState, batch: Batch, batch_size: int) -> Any:
    """The first call of a program, finished: what it takes is mostly compilation."""
    try:
        state, figures = train_step(state, batch)
        jax.block_until_ready(state.step)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        smaller = f"try a batch of {max(1, batch_size // 2)}" if batch_size > 1 else "the net is too large for it"
        raise OutOfMemory(
            f"a step of {batch_size} images does not fit the memory of {jax.devices()[0].device_kind}; {smaller}, "
            "smaller images, or more frozen layers"
        ) from error
    return state, figures


def _diverged(what: str, checkpoints: Checkpoints, recent: Recent) -> Diverged:
    checkpoints.wait()
    latest = checkpoints.latest()
    kept = "no checkpoint was saved" if latest is None else f"the checkpoint of step {latest} is intact"
    return Diverged(f"{what}; {kept}. Try a lower learning rate, in another folder", recent.report())


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.asarray([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _note(plan: Plan, step: int, first: int, meter: Meter) -> str:
    epoch = 1 + (step - 1 - first) // plan.steps_per_epoch
    loss = meter.means().get("loss")
    return f"epoch {epoch}/{plan.phase.epochs}" + ("" if loss is None else f"  loss {loss:.3f}")


def _row(plan: Plan, step: int, update: int, state: TrainState, meter: Meter) -> dict[str, Any]:
    """The training half of an epoch's row; `update` is the phase's last update, whose rates are shown."""
    used = set(state.labels.values())
    found = plan.phase.rates(update, float(state.lr_scale))
    rates = {label: rate for label, rate in found.items() if label in used}
    means = meter.means()
    names = {label: "lr" if len(rates) == 1 else f"lr_{label}" for label in rates}
    return {
        "phase": plan.number + 1,
        "epoch": step // plan.steps_per_epoch,
        "step": step,
        **{names[label]: rate for label, rate in rates.items()},
        **{f"train_{name}": means[name] for name in sorted(means, key=lambda name: name != "loss")},
        "images_per_second": meter.rate(plan.batch_size),
    }


def heeded() -> list[int]:
    """`STOPS`, without SIGHUP where this process was started to ignore it, as by `nohup`."""
    always = (signal.SIGINT, signal.SIGTERM)  # a shell's background processes ignore the first, and can be sent it
    return [number for number in STOPS if number in always or signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collects the first of `STOPS` in the list it yields; a second one acts as usual.

    Outside the main thread, where Python lets nobody handle signals, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    usual = {number: signal.getsignal(number) for number in heeded()}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        restore()

    for number in usual:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
