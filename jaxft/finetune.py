"""One fine-tuning run in a folder, from a dataset and a ported net to predictions, pictures and a summary."""

import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import feed, fetch, files, masking, nets, port_weights, predict, report, train, train_state
from jaxft.checkpoint import CheckpointError, Checkpoints, differences
from jaxft.data import Dataset, decode, loader
from jaxft.data.augment import warp
from jaxft.pretrained import Weights


def compute_dtype(name: str) -> Any:
    """`auto` → bfloat16 on a GPU or TPU, float32 on a CPU, which has no fast bfloat16; else the dtype of that name."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)


def keep_programs() -> pathlib.Path:
    """Turns on JAX's cache of compiled programs, so that the second run of a command need not compile; → its folder.

    That is `$JAX_COMPILATION_CACHE_DIR` if it is set, else `compiled` in the folder of fetched files.
    """
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir or fetch.cache_folder() / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX keeps by itself only what took a second; of building a state there are dozens that take milliseconds each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def start_from(
    name: str,
    weights: Weights,
    num_classes: int,
    *,
    freeze: str = "none",
    image_size: tuple[int, int],
    dtype: Any = jnp.float32,
    seed: int = 0,
    order: str = "auto",
    **options: Any,
) -> tuple[nn.Module, dict[str, Any], frozenset[str]]:
    """A net for a new task, filled from a weight file, and what of it is frozen.

    Args:
        name: of the net in the zoo.
        weights: from `pretrained.resolve`; without a file every layer starts from random values.
        num_classes: width of the new last layer.
        freeze: a specification, as in `masking.frozen_layers`.
        image_size: (height, width) of the images to come.
        dtype: of the computation.
        seed: of layers that the file does not fill.
        order: kernel ordering of the file, as in `port_weights.load`.
        options: further fields of the net's class, `head` say.

    Returns:
        (net, variables, names of the frozen layers).

    Raises:
        ValueError: as `nets.create`, `port_weights.load` and `masking.frozen_layers`.
    """
    net = nets.create(name, num_classes, dtype=dtype, **options)
    if weights.path is None:
        variables = nets.init(net, image_size, seed)
        print(f"{name} starts from random weights (seed {seed})")
    else:
        variables, ported = port_weights.load(
            name, weights.path, num_classes=num_classes, order=order, seed=seed, ignore=weights.ignore, **options
        )
        print(ported)
    frozen = masking.frozen_layers(net, freeze, variables["params"])
    return net.clone(frozen=frozen), variables, frozen


def claim(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Makes `workdir` the folder of the run of `config` (JSON values), or finds that it already is.

    Raises:
        ValueError: it belongs to a run of another configuration; the message shows the differences.
        OSError: it cannot be created or written to.
    """
    config = json.loads(json.dumps(config))
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            files.write_json(file, config)
    except OSError as error:
        raise OSError(f"the workdir {workdir} cannot be written to ({error}); choose another with --workdir") from error
    if lines := differences(json.loads(file.read_text()), config):
        raise ValueError(
            f"{workdir} holds a run of another configuration (there → asked for):\n  "
            + "\n  ".join(lines)
            + "\nGive the same settings to resume it, or another --workdir."
        )


