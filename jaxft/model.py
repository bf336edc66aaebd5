"""`Model`: a net with what fills it, from a Keras weight file, from a finished run, or of one's own."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft import devices, features, files, nets, port_weights, preprocess, pretrained
from jaxft.checkpoint import Checkpoints
from jaxft.checks import check_count
from jaxft.data import Augment, Dataset, Inputs, loader
from jaxft.data.decode import RGB, Decode
from jaxft.nets.common import of_channels
from jaxft.predict import EvalStep, Predictions, evaluate
from jaxft.pretrained import Weights
from jaxft.provenance import describe
from jaxft.task import TASKS, Task

FORMAT = 2  # of model.json
FUNCTIONS = ("encode", "losses", "outputs", "score", "metrics")  # of a task


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A net and its variables; what follows `source` is known of a trained model alone.

    Attributes:
        net: a Flax module that keeps the backbone contract; its `frozen` field says what stays as it is.
        variables: {"params", "batch_stats"}, layer → leaf → array, float32. Training never changes them.
        preprocessing: the name of the function of `jaxft.preprocess` that the weights expect.
        name: of the net in the zoo; None for a net of one's own.
        source: where the weights come from, as JSON values.
        task: what it was trained for.
        classes: the names of its outputs.
        image_size: (height, width) in pixels.
        batch_size: of prediction; another one may round differently.
        decode: how its images become pixels.
    """

    net: Any
    variables: Mapping[str, Any]
    preprocessing: str
    name: str | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: Task | None = None
    classes: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    batch_size: int = 16
    decode: Decode = RGB

    def __post_init__(self):
        preprocess.get(self.preprocessing)
        if not isinstance(self.net, nn.Module):
            raise ValueError(f"net={self.net!r} is not a Flax module; make one with nets.create(NAME, NUM_CLASSES)")
        if "params" not in self.variables:
            raise ValueError(f'variables hold {sorted(self.variables)}; expected {{"params": …, "batch_stats": …}}')

    @property
    def channels(self) -> int | None:
        """How many channels its images have; None if no layer of the net with a kernel says it."""
        params = self.variables["params"]
        layer = first_layer(self.net, params)
        return None if layer is None else params[layer]["kernel"].shape[-2]

    def description(self) -> dict[str, Any]:
        """The net, its preprocessing and the source of its weights, as JSON values."""
        if self.name is None:
            fields = [field.name for field in dataclasses.fields(self.net) if field.name not in ("parent", "name")]
            options = {name: repr(getattr(self.net, name)) for name in fields}
        else:
            options = nets.options(self.name, self.net)
        options.pop("frozen", None)  # which phases say, and every checkpoint
        net = type(self.net).__qualname__ if self.name is None else self.name
        return {"net": net, "options": options, "preprocessing": self.preprocessing, "source": dict(self.source)}

    def trained(self, keep: str = "last") -> dict[str, Any]:
        """What `model.json` says: `description`, what is known of a trained model, and which state `open` takes."""
        task = None
        if self.task is not None:
            task = {name: getattr(self.task, name) for name in ("name", "monitor", "best")}
            task |= {"options": dict(self.task.options), "replaced": _replaced(self.task)}
        return {
            "format": FORMAT,
            **self.description(),
            "zoo": self.name is not None,
            "task": task,
            "classes": list(self.classes),
            "image_size": None if self.image_size is None else list(self.image_size),
            "batch_size": self.batch_size,
            "decode": dataclasses.asdict(self.decode),
            "keep": keep,
        }

    def predict(
        self,
        images: Dataset | Sequence[bytes | np.ndarray],
        indices: np.ndarray | None = None,
        *,
        mirrored: bool = False,
        augment: Augment | None = None,
        views: int = 4,
        seed: int = 0,
        cache_features: bool = False,
    ) -> Predictions:
        """What the model says of images: the same to the bit in every process of one machine and batch size.

        Args:
            images: a dataset, or a sequence of images, each the bytes of a file or uint8 [H, W, 3].
            indices: which of them, int [n]; all by default.
            mirrored: predict each image and its mirror image (left and right exchanged), and take the mean of both.
            augment: predict each image as it is and augmented by this, and take the mean: test-time augmentation.
            views: how many augmented ones of each image; what is drawn depends on `seed`, the image's place in the
                dataset and the view.
            cache_features: keep what the frozen first stages give of the images on disk, so that other models with the
                same ones, as those of folds, need not compute it again. Where there are none it changes nothing.

        Raises:
            ValueError: the model was never trained, so that size and task are not known, or fewer than one view; or as
                `decode.pixels`.
        """
        if self.task is None or self.image_size is None:
            raise ValueError("this model has no task yet: train it with finetune, or use predict.evaluate yourself")
        dataset = images if isinstance(images, Dataset) else unlabelled(images, self.classes, self.task.target)
        inputs = Inputs(
            dataset,
            np.arange(len(dataset)) if indices is None else indices,
            self.image_size,
            self.batch_size,
            decode=self.decode,
        )
        eval_step = self._both_ways if mirrored else self._eval_step
        mesh = devices.mesh()
        variables = {kind: self.variables.get(kind, {}) for kind in ("params", "batch_stats")}
        variables = devices.replicate(variables, mesh)
        stage = features.cut(self.net, list(self.variables["params"])) if cache_features and not mirrored else None
        read = partial(loader.eval_batches, inputs, process=devices.process())
        if stage is None:
            plain = evaluate(eval_step, variables, read(dataset.images), mesh, len(inputs))
        else:
            rows = features.on_disk(self, stage, inputs)
            cached = (batch | {"image": rows.take(batch["index"])} for batch in read(None))
            after = features.eval_step_after(self.net, stage, self.task)
            plain = evaluate(after, variables, cached, mesh, len(inputs))
        if augment is None:
            return plain
        check_count("views", views, 1)
        change = features.make_view(augment, seed)

        def viewed(batch: dict[str, Any], view: int) -> dict[str, Any]:
            return batch | {"image": change(batch["image"], features.row(view, batch["index"], len(dataset)))}

        found = [plain.outputs]
        for view in range(views):
            batches = (viewed(batch, view) for batch in read(dataset.images))
            found.append(evaluate(eval_step, variables, batches, mesh, len(inputs)).outputs)
        return dataclasses.replace(plain, outputs=np.mean(found, 0, dtype=np.float64).astype(np.float32))

    @functools.cached_property
    def _eval_step(self) -> EvalStep:  # compiled once, however often `predict` is called
        assert self.task is not None
        return features.eval_step(self.net, list(self.variables["params"]), self.preprocessing, self.task)

    @functools.cached_property
    def _both_ways(self) -> EvalStep:
        @jax.jit
        def both(variables: Any, images: jax.Array) -> jax.Array:
            return (self._eval_step(variables, images) + self._eval_step(variables, images[:, :, ::-1])) / 2

        return both

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a folder that `open` reads: `model.json` and the variables.

        Raises:
            ValueError: the folder exists and is not empty.
            OSError, CheckpointError: it cannot be written.
        """
        folder = pathlib.Path(folder).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists already; name a new folder to save the model in")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(folder / "checkpoints", {})
        try:
            checkpoints.save_variables(dict(self.variables), sorted(self.net.frozen))
        finally:
            checkpoints.close()
        if devices.is_writer():
            files.write_json(folder / "model.json", self.trained())


def _replaced(task: Task) -> list[str]:
    """The functions of a task that are not those that its name and options make."""
    made = TASKS[task.name](**task.options)
    return [name for name in FUNCTIONS if describe(getattr(task, name)) != describe(getattr(made, name))]


def unlabelled(images: Sequence[bytes | np.ndarray], classes: Sequence[str], target: str) -> Dataset:
    """A dataset of images whose labels are unknown; `target` and `classes` are those of the task to come."""
    names = tuple(map(str, range(len(images))))
    shape = (len(images),) if target == "class" else (len(images), len(classes))
    labels = np.full(shape, np.nan, np.float32) if target == "values" else np.full(shape, -1, np.int32)
    return Dataset("images", images, labels, names, names, tuple(classes), target)  # type: ignore[arg-type]


def load(
    name: str,
    num_classes: int | None = None,
    *,
    weights: str | pathlib.Path | Weights = "auto",
    order: str = "auto",
    dtype: Any = "auto",
    seed: int = 0,
    ignore: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    channels: int = 3,
    **options: Any,
) -> Model:
    """A net of the zoo for a new task, filled from a Keras weight file.

    Args:
        name: of the net.
        num_classes: width of the new last layer; None keeps the published one.
        weights: "auto", "imagenet", "hed-bsds500", "none" (random values), the path of a file, or what
            `pretrained.resolve` gave.
        order: kernel ordering of the file, as in `port_weights.load`.
        dtype: of the computation: float32, bfloat16, or "auto": bfloat16 on a GPU or TPU and float32 on a CPU.
        seed: of layers that the file does not fill.
        ignore: patterns of layers of the file that the net has no place for, as in `port_weights.load`.
        names: the file's name of a layer → the net's, as there.
        channels: of the images; for another number than 3 the first kernel is adapted, as `preprocess.adapt` says.
        options: further fields of the net's class: `hidden`, `dropout`, `fc` of VGG.

    Raises:
        ValueError, FileNotFoundError, fetch.Unavailable: as `nets.create`, `pretrained.resolve`, `port_weights.load`.
    """
    spec = nets.spec(name)
    num_classes = spec.num_classes if num_classes is None else num_classes
    options["dtype"] = compute_dtype(dtype)
    net: Any = nets.create(name, num_classes, **options)
    if not isinstance(weights, Weights):
        weights = pretrained.resolve(name, weights, classifier=getattr(net, "fc", False))
    if weights.path is None:
        variables = nets.init(net, spec.native_size, seed)
        told = f"{name} starts from random weights (seed {seed})"
    else:
        regions = isinstance(net, nets.Regions)  # the file fills the trunk; the layers of the regions are new
        variables, told = port_weights.load(
            name,
            weights.path,
            num_classes=None if regions else num_classes,
            order=order,
            seed=seed,
            ignore=(*weights.ignore, *ignore),
            names=names,
            **(dict(net.options) | {"dtype": net.dtype} if regions else options),
        )
        if regions:
            fresh = nets.init(net, spec.native_size, seed)["params"]
            filled: dict[str, Any] = dict(variables["params"])
            variables = {**variables, "params": {layer: filled.get(layer, fresh[layer]) for layer in fresh}}
    devices.say(str(told))
    variables = {kind: dict(variables.get(kind, {})) for kind in ("params", "batch_stats")}
    check_count("channels", channels, 1)
    if channels != 3:
        layer = first_layer(net, variables["params"])
        assert layer is not None  # in every net of the zoo
        kernel = preprocess.adapt(np.asarray(variables["params"][layer]["kernel"]), channels, weights.preprocessing)
        variables["params"][layer] = {**variables["params"][layer], "kernel": kernel}
        for norm in set(variables["batch_stats"]) - set(variables["params"]):  # of the images themselves
            leaves = variables["batch_stats"][norm]
            adapted = {
                leaf: np.array(of_channels(list(leaves[leaf]), channels), np.float32) for leaf in ("mean", "var")
            }
            variables["batch_stats"][norm] = {**leaves, **adapted}
    return Model(net, variables, weights.preprocessing, name, weights.record())


def first_layer(net: Any, params: Mapping[str, Any]) -> str | None:
    """The name of the layer that sees the images: the first that has a kernel."""
    layers = (layer for layers in net.layers().values() for layer in layers)
    return next((layer for layer in layers if "kernel" in params.get(layer, {})), None)


def compute_dtype(dtype: Any) -> Any:
    """For "auto" float32 on a CPU and bfloat16 on a GPU or TPU; else what is given.

    On a CPU with instructions for bfloat16 that type is faster for wide convolutions, but what a run computes must not
    depend on which processor it finds.
    """
    if dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return dtype


def open(
    folder: str | pathlib.Path,
    which: Literal["best", "last"] | None = None,
    *,
    average: bool = True,
    net: Any = None,
    task: Task | None = None,
) -> Model:
    """The model that a run, or `Model.save`, left in a folder; nothing of the experiment is needed.

    Args:
        folder: of the run.
        which: the state with the best monitored value, or the last one. By default what the run ended with.
        average: take the averaged weights, where the run kept any.
        net: the module, for a net that is not of the zoo: a folder holds data and no code.
        task: for the same reason, a task with functions of one's own; without it all but `outputs`, which must be
            given, are those of `jaxft.task`.

    Raises:
        FileNotFoundError: there is no such folder, or no model in it.
        ValueError: `which` is neither, `model.json` is damaged, or a net or task is needed and not given.
        CheckpointError: there is no checkpoint, or one of an earlier version.
    """
    folder = pathlib.Path(folder).expanduser()
    if which not in (None, "best", "last"):
        raise ValueError(f'which={which!r} of open must be "best", "last", or None for what the run ended with')
    if not (folder / "model.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model.json; give the folder of a run that has saved a checkpoint, or of Model.save"
        )
    saved = files.read_json(folder / "model.json")
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{folder / 'model.json'} is not of this version of jaxft (format {FORMAT})")
    try:
        if net is None:
            if not saved["zoo"]:
                raise ValueError(f"it holds a {saved['net']}, which is not of the zoo: give it as net=")
            net = nets.from_options(saved["net"], saved["options"])
        known = {
            "preprocessing": saved["preprocessing"],
            "name": saved["net"] if saved["zoo"] else None,
            "source": saved["source"],
            "task": _task(saved["task"]) if task is None else task,
            "classes": tuple(saved["classes"]),
            "image_size": None if saved["image_size"] is None else tuple(saved["image_size"]),
            "batch_size": saved["batch_size"],
            "decode": Decode(**saved["decode"]),
        }
        wanted = which or saved["keep"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / 'model.json'} cannot be opened: {error}") from error
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        step = checkpoints.best() if wanted == "best" else None
        step = checkpoints.latest() if step is None else step
        frozen = frozenset(checkpoints.run(step)["progress"]["frozen"])
        assert step is not None  # or `run` had raised
        variables = checkpoints.variables(step, average)
    finally:
        checkpoints.close()
    return Model(net.clone(frozen=frozen), variables, **known)


def _task(saved: Mapping[str, Any] | None) -> Task | None:
    """The task that `model.json` names, made by this version's own functions."""
    if saved is None:
        return None
    if saved["name"] not in TASKS:
        raise ValueError(f"it names the task {saved['name']!r}; known are {', '.join(TASKS)}")
    if "outputs" in saved["replaced"]:  # without which the predictions would be others
        raise ValueError(f"its task has functions of its own ({', '.join(saved['replaced'])}): give it as task=")
    made = TASKS[saved["name"]](**saved["options"])
    return dataclasses.replace(made, monitor=saved["monitor"], best=saved["best"])
