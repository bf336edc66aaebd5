"""What is known of a run whose loss or weights are no longer finite: the steps before, their images and gradients."""

import collections
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STEPS = 8  # that are remembered
LAYERS = 5  # whose gradients are largest


class Diverged(FloatingPointError):
    """The training loss, or a weight, is no longer finite.

    Attributes:
        steps: of the last ones, the first that is not finite at the end: `step` (updates before it), `loss`, `images`
            (indices of its batch) and `largest_gradients` (layer → norm, the largest first; NaN counts as largest).
    """

    def __init__(self, message: str, steps: Sequence[Mapping[str, Any]] = ()):
        super().__init__(message)
        self.steps = list(steps)


class Recent:
    """The last steps of a run."""

    def __init__(self, layers: Sequence[str]):
        """`layers`: the trainable ones, in the order of the norms."""
        self._layers = layers
        self._steps: collections.deque[tuple[int, float, Any, Any]] = collections.deque(maxlen=STEPS)

    def add(self, first: int, losses: np.ndarray, norms: Any, index: Any) -> int | None:
        """Remembers steps that were one dispatch.

        Args:
            first: updates before the first of them.
            losses: float32 [] or [steps].
            norms: of the gradient by layer, float32 [layers] or [steps, layers]; None if they are not known.
            index: the images of each step, int [B] or [steps, B]; None if they are not known.

        Returns:
            the first step whose loss is not finite, the last that is remembered; None if there is none.
        """
        losses = np.ravel(losses)
        norms = None if norms is None else np.reshape(norms, (len(losses), -1))
        index = None if index is None else np.reshape(index, (len(losses), -1))
        for place, loss in enumerate(losses.tolist()):
            its_norms, its_images = (None if each is None else each[place] for each in (norms, index))
            self._steps.append((first + place, loss, its_norms, its_images))
            if not math.isfinite(loss):
                return first + place
        return None

    def report(self) -> list[dict[str, Any]]:
        """As `Diverged.steps`."""
        return [self._told(*step) for step in self._steps]

    def _told(self, step: int, loss: float, norms: Any, index: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"step": step, "loss": loss}
        if norms is not None:
            order = np.argsort(-np.nan_to_num(norms, nan=np.inf), kind="stable")[:LAYERS]
            found["largest_gradients"] = {self._layers[place]: float(norms[place]) for place in order}
        if index is not None:
            found["images"] = [int(number) for number in index]
        return found


def replay() -> str:
    """The command that does the step once more: a run goes on from its last checkpoint, with the same batches."""
    return shlex.join(sys.orig_argv)
