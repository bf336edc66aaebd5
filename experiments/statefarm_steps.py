"""The steps of the State Farm solution, in order, on one set of folds: what `statefarm_solution` runs for each seed."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tyro.conf import OmitArgPrefixes as Flat

from experiments.standin import pretrain
from jaxft import crossval, devices, ensemble, features, files, gradcam, model, neighbours, submission, task
from jaxft import nets as zoo
from jaxft.data import Dataset, Inputs, decode, folds
from jaxft.data.augment import Chain, ColorJitter, Warp
from jaxft.data.mix import Halves
from jaxft.data.statefarm_files import CLASSES
from jaxft.ensemble import Probabilities
from jaxft.finetune import finetune
from jaxft.model import Model
from jaxft.neighbours import Neighbours
from jaxft.optim import InverseTime, NesterovSGD
from jaxft.phase import Phase
from jaxft.provenance import describe
from jaxft.runs import Run

REGIONS = ("whole:0,0,1,1", "head:0.05,0.2,0.5,0.5", "corner:0.5,0.5,0.5,0.5")  # by hand, as the winner's
Pair = tuple[Probabilities, Probabilities]  # out of fold, and of the test images

NEAREST = 20  # neighbours that are searched
MAPPED = 200  # images whose activation maps choose a region


@dataclasses.dataclass(frozen=True)
class Member:
    """One net of the ensemble: how it starts, and what is frozen."""

    net: str
    weights: str
    freeze: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the steps are.

    Attributes:
        nets: of the zoo; all are blended, and the first is the single net of the first row.
        weights: of each net, as in `vgg16_statefarm`; auto on the stand-in is hed-bsds500 for vgg16, and for other nets
            what they learn from other drawn drivers. Without it auto for all.
        freeze: of each net: none, all-but-head, through:STAGE, first:N, or a regular expression over layer names.
        epochs: passes over the training images.
        batch_size: images a step.
        image_size: height and width in pixels that a net sees of an image, and of each region.
        schedule, optimizer: of the training of all nets.
        clip_norm: largest global norm of the trainable layers' gradient.
        warp, jitter: of augmentation, without flips: left and right are classes.
        regions: NAME:TOP,LEFT,HEIGHT,WIDTH in fractions of the image, each; or NAME:map, the half of the image's height
            and width that speaks most for the right class, found from activation maps.
        composites: also try images of the left half of one driver and the right half of another.
        views: augmented ones of each image in prediction.
        confidence: the least probability of a pseudo-label.
        share: of pseudo-labels among training images, at most.
        folds: how many, by driver.
        leak: also show what random folds would say.
        dtype: of the computation: float32, bfloat16; auto is bfloat16 on a GPU and float32 on a CPU.
    """

    nets: tuple[str, ...] = ("vgg16", "resnet50")
    weights: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ("first:10", "none")
    epochs: int = 10
    batch_size: int = 16
    image_size: int = 224
    schedule: Flat[InverseTime] = InverseTime(1e-3, 1e-6)
    optimizer: Flat[NesterovSGD] = NesterovSGD()
    clip_norm: float | None = None
    warp: Flat[Warp] = Warp(rotation=10.0, shift=0.1)
    jitter: Flat[ColorJitter] = ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
    regions: tuple[str, ...] = REGIONS
    composites: bool = False
    views: int = 4
    confidence: float = 0.9
    share: float = 0.5
    folds: int = 5
    leak: bool = True
    dtype: str = "auto"

    @property
    def change(self) -> Chain:
        """The augmentation of training and of test-time views."""
        return Chain((self.warp, self.jitter))

    def phase(self, member: Member) -> Phase:
        """The one phase in which a net is trained."""
        return Phase(self.epochs, self.schedule, self.optimizer, member.freeze, clip_norm=self.clip_norm)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the nets of a step are trained."""

    regions: tuple[tuple[Any, ...], ...] = ()
    augmented: bool = False
    composites: bool = False


@dataclasses.dataclass(frozen=True)
class Said:
    """What the nets of a step say: for each net, for each fold, the held-out images and the test images."""

    held_out: Mapping[str, list[Probabilities]]
    test: Mapping[str, list[Probabilities]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One row of the results.

    Attributes:
        name, note: for people.
        out_of_fold: of all training images; None for a step that has none.
        test: of all test images.
        kept: whether later steps build on it; None where nothing is chosen.
        apart: transductive, or not comparable with the rows above.
    """

    name: str
    note: str
    out_of_fold: Probabilities | None
    test: Probabilities | None
    kept: bool | None = None
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Solved:
    """One seed's results: its run, its rows, and the folders of the nets behind the last of them."""

    run: Run
    steps: list[Step]
    runs: list[pathlib.Path]


