"""VGG16 learns ten kinds of driver behaviour, and is judged on drivers that it has never seen.

The origin's experiment: the last layer of an ImageNet-trained VGG16 is replaced, the first ten layers are frozen, and
the rest is fine-tuned with nesterov SGD (lr 1e-3, decay 1e-6, momentum 0.9) on batches of 16, randomly rotated and
shifted. Data: Kaggle's State Farm Distracted Driver Detection, or a procedural stand-in where that is absent.

    python -m experiments.vgg16_statefarm --data-dir FOLDER_WITH_IMGS_AND_CSV

Result on State Farm, one fold of five by driver (private leaderboard of the origin's VGG16 with folds: 0.22855):

    accuracy              log loss              (not yet measured: needs Kaggle's data)
"""

import dataclasses
import math
import pathlib
from typing import Literal

import jax.numpy as jnp
import tyro

from jaxft import fetch, optim, pretrained, report
from jaxft.data import Dataset, folds, standin, statefarm
from jaxft.finetune import compute_dtype, exits, finetune, start_from
from jaxft.nets import vgg

KAGGLE = pathlib.Path("data/state-farm-distracted-driver-detection")  # where the bare command looks for Kaggle's data
MOMENTUM = 0.9
STANDIN_DRIVERS, STANDIN_IMAGES = 80, 10  # drivers; images of each
STANDIN_NOTE = "STAND-IN DATA: these images are drawn by a program; this score says nothing about State Farm."

