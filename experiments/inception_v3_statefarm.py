"""Inception-V3 learns ten kinds of driver behaviour, and is judged on drivers that it has never seen.

The origin's second walk-through: the output of the last inception block, global average pooling and a new softmax
layer, every layer trained with nesterov SGD (lr 1e-3, decay 1e-6, momentum 0.9) on batches of 16. The origin loads the
weights of release v0.2, `--net inception_v3_v02`; those of keras.applications belong to another net, `inception_v3`.
Data: Kaggle's State Farm Distracted Driver Detection, or the procedural stand-in where that is absent.

    python -m experiments.inception_v3_statefarm --data-dir FOLDER_WITH_IMGS_AND_CSV

Result on State Farm, one fold of five by driver, from ImageNet:

    accuracy              log loss              (not yet measured: needs Kaggle's data and the ImageNet file)
"""

import dataclasses
import math
import pathlib
from typing import Literal

import jax.numpy as jnp
import tyro

from experiments.vgg16_statefarm import STANDIN_NOTE, open_data
from jaxft import nets, optim, pretrained, report
from jaxft.data import folds
from jaxft.finetune import compute_dtype, exits, finetune, start_from

MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fine-tune Inception-V3, or another net of the zoo, on State Farm."""

    data_dir: pathlib.Path | None = None
    """Kaggle's imgs/ and driver_imgs_list.csv, or the zip; without it ./data/…, else stand-in data that are drawn."""
    net: str = "inception_v3_v02"
    """inception_v3_v02 (the origin's), inception_v3, or another net of the zoo."""
    weights: str = "imagenet"
    """imagenet, none, or the path of a Keras weight file."""
    order: str = "auto"
    """Kernel ordering of the weight file: auto, tf, th, th-tf-kernels or tf-th-kernels."""
    freeze: str = "none"
    """none, all-but-head, through:STAGE (mixed7, say), first:N, or a regular expression over layer names."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 16
    """Images a step."""
    image_size: int = 299
    """Height and width in pixels."""
    lr: float = 1e-3
    """Learning rate at the first step."""
    decay: float = 1e-6
    """The rate at update t is lr / (1 + decay · t)."""
    clip_norm: float = math.inf
    """Largest global norm of the trainable layers' gradient."""
    rotation: float = 10.0
    """Largest angle of the augmentation, in degrees."""
    shift: float = 0.1
    """Largest translation, as a fraction of the image."""
    fold: int = 0
    """The fold that is held out."""
    folds: int = 5
    """Folds by driver."""
    seed: int = 0
    """Of folds, fresh layers, the order of images, augmentation, dropout and stand-in data."""
    dtype: str = "auto"
    """Of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU."""
    views: int | None = None
    """Fixed augmented views of each image, which epochs take in turn. Default: a new one at every step."""
    scaled_decode: bool = False
    """Let libjpeg decode at a fraction of the size: faster, and slightly other pixels."""
    cache_features: Literal["auto", "on", "off"] = "auto"
    """Keep what frozen stages give on disk, where inputs repeat; changes no loss. auto: where it saves time."""
    save_every: int | None = None
    """Steps between checkpoints, beside those at the end of each epoch."""
    workdir: pathlib.Path | None = None
    """The run's folder; the same command on the same folder resumes. Default: runs/statefarm/NET."""


def main(settings: Settings) -> None:
    nets.spec(settings.net)
    workdir = settings.workdir or pathlib.Path("runs/statefarm") / settings.net
    dataset, is_standin = open_data(settings.data_dir, settings.seed)
    if is_standin:
        print(STANDIN_NOTE, flush=True)
    train_indices, test_indices = folds.split(dataset.groups, settings.fold, settings.folds, settings.seed)
    weights = pretrained.resolve(settings.net, settings.weights, classifier=False)
    dtype = compute_dtype(settings.dtype)
    image_size = (settings.image_size, settings.image_size)
    net, variables, frozen = start_from(
        settings.net,
        weights,
        len(dataset.classes),
        freeze=settings.freeze,
        image_size=image_size,
        dtype=dtype,
        seed=settings.seed,
        order=settings.order,
        **nets.any_size(settings.net),
    )
    schedule = optim.inverse_time(settings.lr, settings.decay)
    config = {
        name: value for name, value in vars(settings).items() if name not in ("workdir", "data_dir", "cache_features")
    } | {
        "dtype": jnp.dtype(dtype).name,
        "frozen": sorted(frozen),
        "data": {"name": dataset.name, "sha256": dataset.fingerprint, "standin": is_standin},
        "weights": {"source": weights.source, "sha256": weights.sha256, "fallback": weights.fallback is not None},
    }
    _, summary = finetune(
        net,
        variables,
        dataset,
        train_indices,
        test_indices,
        workdir=workdir,
        config=config,
        frozen=frozen,
        preprocessing=weights.preprocessing,
        augmentation={"rotation": settings.rotation, "shift": settings.shift},
        views=settings.views,
        cache_features=settings.cache_features,
        scaled_decode=settings.scaled_decode,
        tx=optim.nesterov_sgd(schedule, MOMENTUM),
        schedule=schedule,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        image_size=image_size,
        seed=settings.seed,
        clip_norm=None if math.isinf(settings.clip_norm) else settings.clip_norm,
        save_every=settings.save_every,
    )
    report.table(
        f"{settings.net} on held-out drivers",
        {
            "accuracy": f"{summary['accuracy']:.1%} of {summary['images']['held_out']}",
            "log loss": f"{summary['log_loss']:.4f}",
            "weights": weights.source,
            "data": "stand-in, drawn by a program" if is_standin else dataset.name,
            "everything else": workdir,
        },
    )
    if is_standin:
        print(STANDIN_NOTE)


if __name__ == "__main__":
    with exits():
        main(tyro.cli(Settings))
