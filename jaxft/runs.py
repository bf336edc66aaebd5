"""A run's folder: where it is, what it records of itself, and whether it may go on."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jaxft
from jaxft import devices, files
from jaxft.checkpoint import FORMAT, differences
from jaxft.checks import is_int
from jaxft.data import Inputs
from jaxft.model import FUNCTIONS, Model
from jaxft.phase import Phase
from jaxft.provenance import describe, digest, revision
from jaxft.task import Task

try:
    import fcntl
except ImportError:  # Windows has no flock; there nothing keeps a second run out of a folder
    fcntl = None


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run keeps what it does, and how.

    Attributes:
        folder: the run's own; the same run on the same folder goes on where it was. `~` is the home folder.
        seed: of the order of images, augmentation and dropout; at least 0.
        save_every: steps between checkpoints beside those at the end of each epoch; None for none.
        cache_features: "on", "off" or "auto": keep what the frozen prefix gives on disk; auto does so where that saves
            time. It changes no loss. Inputs must repeat: no augmentation or fixed views, and no mixing.
        keep: which state the run ends with and is judged by: "best" on the task's monitored value, or "last".
        watch: who else is told of each epoch: tensorboard, wandb, mlflow. It changes no result.
        split_state: share out large parameters over the devices, with their momentum and average, where each holds a
            copy else. For nets with wide dense layers; it changes results by rounding alone.
        pictures: draw curves, confusion and mistakes at the end; without them a run of many ends sooner.

    Raises:
        ValueError: a field out of its range.
    """

    folder: pathlib.Path
    seed: int = 0
    save_every: int | None = None
    cache_features: Literal["auto", "on", "off"] = "auto"
    keep: Literal["best", "last"] = "best"
    watch: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    split_state: bool = False
    pictures: bool = True

    def __post_init__(self):
        if not isinstance(self.folder, str | pathlib.PurePath):
            raise ValueError(f"folder={self.folder!r} is not a path; give the run's folder, as in Run('runs/first')")
        if re.match(r"[a-z0-9]{2,}:/", str(self.folder)):
            raise ValueError(
                f"folder={str(self.folder)!r} is an address; mount it, and give the folder where it appears"
            )
        object.__setattr__(self, "folder", pathlib.Path(self.folder).expanduser())
        if not is_int(self.seed) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} of the run must be a whole number from 0 on")
        if self.save_every is not None and (not is_int(self.save_every) or self.save_every < 1):
            raise ValueError(f"save_every={self.save_every!r} must be a number of steps from 1 on, or None")
        for name, choices in (("cache_features", ("auto", "on", "off")), ("keep", ("best", "last"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if not isinstance(self.watch, tuple | list) or not set(self.watch) <= {"tensorboard", "wandb", "mlflow"}:
            raise ValueError(f"watch={self.watch!r} is not a tuple of tensorboard, wandb and mlflow, or () for none")
        object.__setattr__(self, "watch", tuple(self.watch))


def record(
    model: Model,
    task: Task,
    train: Inputs,
    held_out: Inputs,
    phases: Sequence[Phase],
    run: Run,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the result of a run depends on, as JSON values; what merely changes its speed is left out.

    Functions are recorded by their names and settings: those of a dataclass, a `functools.partial`, a closure or a
    global number are seen, so that another rate is another run. The code of a function is not, but for the names and
    constants in that of a lambda.
    """
    found = {
        "model": model.description() | {"variables": digest(model.variables)},
        "task": {name: describe(getattr(task, name)) for name in ("name", "options", "monitor", "best", *FUNCTIONS)},
        "train": _inputs(train),
        "held_out": _inputs(held_out),
        "phases": [describe(phase) for phase in phases],
        "seed": run.seed,
        "config": describe(config),
    }
    return json.loads(json.dumps(files.strict(found), default=describe))


def _inputs(inputs: Inputs) -> dict[str, Any]:
    found = {name: describe(getattr(inputs, name)) for name in ("batch_size", "augment", "mix", "views", "order")}
    if inputs.plain_view:  # runs of versions before it have no such line
        found["plain_view"] = True
    if inputs.targets is not None:
        found["targets"] = hashlib.sha256(inputs.targets.tobytes()).hexdigest()
    return found | {
        "data": {"name": inputs.dataset.name, "sha256": inputs.dataset.fingerprint, "images": len(inputs.indices)},
        "indices": hashlib.sha256(inputs.indices.tobytes()).hexdigest(),
        "weights": None if inputs.weights is None else hashlib.sha256(inputs.weights.tobytes()).hexdigest(),
        "image_size": list(inputs.image_size),
        "decode": dataclasses.asdict(inputs.decode),
    }


def require_same(folder: pathlib.Path, saved: Mapping[str, Any], wanted: dict[str, Any], done: int) -> None:
    """Refuses a folder that belongs to a run of other settings; more epochs of the last phase are allowed.

    Args:
        folder: for the message.
        saved, wanted: records, there and asked for.
        done: epochs of the last phase that are finished or begun; fewer cannot be asked for.

    Raises:
        ValueError: they differ; the message shows where.
    """
    there, asked = json.loads(json.dumps(saved)), json.loads(json.dumps(wanted))
    last = [side["phases"][-1] for side in (there, asked)]
    if len(there["phases"]) == len(asked["phases"]) and last[1]["epochs"] >= done:
        for side, phase in zip((there, asked), last, strict=True):
            phase.pop("epochs")
            side["config"].pop("epochs", None)
    if lines := differences(there, asked):
        raise ValueError(
            f"{folder} holds a run of other settings (there → asked for):\n  "
            + "\n  ".join(lines)
            + "\nGive the same settings to resume it, or another folder."
        )


def require_writable(folder: pathlib.Path) -> None:
    """Makes the folder, which is not claimed by that.

    Raises:
        OSError: it cannot be made or written to.
    """
    failure = None
    if devices.is_writer():  # two processes would take the probe, and the folder, away from each other
        try:
            created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            files.write_whole(folder / "probe", lambda path: path.write_bytes(b"1"))
            (folder / "probe").unlink()
            for parent in created:
                parent.rmdir()
        except OSError as error:
            failure = error
    if devices.any_process(failure is not None):
        raise OSError(
            f"the folder {folder} cannot be written to ({failure or 'says the first process'}); choose another"
        ) from failure


@contextmanager
def only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Keeps every other run out of a folder as long as the body runs; the system lets go of it for a dead process.

    Raises:
        ValueError: another process has it; the message says which.
    """
    lock = _lock(folder / "lock") if devices.is_writer() else None
    try:
        if devices.any_process(isinstance(lock, str)):
            who = lock or "another process"
            raise ValueError(f"{folder} is in use by {who}: wait until it ends, stop it, or give another folder")
        yield
    finally:
        if lock is not None and not isinstance(lock, str):
            (folder / "lock").unlink(missing_ok=True)
            lock.close()


def _lock(path: pathlib.Path) -> Any:
    """The file, open and locked; or, in words, who holds it; or None where files cannot be locked."""
    if fcntl is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            return holder or "another process"
        except OSError:  # a file system without locks
            file.close()
            path.unlink(missing_ok=True)
            return None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # the one that held it has just taken it away
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def write_record(folder: pathlib.Path, record: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Writes `config.json`, the run's record with what it was made with, and `model.json` for `model.open`.

    `code` is the version of jaxft, and the git commits that it and the working folder are at.
    """
    if devices.is_writer():
        own, here = (revision(path) for path in (pathlib.Path(jaxft.__file__).parent, pathlib.Path.cwd()))
        made_with = {
            "versions": devices.versions(),
            "code": {"jaxft": jaxft.__version__, "jaxft_commit": own, "working_folder_commit": here},
        }
        files.write_json(folder / "config.json", {"format": FORMAT, **record, **made_with})
        files.write_json(folder / "model.json", model)


def compare(folder: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What differs between two finished runs, in lines `what: there → here`; empty if they are the same to the byte.

    Compared are the records, the versions, every figure of the history but for the rates of images, and the
    predictions.

    Raises:
        FileNotFoundError, ValueError: one of them is not finished, or damaged.
    """
    lines = differences(files.read_json(other / "config.json"), files.read_json(folder / "config.json"))

    def history(run: pathlib.Path) -> list[Any]:
        rows = map(json.loads, (run / "history.jsonl").read_text(encoding="utf-8").splitlines())
        return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]

    theirs, ours = history(other), history(folder)
    if theirs != ours:
        rows = zip(theirs, ours, strict=False)
        row = next((row for row, (left, right) in enumerate(rows, 1) if left != right), min(len(theirs), len(ours)) + 1)
        lines.append(f"history.jsonl: from row {row} on")
    if len({(run / "predictions.csv").read_bytes() for run in (other, folder)}) > 1:
        lines.append("predictions.csv: other bytes")
    return lines


def write_history(folder: pathlib.Path, history: Sequence[Mapping[str, Any]]) -> None:
    """`history.csv` and `history.jsonl`, one row an epoch, each written whole, so that resuming doubles none.

    A figure that is undefined is blank in the one and null in the other; so is a rate that a phase does not have in the
    first, where the second leaves it out.
    """
    if devices.is_writer() and history:
        columns = list(dict.fromkeys(name for row in history for name in row))
        files.write_csv(
            folder / "history.csv", [{name: files.strict(row.get(name)) for name in columns} for row in history]
        )
        lines = [json.dumps(files.strict(dict(row)), allow_nan=False) for row in history]
        files.write_text(folder / "history.jsonl", "".join(f"{line}\n" for line in lines))