def members(settings: Settings, is_standin: bool) -> tuple[Member, ...]:
    """The nets with their settings side by side.

    Raises:
        ValueError: not one weight file and one freezing for each net, or a net twice.
    """
    nets, freeze = settings.nets, settings.freeze
    weights = settings.weights or ("auto",) * len(nets)
    if not len(nets) == len(weights) == len(freeze) or len(set(nets)) < len(nets):
        raise ValueError(
            f"nets {list(nets)}, weights {list(weights)}, freeze {list(freeze)}: give one of each, and a net once"
        )

    def start(net: str, word: str) -> str:
        if word != "auto" or net == "vgg16":
            return word
        return str(pretrain.weights(net)) if is_standin else "imagenet"

    rows = zip(nets, weights, freeze, strict=True)
    return tuple(Member(net, start(net, word), frozen, settings.dtype) for net, word, frozen in rows)


class Solution:
    """The data, folds and folder of one seed, and what every step needs of them."""

    def __init__(
        self,
        settings: Settings,
        members: tuple[Member, ...],
        train: Dataset,
        test: Dataset,
        folder: pathlib.Path,
        run: Run,
    ):
        """`folder` holds Kaggle's files: a sample submission perhaps, and for the stand-in the test set's classes."""
        self.settings, self.members, self.train, self.test, self.run = settings, members, train, test, run
        self.answers = folder / "solution.csv" if (folder / "solution.csv").exists() else None
        sample = folder / "sample_submission.csv"
        self.asked = submission.sample(sample)[0] if sample.exists() else list(test.names)
        if missing := sorted(set(self.asked) ^ set(test.names)):
            raise ValueError(
                f"{sample} and the test images differ: {missing[0]} and {len(missing) - 1} more are in one alone; "
                f"unpack all of Kaggle's files again"
            )
        self.fold_of = folds.group_folds(train.groups, settings.folds, labels=train.labels, seed=run.seed)
        self.both = crossval.joined(train, test, f"{train.name} with test")
        data = {"train": train.fingerprint, "test": test.fingerprint}
        record = {"members": describe(members), "data": data, "seed": run.seed}
        self.stages = crossval.Stages(run.folder, describe(settings) | record)

    def start(self, member: Member, recipe: Recipe) -> Model:
        """The net before training, with its regions if there are any."""
        size = self.settings.image_size
        options: dict[str, Any] = zoo.any_size(member.net)
        if recipe.regions:
            options |= {"regions": recipe.regions, "region_size": (size, size)}
        return model.load(
            member.net,
            len(self.train.classes),
            weights=member.weights,
            dtype=member.dtype,
            seed=self.run.seed,
            **options,
        )

    def inputs(self, recipe: Recipe, dataset: Dataset, indices: np.ndarray) -> Inputs:
        """Training images as the recipe wants them; regions are cut from images of twice the size."""
        side = self.settings.image_size * (2 if recipe.regions else 1)
        doubled: dict[str, Any] = {"augment": self.settings.change, "views": 2, "plain_view": True}
        if recipe.composites:  # which are new in every step
            doubled = {"augment": self.settings.change, "mix": Halves()}
        return Inputs(dataset, indices, (side, side), self.settings.batch_size, **(doubled if recipe.augmented else {}))

    def says(
        self, trained: Model, dataset: Dataset, indices: np.ndarray | None = None, *, viewed: bool = False
    ) -> Probabilities:
        """What a net says of images, by itself or with test-time augmentation."""
        views: dict[str, Any] = {"augment": self.settings.change, "views": self.settings.views, "seed": self.run.seed}
        cached = self.run.cache_features != "off" and jax.default_backend() == "cpu"  # a GPU is faster than a disk
        found = trained.predict(dataset, indices, cache_features=cached, **(views if viewed else {}))
        return ensemble.of(found, dataset)

    def trained(self, name: str, recipe: Recipe, targets: list[np.ndarray] | None = None) -> Said:
        """The folds of every net under a recipe; those that are done are read."""
        held_out, test = {}, {}
        for member in self.members:
            places = [f"{name}/{member.net}/fold{fold}" for fold in range(self.settings.folds)]
            tables = [f"{place}-{side}" for place in places for side in ("held-out", "test")]
            if not self.stages.has(*tables):
                devices.say(f"{name}: {member.net}, {self.settings.folds} folds")
                self._folds(f"{name}/{member.net}", member, recipe, targets)
            held_out[member.net] = [self.stages.read(f"{place}-held-out") for place in places]
            test[member.net] = [self.stages.read(f"{place}-test") for place in places]
        return Said(held_out, test)

    def _folds(self, name: str, member: Member, recipe: Recipe, targets: list[np.ndarray] | None) -> None:
        """Trains the folds of one net; with targets, the test images that have some are trained on in every fold."""
        dataset = self.train if targets is None else self.both
        fold_of = np.concatenate([self.fold_of, np.full(len(dataset) - len(self.train), -1)])
        inputs = self.inputs(recipe, dataset, np.arange(len(self.train)))

        def changed(fold: int, train: Inputs) -> Inputs:
            if targets is None:
                return train
            pseudo = np.flatnonzero(~np.isnan(targets[fold][:, 0]))
            return dataclasses.replace(train, indices=np.union1d(train.indices, pseudo), targets=targets[fold])

        found = crossval.folds(
            self.start(member, recipe),
            task.classification(),
            inputs,
            fold_of,
            [self.settings.phase(member)],
            dataclasses.replace(self.run, folder=self.run.folder / name),
            changed=changed,
        )
        for fold, (trained, held_out) in enumerate(found):
            self.stages.once(f"{name}/fold{fold}-held-out", lambda held_out=held_out: held_out)
            self.stages.once(f"{name}/fold{fold}-test", lambda trained=trained: self.says(trained, self.test))

    def augmented(self, name: str) -> Said:
        """Test-time augmentation of the nets of a step."""
        held_out, test = {}, {}
        for member in self.members:
            for fold in range(self.settings.folds):
                place = f"{name}/{member.net}/fold{fold}"
                for side, dataset, into in (("held-out", self.train, held_out), ("test", self.test, test)):
                    indices = np.flatnonzero(self.fold_of == fold) if side == "held-out" else np.arange(len(dataset))

                    def predict(place: str = place, dataset: Dataset = dataset, indices: np.ndarray = indices):
                        return self.says(model.open(self.run.folder / place), dataset, indices, viewed=True)

                    into.setdefault(member.net, []).append(self.stages.once(f"{place}-{side}-views", predict))
        return Said(held_out, test)

    def refit(self, said: Said, recipe: Recipe, name: str, targets: np.ndarray | None, *, viewed: bool) -> Said:
        """With what nets say of the test images that were trained on all drivers, in the same way.

        One image of each class is left out, as a run has to be judged on something; nothing is chosen by it.
        """
        dataset = self.train if targets is None else self.both
        left_out = np.unique(self.train.labels, return_index=True)[1]
        indices = np.setdiff1d(np.arange(len(self.train)), left_out)
        if targets is not None:
            indices = np.union1d(indices, np.flatnonzero(~np.isnan(targets[:, 0])))
        inputs = dataclasses.replace(self.inputs(recipe, dataset, indices), targets=targets)

        def make(member: Member) -> Probabilities:
            phase = self.settings.phase(member)
            run = dataclasses.replace(self.run, folder=self.run.folder / f"refit/{member.net}", keep="last")
            judged = crossval.held_out(inputs, left_out)
            start, goal = self.start(member, recipe), task.classification()
            trained, _ = finetune(start, goal, inputs, judged, [phase], run, config={"after": name})
            return self.says(trained, self.test, viewed=viewed)

        found = {m.net: self.stages.once(f"refit/{m.net}-test", lambda m=m: make(m)) for m in self.members}
        return Said(said.held_out, {net: [*tables, found[net]] for net, tables in said.test.items()})

    def mean(self, said: Said) -> Pair:
        """(out of fold, test) of all nets: the geometric mean, on the test set over folds as well."""
        return ensemble.mean(self.out_of_fold(said)), ensemble.mean([t for net in said.test.values() for t in net])

    def out_of_fold(self, said: Said) -> list[Probabilities]:
        """A table of all training images for each net."""
        return [ensemble.join(tables).ordered(self.train.names) for tables in said.held_out.values()]

    def of_test(self, said: Said) -> list[Probabilities]:
        """A table of all test images for each net, the mean of its folds."""
        return [ensemble.mean(tables) for tables in said.test.values()]

    def targets(self, said: Said) -> list[np.ndarray]:
        """Soft labels of test images for each fold, by nets that have not seen the fold: NaN for all other images."""
        found = []
        for fold in range(self.settings.folds):
            table = ensemble.mean([tables[fold] for tables in said.test.values()])
            train = int((self.fold_of != fold).sum())
            confidence, share = self.settings.confidence, self.settings.share
            rows, soft = ensemble.pseudo_labels(
                table, confidence=confidence, share=share, train=train, seed=self.run.seed
            )
            targets = np.full((len(self.both), len(self.train.classes)), np.nan, np.float32)
            targets[len(self.train) + rows] = soft / soft.sum(1, keepdims=True)
            found.append(targets)
        return found

    def neighbours(self) -> tuple[list[Neighbours], Neighbours]:
        """(of each fold's images among themselves, of the test images), by features of the first net's start."""
        start = self.start(self.members[0], Recipe())
        stage = gradcam.stages(start, (self.settings.image_size,) * 2 + (3,))[-1]

        def of(dataset: Dataset, indices: np.ndarray) -> Neighbours:
            inputs = self.inputs(Recipe(), dataset, indices)
            rows = features.on_disk(start, stage, inputs)
            return neighbours.search(rows.array, min(NEAREST, len(indices)))

        within = [of(self.train, np.flatnonzero(self.fold_of == fold)) for fold in range(self.settings.folds)]
        return within, of(self.test, np.arange(len(self.test)))

    def region(self, word: str) -> tuple[Any, ...]:
        """NAME:TOP,LEFT,HEIGHT,WIDTH, or NAME:map, as a row of `nets.create`."""
        name, colon, where = word.partition(":")
        if colon and where == "map":
            opened = model.open(self.run.folder / f"single nets/{self.members[0].net}/fold0")
            some = np.linspace(0, len(self.train) - 1, min(MAPPED, len(self.train))).astype(int)
            assert opened.image_size is not None
            pixels = [
                decode.pixels(self.train.images[i], opened.image_size, self.train.names[i]) for i in some.tolist()
            ]
            return (name, *gradcam.box(gradcam.heatmaps(opened, np.stack(pixels), None, self.train.labels[some])))
        try:
            return (name, *map(float, where.split(",")))
        except ValueError:
            raise ValueError(f"region {word!r} is not NAME:TOP,LEFT,HEIGHT,WIDTH or NAME:map") from None

    def judged(self, table: Probabilities | None) -> Probabilities | None:
        """A table of test images with their labels, where they are known."""
        if table is None or self.answers is None:
            return table
        return submission.labelled(table, self.answers, list(CLASSES)).ordered(table.names)


