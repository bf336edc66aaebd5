"""Optimizers and schedules as the field writes them, with Keras-exact nesterov SGD.

A schedule is a function of the update count, from 0. Constant, step and cosine ones are optax's own.
"""

import optax

from jaxft.masking import kernels


def inverse_time(lr: float, decay: float) -> optax.Schedule:
    """lr / (1 + decay · t). Source: the `decay` of SGD in Keras 1 and 2; Keras 3 ignores it."""
    return lambda step: lr / (1.0 + decay * step)


def step_decay(lr: float, every: int, factor: float, total: int) -> optax.Schedule:
    """lr · factor^(t // every), for `total` updates."""
    return optax.piecewise_constant_schedule(lr, {step: factor for step in range(every, total, every)})


def cosine(lr: float, total: int, warmup: int = 0) -> optax.Schedule:
    """A linear rise from 0 over `warmup` updates, then half a cosine down to 0 at update `total`.

    Raises:
        ValueError: the warm-up is not shorter than the whole.
    """
    if not 0 <= warmup < total:
        raise ValueError(f"cosine wants 0 ≤ warmup < total, not warmup={warmup} and total={total}")
    if warmup == 0:
        return optax.cosine_decay_schedule(lr, total)
    return optax.warmup_cosine_decay_schedule(0.0, lr, warmup, total)


def nesterov_sgd(lr: float | optax.Schedule, momentum: float = 0.9, l2: float = 0.0) -> optax.GradientTransformation:
    """SGD with nesterov momentum, v ← μv − lr_t·g and p ← p + μv − lr_t·g, as Keras computes it.

    The rate is inside the momentum buffer, where `optax.sgd(nesterov=True)` keeps it outside: the two part as soon as
    the rate changes. `l2` is λ of Keras's `l2(λ)` on kernels, which adds 2λ·w to their gradient.
    """
    decay = optax.add_decayed_weights(2.0 * l2, mask=kernels) if l2 else optax.identity()
    return optax.chain(decay, optax.scale_by_learning_rate(lr), optax.trace(momentum, nesterov=True))
