"""Loss, the jitted train step, and the loop."""

import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxft import masking
from jaxft.checkpoint import Checkpoints
from jaxft.files import write_csv
from jaxft.predict import Batch, Predictions, shard
from jaxft.progress import bar
from jaxft.train_state import TrainState

Prepare = Callable[[jax.Array, jax.Array], jax.Array]  # (key, uint8 images) → float32 images, on the device
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]

METRICS = ("loss", "accuracy", "grad_norm")
SUMS = (*METRICS, "steps", "timed_steps", "seconds")  # over the steps of the epoch under way; saved with it


class Diverged(FloatingPointError):
    """The training loss is no longer finite."""


class Stopped(Exception):
    """A signal ended the run; its state is saved.

    Attributes:
        signum: the signal, SIGINT or SIGTERM.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Mean softmax cross-entropy in nats; logits float32 [B, C], labels int32 [B].

    Of logits [heads, B, C], as GoogLeNet gives in training, the losses of the heads are added. With smoothing s the
    target is 1 - s + s/C on the label and s/C elsewhere, as in Keras.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean(-1).sum()


def make_train_step(prepare: Prepare, label_smoothing: float = 0.0, start: str | None = None) -> TrainStep:
    """The jitted train step; the state is donated, so use only the one returned.

    A batch holds `image` uint8 [B, H, W, 3] and `label` int32 [B]; with `start`, `image` is the output of the stage of
    that name and only what follows is run. The metrics are float32 scalars: `loss` (smoothing
    included), `accuracy` and `grad_norm`, the global norm over the trainable leaves.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
        images = prepare(augment_key, batch["image"])
        trainable, frozen = masking.split(state.params, state.labels)

        def loss_of(trainable: masking.Params) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {"params": masking.merge(trainable, frozen, state.params), "batch_stats": state.batch_stats}
            (logits, _), updated = state.apply_fn(
                variables, images, train=True, start=start, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
            )
            return cross_entropy(logits, batch["label"], label_smoothing), (logits, updated)

        (loss, (logits, updated)), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        # The optimizer wants a tree of every layer; the zeros of frozen ones are constants that XLA removes.
        full = masking.merge(grads, jax.tree.map(jnp.zeros_like, frozen), state.params)
        updates, opt_state = state.tx.update(full, state.opt_state, state.params)
        trainable = optax.apply_updates(trainable, masking.split(updates, state.labels)[0])
        last = logits.reshape(-1, *logits.shape[-2:])[-1]  # of the heads, where there are several
        metrics = {
            "loss": loss,
            "accuracy": (last.argmax(-1) == batch["label"]).mean(dtype=jnp.float32),
            "grad_norm": optax.tree.norm(grads),
        }
        state = state.replace(
            step=state.step + 1,
            params=masking.merge(trainable, frozen, state.params),
            batch_stats=updated.get("batch_stats", state.batch_stats),
            opt_state=opt_state,
        )
        return state, metrics

    return jax.jit(train_step, donate_argnums=0)


