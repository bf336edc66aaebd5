"""A net of four layers that keeps the backbone contract, BatchNorm included, and the runs that tests make of it."""

import csv
import dataclasses
import os
import signal
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxft import feed, optim, task
from jaxft import finetune as finetune_module
from jaxft.data import Dataset, Inputs
from jaxft.data.decode import RGB, Decode
from jaxft.finetune import finetune
from jaxft.model import Model
from jaxft.nets.common import fold
from jaxft.phase import Phase
from jaxft.runs import Run

CLASSES = ("red", "green", "blue")


class Tiny(nn.Module):
    """conv1 → bn1 → pool (stage stem), conv2 (stage body), average (stage mean) and predictions."""

    num_classes: int = 3
    frozen: frozenset[str] = frozenset()
    dropout: float = 0.0

    def layers(self):
        stem = ("conv1_pad", "conv1", "bn1", "pool1")
        return {"stem": stem, "body": ("conv2",), "mean": ("mean",), "predictions": ("predictions",)}

    def head_layers(self):
        return ("predictions",)

    @nn.compact
    def __call__(self, images, *, train=False, start=None):
        def stem(x):
            x = nn.Conv(4, (3, 3), name="conv1")(x)
            x = nn.BatchNorm(use_running_average=not train or "bn1" in self.frozen, momentum=0.9, name="bn1")(x)
            return nn.max_pool(nn.relu(x), (2, 2), (2, 2))

        def body(x):
            return nn.relu(nn.Conv(8, (3, 3), name="conv2")(x))

        def predictions(x):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            return nn.Dense(self.num_classes, name="predictions")(x)

        return fold(
            [("stem", stem), ("body", body), ("mean", lambda x: x.mean((1, 2))), ("predictions", predictions)],
            images,
            start,
        )


class WithoutNorm(Tiny):
    """Tiny without BatchNorm: its variables have no statistics."""

    @nn.compact
    def __call__(self, images, *, train=False, start=None):
        def stem(x):
            return nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="conv1")(x)), (2, 2), (2, 2))

        def predictions(x):
            return nn.Dense(self.num_classes, name="predictions")(x.mean((1, 2)))

        return fold([("stem", stem), ("predictions", predictions)], images, start)

    def layers(self):
        return {"stem": ("conv1", "pool1"), "predictions": ("mean", "predictions")}


def variables(net: Tiny, seed: int = 0):
    """Random variables with batch statistics away from their defaults of 0 and 1."""
    values = net.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 3)))
    key = jax.random.key(seed + 1)
    stats = jax.tree.map(lambda x: x + jax.random.uniform(key, x.shape), values.get("batch_stats", {}))
    return {"params": values["params"], "batch_stats": stats}


def prepare(_key, images):
    """The simplest preprocessing: 0 to 255 → 0 to 1."""
    return images.astype(jnp.float32) / 255.0


def prepare_labelled(key, images, labels):
    """`prepare`, as a train step takes it."""
    return prepare(key, images), labels


