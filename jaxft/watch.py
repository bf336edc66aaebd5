"""What a run tells others while it trains: TensorBoard, and if asked for Weights & Biases or MLflow.

Each epoch is told once, also by a run that is stopped and resumed. A watcher that fails is given up with a warning: the
run goes on.
"""

import contextlib
import importlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxft import devices

Row = Mapping[str, Any]
Told = Callable[[Row], None]
Watcher = Callable[[pathlib.Path, Mapping[str, Any], Sequence[Row]], tuple[Told, Callable[[], object]]]
"""(folder, record, rows of the epochs that are done) → (what takes each new row, what is called at the end)."""


@contextlib.contextmanager
def watching(
    names: Sequence[str], folder: pathlib.Path, record: Mapping[str, Any], history: Sequence[Row]
) -> Iterator[Told]:
    """Opens watchers around a run.

    Args:
        names: keys of `WATCHERS`.
        folder: of the run.
        record: of the run, JSON values.
        history: the rows of the epochs that are done.

    Yields:
        a function that takes the row of an epoch.

    Raises:
        ValueError: a package is missing; the message says how to install it.
    """
    opened: dict[str, tuple[Told, Callable[[], object]]] = {}
    if devices.is_writer():
        for name in names:
            package = PACKAGES[name]
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ValueError(f"watch {name!r} needs a package that is not there: pip install {package}") from error
        for name in names:
            _guarded(name, opened, lambda name=name: opened.update({name: WATCHERS[name](folder, record, history)}))

    def tell(row: Row) -> None:
        for name in list(opened):
            _guarded(name, opened, lambda name=name: opened[name][0](row))

    try:
        yield tell
    finally:
        for name in list(opened):
            _guarded(name, opened, lambda name=name: opened[name][1]())


def _guarded(name: str, opened: dict[str, Any], act: Callable[[], object]) -> None:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - of another library: a full disk, a network that is away, a bad login
        opened.pop(name, None)
        devices.say(f"WARNING: {name} is told no more of this run ({type(error).__name__}: {error}); the run goes on")


def figures(row: Row) -> dict[str, float]:
    """The numbers of an epoch by the names that viewers group by: loss/train, loss/held_out, rate/all, …"""
    sides = {"train": "train", "val": "held_out", "average": "averaged"}
    found = {}
    for name, value in row.items():
        if name in ("phase", "epoch", "step") or value is None or not math.isfinite(value):
            continue
        side, _, figure = name.partition("_")
        if side in sides and figure:
            found[f"{figure}/{sides[side]}"] = float(value)
        elif side == "lr":
            found[f"rate/{figure or 'all'}"] = float(value)
        else:
            found[f"run/{name}"] = float(value)
    return found


def tensorboard(
    folder: pathlib.Path, record: Mapping[str, Any], history: Sequence[Row]
) -> tuple[Told, Callable[[], object]]:
    """Event files in `tensorboard/`, for `tensorboard --logdir RUN`, without TensorFlow; written anew on resuming."""
    from tensorboardX import SummaryWriter

    place = folder / "tensorboard"
    for old in place.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(place), write_to_disk=True)

    def tell(row: Row) -> None:
        for name, value in figures(row).items():
            writer.add_scalar(name, value, int(row["step"]))
        writer.add_scalar("run/epoch", int(row["epoch"]), int(row["step"]))
        writer.flush()

    for row in history:
        tell(row)
    return tell, writer.close


def wandb(folder: pathlib.Path, record: Mapping[str, Any], history: Sequence[Row]) -> tuple[Told, Callable[[], object]]:
    """A run of Weights & Biases, in the project "jaxft" unless WANDB_PROJECT says another; resumed by its id."""
    library: Any = importlib.import_module("wandb")
    note = folder / "wandb_id.txt"
    known = note.read_text(encoding="utf-8").strip() if history and note.is_file() else None
    settings = {"name": folder.absolute().name, "dir": str(folder), "config": dict(record), "resume": "allow"}
    run = library.init(id=known, **settings)
    note.write_text(run.id, encoding="utf-8")
    return lambda row: run.log(figures(row), step=int(row["step"])), run.finish


def mlflow(
    folder: pathlib.Path, record: Mapping[str, Any], history: Sequence[Row]
) -> tuple[Told, Callable[[], object]]:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; resumed by its id."""
    library: Any = importlib.import_module("mlflow")
    note = folder / "mlflow_id.txt"
    known = note.read_text(encoding="utf-8").strip() if history and note.is_file() else None
    run = library.start_run(run_id=known, run_name=None if known else folder.absolute().name)
    note.write_text(run.info.run_id, encoding="utf-8")
    if known is None:
        library.log_dict(dict(record), "config.json")
    names = str.maketrans("/", ".")
    return (
        lambda row: library.log_metrics(
            {k.translate(names): v for k, v in figures(row).items()}, step=int(row["step"])
        ),
        library.end_run,
    )


WATCHERS: dict[str, Watcher] = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
