import math

import optax
import pytest
from tiny import Tiny

from jaxft import optim, phase
from jaxft.phase import Phase

RATE = optim.Constant(0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs of a phase wants an integer of at least 1, not 0"),
        ({"epochs": 1.5}, "not 1.5"),
        ({"epochs": True}, "not True"),
        ({"schedule": 0.001}, r"not the number 0.001; say optim.Constant\(0.001\)"),
        ({"schedule": "constant"}, "a function of the update count"),
        ({"schedule": optim.Constant}, "a function of the update count"),
        ({"optimizer": optax.adam(0.1)}, "the rate goes to schedule="),
        ({"optimizer": optim.NesterovSGD}, r"not the class NesterovSGD; say NesterovSGD\(\)"),
        ({"optimizer": "adam"}, "function of a schedule"),
        ({"frozen": {"conv1"}}, "frozen wants a specification, not {'conv1'}; a regular expression"),
        ({"frozen": ["conv1"]}, "regular expression"),
        ({"clip_norm": math.inf}, "above 0, or None, which clips nothing, not inf"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"patience": 0}, "patience of a phase"),
        ({"average": 1.0}, "decay between 0 and 1"),
        ({"average": 0}, "decay between 0 and 1"),
        ({"momentum": 0.9}, '"anew" or "carry", not 0.9'),
        ({"groups": [("body", "stage:body")]}, "groups wants a mapping"),
        ({"groups": {"frozen": "stage:body"}}, "a label of its own, not 'frozen'"),
        ({"groups": {"trainable": "stage:body"}}, "a label of its own"),
        ({"groups": {"body": {"conv2"}}}, "group 'body' wants a specification"),
        ({"groups": {"body": "none"}}, "group 'body' wants a specification"),
        ({"groups": {"body": "stage:body"}, "schedule": {"trainable": RATE}}, r"no schedule for \['body'\]"),
        (
            {"schedule": {"trainable": RATE, "bdy": RATE}},
            r"\['bdy'\], which are not labels of this phase; they are \['trainable'\]",
        ),
        ({"schedule": {"trainable": 0.1}}, "schedule of 'trainable' wants a schedule, not the number"),
    ],
)
def test_a_phase_that_cannot_be_is_refused(settings, message):
    """Bug: a number for a schedule, a set for a specification or an infinite norm fails late, in other words."""
    with pytest.raises(ValueError, match=message):
        Phase(**{"epochs": 1, "schedule": RATE, **settings})


def test_a_phase_shows_all_its_settings():
    """Bug: a run's record leaves out a setting of a phase, or shows the address of an object for it."""
    value = Phase(
        3, optim.Cosine(0.1, 10), optim.AdamW(), "all-but-head", {"body": "stage:body"}, 1.0, 2, 0.99, "carry"
    )
    assert eval(repr(value), {**vars(optim), "Phase": Phase}) == value
    assert "0x" not in repr(Phase(1, RATE))


def test_a_phase_stays_as_it_was_made():
    """Bug: a phase changes with a mapping that its caller uses again, and the record no longer says what ran."""
    groups, schedules = {"body": "stage:body"}, {"trainable": RATE, "body": RATE}
    value = Phase(1, schedules, groups=groups)
    groups["body"], schedules["body"] = "stage:stem", optim.Constant(9.0)
    assert value == Phase(1, {"trainable": RATE, "body": RATE}, groups={"body": "stage:body"})


def test_rates_are_those_of_each_label():
    """Bug: the history shows one rate for all groups, or forgets what a plateau has made of it."""
    groups = {"body": "stage:body"}
    one = Phase(1, optim.StepDecay(1.0, 10, 0.5), groups=groups)
    assert one.rates(9) == {"trainable": 1.0, "body": 1.0}
    assert one.rates(10, 0.5) == {"trainable": 0.25, "body": 0.25}
    two = Phase(1, {"trainable": RATE, "body": optim.Scaled(RATE, 0.5)}, groups=groups)
    assert two.rates(0) == pytest.approx({"trainable": 0.1, "body": 0.05})


def test_a_plateau_is_found_in_a_group():
    """Bug: a plateau inside another schedule or a group never lowers the rate."""
    plateau = optim.Plateau(0.1, factor=0.5, patience=1)
    schedules = {"trainable": RATE, "body": optim.Scaled(optim.Scaled(plateau, 0.5), 0.5)}
    value = Phase(1, schedules, groups={"body": "stage:body"})
    assert value.plateau() == plateau
    assert value.lr_scale([1.0, 2.0, 2.0]) == 0.25
    assert value.lr_scale([1.0, 2.0, 2.0], "highest") == 0.5
    assert Phase(1, RATE).lr_scale([1.0, 2.0, 2.0]) == 1.0
    with pytest.raises(ValueError, match="a phase has one Plateau"):
        Phase(1, {"trainable": optim.Plateau(0.1), "body": plateau}, groups={"body": "stage:body"})


def test_gradual_unfreezing():
    """Bug: a phase trains one stage alone, or freezes the stage that it is to open."""
    base = Phase(2, RATE, momentum="carry")
    phases = phase.unfreeze(Tiny(), base, ["body", "stem"])
    assert [value.frozen for value in phases] == ["all-but-head", "through:stem", "none"]
    assert {value.momentum for value in phases} == {"carry"}
    with pytest.raises(ValueError, match="the stages are stem, body, mean, predictions"):
        phase.unfreeze(Tiny(), base, ["boddy"])
    with pytest.raises(ValueError, match="from the last to the first"):
        phase.unfreeze(Tiny(), base, ["stem", "body"])


def test_duration():
    """Bug: "1 epochs"."""
    assert [Phase(count, optim.Constant(1e-3)).duration for count in (1, 2)] == ["1 epoch", "2 epochs"]
