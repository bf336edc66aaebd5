"""What the steps of a phase are fed: images or features from where they lie, and the programs that take them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft import devices, features, preprocess, runs, train
from jaxft.data import Images, Inputs, augment, loader
from jaxft.data.rows import Rows
from jaxft.predict import Batch, Predictions, Variables, evaluate
from jaxft.provenance import describe
from jaxft.task import Task
from jaxft.train import Dispatch
from jaxft.train_state import TrainState

AT_ONCE = 16  # steps in one dispatch, where features are vectors: a small dense layer takes less time than a dispatch


@dataclasses.dataclass(frozen=True)
class Side:
    """One of a run's two sets of images, and where they come from.

    Attributes:
        inputs: of the set.
        images: what batches are made of; None where `rows` has them on the device, or nobody needs them.
        rows: the decoded images, on the device.
    """

    inputs: Inputs
    images: Images | None
    rows: Rows | None = None

    def fill(self, batch: Batch) -> Batch:
        """The batch with images that lie on the device."""
        return batch | {"image": self.rows.take(batch["index"])} if self.rows else batch

    def batches(self, indices: np.ndarray) -> Iterator[Batch]:
        """Evaluation batches of the images `indices`, int [n]."""
        inputs = dataclasses.replace(self.inputs, indices=indices)
        return map(self.fill, loader.eval_batches(inputs, self.images, process=devices.process()))


class Feed(NamedTuple):
    """A phase's train step, and what it and the evaluation take.

    Attributes:
        train_step: takes a batch, or several, leaves [K, B, …], as `train.several` does.
        dispatches: (first step, step after the last) → what `train_step` takes; several batches never cross a save.
        evaluate: {"params", "batch_stats"} → predictions on the held-out images.
        cache: name → features; None where each step computes them.
    """

    train_step: train.TrainStep
    dispatches: Callable[[int, int], Iterator[Dispatch]]
    evaluate: Callable[[Variables], Predictions]
    cache: Mapping[str, Rows] | None


def decode(train: Inputs, held_out: Inputs) -> tuple[Side, Side]:
    """Decodes what is to be decoded once; both sides share a file where they are of one dataset, size and decoding.

    Several processes decode their own rows of each batch; one decodes all once, and holds them where they fit.

    Raises:
        ValueError: an image cannot be decoded, by name.
    """
    if jax.process_count() > 1:
        return Side(train, train.dataset.images), Side(held_out, held_out.dataset.images)
    if _alike(train, held_out):
        shared = loader.decode_once([train, held_out])
        return _side(train, shared), _side(held_out, shared)
    return _side(train, loader.decode_once([train])), _side(held_out, loader.decode_once([held_out]))


def _alike(train: Inputs, held_out: Inputs) -> bool:
    """Whether both take images of one dataset in the same way."""
    same = ("image_size", "decode", "batch_size")
    return train.dataset is held_out.dataset and all(getattr(train, x) == getattr(held_out, x) for x in same)


def _side(inputs: Inputs, rows: Rows | None) -> Side:
    if rows is None:
        return Side(inputs, inputs.dataset.images)
    if rows.on_device():
        return Side(inputs, None, rows)
    return Side(inputs, loader.Decoded(rows, len(inputs.dataset)))


def make(
    net: Any,
    preprocessing: str,
    task: Task,
    state: TrainState,
    sides: tuple[Side, Side],
    run: runs.Run,
    epochs: range,
    mesh: Mesh,
) -> Feed:
    """Makes the programs of a phase, and computes once what is to be computed once.

    Args:
        net: of the phase, its frozen layers named.
        preprocessing, task: of the model and the run.
        state: at the start of the phase, on the devices.
        sides: training and held out, from `decode`.
        run: for its seed, its saves and its cache policy.
        epochs: numbers of the run's epochs that the phase takes, from 0.
        mesh: the devices that share each batch.

    Raises:
        ValueError: an image cannot be decoded, or features are to be cached that do not repeat.
        OSError: features are to be cached, and do not fit on the disk.
    """
    train_side, held_out = sides
    inputs, weighted, outputs = train_side.inputs, list(state.params), len(train_side.inputs.dataset.classes)
    repeats = inputs.mix is None and (inputs.augment is None or inputs.views is not None)
    stage = features.cut(net, weighted) if repeats else None
    if run.cache_features == "on" and jax.process_count() > 1:
        raise ValueError("cache_features=on works in one process alone; leave it at auto where there are several")
    if stage is None and run.cache_features == "on":
        raise ValueError(
            "cache_features=on needs a first stage that is wholly frozen, without dropout or auxiliary heads, and "
            "inputs that repeat: no mixing, and a fixed number of views or no augmentation"
        )
    eval_step, views, cache, at_once = features.eval_step(net, weighted, preprocessing, task), None, None, 1
    if stage is None and inputs.views is None:
        step = train.make_train_step(task, outputs, prepare(inputs, preprocessing), layer_norms=True)
    else:
        # A step is two programs: up to `stage`, and what follows. With views on a net without frozen stages, the first
        # one augments alone.
        views = inputs.views
        prefix = features.make_prefix(
            net, stage, preprocess.get(preprocessing), inputs.augment, run.seed, plain_view=inputs.plain_view
        )
        rest = train.make_train_step(task, outputs, lambda key, x, labels: (x, labels), stage, layer_norms=True)
        if stage and run.cache_features != "off" and jax.process_count() == 1:
            cache = _open_cache(net, preprocessing, stage, prefix, state, sides, run, epochs)
        if cache and stage:
            eval_step = features.eval_step_after(net, stage, task)
            train_side, held_out = Side(inputs, None), Side(held_out.inputs, None)  # memory is for the features
            sides = train_side, held_out
            at_once = steps_at_once(cache["held out"].shape)
            step = train.several(rest) if at_once > 1 else rest
        else:

            def step(state: TrainState, batch: Batch, /) -> Any:
                rows = batch.get("row")
                return rest(state, batch | {"image": prefix(state.variables(), batch["image"], rows)})

    def with_images(batch: Batch, view: int | None) -> Batch:
        if cache:
            return batch | {"image": cache[_name(view)].take(batch["index"])}
        batch = train_side.fill(batch)
        return batch if view is None else batch | {"row": _row(inputs, view, batch["index"])}

    def dispatches(first: int, last: int) -> Iterator[Dispatch]:
        for step, batch, count in _stream(train_side, run, at_once, first, last):
            view = step // inputs.steps_per_epoch % views if views else None
            yield Dispatch(with_images(batch, view), count, at_once > 1)

    def evaluated(variables: Variables) -> Predictions:
        batches = held_out.batches(held_out.inputs.indices)
        if cache:
            batches = (batch | {"image": cache["held out"].take(batch["index"])} for batch in batches)
        return evaluate(eval_step, variables, batches, mesh, len(held_out.inputs))

    return Feed(step, dispatches, evaluated, cache)


def prepare(inputs: Inputs, preprocessing: str) -> train.Prepare:
    """Augmentation, mixing and preprocessing of whole batches, for `train.make_train_step`."""
    normalise = preprocess.get(preprocessing)

    def prepared(key: jax.Array, images: jax.Array, labels: train.Labels) -> tuple[jax.Array, train.Labels]:
        keys = jax.random.split(key)
        for change, its_key in zip((inputs.augment, inputs.mix), keys, strict=True):
            if change is not None:
                images, labels = augment.applied(change, its_key, images.astype(jnp.float32), labels)
        return normalise(images), labels

    return prepared


def _stream(side: Side, run: runs.Run, at_once: int, first: int, last: int) -> Iterator[tuple[int, Batch, int]]:
    """(step, its batch, 1) from step `first` to before `last`; or several batches and how many, which cross no save."""
    plain = loader.train_batches(
        side.inputs,
        side.images,
        seed=run.seed,
        start_step=first,
        num_steps=last - first,
        process=devices.process(),
    )
    if at_once == 1:
        yield from ((step, batch, 1) for step, batch in zip(range(first, last), plain, strict=True))
        return
    periods = [period for period in (side.inputs.steps_per_epoch, run.save_every) if period]
    step = first
    while step < last:
        count = min(at_once, last - step, *(period - step % period for period in periods))
        yield step, several(plain, count), count
        step += count


def _name(view: int | None) -> str:
    return "train" if view is None else f"view {view}"


def _open_cache(
    net: Any,
    preprocessing: str,
    stage: str,
    prefix: features.Prefix,
    state: TrainState,
    sides: tuple[Side, Side],
    run: runs.Run,
    epochs: range,
) -> dict[str, Rows] | None:
    """The features of both sides by name: `_name` of a view, and "held out"; in one file where both sides are alike."""
    train_side, held_out = sides
    views = train_side.inputs.views

    def wanted(side: Side, view: int | None, indices: np.ndarray) -> features.Wanted:
        inputs = side.inputs
        decode = dataclasses.asdict(inputs.decode)
        made = {"data": inputs.dataset.fingerprint, "size": inputs.image_size, "decode": decode}
        if view is not None:
            made |= {"augment": describe(inputs.augment), "seed": run.seed}
        if inputs.plain_view:
            made["plain_view"] = True
        return features.Wanted(made, view, indices, len(inputs.dataset), inputs.plain_view, side.batches)

    if views is None and _alike(train_side.inputs, held_out.inputs):
        both = np.union1d(train_side.inputs.indices, held_out.inputs.indices)
        caches = {"train": wanted(train_side, None, both)}
    else:
        numbers = [None] if views is None else sorted({epoch % views for epoch in epochs})
        caches = {_name(view): wanted(train_side, view, train_side.inputs.indices) for view in numbers}
        caches["held out"] = wanted(held_out, None, held_out.inputs.indices)
    identity = features.identity(net, jax.device_get(state.variables()), stage, preprocessing=preprocessing)
    inputs = train_side.inputs
    uses = len(epochs) * (inputs.steps_per_epoch * inputs.batch_size + len(held_out.inputs))
    opened = features.open_cache(
        prefix, state.variables(), identity, caches, uses=uses, required=run.cache_features == "on"
    )
    if opened is not None and "held out" not in opened:
        opened["held out"] = opened["train"]
    return opened


def _row(inputs: Inputs, view: int, index: np.ndarray) -> np.ndarray:
    return features.row(view, index, len(inputs.dataset), plain_view=inputs.plain_view)


def steps_at_once(shape: tuple[int, ...]) -> int:
    """How many steps share a dispatch, where what feeds them of each image has this shape."""
    return AT_ONCE if len(shape) == 1 else 1


def several(batches: Iterator[Batch], count: int) -> Batch:
    """The next `count` batches as one, leaves [count, B, …]."""
    taken = [next(batches) for _ in range(count)]
    return {name: np.stack([batch[name] for batch in taken]) for name in taken[0]}
