"""The progress bar of everything that takes long."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich import progress
from rich.console import Console
from rich.text import Text


class Advance(Protocol):
    def __call__(self, n: float, note: str = "", /) -> None: ...


class _Rate(progress.ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} {self.unit}/s")


@contextmanager
def bar(description: str, total: float, done: float = 0, unit: str = "images") -> Iterator[Advance]:
    """A bar with rate and time left on standard error if that is a terminal, nothing elsewhere.

    Yields a function `advance(n, note="")` to call as n more of the `total` units are done.
    """
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        _Rate(unit),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as shown:
        task = shown.add_task(description, total=total, completed=done, note="")

        def advance(n: float, note: str = "", /) -> None:
            shown.update(task, advance=n, note=note)

        yield advance