def finetune(
    net: nn.Module,
    variables: dict[str, Any],
    dataset: Dataset,
    train_indices: np.ndarray,
    test_indices: np.ndarray,
    *,
    workdir: pathlib.Path,
    config: dict[str, Any],
    frozen: frozenset[str],
    preprocessing: str,
    augmentation: Mapping[str, Any],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    epochs: int,
    batch_size: int,
    image_size: tuple[int, int],
    seed: int = 0,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    save_every: int | None = None,
    views: int | None = None,
    cache_features: str = "auto",
    scaled_decode: bool = False,
) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Trains, or goes on training, and leaves everything about the run in `workdir`.

    That is `config.json`, `history.csv`, `checkpoints/`, `predictions.csv` (the held-out images), `summary.json`,
    `learning_curves.png`, `confusion_matrix.png`, `worst_mistakes.png` and `augmentation.png`.

    Args:
        net, variables: the backbone, and its `params` and `batch_stats` before the first update.
        dataset: labelled images; `train_indices` and `test_indices` say which are trained on and which are held out.
        workdir: the run's folder; with the same `config` (JSON values) it is resumed, with another it is refused.
        frozen: names of the frozen layers.
        preprocessing: name of the function of `jaxft.preprocess` that the weights expect.
        augmentation: options of `augment.warp`, all zero or none for no augmentation.
        tx, schedule: the optimizer of trainable layers, and its learning rate for the record.
        epochs, batch_size, image_size: the run's length, images a step, (height, width) in pixels.
        seed: of the order of images, augmentation and dropout.
        label_smoothing, clip_norm: see `train.cross_entropy` and `train_state.create`.
        save_every: steps between checkpoints beside those at the end of each epoch.
        views: number of fixed augmented views of each image, which epochs take in turn; None augments anew every time.
        cache_features: on, off or auto: keep what the frozen prefix gives on disk; auto does where that saves time. It
            changes no loss. Needs inputs that repeat, so no augmentation or fixed views.
        scaled_decode: see `decode.rgb`.

    Returns:
        (the last state, the summary).

    Raises:
        ValueError, OSError, CheckpointError, train.Diverged, train.Stopped: as `claim` and `train.fit`.
    """
    began = time.perf_counter()
    steps_per_epoch = loader.steps_per_epoch(len(train_indices), batch_size)
    claim(workdir, config)
    print(f"compiled programs are kept in {keep_programs()}", flush=True)
    mesh = predict.data_mesh()
    state = train_state.create(net, variables, tx, frozen=frozen, clip_norm=clip_norm, seed=seed)
    state = predict.replicate(state, mesh)
    latest: dict[int, predict.Predictions] = {}  # step → predictions, so that the last state is not judged twice

    with closing(Checkpoints(workdir / "checkpoints", config)) as checkpoints:
        if checkpoints.latest() is None:
            checkpoints.require_room(state, 3)  # the best, the last, and the one being written
        fed = feed.make(
            net,
            variables,
            state,
            dataset,
            train_indices,
            test_indices,
            frozen=frozen,
            preprocessing=preprocessing,
            augmentation=augmentation,
            epochs=epochs,
            batch_size=batch_size,
            image_size=image_size,
            seed=seed,
            label_smoothing=label_smoothing,
            save_every=save_every,
            views=views,
            cache_features=cache_features,
            scaled_decode=scaled_decode,
        )

        def evaluate(state: train_state.TrainState) -> predict.Predictions:
            latest[int(state.step)] = fed.evaluate(state)
            return latest[int(state.step)]

        shown = train_indices[np.linspace(0, len(train_indices) - 1, report.COLUMNS, dtype=int)]
        sample = np.stack(
            [decode.rgb(dataset.images[i], image_size, dataset.names[i], scaled=scaled_decode) for i in shown]
        )
        report.sample_augmentations(
            workdir / "augmentation.png", sample, warp(jax.random.key(seed), sample, **augmentation)
        )
        state, history = train.fit(
            state,
            fed.train_step,
            fed.batches,
            evaluate,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            schedule=schedule,
            checkpoints=checkpoints,
            history_file=workdir / "history.csv",
            mesh=mesh,
            save_every=save_every,
            report=print_epoch,
        )
        predictions = latest.get(int(state.step)) or evaluate(state)

    rates = [row["images_per_second"] for row in history if row["images_per_second"]]
    best = min(history, key=lambda row: row["val_loss"])
    summary = {
        "accuracy": predictions.accuracy(),
        "log_loss": predictions.log_loss(),
        "best_epoch": {name: best[name] for name in ("epoch", "val_accuracy", "val_loss")},
        "images": {"train": len(train_indices), "held_out": len(test_indices)},
        "epochs": epochs,
        "steps": int(state.step),
        "images_per_second": statistics.median(rates) if rates else None,
        "seconds_in_this_process": round(time.perf_counter() - began, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "config": config,
        "versions": report.versions(),
    }
    if jax.process_index() == 0:
        names, classes = dataset.names, dataset.classes
        report.write_predictions(workdir / "predictions.csv", predictions, names, classes)
        report.learning_curves(workdir / "learning_curves.png", history)
        report.confusion_matrix(workdir / "confusion_matrix.png", predictions, classes)
        report.worst_mistakes(
            workdir / "worst_mistakes.png",
            predictions,
            lambda index: decode.rgb(dataset.images[index], (240, 320), names[index]),
            names,
            classes,
        )
        files.write_json(workdir / "summary.json", summary)
    return state, summary


def print_epoch(row: dict[str, float]) -> None:
    """One line for an epoch of the history."""
    print(
        f"epoch {row['epoch']:3d}  step {row['step']:6d}  lr {row['lr']:.2e}  "
        f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.1%}  "
        f"held out loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.1%}  "
        f"{row['images_per_second'] or float('nan'):.1f} images/s",
        flush=True,
    )


@contextmanager
def exits() -> Iterator[None]:
    """Turns what a user can cause into one message and an exit status, around the body of a command."""
    try:
        yield
    except train.Stopped as stopped:
        print(f"{stopped}; run the same command again to go on", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except (ValueError, OSError, CheckpointError, fetch.Unavailable, train.Diverged) as error:
        sys.exit(f"error: {error}")
