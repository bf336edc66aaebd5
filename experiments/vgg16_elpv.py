r"""VGG on 2,624 electroluminescence images of solar cells: is a cell defective?

The protocol of Deitsch et al., Automatic classification of defective photovoltaic module cells in electroluminescence
images, Solar Energy 185 (2019): 75/25 split stratified by label and module type (1,968/656 images), 300×300 pixels,
global average pooling → 4096 → 2048 → output; first the new layers alone (Adam, 1e-3), then all of them (SGD, 5e-4,
momentum 0.9), batch 16, at most 100 epochs, ±3° rotation, ±2 % shift and scale, flips, quarter turns. A cell counts as
defective from a probability of 0.5 on. The paper's VGG-19 from ImageNet reaches 88.42 %, its SVM 82.44 %.

    python -m experiments.vgg16_elpv

Result with the convolutions of hed-bsds500 in place of ImageNet's, at 96 pixels, 3 epochs of the new layers alone and 4
of all but the first four convolutions (2 cores of an x86-64 CPU, Python 3.11, jax 0.10.2, flax 0.12.8, optax 0.2.8):

    python -m experiments.vgg16_elpv --weights hed-bsds500 --image-size 96 --head-epochs 3 --epochs 4 \
        --freeze first:10 --seed S --workdir runs/vgg16_elpv-S

    seed 0: 81.25 %, seed 1: 82.01 % of 656 cells (n = 2, each its own split; the new layers alone: 70.88 %, 65.40 %)

At 300 pixels, from ImageNet, for 100 epochs: not yet measured.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import optax
import tyro

from jaxft import fetch, masking, pretrained, report
from jaxft.data import elpv, folds
from jaxft.finetune import compute_dtype, exits, finetune, start_from

PAPER = "88.42 % (VGG-19 from ImageNet, 300 pixels)"
HEAD = (4096, 2048)
HEAD_LR, ALL_LR, MOMENTUM = 1e-3, 5e-4, 0.9
AUGMENTATION = {"rotation": 3.0, "shift": 0.02, "zoom": 0.02, "flip": True, "quarter_turns": True}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fine-tune VGG16 or VGG19 to find defective solar cells, by the protocol of Deitsch et al. 2019."""

    net: str = "vgg16"
    """vgg16 or vgg19; the paper's is vgg19, for which there are ImageNet weights alone."""
    weights: str = "auto"
    """auto, imagenet, hed-bsds500, none, or the path of a Keras weight file; auto is imagenet if it can be had."""
    freeze: str = "none"
    """What stays frozen in the second phase; the paper trains everything."""
    image_size: int = 300
    """Height and width in pixels."""
    head_epochs: int = 10
    """Passes that train the new layers alone."""
    epochs: int = 90
    """Passes that train all layers."""
    batch_size: int = 16
    """Images a step."""
    seed: int = 0
    """Of the split, fresh layers, the order of images, augmentation and dropout."""
    dtype: str = "auto"
    """Of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU."""
    save_every: int | None = None
    """Steps between checkpoints, beside those at the end of each epoch."""
    workdir: pathlib.Path = pathlib.Path("runs/vgg16_elpv")
    """The run's folder, with one folder a phase; the same command on the same folder resumes."""


def main(settings: Settings) -> None:
    dataset = elpv.prepare(fetch.cache_folder())
    train_indices, test_indices = folds.stratified_split(dataset.strata, 0.75, settings.seed)
    weights = pretrained.resolve(settings.net, settings.weights, classifier=False)
    image_size = (settings.image_size, settings.image_size)
    dtype = compute_dtype(settings.dtype)
    net, variables, _ = start_from(
        settings.net, weights, 2, image_size=image_size, dtype=dtype, seed=settings.seed, head=HEAD
    )
    phases = (
        ("head", "all-but-head", optax.adam(HEAD_LR), HEAD_LR, settings.head_epochs),
        ("all", settings.freeze, optax.sgd(ALL_LR, MOMENTUM), ALL_LR, settings.epochs),
    )
    rows = {}
    for phase, freeze, tx, lr, epochs in phases:
        frozen = masking.frozen_layers(net, freeze, variables["params"])
        config = {name: value for name, value in vars(settings).items() if name != "workdir"} | {
            "phase": phase,
            "dtype": jnp.dtype(dtype).name,
            "frozen": sorted(frozen),
            "data": {"name": dataset.name, "sha256": dataset.fingerprint},
            "weights": {"source": weights.source, "sha256": weights.sha256, "fallback": weights.fallback is not None},
        }
        state, summary = finetune(
            net.clone(frozen=frozen),
            variables,
            dataset,
            train_indices,
            test_indices,
            workdir=settings.workdir / phase,
            config=config,
            frozen=frozen,
            preprocessing=weights.preprocessing,
            augmentation=AUGMENTATION,
            tx=tx,
            schedule=optax.constant_schedule(lr),
            epochs=epochs,
            batch_size=settings.batch_size,
            image_size=image_size,
            seed=settings.seed,
            save_every=settings.save_every,
        )
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        rows[f"accuracy, {phase} trained"] = f"{summary['accuracy']:.2%} of {summary['images']['held_out']}"
    rows |= {"the paper": PAPER, "weights": weights.source, "everything else": settings.workdir}
    report.table(f"{settings.net} on solar cells, {settings.image_size} pixels", rows)


if __name__ == "__main__":
    with exits():
        main(tyro.cli(Settings))
