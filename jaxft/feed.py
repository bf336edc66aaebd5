"""What the steps of a run are fed: images or features from where they lie, and the programs that take them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxft import features, predict, train
from jaxft.data import Dataset, loader
from jaxft.data.augment import warp
from jaxft.data.cache import Cache
from jaxft.predict import Batch, Predictions
from jaxft.preprocess import PREPROCESSING
from jaxft.train_state import TrainState

AT_ONCE = 16  # steps in one dispatch, where features are vectors: a small dense layer takes less time than a dispatch


class Feed(NamedTuple):
    """A run's train step, and what it and the evaluation take.

    Attributes:
        train_step: takes a batch, or several, leaves [K, B, …], as `train.several` does.
        batches: first step → what `train_step` takes from there on; several batches never cross a save.
        evaluate: state → predictions on the held-out images.
        cache: number of a view → its features; None where each step computes them.
    """

    train_step: train.TrainStep
    batches: Callable[[int], Iterator[Batch]]
    evaluate: Callable[[TrainState], Predictions]
    cache: Mapping[int | None, Cache] | None


def make(
    net: nn.Module,
    variables: Mapping[str, Any],
    state: TrainState,
    dataset: Dataset,
    train_indices: np.ndarray,
    test_indices: np.ndarray,
    *,
    frozen: frozenset[str],
    preprocessing: str,
    augmentation: Mapping[str, Any],
    epochs: int,
    batch_size: int,
    image_size: tuple[int, int],
    seed: int = 0,
    label_smoothing: float = 0.0,
    save_every: int | None = None,
    views: int | None = None,
    cache_features: str = "auto",
    scaled_decode: bool = False,
) -> Feed:
    """Decodes what is to be decoded once, and computes what is to be computed once.

    The arguments are those of `finetune.finetune`; `variables` are on the host and the `state` on the devices.

    Raises:
        ValueError: an image cannot be decoded, or features are to be cached that do not repeat.
        OSError: features are to be cached, and do not fit on the disk.
    """
    steps_per_epoch = loader.steps_per_epoch(len(train_indices), batch_size)
    mesh = predict.data_mesh()
    normalise = PREPROCESSING[preprocessing]
    augmentation = {option: value for option, value in augmentation.items() if value}
    views = views if augmentation else None
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    whole = {"batch_size": batch_size, "image_size": image_size, "scaled": scaled_decode, **hosts}

    # Where the inputs of frozen stages repeat, a step is two programs: up to `stage`, and what follows. Of views on a
    # net without such stages, the first one augments.
    stage = features.cut(net, frozen, list(variables["params"])) if views or not augmentation else None
    if stage is None and cache_features == "on":
        raise ValueError(
            "cache_features=on needs a first stage that is wholly frozen, without dropout or auxiliary heads, and "
            "inputs that repeat: a fixed number of views, or no augmentation"
        )

    # Several processes decode their own rows of each batch; one decodes all once, and holds them where they fit.
    images, held = dataset, None
    if jax.process_count() == 1:
        used = np.union1d(train_indices, test_indices)
        held = loader.decode_once(dataset, used, image_size, scaled=scaled_decode)
        if held and held.on_device():
            whole["image_size"] = None
        elif held:
            images, held = dataclasses.replace(dataset, images=loader.Decoded(held, len(dataset))), None

    def with_images(batch: Batch) -> Batch:
        return batch | {"image": held.take(batch["index"])} if held else batch

    cache, at_once = None, 1
    if stage is None and not views:
        train_step = train.make_train_step(lambda key, x: normalise(warp(key, x, **augmentation)), label_smoothing)
        eval_step = predict.make_eval_step(normalise)
    else:
        prefix = features.make_prefix(net, stage, normalise, augmentation, seed)
        behind = train.make_train_step(lambda _, x: x, label_smoothing, stage)
        eval_behind = predict.make_eval_step(lambda x: x, stage)
        if stage and cache_features != "off" and jax.process_count() == 1:
            inputs = {"data": dataset.fingerprint, "size": image_size, "scaled": scaled_decode}
            augmented = {view: train_indices for view in range(min(views or 0, epochs))} | {None: test_indices}
            cache = features.open_cache(
                prefix,
                state.variables(),  # on the device
                features.identity(
                    net,
                    variables,
                    stage,
                    **inputs,
                    preprocessing=preprocessing,
                    augmentation=augmentation,
                    seed=seed,
                ),
                lambda indices: map(with_images, loader.eval_batches(images, indices, **whole)),
                augmented if views else {None: np.union1d(train_indices, test_indices)},
                examples=len(dataset),
                uses=epochs * (steps_per_epoch * batch_size + len(test_indices)),
                required=cache_features == "on",
            )
        if cache:
            eval_step = eval_behind
            whole["image_size"], held, images = None, None, dataset  # the device's memory is for the features
            at_once = steps_at_once(cache[None].shape)
            train_step = train.several(behind) if at_once > 1 else behind
        else:

            def train_step(state: TrainState, batch: Batch) -> Any:
                return behind(state, batch | {"image": prefix(state.variables(), batch["image"], batch.get("row"))})

            def eval_step(state: TrainState, images: jax.Array) -> jax.Array:
                return eval_behind(state, prefix(state.variables(), images, None))

    def with_features(view: int | None, batch: Batch) -> Batch:
        if cache:
            return batch | {"image": cache[view].take(batch["index"])}
        batch = with_images(batch)
        return batch if view is None else batch | {"row": features.row(view, batch["index"], len(dataset))}

    def batches(first_step: int) -> Iterator[Batch]:
        step, last = first_step, epochs * steps_per_epoch
        plain = loader.train_batches(
            images, train_indices, seed=seed, start_step=first_step, num_steps=last - first_step, **whole
        )
        while step < last:
            view = step // steps_per_epoch % views if views else None
            if at_once == 1:
                batch, count = next(plain), 1
            else:
                count = min(at_once, *(period - step % period for period in (steps_per_epoch, save_every) if period))
                batch = several(plain, count)
            yield with_features(view, batch)
            step += count

    def evaluate(state: TrainState) -> Predictions:
        held_out = loader.eval_batches(images, test_indices, **whole)
        return predict.evaluate(state, eval_step, (with_features(None, batch) for batch in held_out), mesh)

    return Feed(train_step, batches, evaluate, cache)


def steps_at_once(shape: tuple[int, ...]) -> int:
    """How many steps share a dispatch, where what feeds them of each image has this shape."""
    return AT_ONCE if len(shape) == 1 else 1


def several(batches: Iterator[Batch], count: int) -> Batch:
    """The next `count` batches as one, leaves [count, B, …]."""
    taken = [next(batches) for _ in range(count)]
    return {name: np.stack([batch[name] for batch in taken]) for name in taken[0]}
