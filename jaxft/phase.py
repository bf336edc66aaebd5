"""One phase of a run: what is frozen, which optimizer at which rate, for how many epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxft import checks, optim
from jaxft.masking import FROZEN, TRAINABLE, Net
from jaxft.optim import Optimizer, Plateau, Schedule


@dataclass(frozen=True)
class Phase:
    """What a run does for some epochs; a run is one phase after another.

    Attributes:
        epochs: 1 or more.
        schedule: the count of updates of this phase, from 0 → learning rate; or such a function for each label.
        optimizer: schedule → optax transform; `optax.adam` is one, as are those of `optim`.
        frozen: a specification, as in `masking.frozen_layers`.
        groups: label → specification of its layers, as in `masking.select`; layers of no group are "trainable".
        clip_norm: largest global norm of the gradient over all trainable leaves; None clips nothing.
        patience: epochs without a better monitored value after which the phase ends; None never ends it early.
        average: decay of a moving average of what is trained, as in `train_state.averaged`; None keeps none.
        momentum: what the optimizer holds of layers that were trainable in the phase before: it starts "anew", or this
            phase is to "carry" it on.

    Raises:
        ValueError: a value is out of its range, or labels of groups and schedules do not agree.
    """

    epochs: int
    schedule: Schedule | Mapping[str, Schedule]
    optimizer: Optimizer = optim.NesterovSGD()
    frozen: str = "none"
    groups: Mapping[str, str] = field(default_factory=dict)
    clip_norm: float | None = None
    patience: int | None = None
    average: float | None = None
    momentum: Literal["anew", "carry"] = "anew"

    def __post_init__(self) -> None:
        checks.check_count("epochs of a phase", self.epochs, 1)
        if not callable(self.optimizer):
            raise ValueError(
                f"optimizer wants a function of a schedule, optax.adam or optim.AdamW() say, not {self.optimizer!r}; "
                "the rate goes to schedule="
            )
        if isinstance(self.optimizer, type):
            name = self.optimizer.__name__
            raise ValueError(f"optimizer wants a function of a schedule, not the class {name}; say {name}()")
        if not isinstance(self.frozen, str):
            raise ValueError(
                f"frozen wants a specification, not {self.frozen!r}; a regular expression names several layers: "
                '"conv1|conv2"'
            )
        self._check_labels()
        for name in ("groups", "schedule"):  # a mapping that its caller changes later changes no phase
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(getattr(self, name)))
        if self.clip_norm is not None:
            positive = "a finite number above 0, or None, which clips nothing"
            checks.check_real("clip_norm", self.clip_norm, lambda norm: norm > 0, positive)
        if self.patience is not None:
            checks.check_count("patience of a phase", self.patience, 1)
        if self.average is not None:
            decay = "a decay between 0 and 1, 0.999 say, or None for no average"
            checks.check_real("average", self.average, lambda decay: 0 < decay < 1, decay)
        if self.momentum not in ("anew", "carry"):
            raise ValueError(f'momentum of a phase wants "anew" or "carry", not {self.momentum!r}')

    def _check_labels(self) -> None:
        if not isinstance(self.groups, Mapping):
            raise ValueError(
                f'groups wants a mapping of labels to specifications, {{"top": "from:block4"}} say, not {self.groups!r}'
            )
        for label, spec in self.groups.items():
            if not isinstance(label, str) or not label or label in (FROZEN, TRAINABLE):
                raise ValueError(f"a group wants a label of its own, not {label!r}; {FROZEN} and {TRAINABLE} are taken")
            if not isinstance(spec, str) or spec == "none":
                raise ValueError(f"group {label!r} wants a specification of its layers, not {spec!r}")
        if not isinstance(self.schedule, Mapping):
            return optim.check_schedule("schedule of a phase", self.schedule)
        for label, schedule in self.schedule.items():
            optim.check_schedule(f"schedule of {label!r}", schedule)
        labels = {TRAINABLE, *self.groups}
        if missing := set(self.groups) - set(self.schedule):
            raise ValueError(f"no schedule for {sorted(missing)}: schedule wants one for each label of groups")
        if extra := set(self.schedule) - labels:
            raise ValueError(
                f"schedules for {sorted(extra, key=str)}, which are not labels of this phase; they are {sorted(labels)}"
            )
        plateaus = {optim.plateau(schedule) for schedule in self.schedule.values()} - {None}
        if len(plateaus) > 1:
            raise ValueError(
                "a phase has one Plateau, as it scales the rates of all groups by one factor; write the others as "
                f"optim.Scaled(plateau, factor), not {sorted(map(repr, plateaus))}"
            )

    @property
    def duration(self) -> str:
        """In words: "1 epoch", "20 epochs"."""
        return f"{self.epochs} epoch" if self.epochs == 1 else f"{self.epochs} epochs"

    def schedules(self) -> dict[str, Schedule]:
        """Label → schedule, for "trainable" and every group that has one."""
        if isinstance(self.schedule, Mapping):
            return dict(self.schedule)
        return dict.fromkeys((TRAINABLE, *self.groups), self.schedule)

    def rates(self, step: int, lr_scale: float = 1.0) -> dict[str, float]:
        """Label → learning rate of update `step` of this phase, from 0, for the history."""
        return {label: float(schedule(step)) * lr_scale for label, schedule in self.schedules().items()}

    def lr_scale(self, values: Sequence[float], best: Literal["lowest", "highest"] = "lowest") -> float:
        """What the state's `lr_scale` must be after epochs of this phase with these monitored values; 1 by default."""
        plateau = self.plateau()
        return 1.0 if plateau is None else plateau.scale(values, best)

    def plateau(self) -> Plateau | None:
        """The Plateau among the schedules, if there is one."""
        plateaus = (optim.plateau(schedule) for schedule in self.schedules().values())
        return next((found for found in plateaus if found is not None), None)


def unfreeze(net: Net, phase: Phase, stages: Sequence[str]) -> tuple[Phase, ...]:
    """Gradual unfreezing: `phase` with the layers new to the task alone, then once from each of `stages` on.

    >>> unfreeze(net, Phase(2, optim.Constant(1e-3), momentum="carry"), ["block5", "block4"])  # head, then 5, then 4

    Raises:
        ValueError: a name is not that of a stage, or the names do not go from the last stage to the first.
    """
    order = list(net.layers())
    if unknown := [stage for stage in stages if stage not in order]:
        raise ValueError(f"unfreeze names {unknown}, which are not stages; the stages are {', '.join(order)}")
    depths = [order.index(stage) for stage in stages]
    if sorted(set(depths), reverse=True) != depths:
        raise ValueError(f"unfreeze wants stages from the last to the first, not {list(stages)}")
    specs = ["all-but-head", *(f"through:{order[depth - 1]}" if depth else "none" for depth in depths)]
    return tuple(replace(phase, frozen=spec) for spec in specs)