def several(train_step: TrainStep) -> TrainStep:
    """`train_step` over K batches in one dispatch, leaves [K, B, …] → metrics [K]: for steps as short as a dispatch."""
    return jax.jit(lambda state, batches: jax.lax.scan(train_step, state, batches), donate_argnums=0)


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Callable[[int], Iterator[Batch]],
    evaluate: Callable[[TrainState], Predictions],
    *,
    epochs: int,
    steps_per_epoch: int,
    schedule: optax.Schedule,
    checkpoints: Checkpoints,
    history_file: pathlib.Path,
    mesh: Mesh,
    save_every: int | None = None,
    report: Callable[[dict[str, float]], None] = lambda row: None,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Trains to the end of the last epoch, from the latest checkpoint if there is one.

    Args:
        state: the state before the first update; its buffers are donated.
        train_step: from `make_train_step`, or `several` of it.
        batches: first step → the batches from that step on, a pure function of the run's seed. Several at once, for
            `several`, end where an epoch does and where the state is saved.
        evaluate: state → predictions on the held-out images; called at the end of every epoch.
        epochs, steps_per_epoch: the length of the run.
        schedule: update count → learning rate, for the history.
        checkpoints: where the state is saved: at every epoch's end, every `save_every` steps, and on SIGINT or SIGTERM.
        history_file: a csv, one row an epoch, written whole each time.
        mesh: the devices that share each batch.
        report: called with the row of every epoch as it ends.

    Returns:
        (the last state, the history's rows).

    Raises:
        Stopped: SIGINT or SIGTERM came; the state of the last whole step is saved.
        Diverged: the loss is not finite; the last checkpoint is intact.
        CheckpointError: the checkpoint does not fit this run, or could not be written.
    """
    history: list[dict[str, float]] = []
    sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
    if checkpoints.latest() is not None:
        state, progress = checkpoints.restore(state)
        history, sums = progress["history"], progress["sums"]
    step = int(state.step)
    pending: dict[str, jax.Array] | None = None
    seen: set[int] = set()  # numbers of steps in one dispatch; the first of each compiles, and is not timed
    started, untimed = 0.0, 0.0

    def settle() -> None:
        """Adds the metrics of the step before to the epoch's sums; waits for it alone, not for the one under way."""
        nonlocal pending
        if pending is None:
            return
        metrics, pending = jax.device_get(pending), None
        losses = np.ravel(metrics["loss"])
        if not np.isfinite(losses).all():
            latest = checkpoints.latest()
            kept = "no checkpoint was saved" if latest is None else f"the checkpoint of step {latest} is intact"
            bad = losses[~np.isfinite(losses)][0]
            raise Diverged(f"the loss became {bad} by step {step}; {kept}. Try a lower learning rate")
        for name in METRICS:
            for value in np.ravel(metrics[name]).tolist():  # one by one: several at once add up to the same bits
                sums[name] += value
        sums["steps"] += len(losses)

    stream = batches(step)
    with stop_signal() as stop, bar("training", epochs * steps_per_epoch, step, unit="steps") as advance:
        while step < epochs * steps_per_epoch:
            batch = shard(next(stream), mesh)
            steps = batch["label"].size // batch["label"].shape[-1]
            compiles = steps not in seen
            if compiles:
                settle()
                dispatched = time.perf_counter()
                started = started or dispatched  # the first batch may have had to be decoded
            state, metrics = train_step(state, batch)
            settle()
            pending = metrics
            step += steps
            if compiles:
                jax.block_until_ready(state.step)
                untimed += time.perf_counter() - dispatched
                seen.add(steps)
            else:
                sums["timed_steps"] += steps
            loss = f"  loss {sums['loss'] / sums['steps']:.3f}" if sums["steps"] else ""
            advance(steps, f"epoch {1 + (step - 1) // steps_per_epoch}/{epochs}{loss}")
            ends_epoch = step % steps_per_epoch == 0
            saves = stop or ends_epoch or (save_every is not None and step % save_every == 0)
            if not saves:
                continue
            settle()
            sums["seconds"] += time.perf_counter() - started - untimed
            metric = None
            if ends_epoch:
                predictions = evaluate(state)
                metric = predictions.log_loss()
                history.append(_row(step, steps_per_epoch, sums, float(schedule(step - 1)), predictions, batch))
                sums = dict.fromkeys(SUMS, 0.0)
                write_csv(history_file, history)
                report(history[-1])
            checkpoints.save(state, {"history": history, "sums": sums}, metric)
            if stop and step < epochs * steps_per_epoch:
                checkpoints.wait()
                raise Stopped(f"stopped by {signal.Signals(stop[0]).name}; step {step} is saved", stop[0])
            started, untimed = time.perf_counter(), 0.0
    checkpoints.wait()
    return state, history


def _row(
    step: int, steps_per_epoch: int, sums: dict[str, float], lr: float, predictions: Predictions, batch: Batch
) -> dict[str, float]:
    means = {f"train_{name}": sums[name] / sums["steps"] for name in METRICS}
    # What compiles is not timed; an epoch of that alone has rate 0.
    rate = sums["timed_steps"] * batch["label"].shape[-1] / sums["seconds"] if sums["timed_steps"] else 0.0
    return {
        "epoch": step // steps_per_epoch,
        "step": step,
        "lr": lr,
        **means,
        "val_loss": predictions.log_loss(),
        "val_accuracy": predictions.accuracy(),
        "images_per_second": round(rate, 2),
    }


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM in the list it yields; a second one acts as usual."""
    received: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
