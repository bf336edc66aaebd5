"""VGG16 learns ten kinds of driver behaviour, and is judged on drivers that it has never seen.

The experiment of the Keras fine-tuning guide of 2016: the last layer of an ImageNet-trained VGG16 is replaced, the
first ten layers are frozen, and the rest is fine-tuned with nesterov SGD (lr 1e-3, decay 1e-6, momentum 0.9) on batches
of 16, randomly rotated and shifted. Data: Kaggle's State Farm Distracted Driver Detection, or drawn ones without it.

    python -m experiments.vgg16_statefarm --data-dir FOLDER_WITH_IMGS_AND_CSV

Result on State Farm, one fold of five by driver (private score of the guide's VGG16 with folds: 0.22855): not measured.
"""

if __name__ == "__main__":  # before JAX is imported, so that nothing is imported twice
    from jaxft.large_pages import restart

    restart()

import pathlib
from functools import partial

from tyro.conf import OmitArgPrefixes as Flat

from experiments import statefarm_data
from jaxft import command, task
from jaxft.data import Inputs, augment
from jaxft.finetune import finetune
from jaxft.model import load
from jaxft.optim import InverseTime, NesterovSGD
from jaxft.phase import Phase
from jaxft.runs import Run

# A quick look on two cores. Activations are far from unit scale there: without clipping the first steps end in NaN.
STANDIN = {"image_size": 80, "epochs": 4, "schedule": InverseTime(3e-2, 2e-2), "clip_norm": 1.0}
STANDIN |= {"warp": augment.Warp(rotation=3.0, shift=0.03)}


def main(
    data_dir: pathlib.Path | None = None,
    weights: str = "auto",
    order: str = "auto",
    freeze: str = "first:10",
    head: str = "auto",
    epochs: int = 10,
    batch_size: int = 16,
    image_size: int = 224,
    schedule: Flat[InverseTime] = InverseTime(1e-3, 1e-6),
    optimizer: Flat[NesterovSGD] = NesterovSGD(),
    clip_norm: float | None = None,
    warp: Flat[augment.Warp] = augment.Warp(rotation=10.0, shift=0.1),
    fold: int = 0,
    folds: int = 5,
    dtype: str = "auto",
    views: int | None = None,
    run: Flat[Run] = Run(pathlib.Path("runs/vgg16_statefarm")),
) -> None:
    """Fine-tune VGG16 to tell ten kinds of driver behaviour apart on drivers it has never seen.

    Args:
        data_dir: Kaggle's imgs/ and csv, or the zip; without it ./data/…, else stand-in data that are drawn.
        weights: auto, imagenet, hed-bsds500, none, or the path of a Keras weight file; auto is imagenet if reachable.
        order: kernel ordering of the weight file: auto, tf, th, th-tf-kernels or tf-th-kernels.
        freeze: none, all-but-head, through:STAGE, first:N (as Keras counts), or a regular expression over layer names.
        head: fc (with the file's fc1 and fc2), gap, gap:WIDTH,…; auto is fc with the official file at 224 pixels.
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
    found, options = statefarm_data.vgg16_head(head, weights, image_size)
    model = load("vgg16", len(dataset.classes), weights=found, order=order, dtype=dtype, seed=run.seed, **options)
    trained, _ = finetune(model, task.classification(), *inputs, [phase], run, config={"fold": fold, "folds": folds})
    statefarm_data.show("VGG16 on held-out drivers", run, trained, is_standin)


if __name__ == "__main__":
    command.run(partial(main, **STANDIN) if statefarm_data.is_absent() else main)
