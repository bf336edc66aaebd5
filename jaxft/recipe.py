"""What `jaxft finetune` does unless it is told otherwise: a source of images → the values of a run.

First the new layers alone, then the upper stages as well, at lower rates the deeper they lie; the lower stages keep
what they learned from ImageNet. Every choice is a field here and a flag of the command, and `told` says each one aloud.
"""

import dataclasses
import math
import pathlib
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from jaxft import masking, memory, nets, optim, port_weights, settings
from jaxft import task as tasks
from jaxft.checks import check_count, check_real
from jaxft.data import Inputs, augment, folds, mix, order
from jaxft.data.augment import ColorJitter, Warp
from jaxft.data.dataset import Dataset
from jaxft.data.decode import Decode
from jaxft.data.readable import leave_out
from jaxft.data.source import Source, read
from jaxft.masking import TRAINABLE
from jaxft.model import Model, load
from jaxft.phase import Phase
from jaxft.task import Task

QUANTILES = 10  # strata of values
BATCH_SIZE = 16  # the Keras guide's, where it fits into memory


@dataclasses.dataclass(frozen=True)
class Start:
    """The net, and what fills it.

    Attributes:
        net: a net of the zoo; `jaxft nets` lists them.
        weights: auto, imagenet, hed-bsds500 (vgg16), none, or the path of a Keras weight file.
        order: kernel ordering of the file: auto, tf, th, th-tf-kernels or tf-th-kernels.
        ignore: patterns of layers of the file that the net has no place for.
        names: the file's name of a layer and the net's, for names of one's own: my_output=predictions.
        head: gap (global average pooling), gap:256 (and a hidden layer), or fc (the file's dense layers before its
            last one, in VGG and MobileNetV3).
        dropout: share of units dropped before the last layer, where the net takes it.
        dtype: of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU.
    """

    net: str = "resnet50"
    weights: str = "auto"
    order: str = "auto"
    ignore: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    head: str = "gap"
    dropout: float | None = None
    dtype: str = "auto"


@dataclasses.dataclass(frozen=True)
class Split:
    """Which images judge the net, where the data do not say it themselves.

    Attributes:
        val: share of the images that is held out. Groups stay whole; without groups each class gives its share.
        fold: hold out this fold of `folds` instead, from 0.
        folds: how many folds there are.
    """

    val: float = 0.2
    fold: int | None = None
    folds: int = 5

    def __post_init__(self):
        check_real("--val", self.val, lambda share: 0 < share < 1, "a share between 0 and 1, 0.2 say")
        check_count("--folds", self.folds, 2)
        if self.fold is not None:
            check_count("--fold", self.fold, 0)
            if self.fold >= self.folds:
                raise ValueError(f"--fold {self.fold} does not exist: {self.folds} folds are 0 to {self.folds - 1}")


@dataclasses.dataclass(frozen=True)
class Batches:
    """How images reach the net.

    Attributes:
        image_size: height and width in pixels; by default what the weights were made for.
        batch_size: images a step; by default 16, or what fits into memory.
        views: fixed augmented views of each image, which epochs take in turn: the frozen stages then run once for each
            and not in every epoch. By default a new view at every step.
        mixup: alpha of mixup; 0 mixes nothing.
        cutmix: alpha of cutmix; 0 mixes nothing.
        balance: none; sample (each class equally often); weights (each class the same part in the loss).
        corrupt: largest share of images that cannot be decoded, which are left out and named; at 0 the first one ends
            the run.
    """

    image_size: int | None = None
    batch_size: int | None = None
    views: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    balance: Literal["none", "sample", "weights"] = "none"
    corrupt: float = 0.0

    def __post_init__(self):
        for flag, value in (("--image-size", self.image_size), ("--batch-size", self.batch_size)):
            if value is not None:
                check_count(flag, value, 1)
        if self.mixup and self.cutmix:
            raise ValueError("--mixup and --cutmix exclude each other: give one of them")