# What depends on the data: Kaggle's get the origin's settings, the stand-in those of a quick look on two cores, where
# activations are far from unit scale: without clipping the first steps end in NaN or in units that never fire again.
DEFAULTS = {
    "kaggle": {
        "image_size": 224,
        "epochs": 10,
        "lr": 1e-3,
        "decay": 1e-6,
        "clip_norm": math.inf,
        "rotation": 10.0,
        "shift": 0.1,
    },
    "standin": {
        "image_size": 80,
        "epochs": 4,
        "lr": 3e-2,
        "decay": 2e-2,
        "clip_norm": 1.0,
        "rotation": 3.0,
        "shift": 0.03,
    },
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fine-tune VGG16 to tell ten kinds of driver behaviour apart on drivers it has never seen."""

    data_dir: pathlib.Path | None = None
    """Kaggle's imgs/ and driver_imgs_list.csv, or the zip; without it ./data/…, else stand-in data that are drawn."""
    weights: str = "auto"
    """auto, imagenet, hed-bsds500, none, or the path of a Keras weight file; auto is imagenet if it can be had."""
    freeze: str = "first:10"
    """none, all-but-head, through:STAGE, first:N (the origin's count), or a regular expression over layer names."""
    order: str = "auto"
    """Kernel ordering of the weight file: auto, tf, th, th-tf-kernels or tf-th-kernels."""
    head: str = "auto"
    """fc (the origin's fc1 and fc2), gap, gap:WIDTH,…; auto is fc with the official file at 224 to 255 pixels."""
    epochs: int | None = None
    """Passes over the training images. Default: 10 with Kaggle's data, 4 with the stand-in."""
    batch_size: int = 16
    """Images a step."""
    image_size: int | None = None
    """Height and width in pixels. Default: 224 with Kaggle's data, 80 with the stand-in."""
    lr: float | None = None
    """Learning rate at the first step. Default: 1e-3 with Kaggle's data, 3e-2 with the stand-in."""
    decay: float | None = None
    """The rate at update t is lr / (1 + decay · t). Default: 1e-6 with Kaggle's data, 2e-2 with the stand-in."""
    l2: float = 0.0
    """λ of an l2 penalty on kernels, in Keras's sense."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    clip_norm: float | None = None
    """Largest global norm of the trainable layers' gradient. Default: inf with Kaggle's data, 1 with the stand-in."""
    rotation: float | None = None
    """Largest angle of the augmentation, in degrees. Default: 10 with Kaggle's data, 3 with the stand-in."""
    shift: float | None = None
    """Largest translation, as a fraction of the image. Default: 0.1 with Kaggle's data, 0.03 with the stand-in."""
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
    workdir: pathlib.Path = pathlib.Path("runs/vgg16_statefarm")
    """The run's folder; the same command on the same folder resumes."""


def open_data(data_dir: pathlib.Path | None, seed: int) -> tuple[Dataset, bool]:
    """(the dataset, whether it is the stand-in)."""
    folder = data_dir or (KAGGLE if KAGGLE.exists() else None)
    if folder is None:
        folder = standin.render(
            fetch.cache_folder() / f"standin-v{standin.VERSION}-{STANDIN_DRIVERS}x{STANDIN_IMAGES}-seed{seed}",
            drivers=STANDIN_DRIVERS,
            images_per_driver=STANDIN_IMAGES,
            seed=seed,
        )
    return statefarm.prepare(folder, fetch.cache_folder()), (folder / "STANDIN.json").exists()


def choose_weights(settings: Settings) -> tuple[pretrained.Weights, tuple[int, ...] | None]:
    """(the weight file, the head that goes with it)."""
    if settings.head != "auto":
        head = vgg.head(settings.head)
        return pretrained.resolve("vgg16", settings.weights, classifier=head is None), head
    if settings.image_size in range(224, 256) and settings.weights in ("auto", "imagenet"):
        try:
            return pretrained.resolve("vgg16", settings.weights, classifier=True), None
        except fetch.Unavailable:
            if settings.weights == "imagenet":
                raise
    return pretrained.resolve("vgg16", settings.weights, classifier=False), ()


def main(settings: Settings) -> None:
    dataset, is_standin = open_data(settings.data_dir, settings.seed)
    if is_standin:
        print(STANDIN_NOTE, flush=True)
    defaults = DEFAULTS["standin" if is_standin else "kaggle"]
    unset = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **unset)
    assert settings.image_size and settings.epochs and settings.lr  # for the type checker: defaults fill them
    assert settings.rotation is not None and settings.shift is not None
    assert settings.clip_norm is not None and settings.decay is not None
    train_indices, test_indices = folds.split(dataset.groups, settings.fold, settings.folds, settings.seed)

    weights, head = choose_weights(settings)
    dtype = compute_dtype(settings.dtype)
    image_size = (settings.image_size, settings.image_size)
    net, variables, frozen = start_from(
        "vgg16",
        weights,
        len(dataset.classes),
        freeze=settings.freeze,
        image_size=image_size,
        dtype=dtype,
        seed=settings.seed,
        order=settings.order,
        head=head,
    )
    schedule = optim.inverse_time(settings.lr, settings.decay)

    config = {
        name: value for name, value in vars(settings).items() if name not in ("workdir", "data_dir", "cache_features")
    } | {
        "head": head,
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
        workdir=settings.workdir,
        config=config,
        frozen=frozen,
        preprocessing=weights.preprocessing,
        augmentation={"rotation": settings.rotation, "shift": settings.shift},
        views=settings.views,
        cache_features=settings.cache_features,
        scaled_decode=settings.scaled_decode,
        tx=optim.nesterov_sgd(schedule, MOMENTUM, settings.l2),
        schedule=schedule,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        image_size=image_size,
        seed=settings.seed,
        label_smoothing=settings.label_smoothing,
        clip_norm=None if math.isinf(settings.clip_norm) else settings.clip_norm,
        save_every=settings.save_every,
    )
    report.table(
        "VGG16 on held-out drivers",
        {
            "accuracy": f"{summary['accuracy']:.1%} of {summary['images']['held_out']}",
            "log loss": f"{summary['log_loss']:.4f}",
            "speed": f"{summary['images_per_second']:.1f} images/s"
            if summary["images_per_second"]
            else "one step only",
            "weights": weights.source,
            "data": "stand-in, drawn by a program" if is_standin else dataset.name,
            "everything else": settings.workdir,
        },
    )
    if is_standin:
        print(STANDIN_NOTE)


if __name__ == "__main__":
    with exits():
        main(tyro.cli(Settings))
