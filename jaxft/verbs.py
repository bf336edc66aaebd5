"""The verbs of the command `jaxft`: one small function each. What they do lies in the modules that they call."""

import dataclasses
import pathlib
from collections.abc import Mapping
from contextlib import closing
from typing import Any, Literal

import numpy as np
from tyro.conf import OmitArgPrefixes as Flat
from tyro.conf import Positional

from jaxft import command, devices, files, model, nets, port_weights, pretrained, recipe, runs, settings
from jaxft.data import check as checking
from jaxft.data import source as sources
from jaxft.data.augment import ColorJitter, Warp
from jaxft.data.decode import Decode
from jaxft.recipe import Batches, Course, Plan, Split, Start
from jaxft.runs import Run

FOLDER = pathlib.Path("runs/DATA-NET")  # stands for the names of both
RUN = Run(FOLDER, watch=("tensorboard",))
SETTINGS = "settings.yaml"
WARP = Warp(rotation=10.0, shift=0.1, zoom=0.1, flip_horizontal=True)
SHOWN = 20  # rows that predict prints without --out

Which = Literal["best", "last"]


def finetune(
    data: Positional[str],
    start: Flat[Start] = Start(),
    split: Flat[Split] = Split(),
    batches: Flat[Batches] = Batches(),
    decode: Flat[Decode] = Decode(),
    warp: Flat[Warp] = WARP,
    color: Flat[ColorJitter] = ColorJitter(),
    course: Flat[Course] = Course(),
    run: Flat[Run] = RUN,
    repeats: pathlib.Path | None = None,
) -> None:
    """Fine-tune a pretrained net on your own images.

    Example: jaxft finetune photos --net resnet50

    DATA is a folder of class folders (with or without train, val and test above them), a table (csv, tsv or Parquet
    with the columns file and label, labels or value, and if you like group, split and weight), or tfds:NAME. Run the
    same again to go on where it stopped.

    Args:
        data: the folder, the table, or tfds:NAME.
        repeats: the folder of a run that this one is compared with at its end; --from RUN sets it, and takes the
            settings from there.
    """
    given = settings.flattened(locals())
    del given["repeats"]
    if run.folder == FOLDER:
        run = dataclasses.replace(run, folder=pathlib.Path("runs") / f"{sources.name_of(data)}-{start.net}")
    source = sources.read(data)
    plan = recipe.plan(source, start, split, batches, decode, (warp, color), course, run.seed)
    given |= {"data": _absolute(data), "folder": str(run.folder)}
    given |= {"image-size": plan.train.image_size[0], "batch-size": plan.train.batch_size}
    _tell(plan, run)
    findings = checking.examine(source, plan.train.indices, plan.held_out.indices, brief=True)
    _show_findings(findings)
    if not findings:
        devices.say("labels, groups and files show no fault; `jaxft check` looks at the pixels, too")
    _run(plan, run, given)
    if repeats is not None and devices.is_writer():
        _compare(run.folder, repeats)


def predict(
    run: Positional[pathlib.Path],
    images: Positional[tuple[str, ...]],
    tta: bool = False,
    out: pathlib.Path | None = None,
    which: Which | None = None,
) -> None:
    """Say what a trained net sees in images.

    Example: jaxft predict runs/photos-resnet50 new/ one.jpg --out predictions.csv

    Args:
        run: the folder of the run.
        images: files, or folders of them.
        tta: predict the mirror image, too, and take the mean of both.
        out: a csv for all of it; without it the first rows are printed.
        which: the state with the best held-out value or the last one; by default what the run ended with.
    """
    opened = model.open(run, which)
    dataset = sources.unlabelled(images, opened.classes, _task(opened).target)
    predictions = opened.predict(dataset, mirrored=tta)
    if devices.is_writer():
        from jaxft import report

        if out is None:
            report.print_predictions(predictions, dataset, SHOWN)
        else:
            report.write_predictions(_new(out), predictions, dataset)
            devices.say(f"{len(predictions):,} predictions are in {out}")