@dataclasses.dataclass(frozen=True)
class Course:
    """What is trained, how fast and for how long: the new layers first, then the upper stages, too.

    Attributes:
        head_epochs: passes that train the new layers alone.
        epochs: passes that train the upper stages as well; with 0 the new layers alone are trained.
        freeze: what the second phase leaves as it is: auto (the lower two thirds of the stages), none, through:STAGE,
            first:N, or a regular expression over layer names.
        optimizer: adamw, which takes features of any scale at the same rates; nesterov (as Keras computes it); or sgd.
        head_lr: rate of the first phase, which falls by half a cosine.
        lr: rate of the new layers in the second phase, which falls by half a cosine.
        lr_factor: in the second phase, rate of the upper half of the open stages as a share of `lr`, and once more of
            the lower half as a share of that.
        clip_norm: largest norm of the gradient; 0 clips nothing.
        patience: epochs of the second phase without a better held-out loss after which it ends; 0 never ends it early.
        average: decay of a moving average of the weights; 0 keeps none.
        label_smoothing: share of the target that is spread over all classes.
    """

    head_epochs: int = 5
    epochs: int = 15
    freeze: str = "auto"
    optimizer: Literal["adamw", "nesterov", "sgd"] = "adamw"
    head_lr: float = 1e-3
    lr: float = 3e-4
    lr_factor: float = 0.3
    clip_norm: float = 1.0
    patience: int = 5
    average: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        check_count("--head-epochs", self.head_epochs, 0)
        check_count("--epochs", self.epochs, 0)
        check_count("--patience", self.patience, 0)
        if not self.head_epochs + self.epochs:
            raise ValueError("--head-epochs 0 and --epochs 0 train nothing: give one of them 1 or more")
        for flag, value in (("--head-lr", self.head_lr), ("--lr", self.lr), ("--lr-factor", self.lr_factor)):
            check_real(flag, value, lambda rate: rate > 0, "a finite number above 0")