def solve(
    settings: Settings, members: tuple[Member, ...], train: Dataset, test: Dataset, folder: pathlib.Path, run: Run
) -> Solved:
    """All steps for one seed; writes `submission.csv` and tables of every step into the run's folder.

    Raises:
        ValueError: the folder holds a solution of other settings; or as the parts.
    """
    solution = Solution(settings, members, train, test, folder, run)
    steps: list[Step] = []

    def tell(name: str, note: str, pair: tuple[Probabilities | None, Probabilities | None], **said: Any) -> Step:
        steps.append(Step(name, note, pair[0], solution.judged(pair[1]), **said))
        devices.say(line(steps[-1]))
        return steps[-1]

    recipe, name = Recipe(), "single nets"
    said = solution.trained(name, recipe)
    first = members[0].net
    single = said.held_out[first][0], said.test[first][0]
    tell("single net, single fold", f"{first}, fold 0 of {settings.folds}", single)
    if settings.leak:
        tell("the same, random folds", "consecutive frames leak: means nothing", (_leak(solution), None), apart=True)
    best = solution.mean(said)
    tell("folds and nets", f"geometric mean of {settings.folds} folds × {len(members)} nets", best, kept=True)
    changes: list[tuple[str, str, Callable[[], Recipe]]] = [
        (
            "views",
            "one trunk over regions: " + ", ".join(word.partition(":")[0] for word in settings.regions),
            lambda: dataclasses.replace(recipe, regions=tuple(solution.region(word) for word in settings.regions)),
        ),
        ("augmentation", "the set doubled by augmented copies", lambda: dataclasses.replace(recipe, augmented=True)),
    ]
    if settings.composites:
        note = "left half of one driver, right half of another"
        changes.append(("composites", note, lambda: dataclasses.replace(recipe, augmented=True, composites=True)))
    for change, note, change_recipe in changes:
        tried = change_recipe()
        found = solution.trained(change, tried)
        pair = solution.mean(found)
        if tell(change, note, pair, kept=_better(solution, pair, best)).kept:
            said, best, recipe, name = found, pair, tried, change
    found = solution.augmented(name)
    pair, note = solution.mean(found), f"mean of the image and {settings.views} augmented ones"
    viewed = _better(solution, pair, best)
    tell("test-time augmentation", note, pair, kept=viewed)
    if viewed:
        said, best = found, pair
    targets, pseudo = solution.targets(said), None
    counts = [int((~np.isnan(fold[:, 0])).sum()) for fold in targets]
    if all(counts):
        found = solution.trained("pseudo-labels", recipe, targets)
        if viewed:
            found = solution.augmented("pseudo-labels")
        pair = solution.mean(found)
        note = f"soft labels of {int(np.mean(counts)):,} test images from {settings.confidence:.0%} on"
        if tell("pseudo-labels", note, pair, kept=_better(solution, pair, best)).kept:
            said, best, name, pseudo = found, pair, "pseudo-labels", _any_fold(targets)
    said = solution.refit(said, recipe, name, pseudo, viewed=viewed)
    best = best[0], solution.mean(said)[1]
    tell("refit on all drivers", "its nets join the ensemble; out of fold nothing changes", best)
    best = _transductive(solution, _corrected(solution, said, best, tell), tell)
    ensemble.write(run.folder / "out-of-fold.csv", best[0])
    submission.write(run.folder / "submission.csv", best[1], solution.asked, list(CLASSES))
    runs = [run.folder / f"{name}/{member.net}/fold{fold}" for member in members for fold in range(settings.folds)]
    rows = [row(step) for step in steps]
    files.write_json(run.folder / "results.json", {"seed": run.seed, "steps": rows})
    return Solved(run, steps, runs)


