"""A device's measured peak, in operations a second: `python -m benchmarks.flops DTYPE` prints it."""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp


def device_peak(dtype: Any) -> float:
    """Operations a second of the fastest of ten products of square random matrices, on the default device."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)  # a GPU multiplies ones faster than it does data
    # A CPU multiplies bfloat16 fast only where it may add up in float32.
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


if __name__ == "__main__":
    print(device_peak(jnp.dtype(sys.argv[1])))