def batch(step: int, size: int = 8, num_classes: int = 3):
    """A learnable batch that is a function of the step: the class is the brightest channel."""
    rng = np.random.default_rng(step)
    label = rng.integers(0, num_classes, size)
    image = rng.integers(0, 100, (size, 8, 8, 3), dtype=np.uint8)
    image[np.arange(size), :, :, label] += 120
    return {
        "image": image,
        "label": label.astype(np.int32),
        "known": np.ones(size, bool),
        "weight": np.ones(size, np.float32),
        "index": np.arange(size, dtype=np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Noise:
    """An augmentation that compiles in no time: each image gets a shade of its own."""

    size: float = 30.0

    def __call__(self, key, images, labels):
        images = jnp.asarray(images, jnp.float32)
        return images + self.size * jax.random.normal(key, (len(images), 1, 1, 3)), labels


def dataset(n: int = 30, target: str = "class", **changes):
    """n images of which the brightest channel says what they are: as a class, as labels, or as values."""
    whole = batch(0, size=n)
    bright = whole["image"].mean((1, 2)) / 255
    labels = {"class": whole["label"], "labels": (bright > 0.4).astype(np.int32), "values": bright.astype(np.float32)}
    names = tuple(f"img_{i}.png" for i in range(n))
    columns = dict(images=list(whole["image"]), labels=labels[target], groups=names, names=names, classes=CLASSES)
    return Dataset(**{"name": "bright channels", "target": target, **columns, **changes})


def model(net=None, seed: int = 0) -> Model:
    """A net that nobody trained."""
    net = Tiny() if net is None else net
    return Model(net, jax.device_get(variables(net, seed)), "torch")


TASKS = {"class": task.classification, "labels": task.multilabel, "values": task.regression}


def scored(values):
    """Classification whose held-out losses are these, one an evaluation and one for the summary, in this process."""
    plain, values = task.classification(), iter(values)

    def metrics(found):
        return plain.metrics(found) | ({"loss": next(values)} if found.known.any() else {})

    return dataclasses.replace(plain, metrics=metrics)


def run(
    folder,
    phases: Sequence[Phase] | None = None,
    *,
    data=None,
    start=None,
    goal=None,
    batch_size: int = 8,
    held_out: int = 7,
    decode: Decode = RGB,
    config=None,
    inputs=None,
    **settings,
):
    """A run of `finetune`: its last images are held out; `inputs` are settings of the training side, the rest Run's."""
    data = dataset() if data is None else data
    goal = TASKS[data.target]() if goal is None else goal
    indices = np.arange(len(data))
    common = dict(image_size=(8, 8), batch_size=batch_size, decode=decode)
    train = Inputs(data, indices[:-held_out], **common, **(inputs or {}))
    test = Inputs(data, indices[-held_out:], **common)
    phases = [Phase(2, optim.InverseTime(0.05, 1e-3))] if phases is None else phases
    return finetune(start or model(), goal, train, test, phases, Run(folder, **settings), config=config)


def history(folder) -> list[dict[str, str]]:
    """The rows of history.csv but for the rate, which no run repeats."""
    with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
        return [{name: x for name, x in row.items() if name != "images_per_second"} for row in csv.DictReader(file)]


def leaves(tree) -> dict[str, np.ndarray]:
    """Copies on the host, by path."""
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def saved(folder) -> dict[str, np.ndarray]:
    """Every array of a run's last checkpoint."""
    steps = folder / "checkpoints"
    last = steps / str(max(int(path.name) for path in steps.iterdir() if path.name.isdigit()))
    items = [item for item in ("variables", "average", "optimizer") if (last / item).exists()]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def like(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    with ocp.StandardCheckpointer() as reader:
        trees = {item: jax.tree.map(like, reader.metadata(last / item).item_metadata.tree) for item in items}
        return leaves({item: reader.restore(last / item, tree) for item, tree in trees.items()})


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert sorted(found) == sorted(expected)
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def at_step(monkeypatch, step: int, act) -> None:
    """Has `act` called when the batch of this step is asked for."""
    train_batches = feed.loader.train_batches

    def watched(*args, start_step=0, **options):
        for number, batch in enumerate(train_batches(*args, start_step=start_step, **options), start_step):
            if number == step:
                act()
            yield batch

    monkeypatch.setattr(feed.loader, "train_batches", watched)


def stop(number: int = signal.SIGTERM) -> None:
    """Sends this process a signal."""
    os.kill(os.getpid(), number)


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take longer than a tiny net's training."""
    monkeypatch.setattr(finetune_module, "_pictures", lambda *args: None)


@pytest.fixture(scope="module")
def kept_programs(tmp_path_factory):
    """Programs compiled once for all runs of a module, in a folder of the tests' own."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The folder of fetched and cached files, anew for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("JAXFT_CACHE", str(folder))
    return folder
