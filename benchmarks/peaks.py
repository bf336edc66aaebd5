"""A device's measured peaks: `python -m benchmarks.peaks DTYPE` prints operations and bytes a second, as JSON."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 10


def fastest(function: Callable[..., jax.Array], *args: jax.Array) -> float:
    """Seconds of the fastest of ten runs."""
    function(*args).block_until_ready()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function(*args).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def operations(dtype: Any) -> float:
    """Operations a second of a product of square random matrices, on the default device."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)  # a GPU multiplies ones faster than it does data
    # A CPU multiplies bfloat16 fast only where it may add up in float32.
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return 2 * n**3 / fastest(product, a, a)


def bandwidth() -> float:
    """Bytes a second of 2a + b, of arrays that no cache holds: two are read and one written."""
    a = jnp.ones((1 if jax.default_backend() == "cpu" else 8) * 2**26, jnp.float32)
    return 3 * a.nbytes / fastest(jax.jit(lambda a, b: 2 * a + b), a, a + 1)


if __name__ == "__main__":
    print(json.dumps({"flops": operations(jnp.dtype(sys.argv[1])), "bandwidth": bandwidth()}))
