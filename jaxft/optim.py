"""Schedules and optimizers, as frozen values: their repr shows every setting, and goes into a run's record.

A schedule takes the count of updates from the start of its phase, beginning at 0, and gives a learning rate. An
optimizer takes a schedule and gives an optax transform. Your own function can take the place of either.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxft import masking
from jaxft.checks import check_count, check_real, plain

Schedule = Callable[[Any], Any]  # update count → learning rate
Optimizer = Callable[[Schedule], optax.GradientTransformation]


def check_schedule(what: str, schedule: object) -> None:
    """Raises ValueError unless `schedule` is a function; for a number the message says which one to write."""
    if (number := plain(schedule)) is not None:
        raise ValueError(f"{what} wants a schedule, not the number {number}; say optim.Constant({number})")
    if not callable(schedule) or isinstance(schedule, type):
        raise ValueError(f"{what} wants a function of the update count, optim.Constant(0.001) say, not {schedule!r}")


def _check_lr(schedule: Any, *, zero: bool = True) -> None:
    fits, wanted = ((lambda lr: lr >= 0), "0 or above") if zero else ((lambda lr: lr > 0), "above 0")
    check_real(f"lr of {type(schedule).__name__}", schedule.lr, fits, f"a finite number, {wanted}")


@dataclass(frozen=True)
class Constant:
    """`lr` at every update."""

    lr: float

    def __post_init__(self) -> None:
        _check_lr(self)

    def __call__(self, count: Any) -> Any:
        return self.lr


@dataclass(frozen=True)
class InverseTime:
    """lr / (1 + decay · t). Source: the `decay` of SGD in Keras 1 and 2; Keras 3 ignores it."""

    lr: float
    decay: float

    def __post_init__(self) -> None:
        _check_lr(self)
        check_real("decay of InverseTime", self.decay, lambda decay: decay >= 0, "a finite number, 0 or above")

    def __call__(self, count: Any) -> Any:
        return self.lr / (1.0 + self.decay * count)


@dataclass(frozen=True)
class StepDecay:
    """lr · factor^(t // every); `every` is in updates."""

    lr: float
    every: int
    factor: float

    def __post_init__(self) -> None:
        _check_lr(self)
        check_count("every of StepDecay", self.every, 1)
        check_real("factor of StepDecay", self.factor, lambda factor: factor > 0, "a finite number above 0")

    def __call__(self, count: Any) -> Any:
        return self.lr * self.factor ** (count // self.every)


@dataclass(frozen=True)
class Cosine:
    """A linear rise from 0 to `lr` over `warmup` updates, then half a cosine down to 0 at update `total`."""

    lr: float
    total: int
    warmup: int = 0

    def __post_init__(self) -> None:
        _check_lr(self)
        check_count("total of Cosine", self.total, 1)
        check_count("warmup of Cosine", self.warmup, 0)
        if self.warmup >= self.total:
            raise ValueError(
                f"warmup={self.warmup} of Cosine is not shorter than total={self.total}; both count updates"
            )

    def __call__(self, count: Any) -> Any:
        if self.warmup == 0:
            return optax.cosine_decay_schedule(self.lr, self.total)(count)
        return optax.warmup_cosine_decay_schedule(0.0, self.lr, self.warmup, self.total)(count)


LINEAR_FINAL = 0.85  # share of the cycle after which the linear shape falls from its first rate to its last


@dataclass(frozen=True)
class OneCycle:
    """A rise from lr / start to `lr` over the share `warmup` of the cycle, then a fall to lr / (start · end).

    The linear shape falls to its first rate by 85 % of the cycle, and to its last one from there. `total` is the length
    of the cycle in updates. Source: Smith and Topin 2017, "Super-Convergence", in the form of
    `optax.cosine_onecycle_schedule` and `optax.linear_onecycle_schedule`.
    """

    lr: float
    total: int
    warmup: float = 0.3
    start: float = 25.0
    end: float = 1e4
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        _check_lr(self)
        check_count("total of OneCycle", self.total, 2)
        check_real("start of OneCycle", self.start, lambda start: start >= 1, "a finite number, 1 or above")
        check_real("end of OneCycle", self.end, lambda end: end >= 1, "a finite number, 1 or above")
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f'shape of OneCycle wants "cosine" or "linear", not {self.shape!r}')
        check_real("warmup of OneCycle", self.warmup, lambda share: 0 < share < 1, "a share between 0 and 1")
        peak = int(self.warmup * self.total)
        falls = int(LINEAR_FINAL * self.total) if self.shape == "linear" else self.total
        if not 1 <= peak < falls:
            raise ValueError(
                f"OneCycle of {self.total} updates with warmup={self.warmup} has its peak at update {peak}, and wants "
                f"it from 1 to {falls - 1}; change warmup, or make total larger"
            )

    def __call__(self, count: Any) -> Any:
        if self.shape == "linear":
            schedule = optax.linear_onecycle_schedule
            return schedule(self.total, self.lr, self.warmup, LINEAR_FINAL, self.start, self.end)(count)
        return optax.cosine_onecycle_schedule(self.total, self.lr, self.warmup, self.start, self.end)(count)


@dataclass(frozen=True)
class Plateau:
    """`lr`, times `factor` whenever the monitored value has not improved for `patience` epochs.

    The loop asks `scale` for the product of those factors at the end of an epoch, and puts it into the state's
    `lr_scale`. That is one number a run: in a phase of several groups it scales the rate of each, also of groups whose
    schedule is not a Plateau, and all Plateaus of a phase must be equal. `Scaled` of a Plateau is the way to other
    rates.

    Attributes:
        lr: the rate before the first reduction.
        factor: between 0 and 1.
        patience: epochs without improvement before a reduction.
        min_delta: the least change that counts as an improvement.
        cooldown: epochs after a reduction in which nothing is counted.
        floor: lowest rate, Keras's `min_lr`; inside `Scaled` it is scaled, too.

    Source: `keras.callbacks.ReduceLROnPlateau`.
    """

    lr: float
    factor: float = 0.1
    patience: int = 10
    min_delta: float = 1e-4
    cooldown: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_lr(self, zero=False)
        check_real("factor of Plateau", self.factor, lambda factor: 0 < factor < 1, "a number between 0 and 1")
        check_count("patience of Plateau", self.patience, 1)
        check_real("min_delta of Plateau", self.min_delta, lambda delta: delta >= 0, "a finite number, 0 or above")
        check_count("cooldown of Plateau", self.cooldown, 0)
        check_real(
            "floor of Plateau", self.floor, lambda floor: 0 <= floor <= self.lr, f"a rate from 0 to lr={self.lr}"
        )

    def __call__(self, count: Any) -> Any:
        return self.lr

    def scale(self, values: Sequence[float], best: Literal["lowest", "highest"] = "lowest") -> float:
        """The factor on `lr` after epochs with these monitored values: a pure function, so that resuming is exact.

        NaN does not count as an improvement.
        """
        if best not in ("lowest", "highest"):
            raise ValueError(f'best wants "lowest" or "highest", not {best!r}')
        scale, reached, wait, cooldown = 1.0, math.inf, 0, 0
        for value in values:
            lower = value if best == "lowest" else -value
            if cooldown:
                cooldown, wait = cooldown - 1, 0
            if lower < reached - self.min_delta:
                reached, wait = lower, 0
            elif not cooldown:
                wait += 1
                if wait >= self.patience and scale * self.lr > self.floor:
                    scale, cooldown, wait = max(scale * self.factor, self.floor / self.lr), self.cooldown, 0
        return scale


@dataclass(frozen=True)
class Scaled:
    """`factor` times another schedule."""

    schedule: Schedule
    factor: float

    def __post_init__(self) -> None:
        check_schedule("schedule of Scaled", self.schedule)
        check_real("factor of Scaled", self.factor, lambda factor: factor >= 0, "a finite number, 0 or above")

    def __call__(self, count: Any) -> Any:
        return self.schedule(count) * self.factor


def plateau(schedule: Schedule) -> Plateau | None:
    """The Plateau that `schedule` is, or that it scales; None for any other."""
    while isinstance(schedule, Scaled):
        schedule = schedule.schedule
    return schedule if isinstance(schedule, Plateau) else None


def _check_share(what: str, value: object) -> None:
    check_real(what, value, lambda share: 0 <= share < 1, "a number from 0 to below 1")


def _check_decay(what: str, value: object) -> None:
    check_real(what, value, lambda decay: decay >= 0, "a finite number, 0 or above")


def _l2(l2: float) -> optax.GradientTransformation:
    return optax.add_decayed_weights(2.0 * l2, mask=masking.kernels) if l2 else optax.identity()


@dataclass(frozen=True)
class NesterovSGD:
    """SGD with nesterov momentum, v ← μv − lr_t·g and p ← p + μv − lr_t·g, as Keras computes it.

    The rate is inside the momentum buffer, where `SGD(nesterov=True)` keeps it outside: the two differ as soon as the
    rate changes. `l2` is λ of Keras's `l2(λ)` on kernels, which adds 2λ·w to their gradient.
    """

    momentum: float = 0.9
    l2: float = 0.0

    def __post_init__(self) -> None:
        _check_share("momentum of NesterovSGD", self.momentum)
        _check_decay("l2 of NesterovSGD", self.l2)

    def __call__(self, schedule: Schedule) -> optax.GradientTransformation:
        rate = optax.scale_by_learning_rate(schedule)
        return optax.chain(_l2(self.l2), rate, optax.trace(self.momentum, nesterov=True))


@dataclass(frozen=True)
class SGD:
    """SGD as optax and PyTorch compute it: the momentum buffer holds gradients. `l2` is as in `NesterovSGD`."""

    momentum: float = 0.0
    nesterov: bool = False
    l2: float = 0.0

    def __post_init__(self) -> None:
        _check_share("momentum of SGD", self.momentum)
        _check_decay("l2 of SGD", self.l2)
        if self.nesterov and not self.momentum:
            raise ValueError("SGD(nesterov=True) wants a momentum above 0, 0.9 say")

    def __call__(self, schedule: Schedule) -> optax.GradientTransformation:
        return optax.chain(_l2(self.l2), optax.sgd(schedule, self.momentum or None, self.nesterov))


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay lr_t · weight_decay · w on kernels alone; biases and BatchNorm do not decay."""

    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_decay("weight_decay of AdamW", self.weight_decay)
        _check_share("b1 of AdamW", self.b1)
        _check_share("b2 of AdamW", self.b2)
        check_real("eps of AdamW", self.eps, lambda eps: eps > 0, "a finite number above 0")

    def __call__(self, schedule: Schedule) -> optax.GradientTransformation:
        return optax.adamw(schedule, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=masking.kernels)


def by_depth(net: masking.Net, schedule: Schedule, factor: float) -> tuple[dict[str, str], dict[str, Schedule]]:
    """Discriminative rates: each stage learns at `factor` times the rate of the one after it.

    Stages that hold a layer new to the task follow `schedule` itself, under the label "trainable", which has no group;
    a net without a head has its last stage there. Each other stage with weights is a group of its own name.

    >>> groups, schedules = optim.by_depth(net, optim.Cosine(1e-3, total=500), factor=0.5)
    >>> Phase(epochs=5, schedule=schedules, groups=groups)

    Returns:
        (groups, schedules), as `Phase` takes them.

    Source: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", with factor 1/2.6.
    """
    check_schedule("by_depth", schedule)
    check_real("factor of by_depth", factor, lambda factor: factor > 0, "a finite number above 0")
    weighted = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    heads = set(net.head_layers())
    stages = [
        stage for stage, layers in net.layers().items() if set(layers) & set(weighted) and not set(layers) & heads
    ]
    if not heads:
        stages.pop()
    groups = {stage: f"stage:{stage}" for stage in stages}
    scaled = {stage: Scaled(schedule, factor**depth) for depth, stage in enumerate(reversed(stages), 1)}
    return groups, {**{stage: scaled[stage] for stage in stages}, masking.TRAINABLE: schedule}
