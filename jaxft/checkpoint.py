"""Orbax checkpoints of a run: saved while training goes on, restored strictly."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxft import devices, files
from jaxft.train_state import TrainState

Arrays = dict[str, Any]

FORMAT = 3  # of a run's folder; 1 had no phases, 2 no digests
LAST = 2  # checkpoints that are kept beside the best: if the last one is damaged, the one before it is there


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or does not belong to the run that asks for it."""


def differences(saved: dict[str, Any], wanted: dict[str, Any], limit: int = 12) -> list[str]:
    """One line for each value that differs, `key.key: saved → wanted`; past `limit` they are only counted."""
    saved, wanted = _flat(saved), _flat(wanted)
    lines = [
        f"{key}: {saved.get(key, '(absent)')} → {wanted.get(key, '(absent)')}"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key) or (key in saved) != (key in wanted)
    ]
    return lines if len(lines) <= limit else [*lines[:limit], f"… and {len(lines) - limit} more"]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            flat |= _flat({str(place): item for place, item in enumerate(value, 1)}, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclasses.dataclass
class _LastAndBest(preservation_policy.PreservationPolicy):
    """Which checkpoints Orbax keeps: the last `LAST`, and what `of` calls the best."""

    of: "Checkpoints"

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        last = sorted(found.step for found in checkpoints)[-LAST:]
        return [found.step in (*last, self.of.best()) for found in checkpoints]


class Checkpoints:
    """The checkpoints in one folder: the last two and the best are kept.

    A checkpoint holds three or four items: `variables` (parameters and BatchNorm statistics), `average` of them if
    there is one, `optimizer` (all else of a state), and `run`, JSON values. A save copies the state to the host,
    returns, and goes on writing in the background. Orbax renames it to `STEP` when it is whole; then its files are
    forced to the disk, and `STEP.sha256` beside it gets the digest of each, as `sha256sum` writes and checks it. A
    checkpoint counts from then on, and not before: a run that is killed, or a machine that loses its power, leaves the
    ones before it. Nothing is restored from a file that is no longer what was saved.
    """

    def __init__(self, folder: pathlib.Path, record: dict[str, Any] | None = None):
        """Opens `folder`: to read alone without `record`, else to write for the run of that record (JSON values).

        To write, every checkpoint is checked. One that is damaged is set aside, under another name, and said.
        """
        self.folder = folder.absolute()
        self.record = record
        self._best: int | None = None
        self._checked: set[int] = set()
        self._sealing: threading.Thread | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(self),
            cleanup_tmp_directories=record is not None,
            create=record is not None,
        )
        arrays = {name: ocp.StandardCheckpointHandler() for name in ("variables", "average", "optimizer")}
        handlers = {**arrays, "run": ocp.JsonCheckpointHandler()}
        if record is not None:
            _hush()
            self._set_damaged_aside()
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        latest = self.latest()
        if latest is not None:
            best = self.run(latest)["best"]
            self._best = best if best in self.steps() else None

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, which have digests, in order."""
        return [step for step in self._named() if self._sealed(step).exists()]

    def _named(self) -> list[int]:
        if not self.folder.exists():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def latest(self) -> int | None:
        """The step of the last whole checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the last checkpoint that was saved as the best; None if none was."""
        return self._best

    def save(self, state: TrainState, progress: dict[str, Any], best: bool = False) -> None:
        """Starts to write `state` and the JSON values of `progress`.

        Args:
            state: as it is now; the next step may overwrite its buffers.
            progress: as `train.Progress`.
            best: whether it is the best so far, which is kept until a better one comes.

        Raises:
            CheckpointError: the disk has no room, or an earlier save failed.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest():
            return
        self.require_room(state)
        self._best = step if best else self._best
        run = {"format": FORMAT, "record": self.record, "progress": progress, "best": self._best}
        items = {name: ocp.args.StandardSave(arrays) for name, arrays in _arrays(state).items()}
        self._write(step, items, run)
        self._sealing = threading.Thread(target=self._seal_when_whole, daemon=True)
        self._sealing.start()

    def save_variables(self, variables: Arrays, frozen: list[str]) -> None:
        """Writes the variables of a model alone, as step 0; `frozen` names its frozen layers."""
        run = {"format": FORMAT, "record": self.record, "progress": {"frozen": frozen}, "best": None}
        variables = {name: jax.tree.map(jnp.asarray, variables.get(name, {})) for name in ("params", "batch_stats")}
        self._write(0, {"variables": ocp.args.StandardSave(variables)}, run)
        self.wait()

    def _write(self, step: int, items: dict[str, Any], run: dict[str, Any]) -> None:
        args = ocp.args.Composite(**items, run=ocp.args.JsonSave(files.strict(run)))
        with self._says(f"the checkpoint of step {step} was not written"):
            self._manager.save(step, args=args)

    def require_room(self, state: TrainState, checkpoints: int = 1) -> None:
        """Raises CheckpointError unless the disk has room for that many more checkpoints of `state`."""
        size = checkpoints * sum(leaf.nbytes for leaf in jax.tree.leaves(_arrays(state)))
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise CheckpointError(
                f"{checkpoints} checkpoint(s) of this run need {size / 1e6:.1f} MB and {self.folder} has "
                f"{free / 1e6:.1f} MB free; {self._remedy()}"
            )

    def wait(self) -> None:
        """Blocks until the save under way is whole, in every process.

        Raises:
            CheckpointError: it failed.
        """
        self._finish()
        devices.barrier("a checkpoint is whole")

    def _finish(self) -> None:
        with self._says("a checkpoint was not written"):
            self._manager.wait_until_finished()
            if self._sealing is not None:
                self._sealing.join()
            self._seal()

    def check(self, step: int) -> None:
        """Compares the files of the checkpoint of `step` with their digests from when it was whole.

        Raises:
            CheckpointError: a file is not what was saved, is gone, or cannot be read; the message names it.
        """
        if step in self._checked:
            return
        try:
            wanted = self._sealed(step).read_bytes().splitlines()
            found = self._digests(step)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} is not whole: {pathlib.Path(error.filename).name} "
                "is missing"
            ) from error
        except OSError as error:
            raise CheckpointError(f"the checkpoint of step {step} in {self.folder} cannot be read ({error})") from error
        if bad := sorted(set(wanted) ^ set(found), key=lambda line: line.partition(b"  ")[2]):
            file = bad[0].partition(b"  ")[2].decode(errors="replace") or self._sealed(step).name
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} is damaged: {file} is not what was saved"
            )
        self._checked.add(step)

    def _sealed(self, step: int) -> pathlib.Path:
        return self.folder / f"{step}.sha256"

    def _digests(self, step: int) -> list[bytes]:
        """A line of each file, digest and path, as `sha256sum` writes them."""
        paths = sorted(path for path in (self.folder / str(step)).rglob("*") if path.is_file())

        def line(path: pathlib.Path) -> bytes:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return f"{digest}  {path.relative_to(self.folder).as_posix()}".encode()

        with ThreadPoolExecutor() as threads:
            return list(threads.map(line, paths))

    def _seal(self) -> None:
        """Writes the digests of what is whole and has none; deletes those of what is no longer kept."""
        if self.record is None or not devices.is_writer():
            return
        steps = self._named()
        for path in self.folder.glob("*.sha256"):
            if path.stem not in map(str, steps):
                path.unlink(missing_ok=True)
        for step in steps:
            if not self._sealed(step).exists():
                files.force_to_disk(self.folder / str(step))
                content = b"".join(line + b"\n" for line in self._digests(step))
                files.write_whole(self._sealed(step), lambda path, content=content: path.write_bytes(content))

    def _seal_when_whole(self) -> None:
        """In a thread, so that a run that is killed in the next epoch leaves digests; `wait` reports what fails."""
        while self._manager.is_saving_in_progress():
            time.sleep(0.05)
        with contextlib.suppress(OSError):
            self._seal()

    def _set_damaged_aside(self) -> None:
        self._require_this_format()
        for step in reversed(self._named()):
            damage = ""
            try:
                self.check(step)
            except CheckpointError as error:
                damage = str(error)
            if not devices.any_process(bool(damage)):
                continue
            aside = self.folder / f"{step}.damaged"
            if devices.is_writer():
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
                self._sealed(step).unlink(missing_ok=True)
            devices.barrier("a damaged checkpoint is set aside")
            latest = self.latest()
            then = (
                "no other is left: the run begins anew"
                if latest is None
                else f"the last one is now that of step {latest}"
            )
            damage = damage or "another process finds a checkpoint damaged"
            devices.say(f"WARNING: {damage}. It is set aside as {aside.name}; {then}")

    def _require_this_format(self) -> None:
        for step in reversed(self._named()):
            found = self._said(step).get("format")
            if found is not None and found != FORMAT and not self._sealed(step).exists():
                raise CheckpointError(f"the checkpoint of step {step} in {self.folder} {_earlier(found, step)}")

    def _said(self, step: int) -> dict[str, Any]:
        """The JSON values of a checkpoint, whole or not, of format 1 if they say none; {} if they cannot be read."""
        try:
            return {"format": 1} | json.loads((self.folder / str(step) / "run" / "metadata").read_bytes())
        except (OSError, ValueError, TypeError):
            return {}

    def run(self, step: int | None = None) -> dict[str, Any]:
        """{"record", "progress", "best"} of the checkpoint of `step`, by default the latest.

        Raises:
            CheckpointError: there is none, it is damaged, or it was written by another version of jaxft.
        """
        step = self.latest() if step is None else step
        if step is None:
            self._require_this_format()
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        self.check(step)
        found = self._said(step)
        if found.get("format") != FORMAT:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} {_earlier(found.get('format'), step)}"
            )
        return found

    def restore(self, template: TrainState, step: int | None = None) -> TrainState:
        """The state saved at `step` (the latest by default), laid out on devices as `template` is.

        Raises:
            CheckpointError: there is none, it is damaged, or its tree, shapes or dtypes are not those of `template`.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        self.check(step)
        arrays = _arrays(template)
        metadata = self._manager.item_metadata(step)
        found = {name: metadata[name].tree for name in arrays if (self.folder / str(step) / name).exists()}
        if lines := differences(_signature(found), _signature(arrays)):
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} does not fit this net and optimizer "
                "(saved → asked for):\n  " + "\n  ".join(lines)
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        optimizer = found["optimizer"]
        rng = jax.random.wrap_key_data(optimizer.pop("rng"))
        return dataclasses.replace(template, **optimizer, **found["variables"], average=found.get("average"), rng=rng)

    def variables(self, step: int, average: bool = True) -> Arrays:
        """{"params", "batch_stats"} of the checkpoint of `step`, NumPy arrays; the average ones where there are any.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        if not (self.folder / str(step)).exists():
            raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}")
        self.check(step)
        has_average = average and (self.folder / str(step) / "average").exists()
        metadata = self._manager.item_metadata(step)
        # Whatever devices it was saved from; an untrusted file can name only shapes and dtypes here.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def read(name: str) -> Arrays:
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), metadata[name].tree
            )
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)})
            return jax.tree.map(np.asarray, self._manager.restore(step, args=args)[name])

        raw = read("variables")
        if not has_average:
            return raw
        averaged = read("average")
        return {kind: {**layers, **averaged[kind]} for kind, layers in raw.items()}

    def close(self) -> None:
        """Waits for the save under way in this process, and stops the background threads."""
        self._finish()
        self._manager.close()

    @contextlib.contextmanager
    def _says(self, what: str) -> Iterator[None]:
        """Turns whatever fails in the body into a CheckpointError of one line."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001 - Orbax passes on whatever its threads met, of any type
            reason = re.sub(r" \[tensorstore_spec=.*| \[os_error_code=.*", "", " ".join(str(error).split()))
            raise CheckpointError(
                f"{what} ({reason[-500:] or type(error).__name__}); {self._remedy(reason)}"
            ) from error

    def _remedy(self, reason: str = "No space left") -> str:
        latest = self.latest()
        kept = "nothing was saved before it" if latest is None else f"the checkpoint of step {latest} is intact"
        full = any(words in reason for words in ("No space left", "quota", "File too large"))
        way_out = "Free some space (bytes and, by `df -i`, inodes)" if full else "Mend that"
        return f"{kept}. {way_out} and run the same command again"


class _OfOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


def _hush() -> None:
    """Has Orbax not print what it raises.

    When a write fails, its threads log the error with a traceback, and, as they close their event loop first, each
    write that was under way another one, by `sys.unraisablehook`. The error itself comes out of `wait_until_finished`.
    """
    logger = logging.getLogger("absl")
    if any(isinstance(found, _OfOrbax) for found in logger.filters):
        return
    logger.addFilter(_OfOrbax())
    usual = sys.unraisablehook

    def hook(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            usual(found)

    sys.unraisablehook = hook


def _earlier(found: int | None, step: int) -> str:
    """What a checkpoint of another format is, and the way out."""
    if found == 2:
        return (
            "was written by a version of jaxft without digests. If you trust it, and its run is not going on, adopt it "
            f'with: cd checkpoints && sed -i \'s/"format": 2/"format": {FORMAT}/\' {step}/run/metadata && '
            f"find {step} -type f -exec sha256sum {{}} + > {step}.sha256"
        )
    return (
        "was written by a version of jaxft without phases, or by another program; this version cannot go on from it. "
        "Use a new folder; to start from its weights, write them with the version that made it (port_weights.save), "
        "and give that file as the weights"
    )


def _arrays(state: TrainState) -> dict[str, Arrays]:
    """The arrays of a state by item; the key as its uint32 words, which every Orbax version stores."""
    items = {
        "variables": {"params": state.params, "batch_stats": state.batch_stats},
        "optimizer": {
            "step": state.step,
            "opt_state": state.opt_state,
            "lr_scale": state.lr_scale,
            "rng": jax.random.key_data(state.rng),
        },
    }
    return items if state.average is None else items | {"average": state.average}


def _signature(tree: Any) -> dict[str, str]:
    """Path → "dtype[shape]" of every leaf; the same for a tree and for Orbax's metadata of it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {_path(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _path(path: tuple[Any, ...]) -> str:
    # Orbax's metadata turns named tuples into dicts and tuples into lists: only the bare names are comparable.
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
