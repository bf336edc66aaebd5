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
        --freeze first:10 --seed S --folder runs/vgg16_elpv-S

    seed 0: 79.12 % of 656 cells, log loss 0.462, ROC AUC 0.811, the best state by loss (epoch 5 of 7; n = 1)

At 300 pixels, from ImageNet, for 100 epochs: not measured.
"""

if __name__ == "__main__":  # before JAX is imported, so that nothing is imported twice
    from jaxft.large_pages import restart

    restart()

import pathlib
from functools import partial

import optax
from tyro.conf import OmitArgPrefixes as Flat

from jaxft import command, devices, fetch, nets, optim, report, task
from jaxft.data import Inputs, augment, elpv
from jaxft.data.folds import stratified_split
from jaxft.finetune import finetune
from jaxft.model import load
from jaxft.phase import Phase
from jaxft.runs import Run

PAPER = "88.42 % (VGG-19 from ImageNet, 300 pixels)"
HEAD = "gap:4096,2048"
WARP = augment.Warp(3.0, 0.02, 0.02, flip_horizontal=True, flip_vertical=True, quarter_turns=True)


def main(
    net: str = "vgg16",
    weights: str = "auto",
    freeze: str = "none",
    image_size: int = 300,
    head_epochs: int = 10,
    epochs: int = 90,
    batch_size: int = 16,
    dtype: str = "auto",
    run: Flat[Run] = Run(pathlib.Path("runs/vgg16_elpv")),
) -> None:
    """Fine-tune VGG16, or another net, to find defective solar cells, by the protocol of Deitsch et al. 2019.

    Args:
        net: of the zoo; the paper's is vgg19, for which there are ImageNet weights alone.
        weights: auto, imagenet, hed-bsds500, none, or the path of a Keras weight file; auto is imagenet if reachable.
        freeze: what stays frozen in the second phase; the paper trains everything.
        image_size: height and width in pixels.
        head_epochs: passes that train the new layers alone.
        epochs: passes that train all layers.
        batch_size: images a step.
        dtype: of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU.
    """
    phases = [
        Phase(head_epochs, optim.Constant(1e-3), optax.adam, frozen="all-but-head"),
        Phase(epochs, optim.Constant(5e-4), optim.SGD(momentum=0.9), frozen=freeze),
    ]
    dataset = elpv.prepare(fetch.cache_folder())
    train, held_out = stratified_split(dataset.strata, 0.75, run.seed)
    sized = partial(Inputs, dataset, image_size=(image_size, image_size), batch_size=batch_size)
    inputs = sized(train, augment=WARP), sized(held_out)
    options = {"weights": weights, "dtype": dtype, "seed": run.seed, **nets.head_options(net, HEAD)}
    model = load(net, len(dataset.classes), **options)
    trained, _ = finetune(model, task.classification(), *inputs, phases, run, config={"split": "stratified"})
    if devices.is_writer():
        rows = {"the paper": PAPER, "weights": trained.source["source"]}
        report.result(f"{net} on solar cells, {image_size} pixels", run.folder, rows)


if __name__ == "__main__":
    command.run(main)
