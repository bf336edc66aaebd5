"""Checks of settings that are numbers."""

import math
import numbers
from collections.abc import Callable


def is_int(value: object) -> bool:
    """Whether `value` is an integer, NumPy's included, and not a boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether `value` is a finite number, NumPy's scalars included, and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: object) -> float | None:
    """The number that a scalar or an array without dimensions holds, in the digits of its own dtype; else None."""
    if isinstance(value, bool) or getattr(value, "shape", ()) != ():
        return None
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return float(value) if isinstance(value, numbers.Real) else None
    return float(str(value)) if dtype.kind in "fiu" else None


def check_real(what: str, value: object, fits: Callable[[float], bool], wanted: str) -> None:
    """Raises ValueError unless `value` is a finite number that `fits`."""
    if not is_real(value):
        number = None if isinstance(value, numbers.Real) else plain(value)  # an array of JAX, say
        remedy = "" if number is None else f"; give the plain number {number}"
        raise ValueError(f"{what} wants {wanted}, not {value!r}{remedy}")
    if not fits(float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{what} wants {wanted}, not {value!r}")


def check_count(what: str, value: object, lowest: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `lowest`."""
    if not is_int(value) or int(value) < lowest:  # type: ignore[call-overload]
        raise ValueError(f"{what} wants an integer of at least {lowest}, not {value!r}")