def line(step: Step) -> str:
    """A step in one line."""
    words = []
    for name, table in (("out of fold", step.out_of_fold), ("test", step.test)):
        if table is not None and table.known.any():
            found = table.figures()
            words.append(f"{name} log loss {found['loss']:.4f} ± {found['loss_spread']:.4f}, {found['accuracy']:.2%}")
    kept = {True: "; kept", False: "; not kept", None: ""}[step.kept]
    return f"{step.name} ({step.note}): {'; '.join(words)}{kept}"


def row(step: Step) -> dict[str, Any]:
    """A step's figures as JSON values."""
    found: dict[str, Any] = {"name": step.name, "note": step.note, "kept": step.kept, "apart": step.apart}
    for side, table in (("out_of_fold", step.out_of_fold), ("test", step.test)):
        found[side] = table.figures() if table is not None and table.known.any() else None
    return found


def _lower(found: Pair, best: Pair) -> bool:
    return found[0].figures()["loss"] < best[0].figures()["loss"]


def _better(solution: Solution, found: Pair, best: Pair) -> bool:
    """Whether the out-of-fold log loss falls, each side at its own temperature, fitted on other folds.

    Without it a step that makes an ensemble less sure, as every mean does, is refused for what one number mends.
    """
    tempered = (
        ensemble.cross_fitted(ensemble.fit_temperature, pair[0], solution.fold_of).figures()["loss"]
        for pair in (found, best)
    )
    return next(tempered) < next(tempered)


