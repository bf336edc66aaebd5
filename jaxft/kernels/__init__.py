"""What a CPU is fast at: convolution, pooling, dense layers and normalisation, with their gradients."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_PLAIN = contextvars.ContextVar("plain", default=False)


def of_cpu() -> bool:
    """Whether what is traced now takes the kernels of this package: on a CPU, but not within `plain`."""
    return not _PLAIN.get() and jax.default_backend() == "cpu"


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """What is traced within takes XLA's own operations, for programs that leave this machine."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)
