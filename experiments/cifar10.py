"""Any net of the zoo learns CIFAR-10's ten classes, its 32×32 pixels enlarged to the size that the net knows.

The demonstration of the Keras fine-tuning guide of 2016: 3,000 training and 100 test images (`--no-subset` takes all
60,000), a new last layer, every layer trained with nesterov SGD (lr 1e-3, decay 1e-6, momentum 0.9) on batches of 16
for 10 epochs.

    python -m experiments.cifar10 --net resnet50

Result on the 100 test images, from ImageNet: not measured (needs CIFAR-10 and the ImageNet files).
"""

if __name__ == "__main__":  # before JAX is imported, so that nothing is imported twice
    from jaxft.large_pages import restart

    restart()

import pathlib
from functools import partial

import numpy as np
from tyro.conf import OmitArgPrefixes as Flat

from jaxft import command, devices, fetch, nets, report, task
from jaxft.data import Inputs, cifar10
from jaxft.finetune import finetune
from jaxft.model import load
from jaxft.optim import InverseTime, NesterovSGD
from jaxft.phase import Phase
from jaxft.runs import Run

SUBSET = 3000, 100  # training and test images of the guide's demonstration


def main(
    net: str = "resnet50",
    weights: str = "imagenet",
    order: str = "auto",
    freeze: str = "none",
    subset: bool = True,
    epochs: int = 10,
    batch_size: int = 16,
    image_size: int | None = None,
    schedule: Flat[InverseTime] = InverseTime(1e-3, 1e-6),
    optimizer: Flat[NesterovSGD] = NesterovSGD(),
    dtype: str = "auto",
    run: Flat[Run] = Run(pathlib.Path("runs/cifar10")),
) -> None:
    """Fine-tune a net of the zoo on CIFAR-10.

    Args:
        net: of the zoo.
        weights: imagenet, none, or the path of a Keras weight file; for vgg16 also auto and hed-bsds500.
        order: kernel ordering of the weight file: auto, tf, th, th-tf-kernels or tf-th-kernels.
        freeze: none, all-but-head, through:STAGE, first:N, or a regular expression over layer names.
        subset: the first 3,000 training and 100 test images alone.
        epochs: passes over the training images.
        batch_size: images a step.
        image_size: height and width in pixels to which the images are enlarged; by default the net's native size.
        dtype: of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU.
    """
    phase = Phase(epochs, schedule, optimizer, freeze)
    size = nets.spec(net).native_size[0] if image_size is None else image_size
    options = {} if net == "googlenet" and size == 224 else nets.any_size(net)  # its auxiliary heads take no other size
    dataset, count = cifar10.prepare(fetch.cache_folder())
    train, test = np.arange(count), np.arange(count, len(dataset))
    if subset:
        train, test = train[: SUBSET[0]], test[: SUBSET[1]]
    sized = partial(Inputs, dataset, image_size=(size, size), batch_size=batch_size)
    inputs = sized(train), sized(test)
    model = load(net, len(dataset.classes), weights=weights, order=order, dtype=dtype, seed=run.seed, **options)
    trained, _ = finetune(model, task.classification(), *inputs, [phase], run)
    if devices.is_writer():
        report.result(f"{net} on CIFAR-10, {size} pixels", run.folder, {"weights": trained.source["source"]})


if __name__ == "__main__":
    command.run(main)
