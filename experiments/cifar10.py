"""Any net of the zoo learns CIFAR-10's ten classes, its 32×32 pixels enlarged to the size that the net knows.

The origin's demonstration: 3,000 training and 100 test images (`--no-subset` takes all 60,000), a new last layer, every
layer trained with nesterov SGD (lr 1e-3, decay 1e-6, momentum 0.9) on batches of 16 for 10 epochs.

    python -m experiments.cifar10 --net resnet50

Result on the 100 test images, from ImageNet:

    accuracy              log loss              (not yet measured: needs CIFAR-10 and the ImageNet files)
"""

import dataclasses
import pathlib
from typing import Literal

import jax.numpy as jnp
import numpy as np
import tyro

from jaxft import fetch, nets, optim, pretrained, report
from jaxft.data import cifar10
from jaxft.finetune import compute_dtype, exits, finetune, start_from

SUBSET = 3000, 100  # training and test images of the origin's demonstration
MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fine-tune a net of the zoo on CIFAR-10."""

    net: str = "resnet50"
    """A net of the zoo."""
    weights: str = "imagenet"
    """imagenet, none, or the path of a Keras weight file; for vgg16 also auto and hed-bsds500."""
    order: str = "auto"
    """Kernel ordering of the weight file: auto, tf, th, th-tf-kernels or tf-th-kernels."""
    freeze: str = "none"
    """none, all-but-head, through:STAGE, first:N, or a regular expression over layer names."""
    subset: bool = True
    """The first 3,000 training and 100 test images alone."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 16
    """Images a step."""
    image_size: int | None = None
    """Height and width in pixels to which the images are enlarged. Default: the net's native size."""
    lr: float = 1e-3
    """Learning rate at the first step."""
    decay: float = 1e-6
    """The rate at update t is lr / (1 + decay · t)."""
    seed: int = 0
    """Of fresh layers, the order of images and dropout."""
    dtype: str = "auto"
    """Of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU."""
    cache_features: Literal["auto", "on", "off"] = "auto"
    """Keep what frozen stages give on disk, where inputs repeat; changes no loss. auto: where it saves time."""
    save_every: int | None = None
    """Steps between checkpoints, beside those at the end of each epoch."""
    workdir: pathlib.Path | None = None
    """The run's folder; the same command on the same folder resumes. Default: runs/cifar10/NET."""


def main(settings: Settings) -> None:
    size = settings.image_size or nets.spec(settings.net).native_size[0]
    workdir = settings.workdir or pathlib.Path("runs/cifar10") / settings.net
    dataset, train_count = cifar10.prepare(fetch.cache_folder())
    indices = np.arange(len(dataset))
    train_indices, test_indices = indices[:train_count], indices[train_count:]
    if settings.subset:
        train_indices, test_indices = train_indices[: SUBSET[0]], test_indices[: SUBSET[1]]
    dtype = compute_dtype(settings.dtype)
    auxiliary = settings.net == "googlenet" and size == 224  # its auxiliary heads take no other size
    weights = pretrained.resolve(settings.net, settings.weights, classifier=False)
    net, variables, frozen = start_from(
        settings.net,
        weights,
        len(dataset.classes),
        freeze=settings.freeze,
        image_size=(size, size),
        dtype=dtype,
        seed=settings.seed,
        order=settings.order,
        **({} if auxiliary else nets.any_size(settings.net)),
    )
    schedule = optim.inverse_time(settings.lr, settings.decay)
    config = {name: value for name, value in vars(settings).items() if name not in ("workdir", "cache_features")} | {
        "image_size": size,
        "dtype": jnp.dtype(dtype).name,
        "frozen": sorted(frozen),
        "data": {"name": dataset.name, "sha256": dataset.fingerprint},
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
        augmentation={},
        cache_features=settings.cache_features,
        tx=optim.nesterov_sgd(schedule, MOMENTUM),
        schedule=schedule,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        image_size=(size, size),
        seed=settings.seed,
        save_every=settings.save_every,
    )
    report.table(
        f"{settings.net} on CIFAR-10, {size} pixels",
        {
            "accuracy": f"{summary['accuracy']:.1%} of {summary['images']['held_out']}",
            "log loss": f"{summary['log_loss']:.4f}",
            "weights": weights.source,
            "everything else": workdir,
        },
    )


if __name__ == "__main__":
    with exits():
        main(tyro.cli(Settings))