OPTIMIZERS: dict[str, optim.Optimizer] = {
    "nesterov": optim.NesterovSGD(),
    "sgd": optim.SGD(momentum=0.9),
    "adamw": optim.AdamW(),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Division:
    """Who trains and who judges.

    Attributes:
        train, held_out: int [n], indices of the dataset; every one has a known label.
        test: int [n], the images that the data keep for the end; empty where they keep none.
        how: in words.
    """

    train: np.ndarray
    held_out: np.ndarray
    test: np.ndarray
    how: str


def divide(source: Source, split: Split, seed: int) -> Division:
    """Takes the split that the data state, else whole groups, else each class in proportion.

    A test part is never used to choose the best epoch; without a validation part, one is taken from the rest.

    Raises:
        ValueError: too few images with a known label, or a split that leaves a part empty.
    """
    dataset = source.dataset
    _require_classes(dataset)
    known = dataset.has_label
    said = np.asarray(source.split if source.split else [""] * len(dataset))
    test, val = (np.flatnonzero(known & (said == part)) for part in ("test", "val"))
    rest = np.flatnonzero(known & (said != "test") & (said != "val"))
    if len(val) and split.fold is None:
        if not len(rest):
            raise ValueError("no image with a known label is left to train on; give some the split train")
        return Division(rest, val, test, "the validation part of the data")
    rest = np.union1d(rest, val)
    if len(rest) < 2:
        raise ValueError(f"{len(rest)} images with a known label are too few to train on some and judge by others")
    groups = [dataset.groups[i] for i in rest]
    if len(set(groups)) < len(groups):
        count = split.folds if split.fold is not None else max(2, round(1 / split.val))
        fold, count = split.fold or 0, min(count, max(2, len(set(groups))))
        train, held_out = folds.split(groups, fold, count, seed)
        how = f"whole groups, {len({groups[i] for i in held_out})} of {len(set(groups))}"
    else:
        strata, unit = _strata(dataset, rest)
        if split.fold is not None:
            of = _stratified_folds(strata, split.folds, seed)
            train, held_out = np.flatnonzero(of != split.fold), np.flatnonzero(of == split.fold)
        else:
            train, held_out = folds.stratified_split(strata, 1 - split.val, seed)
        how = f"at random, {unit} in proportion"
    if split.fold is not None:
        how = f"fold {split.fold} of {split.folds}: {how}"
    return Division(rest[train], rest[held_out], test, how)


def _require_classes(dataset: Dataset) -> None:
    """Refuses a dataset of one class, or of a class that cannot be both trained on and judged by."""
    if dataset.target != "class":
        return
    counts = np.bincount(dataset.labels[dataset.labels >= 0], minlength=len(dataset.classes))
    present = [name for name, count in zip(dataset.classes, counts, strict=True) if count]
    if len(present) < 2:
        raise ValueError(
            f"{dataset.name} holds images of {present[0]!r} alone: there is nothing to tell apart; add a class"
            if present
            else f"{dataset.name}: no label is known; give images with labels"
        )
    if alone := [name for name, count in zip(dataset.classes, counts, strict=True) if count == 1]:
        raise ValueError(
            f"{dataset.name} holds one image of {', '.join(alone[:3])}: it cannot both train the net and judge it; add "
            f"images of that class, or take it out"
        )


def _strata(dataset: Dataset, indices: np.ndarray) -> tuple[list[Any], str]:
    labels = dataset.labels[indices]
    if dataset.target == "class":
        return labels.tolist(), "each class"
    if dataset.target == "labels":
        return [tuple(row) for row in labels.tolist()], "each set of labels"
    edges = np.nanquantile(labels[:, 0], np.linspace(0, 1, QUANTILES + 1)[1:-1])
    return np.searchsorted(edges, np.nan_to_num(labels[:, 0], nan=-np.inf)).tolist(), "tenths of the values"


def _stratified_folds(strata: Sequence[Any], count: int, seed: int) -> np.ndarray:
    """The fold of each example, by folds taken off one after another, each the same share of every stratum."""
    of, left = np.zeros(len(strata), int), np.arange(len(strata))
    for fold in range(count - 1):
        taken, rest = folds.stratified_split([strata[i] for i in left.tolist()], 1 / (count - fold), seed + fold)
        of[left[taken]], left = fold, left[rest]
    of[left] = count - 1
    return of


def task_of(dataset: Dataset, course: Course) -> Task:
    """Classification, several labels or values, by what the labels are; values lie in their range and a tenth more."""
    if dataset.target == "class":
        return tasks.classification(label_smoothing=course.label_smoothing)
    if dataset.target == "labels":
        return tasks.multilabel(label_smoothing=course.label_smoothing)
    if course.label_smoothing:
        raise ValueError("--label-smoothing is for classes and labels; these data hold values: leave it out")
    low, high = float(np.nanmin(dataset.labels)), float(np.nanmax(dataset.labels))
    room = 0.1 * (high - low) or 1.0
    return tasks.regression(range=(low - room, high + room))


def model_of(start: Start, num_classes: int, channels: int, seed: int) -> Model:
    """The net for this many classes, filled from its weight file.

    Raises:
        ValueError, FileNotFoundError, fetch.Unavailable: as `model.load`.
    """
    options: dict[str, Any] = nets.any_size(start.net) | nets.head_options(start.net, start.head)
    if start.dropout is not None:
        many = getattr(nets.create(start.net), "dropout", 0.0)  # GoogLeNet has a rate for each of its heads
        options["dropout"] = (start.dropout,) * len(many) if isinstance(many, tuple) else start.dropout
    settings = {name: getattr(start, name) for name in ("weights", "order", "dtype", "ignore")}
    settings["names"] = port_weights.pairs(start.names)
    return load(start.net, num_classes, seed=seed, channels=channels, **settings, **options)


def inputs_of(
    source: Source,
    division: Division,
    batches: Batches,
    decode: Decode,
    changes: Sequence[Warp | ColorJitter],
    sizes: tuple[int, int],
) -> tuple[Inputs, Inputs]:
    """(train, held_out). `changes` are augmentations, of which those that change nothing are left out.

    Args:
        sizes: (side in pixels, images a batch).

    Raises:
        ValueError: as `Inputs`.
    """
    side, batch = sizes
    dataset = source.dataset
    used = [change for change in changes if change != type(change)()]
    mixing = mix.Mixup(batches.mixup) if batches.mixup else mix.CutMix(batches.cutmix) if batches.cutmix else None
    weights = source.weights
    if batches.balance == "weights":
        balancing = order.class_weights(dataset, division.train)
        weights = balancing if weights is None else balancing * weights
    common = {"image_size": (side, side), "batch_size": min(batch, len(division.train)), "decode": decode}
    train = Inputs(
        dataset,
        division.train,
        augment=None if not used else used[0] if len(used) == 1 else augment.Chain(tuple(used)),
        mix=mixing,
        views=batches.views,
        weights=weights,
        order=order.balanced if batches.balance == "sample" else order.shuffled,
        **common,
    )
    return train, Inputs(dataset, division.held_out, **common)


def phases_of(model: Model, course: Course, steps_per_epoch: int) -> list[Phase]:
    """The phases of a run: the head, then the upper stages with it.

    Raises:
        ValueError: `freeze` fits no layer, or a value is out of its range.
    """
    optimizer = OPTIMIZERS[course.optimizer]
    common = {"optimizer": optimizer, "clip_norm": course.clip_norm or None, "average": course.average or None}
    found = []
    if course.head_epochs:
        cosine = optim.Cosine(course.head_lr, course.head_epochs * steps_per_epoch)
        found.append(Phase(course.head_epochs, cosine, frozen="all-but-head", **common))
    if course.epochs:
        frozen = lower_stages(model.net, model.variables["params"]) if course.freeze == "auto" else course.freeze
        cosine = optim.Cosine(course.lr, course.epochs * steps_per_epoch)
        groups = halves(model, frozen)
        rates = {name: optim.Scaled(cosine, course.lr_factor**depth) for depth, name in enumerate(groups, 1)}
        schedule: Any = cosine if not groups else {TRAINABLE: cosine, **rates}
        found.append(
            Phase(course.epochs, schedule, frozen=frozen, groups=groups, patience=course.patience or None, **common)
        )
    return found


def lower_stages(net: Any, weighted: Collection[str]) -> str:
    """The specification that freezes the lower two thirds of the stages of a backbone; `weighted` have weights."""
    of_backbone = set(weighted) - set(net.head_layers())
    stages = [stage for stage, layers in net.layers().items() if set(layers) & of_backbone]
    return f"through:{stages[len(stages) - math.ceil(len(stages) / 3) - 1]}" if len(stages) > 1 else "all-but-head"


def halves(model: Model, frozen: str) -> dict[str, str]:
    """Groups of the layers that were pretrained and are not frozen: label → the pattern of their names.

    "upper" is the later half of their stages and "lower" the earlier one; a single stage is "upper".
    """
    params = model.variables["params"]
    head, still = set(model.net.head_layers()), masking.frozen_layers(model.net, frozen, params)
    stages = []
    for layers in model.net.layers().values():
        if open_layers := [layer for layer in layers if layer in params and layer not in still and layer not in head]:
            stages.append(open_layers)
    middle = len(stages) // 2
    parts = {"upper": stages[middle:], "lower": stages[:middle]}
    return {label: "|".join(layer for layers in part for layer in layers) for label, part in parts.items() if part}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The values of a run, made of a source by the recipe."""

    source: Source
    division: Division
    model: Model
    task: Task
    train: Inputs
    held_out: Inputs
    phases: list[Phase]


def plan(
    source: Source,
    start: Start,
    split: Split,
    batches: Batches,
    decode: Decode,
    changes: Sequence[Warp | ColorJitter],
    course: Course,
    seed: int,
) -> Plan:
    """Everything that `finetune.finetune` takes, but the folder.

    Raises:
        ValueError: what was asked for does not fit together, or does not fit into memory.
        FileNotFoundError, fetch.Unavailable: the weights cannot be had.
    """
    source = dataclasses.replace(source, dataset=leave_out(source.dataset, decode, batches.corrupt))
    spec, division = nets.spec(start.net), divide(source, split, seed)
    task, side = task_of(source.dataset, course), batches.image_size or spec.native_size[0]
    model = model_of(start, len(source.dataset.classes), decode.channels, seed)
    wanted = batches.batch_size or min(BATCH_SIZE, len(division.train))
    sides = partial(inputs_of, source, division, batches, decode, changes)
    if batches.batch_size is None:
        train, _ = sides((side, wanted))
        widest = phases_of(model, course, train.steps_per_epoch)[-1]  # which trains the most layers
        wanted = memory.largest_batch(model, task, widest, train, wanted)
    train, held_out = sides((side, wanted))
    return Plan(source, division, model, task, train, held_out, phases_of(model, course, train.steps_per_epoch))


def judged(file: pathlib.Path, data: str | None, model: Model) -> tuple[Source, np.ndarray]:
    """The images that judged a run, and their indices, int [n], read once more.

    Args:
        file: the run's `settings.yaml`. Where there is none, `data` must be given, and all of its images judge.
        data: where the images are now; None: where they were.
        model: of the run.

    Raises:
        ValueError, OSError: the images are no longer there, or are others.
    """
    target = None if model.task is None else model.task.target
    if not file.is_file():
        if data is None:
            raise ValueError(f"there is no {file}: where the images of this run are is not known; say it by --data")
        source = read(data, classes=model.classes, target=target)
        return source, np.arange(len(source.dataset))
    found = settings.read(file)
    source = read(data or found["data"], classes=model.classes, target=target)
    source = dataclasses.replace(source, dataset=leave_out(source.dataset, model.decode, found.get("corrupt", 0.0)))
    split = Split(**{field.name: found[field.name] for field in dataclasses.fields(Split)})
    return source, divide(source, split, found["seed"]).held_out


def told(plan: Plan) -> list[tuple[str, str, str]]:
    """What was chosen: (what, the choice, the flags that change it)."""
    dataset, division, model, train = plan.source.dataset, plan.division, plan.model, plan.train
    side = train.image_size[0]
    kinds = {"class": "classes", "labels": "labels", "values": "values"}
    lines = [
        ("data", f"{len(dataset):,} images, {len(dataset.classes)} {kinds[dataset.target]}", ""),
        (
            "split",
            f"{len(division.train):,} train, {len(division.held_out):,} judge"
            + (f", {len(division.test):,} are kept for the end" if len(division.test) else "")
            + f" ({division.how})",
            "--val --fold",
        ),
        ("net", f"{model.name}, weights: {model.source.get('source', 'given')}", "--net --weights --head"),
        ("images", f"{side}×{side} pixels ({train.decode.resize}), {train.batch_size} a step", "--image-size --resize"),
        ("changes", _changes(train), "--rotation … --mixup"),
    ]
    for number, phase in enumerate(plan.phases, 1):
        rates = ", ".join(
            f"{_peak(schedule):.2g}" + ("" if name == TRAINABLE else f" ({name})")
            for name, schedule in phase.schedules().items()
        )
        early = f", fewer if {phase.patience} in a row are no better" if phase.patience else ""
        what = "the new layers" if phase.frozen == "all-but-head" else f"all but what {phase.frozen} freezes"
        flags = "--head-epochs --head-lr" if phase.frozen == "all-but-head" else "--epochs --lr --freeze --patience"
        lines.append((f"phase {number}", f"{what}: {phase.duration}{early}; rate {rates}", flags))
    return lines


def _peak(schedule: Any) -> float:
    return float(schedule(0))


def _changes(train: Inputs) -> str:
    parts = [repr(value) for value in (train.augment, train.mix) if value is not None]
    return "; ".join(parts) if parts else "none"
