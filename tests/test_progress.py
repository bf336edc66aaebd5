import builtins
import io
import sys
import threading
import types

import pytest
from rich.console import Console

from jaxft import progress


class Clock:
    """A clock that the test turns."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def run(self, pace, steps, seconds):
        for _ in range(steps):
            self.now += seconds
            pace.advance(1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def terminal(monkeypatch):
    """Standard error as a terminal of 120 columns; to call in a test: pytest replaces the stream after fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def shown():
    """What the live display shows now, as plain text."""
    console = Console(file=io.StringIO(), width=120)
    console.print(progress._DISPLAY.shown.get_renderable())
    return console.file.getvalue()


def test_the_first_steps_are_not_timed(clock):
    """Bug: the bar says 538 steps/s, because the step that follows the compiled one is only handed to the device."""
    pace = progress.Pace()
    clock.now += 60  # compiles
    pace.advance(1)
    clock.now += 0.001
    pace.advance(1)
    assert pace.rate() is None and pace.left(10) is None
    clock.run(pace, 8, 0.5)
    assert pace.rate() == pytest.approx(2)


def test_an_evaluation_does_not_slow_the_rate(clock):
    """Bug: the bar says 2.24 steps/s and, after the first epoch, 0.1."""
    pace = progress.Pace()
    clock.run(pace, 22, 0.5)
    pace.interrupt()
    clock.now += 300
    assert pace.rate() == pytest.approx(2)
    clock.now += 30  # figures are computed, a checkpoint is saved
    pace.advance(1)
    assert pace.rate() == pytest.approx(2)
    clock.run(pace, 20, 0.5)
    assert pace.rate() == pytest.approx(2)


def test_the_time_left_counts_the_evaluations_to_come(clock):
    """Bug: an hour of training with as long an evaluation is announced as half an hour."""
    pace = progress.Pace()
    clock.run(pace, 20, 0.5)
    assert pace.left(20) == pytest.approx(10)
    pace.interrupt()
    clock.now += 8  # for 20 steps
    clock.run(pace, 10, 0.5)
    assert pace.left(20) == pytest.approx(10 + 8)


def test_what_compiles_later_is_not_timed(clock):
    """Bug: the last group of an epoch, which compiles a second program, shows a tenth of the rate."""
    pace = progress.Pace()
    clock.run(pace, 22, 0.5)
    clock.now += 100
    pace.advance(5, timed=False)
    clock.now += 0.001
    pace.advance(1)
    clock.run(pace, 20, 0.5)
    assert pace.rate() == pytest.approx(2)


def test_the_rate_is_that_of_now(clock):
    """Bug: a rate over the whole run hides that the machine became busy."""
    pace = progress.Pace()
    clock.run(pace, 1000, 0.1)
    clock.run(pace, 100, 1.0)
    assert pace.rate() == pytest.approx(1, rel=0.05)
    assert len(pace.samples) < 100


def test_bars_nest_in_one_display(monkeypatch, clock):
    """Bug: the display stands still while an evaluation runs, or a second live display is an error."""
    stream = terminal(monkeypatch)
    with progress.bar("training", 40, 0, unit="steps") as advance:
        for _ in range(12):
            clock.now += 0.5
            advance(1, "epoch 1/2")
        with progress.bar("evaluating", 8) as inner:
            for _ in range(4):
                clock.now += 10
                inner(1)
            text = shown()
            assert "training" in text and "12/40" in text and "2 steps/s" in text and "epoch 1/2" in text
            assert "evaluating" in text and "4/8" in text and "0.1 images/s" in text and "0:40 left" in text
        clock.now += 0.5
        advance(1)
        text = shown()
        assert "evaluating" not in text and "2 steps/s" in text
        assert "1:44 left" in text  # 27 steps at 2 a second, and 40 s of evaluation for every 12 steps
    assert progress._DISPLAY.shown is None and "training" in stream.getvalue()


def test_a_bar_without_a_total(monkeypatch, clock):
    """Bug: a set of unknown length cannot be shown, because None is compared with a number."""
    terminal(monkeypatch)
    with progress.bar("evaluating", None) as advance:
        advance(3)
        assert "3/?" in shown()


def test_an_error_closes_the_display(monkeypatch):
    """Bug: after a failed run, the next bar of a notebook or server draws into a display that is dead."""
    terminal(monkeypatch)
    with pytest.raises(KeyError), progress.bar("training", 3), progress.bar("evaluating", 3):
        raise KeyError("x")
    assert progress._DISPLAY.shown is None
    with progress.bar("training", 3) as advance:
        advance(1)
        assert "1/3" in shown()


def test_bars_of_several_threads(monkeypatch):
    """Bug: a bar of one thread interrupts that of another, or two live displays fight for the terminal."""
    terminal(monkeypatch)
    failed = []

    def work(name):
        try:
            with progress.bar(name, 50) as advance:
                for _ in range(50):
                    advance(1)
                assert not progress._DISPLAY._open()[-1].interrupted
        except BaseException as error:  # noqa: BLE001 whatever it is, the test reports it
            failed.append(error)

    with progress.bar("outer", 1):
        threads = [threading.Thread(target=work, args=(f"thread {t}",)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not progress._DISPLAY._open()[-1].interrupted
    assert not failed and progress._DISPLAY.shown is None


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_quiet_where_nobody_looks(monkeypatch, stream):
    """Bug: a log file fills with bars, or a process without standard error (pythonw) crashes."""
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.bar("training", 3) as advance:
        advance(1, "note", timed=False)
        assert progress._DISPLAY.shown is None
    assert stream is None or not stream.getvalue()


def test_a_notebook_shows_the_bar(monkeypatch, clock):
    """Bug: a kernel's standard error is not a terminal, so a notebook shows nothing; or each refresh adds one more."""
    outputs = []

    class ZMQInteractiveShell:  # the name by which rich knows a notebook, and displays on its own
        kernel = object()

    class Handle:
        def update(self, data, raw):
            assert raw
            outputs.append(data["text/plain"])

    kernel = types.ModuleType("IPython")
    kernel.get_ipython = ZMQInteractiveShell
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    kernel.display = types.ModuleType("IPython.display")
    kernel.display.display = lambda data, raw, display_id: Handle()
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", kernel.display)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar("training", 100, unit="steps") as advance:
        for _ in range(50):
            clock.now += 0.1
            advance(1, "epoch 1/2")
        assert "training" in outputs[-1] and "10 steps/s" in outputs[-1]
        assert "\x1b" not in outputs[-1]
        assert len(outputs) < 20  # every half second, not at every step
    assert outputs[-1].strip() == ""
