"""Orbax checkpoints of a run: saved while training goes on, restored strictly."""

import json
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxft.train_state import TrainState

Arrays = dict[str, Any]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or does not belong to the run that asks for it."""


def differences(saved: dict[str, Any], wanted: dict[str, Any], limit: int = 12) -> list[str]:
    """One line for each key whose value differs, `key: saved → wanted`; past `limit` they are only counted."""
    lines = [
        f"{key}: {saved.get(key, '(absent)')} → {wanted.get(key, '(absent)')}"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key) or (key in saved) != (key in wanted)
    ]
    return lines if len(lines) <= limit else [*lines[:limit], f"… and {len(lines) - limit} more"]


class Checkpoints:
    """The checkpoints in one folder: the last and the best (lowest `metric`) are kept.

    A save copies the state to the host, returns, and goes on writing in the background; it becomes visible by a rename
    when it is whole, so that a killed run leaves the checkpoints before it intact.
    """

    def __init__(self, folder: pathlib.Path, config: dict[str, Any]):
        """Opens or creates `folder` for the run of `config` (JSON values), which `restore` holds it to."""
        self.folder = folder.absolute()
        self.config = json.loads(json.dumps(config))
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["metric"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(1), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=best.get_metric_fn, best_mode="min", cleanup_tmp_directories=True
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The step of the last whole checkpoint, read off the folder: Orbax's own list counts saves under way."""
        return max((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), default=None)

    def best(self) -> int | None:
        """The step of the checkpoint with the lowest metric."""
        return self._manager.best_step()

    def save(self, state: TrainState, progress: dict[str, Any], metric: float | None = None) -> None:
        """Starts to write `state` and the JSON values of `progress`; `metric`, if given, competes for the best.

        Raises:
            CheckpointError: the disk has no room, or an earlier save failed.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest():
            return
        self.require_room(state)
        arrays = _arrays(state)
        run = ocp.args.JsonSave({"config": self.config, "progress": progress})
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), run=run)
        try:
            self._manager.save(step, args=items, metrics=None if metric is None else {"metric": metric})
        except (OSError, ValueError) as error:  # tensorstore reports a failed write as a ValueError
            raise CheckpointError(
                f"the checkpoint of step {step} was not written ({error}); {self._remedy()}"
            ) from error

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
        """Blocks until the save under way is whole.

        Raises:
            CheckpointError: it failed.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"a checkpoint was not written ({error}); {self._remedy()}") from error

    def restore(self, template: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state and the progress saved at `step` (the latest by default), laid out on devices as `template` is.

        Raises:
            CheckpointError: there is none, it was saved by a run of another configuration, or its tree, shapes or
                dtypes are not those of `template`.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if lines := differences(run["config"], self.config):
            raise CheckpointError(
                f"the checkpoint in {self.folder} belongs to a run of another configuration (saved → asked for):\n  "
                + "\n  ".join(lines)
            )
        arrays = _arrays(template)
        expected = _signature(arrays)
        metadata = self._manager.item_metadata(step)["state"]
        found = _signature(metadata.tree)
        if lines := differences(found, expected):
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} does not fit this net and optimizer "
                "(saved → asked for):\n  " + "\n  ".join(lines)
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        arrays = self._manager.restore(step, args=items)["state"]
        rng = jax.random.wrap_key_data(arrays.pop("rng"))
        return template.replace(**arrays, rng=rng), run["progress"]

    def close(self) -> None:
        """Waits for the save under way and stops the background threads."""
        self.wait()
        self._manager.close()

    def _remedy(self) -> str:
        latest = self.latest()
        kept = "nothing was saved before it" if latest is None else f"the checkpoint of step {latest} is intact"
        return f"{kept}. Free some space and run the same command again"


def _arrays(state: TrainState) -> Arrays:
    """The pytree part of a state by field name; the key as its uint32 words, which every Orbax version stores."""
    names = ("step", "params", "batch_stats", "opt_state")
    return {name: getattr(state, name) for name in names} | {"rng": jax.random.key_data(state.rng)}


def _signature(tree: Any) -> dict[str, str]:
    """Path → "dtype[shape]" of every leaf; the same for a tree and for Orbax's metadata of it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {_path(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _path(path: tuple[Any, ...]) -> str:
    # Orbax's metadata turns named tuples into dicts and tuples into lists: only the bare names are comparable.
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
