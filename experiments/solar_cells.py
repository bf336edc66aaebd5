r"""Defective solar cells over five splits: a net that is fine-tuned, probes of its features, and both together.

The splits of Deitsch et al. 2019: 75/25, stratified by label and module type, 1,968 and 656 of 2,624 cells. On each of
them, from the same file:

- logistic: logistic regression on mean, maximum and deviation of blocks 2 to 5 over places, as square roots;
- svm: a radial support vector machine on the same;
- net: VGG16's block 5 fine-tuned on the four flips of each cell, against the probability of a defect that the experts
  gave, and not against the class it is rounded to; judged by its mean over the four flips;
- net and svm: the geometric mean of the probabilities that these two give.

Penalties are chosen in folds of the training part, and a cell is called defective from a probability of 0.5 on. The
held-out part chooses nothing. What is done is kept, so that a run that is killed goes on where it was.

    python -m experiments.solar_cells --weights hed-bsds500

Result with hed-bsds500, seeds 5 to 9: net and svm 86.16 ± 1.44 %, net 85.09 ± 1.15 % (docs/solar_cells.md).
"""

if __name__ == "__main__":  # before JAX is imported, so that nothing is imported twice
    from jaxft.large_pages import restart

    restart()

import dataclasses
import pathlib
from functools import partial

import numpy as np
from tyro.conf import OmitArgPrefixes as Flat

from experiments import solar_cells_steps as steps
from experiments.solar_cells_steps import Settings
from jaxft import command, devices, ensemble, fetch, probe
from jaxft.crossval import Stages
from jaxft.data import Inputs, elpv
from jaxft.data.folds import stratified_split
from jaxft.runs import Run


def main(
    settings: Flat[Settings] = Settings(), run: Flat[Run] = Run(pathlib.Path("runs/solar_cells"), keep="last")
) -> None:
    """Is a solar cell defective? A fine-tuned net, probes of its features, and both, over several splits.

    Args:
        run: its seed is that of the first split; the others follow.
    """
    cells = elpv.prepare(fetch.cache_folder())
    model = steps.start(settings, run.seed, len(cells.classes))
    size = (settings.image_size, settings.image_size)
    plain = Inputs(cells, np.arange(len(cells)), size, settings.batch_size)
    whole = dataclasses.asdict(settings) | {"seed": run.seed, "data": cells.fingerprint, "source": model.source}
    del whole["splits"]  # more of them may come later
    done = Stages(run.folder, whole)
    rows = steps.pooled(model, plain, run.folder / "pooled.npy")
    splits = []
    for seed in range(run.seed, run.seed + settings.splits):
        parts = stratified_split(cells.strata, 0.75, seed)
        own = dataclasses.replace(run, seed=seed, folder=run.folder / f"split{seed}" / "net")
        probes = {f"split{seed}/{name}": name for name in steps.TRIED}
        for name, classifier in probes.items():
            tried = [c * len(parts[0]) for c in steps.TRIED[classifier]]
            done.once(name, partial(probe.on_features, rows, cells, *parts, classifier=classifier, penalty=tried))
        net = done.once(f"split{seed}/flips", partial(steps.fine_tuned, model, cells, plain, *parts, settings, own))
        logistic, svm = (done.read(name) for name in probes)
        splits.append({"logistic": logistic, "svm": svm, "net": net, "net and svm": ensemble.mean([net, svm])})
    if devices.is_writer():
        steps.show(run.folder, {name: [steps.figures(split[name], cells) for split in splits] for name in splits[0]})


if __name__ == "__main__":
    command.run(main)
