"""Predictions: every image of a set once, with the labels that are known of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft import devices
from jaxft.progress import bar

Batch = dict[str, Any]
Variables = Mapping[str, Any]  # "params" and "batch_stats"
EvalStep = Callable[[Variables, jax.Array], jax.Array]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a net says of n images, in the set's order, beside what is known of them.

    Attributes:
        index: int [n], the images' places in the dataset.
        label: the dataset's labels of these images: int [n] (classes), or float [n, C] (labels, values).
        known: bool, of the shape of `label`. Where it is False, `label` means nothing and takes part in no figure.
        outputs: float32 [n, C], what `Task.outputs` makes of the logits: probabilities, or values.

    Raises:
        ValueError: the columns do not fit each other.
    """

    index: np.ndarray
    label: np.ndarray
    known: np.ndarray
    outputs: np.ndarray

    def __post_init__(self):
        if self.outputs.ndim != 2:
            raise ValueError(f"outputs have shape {self.outputs.shape}; expected [n, C], a row for each image")
        rows = {name: len(getattr(self, name)) for name in ("index", "label", "known", "outputs")}
        if len(set(rows.values())) != 1:
            raise ValueError(f"columns of predictions differ in length: {rows}; give one row for each image")
        if self.known.shape != self.label.shape or self.known.dtype != bool:
            raise ValueError(
                f"`known` is {self.known.dtype} {self.known.shape}, `label` has shape {self.label.shape}; "
                "give a boolean for each label"
            )
        if self.label.ndim > 1 and self.label.shape != self.outputs.shape:
            raise ValueError(f"labels have shape {self.label.shape}, outputs {self.outputs.shape}; they must be equal")

    def __len__(self) -> int:
        return len(self.index)


def make_eval_step(
    apply_fn: Callable[..., Any],
    outputs: Callable[[jax.Array], jax.Array],
    prepare: Callable[[jax.Array], jax.Array],
    start: str | None = None,
) -> EvalStep:
    """The jitted eval step: (variables, images uint8 [B, H, W, 3]) → outputs float32 [B, C].

    `outputs` turns logits into what is predicted (`Task.outputs`), `prepare` turns images into what the net takes.
    With `start`, the step takes the output of the stage of that name instead of images.
    """

    @jax.jit
    def eval_step(variables: Variables, images: jax.Array) -> jax.Array:
        return outputs(apply_fn(variables, prepare(images), train=False, start=start)[0])

    return eval_step


def real_rows(
    eval_step: EvalStep, variables: Variables, batches: Iterable[Batch], mesh: Mesh
) -> Iterator[dict[str, np.ndarray]]:
    """`index`, `label`, `known` and `outputs` of each batch without the rows that pad it, one behind the device.

    Arguments as in `evaluate`.
    """

    def settled(columns: Batch) -> dict[str, np.ndarray]:
        rows = devices.gather(columns)
        real = np.asarray(rows.pop("real"), bool)
        return {name: np.asarray(column)[real] for name, column in rows.items()}

    pending = None
    for batch in batches:
        columns = {name: batch[name] for name in ("index", "label", "known", "real")}
        columns["outputs"] = eval_step(variables, devices.shard(batch, mesh)["image"])
        if pending is not None:
            yield settled(pending)  # while the device computes this batch
        pending = columns
    if pending is not None:
        yield settled(pending)


def evaluate(
    eval_step: EvalStep, variables: Variables, batches: Iterable[Batch], mesh: Mesh, total: int | None = None
) -> Predictions:
    """Predicts every image of `batches` once, and leaves the rows out that only pad a batch.

    Args:
        eval_step: from `make_eval_step`.
        variables: `params` and `batch_stats`.
        batches: evaluation batches of `jaxft.data.loader`, with `image`, `label`, `known`, `index` and `real`.
        mesh: the devices that share each batch.
        total: the number of images, for the progress bar.

    Raises:
        ValueError: there is no batch.
    """
    parts = []
    with bar("evaluating", total) as advance:
        for rows in real_rows(eval_step, variables, batches, mesh):
            parts.append([rows[name] for name in ("index", "label", "known", "outputs")])
            advance(len(rows["index"]))
    if not parts:
        raise ValueError("there is no batch to evaluate; give at least one image")
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))
