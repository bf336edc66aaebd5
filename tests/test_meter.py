import json

import numpy as np
import pytest

from jaxft import meter
from jaxft.meter import Meter


def test_several_steps_add_up_to_the_bits_of_single_ones():
    """Bug: the sum over a dispatch is added at once, which rounds differently from step by step."""
    losses = np.float32([0.1, 1e7, 0.3, -1e7, 0.7])
    single, several = Meter(), Meter()
    for loss in losses:
        single.add({"loss": loss})
    several.add({"loss": losses[:3]})
    several.add({"loss": losses[3:]})
    assert single.means() == several.means() and several.sums["steps"] == 5


def test_an_epoch_that_is_resumed_goes_on_from_its_sums():
    """Bug: the mean of an epoch is that of the steps after the stop; or the sums do not survive JSON."""
    whole, before = Meter(), Meter()
    for number in range(7):
        whole.add({"loss": np.float32(number / 3), "accuracy": np.float32(number / 7)})
    for number in range(4):
        before.add({"loss": np.float32(number / 3), "accuracy": np.float32(number / 7)})
    after = Meter(json.loads(json.dumps(before.sums)))
    for number in range(4, 7):
        after.add({"loss": np.float32(number / 3), "accuracy": np.float32(number / 7)})
    assert after.means() == whole.means()
    assert set(whole.means()) == {"loss", "accuracy"}  # counts are not figures


def test_before_the_first_step_there_is_no_mean_and_no_rate():
    """Bug: a division by zero, or a rate of nan in the history and on the screen."""
    assert Meter().means() == {} and Meter({}).rate(8) is None
    compiling = Meter()
    compiling.add({"loss": np.float32(1)})
    assert compiling.rate(8) is None  # every step compiled: nothing was timed


def test_the_clock_runs_only_between_resume_and_pause(monkeypatch):
    """Bug: compiling, saving and evaluating count as training; or a second resume forgets the first."""
    clock = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    meter_ = Meter()
    for seconds, act in [(5, meter_.resume), (2, meter_.resume), (2, meter_.pause), (9, meter_.pause), (1, lambda: 0)]:
        clock[0] += seconds
        act()
    meter_.timed(3)
    meter_.timed(1)
    assert meter_.sums["seconds"] == 4
    assert meter_.rate(8) == pytest.approx(4 * 8 / 4)
