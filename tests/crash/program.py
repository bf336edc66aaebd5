# ruff: noqa: E402
"""Small runs of many kinds, each in a process that can be killed: what they are, how one is started, what it leaves.

A process is forked from one that has imported everything and computed nothing, so that a kill costs a second or two.
"""

import dataclasses
import functools
import hashlib
import io
import json
import mmap
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

import jax
import numpy as np
import tiny
from PIL import Image

from jaxft import devices, feed, nets, optim, task
from jaxft import finetune as finetune_module
from jaxft.checkpoint import Checkpoints
from jaxft.command import exits
from jaxft.data import Inputs, augment, mix
from jaxft.data.rows import Rows
from jaxft.model import Model
from jaxft.phase import Phase, unfreeze
from jaxft.runs import Run

RATE = optim.InverseTime(0.05, 1e-3)
WARP = augment.Warp(rotation=10.0, shift=0.1, flip_horizontal=True)
STEPWISE = unfreeze(
    tiny.Tiny(), Phase(2, optim.Plateau(0.05, patience=1), clip_norm=1.0), ("predictions", "body", "stem")
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A run: its phases, what its training inputs and settings are beside the defaults, its net and its processes."""

    what: str
    phases: tuple[Phase, ...]
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    net: Callable[[], Any] = tiny.Tiny
    side: int = 8
    processes: int = 1


KINDS = {
    "plain": Kind("all layers trained, BatchNorm", (Phase(4, RATE),)),
    "dropout": Kind(
        "dropout, augmentation, saves within epochs",
        (Phase(3, RATE),),
        {"augment": WARP},
        {"save_every": 2},
        functools.partial(tiny.Tiny, dropout=0.5),
    ),
    "cached": Kind(
        "head alone, cached features, several steps in a dispatch",
        (Phase(5, RATE, frozen="all-but-head"),),
        settings={"cache_features": "on", "save_every": 3},
    ),
    "views": Kind(
        "frozen stem, two augmented views cached",
        (Phase(4, RATE, frozen="through:stem"),),
        {"augment": WARP, "views": 2},
        {"cache_features": "on"},
    ),
    "average": Kind("mixup, moving average", (Phase(4, RATE, average=0.9),), {"mix": mix.Mixup(0.4)}),
    "phases": Kind(
        "three phases, momentum carried, clipping, plateau",
        (STEPWISE[0], *(dataclasses.replace(phase, momentum="carry") for phase in STEPWISE[1:])),
    ),
    "adam": Kind(
        "AdamW, patience, the last state kept", (Phase(5, RATE, optim.AdamW(), patience=2),), {}, {"keep": "last"}
    ),
    "densenet": Kind(
        "DenseNet-121, its last block trained",
        (Phase(2, RATE, frozen="through:pool4"),),
        net=functools.partial(nets.create, "densenet121", num_classes=3),
        side=32,
    ),
    "hosts": Kind(
        "two processes, two phases, moving average",
        (Phase(1, RATE, frozen="all-but-head"), Phase(3, RATE, average=0.9)),
        {"augment": WARP},
        {"save_every": 3},
        processes=2,
    ),
}

STAGES = ("start", "decoding", "cache filling", "restoring", "steps", "evaluation", "the end and its report")
BOARD = mmap.mmap(-1, 16)
"""Shared with the processes forked from this one: place 0 is the stage, 1 whether a save is under way."""


def watched(owner: Any, name: str, stage: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Has a function say on the board that its stage is under way."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        before = BOARD[0]
        if when(*args):
            BOARD[0] = STAGES.index(stage)
        try:
            return function(*args, **options)
        finally:
            BOARD[0] = before

    setattr(owner, name, wrapper)


def watch() -> None:
    """Has the stages of a run said on the board."""
    watched(feed, "decode", "decoding")
    watched(Rows, "_write", "cache filling", lambda rows, *_: rows.kind == "features")
    watched(finetune_module, "fit", "steps")
    watched(feed, "evaluate", "evaluation")
    watched(Checkpoints, "restore", "restoring")
    watched(finetune_module, "_end", "the end and its report")
    watched(finetune_module, "_pictures", "the end and its report")
    write, seal = Checkpoints._write, Checkpoints._seal

    def writes(self: Checkpoints, *args: Any) -> None:
        BOARD[1] = 1
        write(self, *args)

    def seals(self: Checkpoints) -> None:
        seal(self)
        BOARD[1] = 0

    Checkpoints._write, Checkpoints._seal = writes, seals


def forget_seed() -> None:
    """Has each process draw an order of the images of its own."""
    stream = feed.loader.train_batches

    def anew(*args: Any, **options: Any) -> Any:
        return stream(*args, **options | {"seed": options["seed"] + os.getpid()})

    feed.loader.train_batches = anew


def images(count: int, side: int) -> list[bytes]:
    """PNG files of which the brightest channel says the class."""
    found = []
    for pixels in tiny.batch(0, size=count)["image"]:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((side, side)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def train(kind: Kind, folder: pathlib.Path) -> None:
    """The run, from its beginning or from where it is."""
    data = tiny.dataset(40, images=images(40, kind.side))
    common = dict(image_size=(kind.side, kind.side), batch_size=8)
    inputs = Inputs(data, np.arange(28), **common, **kind.inputs)
    held_out = Inputs(data, np.arange(28, 40), **common)
    net = kind.net()
    variables = jax.device_get(jax.jit(net.init)(jax.random.key(0), np.zeros((1, kind.side, kind.side, 3), np.float32)))
    model = Model(net, variables, "torch")
    goal = task.classification()
    finetune_module.finetune(model, goal, inputs, held_out, kind.phases, Run(folder, **kind.settings))


def left(folder: pathlib.Path) -> dict[str, Any]:
    """What a finished run leaves: the same bytes, however often it was killed. In a process of its own, as `train`."""

    def digests() -> Iterator[Any]:
        arrays = {name: hashlib.sha256(leaf.tobytes()).hexdigest() for name, leaf in tiny.saved(folder).items()}
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        yield {
            "arrays": arrays,
            "history": tiny.history(folder),
            "predictions": hashlib.sha256((folder / "predictions.csv").read_bytes()).hexdigest(),
            "summary": {name: summary[name] for name in ("metrics", "kept")},
        }

    (found,) = answers(digests, folder / "left.log")
    return found


def answers(body: Callable[[], Iterable[Any]], log: pathlib.Path) -> list[Any]:
    """The JSON values that `body` yields in a process of its own."""
    read, write = os.pipe()

    def send() -> None:
        for value in body():
            os.write(write, (json.dumps(value) + "\n").encode())

    number = forked(send, log)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = [json.loads(line) for line in pipe.read().splitlines()]
    os.waitpid(number, 0)
    return found


def keep_programs(folder: pathlib.Path) -> None:
    """Has the processes forked from this one share compiled programs, though tests else do not."""
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def start(kind: Kind, folder: pathlib.Path, cache: pathlib.Path, log: pathlib.Path, port: int = 0) -> list[int]:
    """Forks the processes of a run; → their numbers. What they print goes to the end of `log`."""
    BOARD[:] = bytes(len(BOARD))

    def run(index: int) -> None:
        os.environ["JAXFT_CACHE"] = str(cache)
        if kind.processes > 1:
            devices.initialise(f"localhost:{port}", kind.processes, index)
        train(kind, folder)

    return [forked(functools.partial(run, index), log) for index in range(kind.processes)]


def forked(body: Callable[[], None], log: pathlib.Path) -> int:
    """The number of a process that does `body` as a command does, printing to the end of `log`."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    status = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        with exits():
            body()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        print(error)
    except BaseException:  # noqa: BLE001 - the parent's code must not go on here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