def evaluate(
    run: Positional[pathlib.Path],
    data: Positional[str],
    part: Literal["all", "train", "val", "test"] = "all",
    tta: bool = False,
    out: pathlib.Path | None = None,
    which: Which | None = None,
) -> None:
    """Measure a trained net on images whose labels are known.

    Example: jaxft evaluate runs/photos-resnet50 other_photos

    Args:
        run: the folder of the run.
        data: the folder, the table, or tfds:NAME; its classes are those of the run.
        part: the images of this part of the data, where the data say which are which.
        tta: predict the mirror image, too, and take the mean of both.
        out: a csv for the predictions.
        which: the state with the best held-out value or the last one; by default what the run ended with.
    """
    opened = model.open(run, which)
    task = _task(opened)
    read = sources.read(data, classes=opened.classes, target=task.target)
    indices = np.arange(len(read.dataset)) if part == "all" else np.flatnonzero(np.asarray(read.split) == part)
    if not len(indices):
        raise ValueError(f"no image of {data} is of the part {part}; leave --part out, or give data that say which is")
    predictions = opened.predict(read.dataset, indices, mirrored=tta)
    if devices.is_writer():
        from jaxft import report

        report.figures(f"{run} on {data}", task.metrics(predictions), {"images": f"{len(indices):,}"})
        if out is not None:
            report.write_predictions(_new(out), predictions, read.dataset)


def report(
    run: Positional[pathlib.Path],
    data: str | None = None,
    stages: tuple[str, ...] = (),
    which: Which | None = None,
) -> None:
    """Write report.html and report.md of a run, with its curves, mistakes and where the net looks.

    Example: jaxft report runs/photos-resnet50

    Args:
        run: the folder of the run.
        data: where its images are now; by default where they were. Of a run that no `jaxft finetune` made, all of them.
        stages: whose activations are shown over the images; by default the last one with a place.
        which: the state with the best held-out value or the last one; by default what the run ended with.
    """
    opened = model.open(run, which)
    read, indices = recipe.judged(run / SETTINGS, data, opened)
    predictions = opened.predict(read.dataset, indices)
    if devices.is_writer():
        _write_page(run, opened, read.dataset, predictions, stages)


def export(
    run: Positional[pathlib.Path],
    to: Literal["keras", "weights.h5", "onnx", "stablehlo", "safetensors"],
    out: pathlib.Path | None = None,
    which: Which | None = None,
) -> None:
    """Write a trained net for use without jaxft.

    Example: jaxft export runs/photos-resnet50 --to onnx

    Args:
        run: the folder of the run.
        to: the format.
        out: the file; by default model.FORMAT in the run's folder. It must not exist.
        which: the state with the best held-out value or the last one; by default what the run ended with.
    """
    from jaxft import export as ways_out

    opened = model.open(run, which)
    if devices.is_writer():
        devices.say(f"wrote {ways_out.write(opened, run / f'model.{to}' if out is None else out, to)}")


def serve(run: Positional[pathlib.Path], host: str = "127.0.0.1", port: int = 8000, which: Which | None = None) -> None:
    """Serve a trained net on a page for uploads and as JSON; wants `pip install 'jaxft[serve]'`.

    Example: jaxft serve runs/photos-resnet50

    Args:
        run: the folder of the run.
        host: the address to listen at; 127.0.0.1 is reached from this machine alone.
        port: to listen at.
        which: the state with the best held-out value or the last one; by default what the run ended with.
    """
    from jaxft import serve as server

    server.serve(model.open(run, which), host, port)


def check(data: Positional[str], split: Flat[Split] = Split(), seed: int = 0) -> None:
    """Look for what spoils a training run: broken files, doubles, leaks, labels that are nearly the same.

    Example: jaxft check photos

    Exit status 1 if something serious is found. Of the folder of a run, every file of its checkpoints is compared with
    its digest.

    Args:
        data: the folder, the table, or tfds:NAME; or the folder of a run.
        seed: of the split.
    """
    if ((folder := pathlib.Path(data).expanduser()) / "checkpoints").is_dir():
        _check_run(folder)
        return
    source = sources.read(data)
    division = recipe.divide(source, split, seed)
    findings = checking.examine(source, division.train, division.held_out)
    _show_findings(findings)
    if not findings:
        devices.say(f"{len(source.dataset):,} images of {data}: nothing found")
    if serious := sum(finding.serious for finding in findings):
        what = "1 serious finding" if serious == 1 else f"{serious} serious findings"
        raise ValueError(f"{what} in {data}: mend what is found, or know why it does not matter")


def lr_find(
    data: Positional[str],
    start: Flat[Start] = Start(),
    split: Flat[Split] = Split(),
    batches: Flat[Batches] = Batches(),
    decode: Flat[Decode] = Decode(),
    warp: Flat[Warp] = WARP,
    color: Flat[ColorJitter] = ColorJitter(),
    course: Flat[Course] = Course(),
    seed: int = 0,
    out: pathlib.Path = pathlib.Path("lr.png"),
) -> None:
    """Find a learning rate: train a copy for 100 steps at rising rates, and draw the loss.

    Example: jaxft lr-find photos --net resnet50

    Args:
        data: the folder, the table, or tfds:NAME.
        seed: of the order of images, augmentation and dropout.
        out: the picture.
    """
    from jaxft import lr_finder, report

    plan = recipe.plan(sources.read(data), start, split, batches, decode, (warp, color), course, seed)
    curve = lr_finder.find(plan.model, plan.task, plan.train, plan.phases[0], seed=seed, picture=out)
    if devices.is_writer():
        rate = "none: the loss does not fall" if curve.suggestion is None else f"{curve.suggestion:.2g}"
        flag = "--head-lr" if course.head_epochs else "--lr"
        report.table(f"{start.net} on {data}", {f"suggestion for {flag}": rate, "picture": out})