def _leak(solution: Solution) -> Probabilities:
    """Out-of-fold predictions of the first net over folds by chance."""
    member = solution.members[0]
    name = f"random folds/{member.net}"

    def make() -> Probabilities:
        fold_of = folds.random_folds(solution.train.labels, solution.settings.folds, seed=solution.run.seed)
        inputs = solution.inputs(Recipe(), solution.train, np.arange(len(solution.train)))
        phases = [solution.settings.phase(member)]
        run = dataclasses.replace(solution.run, folder=solution.run.folder / name)
        start = solution.start(member, Recipe())
        found = crossval.folds(start, task.classification(), inputs, fold_of, phases, run, divided=True)
        return ensemble.join([table for _, table in found]).ordered(solution.train.names)

    return solution.stages.once(f"{name}/out-of-fold", make)


def _corrected(solution: Solution, said: Said, best: Pair, tell: Callable[..., Step]) -> Pair:
    """Weights of the nets, then corrections, each fitted on other folds than it is judged on."""
    tables, tests, fold_of = solution.out_of_fold(said), solution.of_test(said), solution.fold_of
    for name, fit in (("blend", ensemble.fit_blend), ("per class", ensemble.fit_per_class)):
        if len(tables) > 1:
            fitted = fit(tables)
            pair = ensemble.cross_fitted(fit, tables, fold_of), fitted(tests)
            if isinstance(fitted, ensemble.Blend):
                shares = zip((m.net for m in solution.members), fitted.weights, strict=True)
                note = "weights " + ", ".join(f"{net} {share:.2f}" for net, share in shares)
            else:
                note = "for each class the nets that are best at it"
            if tell(name, note, pair, kept=_better(solution, pair, best)).kept:
                best = pair
    for name, fit in (
        ("class biases", ensemble.fit_bias),
        ("temperature", ensemble.fit_temperature),
        ("clip", ensemble.fit_clip),
    ):
        fitted = fit(best[0])
        pair = ensemble.cross_fitted(fit, best[0], fold_of), fitted(best[1])
        values = dataclasses.astuple(fitted)[0]
        note = f"{values:.3g}" if isinstance(values, float) else ", ".join(f"{value:+.2f}" for value in values)
        if tell(name, note, pair, kept=_lower(pair, best)).kept:
            best = pair
    return best


