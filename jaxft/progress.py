"""The progress bar of everything that takes long: in a terminal, in a notebook, and silent elsewhere."""

import io
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich import progress
from rich.console import Console
from rich.text import Text

Found = TypeVar("Found")

WINDOW = 30.0  # seconds of work whose mean is the rate shown
FEWEST = 10  # samples that stay in the window, however old
SAMPLE = 0.1  # seconds between two samples
REFRESH = 0.5  # seconds between two pictures in a notebook


class Advance(Protocol):
    def __call__(self, n: float, note: str = "", /, *, timed: bool = True) -> None: ...


class Pace:
    """The steady rate of something that is interrupted, and what time the rest will take.

    Left out of the rate: the interval in which something else was done (an evaluation and what follows it), work that
    the caller calls untimed because it compiled, the first work of all for the same reason, and the work after these,
    which may only have been handed to the device.
    """

    def __init__(self):
        self.seconds = self.units = 0.0  # of timed work
        self.all_units = 0.0
        self.lost = self.lost_per_unit = 0.0  # seconds of interruptions
        self.interrupted = False
        self.skip = 2
        self.last = time.monotonic()
        self.samples: deque[tuple[float, float]] = deque([(0.0, 0.0)])

    def advance(self, n: float, timed: bool = True) -> None:
        """Counts n units of work as done now."""
        now = time.monotonic()
        if not timed:
            self.skip = 2
        if self.skip:
            self.skip -= 1
        elif self.interrupted:
            self.lost += max(0.0, now - self.last - n / (self.rate() or math.inf))
            self.lost_per_unit = self.lost / (self.all_units or n or 1)
        else:
            self.seconds += now - self.last
            self.units += n
            if self.seconds - self.samples[-1][0] >= SAMPLE:
                self.samples.append((self.seconds, self.units))
                while len(self.samples) > FEWEST and self.seconds - self.samples[0][0] > WINDOW:
                    self.samples.popleft()
        self.all_units += n
        self.interrupted = False
        self.last = now

    def interrupt(self) -> None:
        """Something else is done before the work goes on."""
        self.interrupted = True

    def rate(self) -> float | None:
        """Units a second, or None while too little is known."""
        (seconds, units), (first_seconds, first_units) = self.samples[-1], self.samples[0]
        return (units - first_units) / (seconds - first_seconds) if seconds - first_seconds > 0 else None

    def left(self, units: float) -> float | None:
        """Seconds for so many more units, with as many interruptions as so far; None while too little is known."""
        rate = self.rate()
        return units / rate + units * self.lost_per_unit if rate else None


class _Rate(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        rate = task.fields["pace"].rate()
        return Text("" if rate is None else f"{rate:.3g} {task.fields['unit']}/s")


class _Left(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        seconds = None if task.total is None else task.fields["pace"].left(task.total - task.completed)
        if seconds is None:
            return Text("")
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left")


class _Display:
    """The one live display of the process: a row for each bar that is open."""

    def __init__(self):
        self.lock = threading.RLock()
        self.shown: progress.Progress | None = None
        self.notebook: Any = None  # IPython's handle of the output that is replaced
        self.refreshed = 0.0
        self.of_thread = threading.local()  # .open: the paces of this thread's bars, the outermost first

    def add(self, description: str, total: float | None, done: float, unit: str) -> tuple[progress.TaskID, Pace]:
        pace = Pace()
        with self.lock:
            if self.shown is None:
                self._start()
            assert self.shown is not None
            row = self.shown.add_task(description, total=total, note="", pace=pace, unit=unit)
            self.shown.update(row, completed=done)
            outer = self._open()
            if outer:
                outer[-1].interrupt()
            outer.append(pace)
            self._refresh()
        return row, pace

    def advance(self, row: progress.TaskID, pace: Pace, n: float, note: str, timed: bool) -> None:
        with self.lock:
            if self.shown is None:
                return
            pace.advance(n, timed)
            self.shown.update(row, advance=n, note=note)
            if time.monotonic() - self.refreshed >= REFRESH:
                self._refresh()

    def remove(self, row: progress.TaskID, pace: Pace) -> None:
        with self.lock:
            outer = self._open()
            if pace in outer:
                outer.remove(pace)
            assert self.shown is not None
            self.shown.remove_task(row)
            self._refresh()
            if not self.shown.task_ids:
                self.shown.stop()
                self.shown = self.notebook = None

    def _open(self) -> list[Pace]:
        if not hasattr(self.of_thread, "open"):
            self.of_thread.open = []
        return self.of_thread.open

    def _start(self) -> None:
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            _Rate(),
            _Left(),
            progress.TextColumn("{task.fields[note]}"),
        )
        notebook = _in_notebook()
        # A notebook gets plain text that is replaced: rich's own way there needs ipywidgets.
        if notebook:
            console = Console(file=io.StringIO(), width=110, color_system=None, force_jupyter=False)
        else:
            console = Console(stderr=True)
        shown = self.shown = progress.Progress(*columns, console=console, disable=notebook, transient=True)
        if notebook:
            from IPython.display import display  # pyright: ignore[reportMissingImports]

            self.notebook = display({"text/plain": ""}, raw=True, display_id=True)
        shown.start()

    def _refresh(self) -> None:
        if self.notebook is None or self.shown is None:
            return  # in a terminal, rich refreshes the display from a thread of its own
        self.refreshed = time.monotonic()
        with self.shown.console.capture() as text:
            self.shown.console.print(self.shown.get_renderable())
        self.notebook.update({"text/plain": text.get().rstrip()}, raw=True)


_DISPLAY = _Display()


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _in_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def bar(description: str, total: float | None, done: float = 0, unit: str = "images") -> Iterator[Advance]:
    """A bar with rate and time left, on standard error if that is a terminal or in a notebook; nothing elsewhere.

    Bars may nest, and may be open in several threads: each is a row of one display. A bar interrupts the one
    around it in the same thread, whose rate leaves that time out. `total` is None where it is
    not known.

    Yields a function `advance(n, note="", timed=True)` to call as n more of the `total` units are done; `timed=False`
    leaves them out of the rate, as those during which something compiled.
    """
    if not (_in_terminal() or _in_notebook()):
        yield lambda n, note="", /, *, timed=True: None
        return
    row, pace = _DISPLAY.add(description, total, done, unit)
    try:
        yield lambda n, note="", /, *, timed=True: _DISPLAY.advance(row, pace, n, note, timed)
    finally:
        _DISPLAY.remove(row, pace)


def each(description: str, function: Callable[[int], Found], count: int) -> list[Found]:
    """function(0), function(1), … of so many, on up to eight threads, with a bar."""
    found = []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool, bar(description, count) as advance:
        for one in pool.map(function, range(count)):
            found.append(one)
            advance(1)
    return found