def list_nets() -> None:
    """List the nets, their cost, and the weights that are at hand.

    Example: jaxft nets
    """
    from jaxft import report

    rows = [
        (name, f"{spec.num_params / 1e6:.1f}", f"{spec.gmac:.2f}", "×".join(map(str, spec.native_size)), weights)
        for (name, spec), weights in zip(nets.ZOO.items(), pretrained.at_hand().values(), strict=True)
    ]
    report.columns("the nets", ("net", "million parameters", "GMAC", "pixels", "weights"), rows)


def port(arguments: Flat[port_weights.Arguments]) -> None:
    """Port a Keras weight file: print the report, convert, write back.

    Example: jaxft port vgg16 vgg16_weights_tf_dim_ordering_tf_kernels.h5
    """
    port_weights.main(arguments)


def main() -> None:
    """Runs the verb that the command line names."""
    verbs = (finetune, predict, evaluate, report, export, serve, check, lr_find, list_nets, port)
    names = {"list_nets": "nets"}
    command.run({names.get(verb.__name__, verb.__name__).replace("_", "-"): verb for verb in verbs})


def _tell(plan: Plan, run: Run) -> None:
    if devices.is_writer():
        from jaxft import report

        rows = [*recipe.told(plan), ("run", str(run.folder), "--folder --seed")]
        report.columns("what this run does", ("", "choice", "change it by"), rows)


def _check_run(folder: pathlib.Path) -> None:
    from jaxft.checkpoint import Checkpoints

    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        if not (steps := checkpoints.steps()):
            checkpoints.run()  # which says why there is none
        for step in steps:
            checkpoints.check(step)
        words = f"step {', '.join(map(str, steps))}"
        devices.say(f"the checkpoints of {folder} are what was saved: {words}")


def _show_findings(findings: list[checking.Finding]) -> None:
    for finding in sorted(findings, key=lambda finding: not finding.serious):
        devices.say(f"{'WARNING: ' if finding.serious else 'note: '}{finding.text}")


def _run(plan: Plan, run: Run, given: Mapping[str, Any]) -> None:
    from jaxft import report
    from jaxft.finetune import finetune as train

    if devices.is_writer() and not (run.folder / "config.json").exists():  # which could be another run's
        run.folder.mkdir(parents=True, exist_ok=True)
        settings.write(run.folder / SETTINGS, given)
    trained, predictions = train(plan.model, plan.task, plan.train, plan.held_out, plan.phases, run)
    dataset, test = plan.source.dataset, plan.division.test
    tested = trained.predict(dataset, test) if len(test) else None
    if devices.is_writer():
        settings.write(run.folder / SETTINGS, given)  # this run's, or `train` had refused
        _write_page(run.folder, trained, dataset, predictions, ())
        if tested is not None:
            files.write_json(run.folder / "test.json", plan.task.metrics(tested))
            report.figures("the test part of the data", plan.task.metrics(tested), {"images": f"{len(test):,}"})
        rows = {"weights": trained.source["source"], "look at": run.folder / "report.html"}
        report.result(f"{trained.name} on {dataset.name}", run.folder, rows)


def _compare(folder: pathlib.Path, other: pathlib.Path) -> None:
    if lines := runs.compare(folder, other.expanduser()):
        devices.say(f"WARNING: {folder} is not what {other} was (there → here):\n  " + "\n  ".join(lines))
    else:
        devices.say(f"{folder} is {other} once more: record, history and predictions are the same to the byte")


def _write_page(folder: pathlib.Path, opened: model.Model, dataset: Any, predictions: Any, stages: Any) -> None:
    from jaxft import page

    devices.say(f"the report is {page.write(folder, opened, dataset, predictions, stages=stages or None)}")


def _task(opened: model.Model) -> Any:
    if opened.task is None:
        raise ValueError("this model was saved before it was trained: it has no task, and predicts nothing")
    return opened.task


def _absolute(data: str) -> str:
    return data if data.startswith("tfds:") else str(pathlib.Path(data).expanduser().absolute())


def _new(path: pathlib.Path) -> pathlib.Path:
    path = path.expanduser()
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of --out {path} does not exist; make it first")
    return path