def _transductive(solution: Solution, best: Pair, tell: Callable[..., Step]) -> Pair:
    """Neighbours, then segments; out of fold among the images of one fold."""
    within, of_test = solution.neighbours()
    rows = [np.flatnonzero(solution.fold_of == fold) for fold in range(solution.settings.folds)]
    parts = [best[0].at(r) for r in rows]

    def joined(tables: Sequence[Probabilities]) -> Probabilities:
        return ensemble.join(tables).ordered(solution.train.names)

    def but(fold: int) -> neighbours.Average:  # fitted on the other folds
        others = [other for other in range(len(parts)) if other != fold]
        return neighbours.fit_average([parts[o] for o in others], [within[o] for o in others])

    average = neighbours.fit_average(parts, within)
    averaged = [but(fold)(part, found) for fold, (part, found) in enumerate(zip(parts, within, strict=True))]
    pair = joined(averaged), average(best[1], of_test)
    note = f"mean over {average.k} nearest, width {average.width:g}; transductive"
    step = tell("neighbours", note, pair, kept=_lower(pair, best), apart=True)
    if step.kept:
        best, parts = pair, averaged
    share = neighbours.Share()
    pieces = [neighbours.segments(found) for found in within]
    of_test_pieces = neighbours.segments(of_test)
    pair = joined([share(p, s) for p, s in zip(parts, pieces, strict=True)]), share(best[1], of_test_pieces)
    lengths = np.bincount(of_test_pieces)
    films = lengths[lengths > 1]
    note = f"{len(films):,} pieces of film with {films.sum():,} test images; transductive"
    if tell("segments", note, pair, kept=_lower(pair, best), apart=True).kept:
        best = pair
    return best


def _any_fold(targets: list[np.ndarray]) -> np.ndarray:
    """For each image the mean of the folds' targets that there are; NaN where there is none."""
    known = [~np.isnan(fold) for fold in targets]
    count = np.sum(known, 0)
    total = np.sum([np.nan_to_num(fold) for fold in targets], 0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
