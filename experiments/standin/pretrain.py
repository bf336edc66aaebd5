"""Weights that a net of the zoo learned from drawn drivers of another seed: what stands in for ImageNet's.

    python -m experiments.standin.pretrain --net resnet50

Result, 720 pictures of 24 drivers at 64 pixels, 240 held out by driver: see docs/statefarm.md.
"""

if __name__ == "__main__":  # before JAX is imported, so that nothing is imported twice
    from jaxft.large_pages import restart

    restart()

import pathlib

from experiments import standin
from jaxft import command, fetch, model, nets, optim, port_weights, task
from jaxft.data import Inputs, folds, statefarm
from jaxft.finetune import finetune
from jaxft.phase import Phase
from jaxft.runs import Run

SEED = 77  # of drivers that no experiment is judged on
SIZE, BATCH, EPOCHS = 64, 16, 12


def weights(net: str, drivers: int = 24) -> pathlib.Path:
    """The Keras weight file of a net that was trained on drawn pictures, made if it is not there; without its head."""
    path = fetch.cache_folder() / f"standin-v{standin.VERSION}-pretrained" / f"{net}.weights.h5"
    if path.exists():
        return path
    name = f"standin-v{standin.VERSION}-{drivers}x30-seed{SEED}"
    folder = standin.render(fetch.cache_folder() / name, drivers=drivers, images_per_driver=30, seed=SEED)
    dataset = statefarm.prepare(folder, fetch.cache_folder())
    train, held_out = folds.split(dataset.groups, 0, 3)
    sides = iter([Inputs(dataset, part, (SIZE, SIZE), BATCH) for part in (train, held_out)])
    schedule = optim.OneCycle(1e-3, EPOCHS * (len(train) // BATCH))
    start = model.load(net, len(dataset.classes), weights="none", **nets.any_size(net))
    phase = Phase(EPOCHS, schedule, optim.AdamW(), clip_norm=1.0)
    run = Run(path.parent / net, keep="last", pictures=False)
    trained, _ = finetune(start, task.classification(), next(sides), next(sides), [phase], run)
    params = dict(trained.variables["params"])
    for layer in trained.net.head_layers():  # of the drawn classes, which a new task has to learn again
        del params[layer]
    path.parent.mkdir(parents=True, exist_ok=True)
    port_weights.save(net, {**trained.variables, "params": params}, path, **nets.any_size(net))
    return path


def main(net: str = "resnet50") -> None:
    """Trains a net on drawn pictures, from random values, and keeps its weights for `statefarm_solution`.

    Args:
        net: of the zoo.
    """
    print(f"the weights are in {weights(net)}")


if __name__ == "__main__":
    command.run(main)
