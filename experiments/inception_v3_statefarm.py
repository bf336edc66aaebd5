"""Inception-V3 learns ten kinds of driver behaviour, and is judged on drivers that it has never seen.

The second walk-through of the Keras fine-tuning guide of 2016: the output of the last inception block, global average
pooling and a new softmax layer, every layer trained with nesterov SGD (lr 1e-3, decay 1e-6, momentum 0.9) on batches of
16. The guide loads the weights of release v0.2, `--net inception_v3_v02`; those of keras.applications belong to another
net, `inception_v3`. Data: Kaggle's State Farm Distracted Driver Detection, or drawn ones without it.

    python -m experiments.inception_v3_statefarm --data-dir FOLDER_WITH_IMGS_AND_CSV

Result on State Farm, one fold of five by driver, from ImageNet: not measured.
"""

if __name__ == "__main__":  # before JAX is imported, so that nothing is imported twice
    from jaxft.large_pages import restart

    restart()

import pathlib
from functools import partial

from tyro.conf import OmitArgPrefixes as Flat

from experiments import statefarm_data
from jaxft import command, nets, task
from jaxft.data import Inputs, augment
from jaxft.finetune import finetune
from jaxft.model import load
from jaxft.optim import InverseTime, NesterovSGD
from jaxft.phase import Phase
from jaxft.runs import Run


def main(
    data_dir: pathlib.Path | None = None,
    net: str = "inception_v3_v02",
    weights: str = "imagenet",
    order: str = "auto",
    freeze: str = "none",
    epochs: int = 10,
    batch_size: int = 16,
    image_size: int = 299,
    schedule: Flat[InverseTime] = InverseTime(1e-3, 1e-6),
    optimizer: Flat[NesterovSGD] = NesterovSGD(),
    clip_norm: float | None = None,
    warp: Flat[augment.Warp] = augment.Warp(rotation=10.0, shift=0.1),
    fold: int = 0,
    folds: int = 5,
    dtype: str = "auto",
    views: int | None = None,
    run: Flat[Run] = Run(pathlib.Path("runs/statefarm")),
) -> None:
    """Fine-tune Inception-V3, or another net of the zoo, on State Farm.

    Args:
        data_dir: Kaggle's imgs/ and csv, or the zip; without it ./data/…, else stand-in data that are drawn.
        net: inception_v3_v02 (the guide's), inception_v3, or another net of the zoo.
        weights: imagenet, none, or the path of a Keras weight file; for vgg16 also auto and hed-bsds500.
        order: kernel ordering of the weight file: auto, tf, th, th-tf-kernels or tf-th-kernels.
        freeze: none, all-but-head, through:STAGE (mixed7, say), first:N, or a regular expression over layer names.
        epochs: passes over the training images.
        batch_size: images a step.
        image_size: height and width in pixels.
        clip_norm: largest global norm of the trainable layers' gradient.
        fold: the fold that is held out.
        folds: how many folds there are, by driver.
        dtype: of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU.
        views: fixed augmented views of each image, which epochs take in turn; by default a new one at every step.
    """
    phase = Phase(epochs, schedule, optimizer, freeze, clip_norm=clip_norm)
    dataset, is_standin = statefarm_data.open_data(data_dir, run.seed)
    sized = partial(Inputs, dataset, image_size=(image_size, image_size), batch_size=batch_size)
    inputs = statefarm_data.sides(sized, dataset.groups, (fold, folds, run.seed), warp, views)
    options = {"weights": weights, "order": order, "dtype": dtype, "seed": run.seed, **nets.any_size(net)}
    model = load(net, len(dataset.classes), **options)
    trained, _ = finetune(model, task.classification(), *inputs, [phase], run, config={"fold": fold, "folds": folds})
    statefarm_data.show(f"{net} on held-out drivers", run, trained, is_standin)


if __name__ == "__main__":
    command.run(main)
