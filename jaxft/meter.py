"""Running means of an epoch's training figures, and its rate."""

import time
from collections.abc import Mapping

import numpy as np

COUNTS = ("steps", "timed_steps", "seconds")


class Meter:
    """Sums over the steps of the epoch under way. `sums` holds JSON values, which a checkpoint keeps.

    Attributes:
        sums: figure → sum over the steps; with `steps`, and with `timed_steps` and their `seconds`.
    """

    def __init__(self, sums: Mapping[str, float] | None = None):
        self.sums: dict[str, float] = dict.fromkeys(COUNTS, 0) | dict(sums or {})
        self._since: float | None = None

    def add(self, figures: Mapping[str, np.ndarray]) -> None:
        """Adds one step's figures, float32 scalars, or those of several steps, [steps]."""
        for name, values in figures.items():
            total = self.sums.get(name, 0.0)
            for value in np.ravel(values).tolist():  # one by one: several at once add up to the same bits
                total += value
            self.sums[name] = total
        self.sums["steps"] += np.size(next(iter(figures.values())))

    def means(self) -> dict[str, float]:
        """Figure → mean over the steps so far; empty before the first."""
        return {name: total / self.sums["steps"] for name, total in self.sums.items() if name not in COUNTS}

    def resume(self) -> None:
        """Lets the clock run, if it does not."""
        self._since = time.perf_counter() if self._since is None else self._since

    def pause(self) -> None:
        """Stops the clock: for what compiles, saves and evaluates."""
        if self._since is not None:
            self.sums["seconds"] += time.perf_counter() - self._since
        self._since = None

    def timed(self, steps: int) -> None:
        """Counts steps that the clock has seen."""
        self.sums["timed_steps"] += steps

    def rate(self, batch_size: int) -> float | None:
        """Images a second; None where everything compiled."""
        seconds = self.sums["seconds"]
        return (
            round(self.sums["timed_steps"] * batch_size / seconds, 2) if seconds and self.sums["timed_steps"] else None
        )
