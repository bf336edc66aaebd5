"""State Farm as it was won: folds by driver, views, pseudo-labels, ensembles, neighbours, a submission.

What the competition's leaders wrote up, step after step, each judged on the whole ensemble by its out-of-fold log loss,
and kept only if that falls. Every step is written when it is done: a run that is killed goes on with the next one.
`results.html` in the folder shows what each step bought. Without Kaggle's data it draws a stand-in that has a test set
with known labels.

    python -m experiments.statefarm_solution --data-dir FOLDER_WITH_IMGS_AND_CSV

Result on State Farm: not measured. On the stand-in, three seeds: docs/statefarm.md.
"""

if __name__ == "__main__":  # before JAX is imported, so that nothing is imported twice
    from jaxft.large_pages import restart

    restart()

import dataclasses
import pathlib
from functools import partial

from tyro.conf import OmitArgPrefixes as Flat

from experiments import statefarm_data, statefarm_page, statefarm_steps
from jaxft import command
from jaxft.data.augment import ColorJitter, Warp
from jaxft.optim import InverseTime, NesterovSGD
from jaxft.phase import Phase
from jaxft.runs import Run

# A quick look on two cores: small images, few folds, and most layers frozen.
STANDIN = {"image_size": 64, "folds": 3, "epochs": 6, "schedule": InverseTime(3e-2, 2e-2), "clip_norm": 1.0}
STANDIN |= {"freeze": ("through:block4", "through:conv4_block6"), "warp": Warp(rotation=5.0, shift=0.05), "views": 1}


def main(
    data_dir: pathlib.Path | None = None,
    nets: tuple[str, ...] = ("vgg16", "resnet50"),
    weights: tuple[str, ...] = ("auto", "auto"),
    freeze: tuple[str, ...] = ("first:10", "none"),
    epochs: int = 10,
    batch_size: int = 16,
    image_size: int = 224,
    schedule: Flat[InverseTime] = InverseTime(1e-3, 1e-6),
    optimizer: Flat[NesterovSGD] = NesterovSGD(),
    clip_norm: float | None = None,
    warp: Flat[Warp] = Warp(rotation=10.0, shift=0.1),
    jitter: Flat[ColorJitter] = ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    regions: tuple[str, ...] = statefarm_steps.REGIONS,
    composites: bool = False,
    views: int = 4,
    confidence: float = 0.9,
    share: float = 0.5,
    folds: int = 5,
    leak: bool = True,
    dtype: str = "auto",
    seeds: int = 1,
    run: Flat[Run] = Run(pathlib.Path("runs/statefarm_solution"), pictures=False),
) -> None:
    """Folds, views, augmentation, test-time views, pseudo-labels, blend, neighbours, segments, refit, submission.

    Args:
        data_dir: Kaggle's imgs/ with its test images, and csv, or the zip; without it ./data/…, else stand-in data.
        nets: of the zoo; all are blended.
        weights: of each net, as in `vgg16_statefarm`; auto on the stand-in is hed-bsds500 for vgg16, and for other nets
            what they learn from other drawn drivers.
        freeze: of each net: none, all-but-head, through:STAGE, first:N, or a regular expression over layer names.
        epochs: passes over the training images.
        batch_size: images a step.
        image_size: height and width in pixels that a net sees of an image, and of each region.
        clip_norm: largest global norm of the trainable layers' gradient.
        regions: NAME:TOP,LEFT,HEIGHT,WIDTH in fractions of the image, each; or NAME:map, the half of the image's height
            and width that speaks most for the right class, found from activation maps.
        composites: also try images of the left half of one driver and the right half of another.
        views: augmented ones of each image in prediction.
        confidence: the least probability of a pseudo-label.
        share: of pseudo-labels among training images, at most.
        folds: how many, by driver.
        leak: also show what random folds would say.
        dtype: of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU.
        seeds: how many whole solutions, from the run's seed on; their spread is shown.
    """
    train, test, folder, is_standin = statefarm_data.open_both(data_dir)
    members = statefarm_steps.members(nets, weights, freeze, is_standin, dtype)
    phase = Phase(epochs, schedule, optimizer, clip_norm=clip_norm)
    settings = statefarm_steps.Settings(
        members,
        phase,
        batch_size,
        image_size,
        (warp, jitter),
        regions,
        composites,
        views,
        confidence,
        share,
        folds,
        leak,
    )
    done = []
    for seed in range(run.seed, run.seed + seeds):
        own = dataclasses.replace(run, seed=seed, folder=run.folder / f"seed{seed}")
        done.append(statefarm_steps.solve(settings, train, test, folder, own))
    statefarm_page.write(run.folder, done, train, is_standin)


if __name__ == "__main__":
    command.run(partial(main, **STANDIN) if statefarm_data.is_absent() else main)
