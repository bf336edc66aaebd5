"""Bytes that a compiled program moves, against what its operations must."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.reference import hlo

N = 1 << 16


def moved(function, *args) -> int:
    program = jax.jit(function).lower(*args).compile().as_text()
    return sum(hlo.operations(program)[1].values())


def test_an_elementwise_operation_reads_and_writes_once():
    assert moved(lambda x: jnp.sin(x) * 2 + 1, jnp.zeros(N)) == 2 * 4 * N


def test_a_part_of_an_array_is_read_alone():
    assert moved(lambda x: x[: N // 8] * 2, jnp.zeros(N)) == 2 * 4 * N // 8


def test_a_product_reads_both_of_its_operands():
    assert moved(jnp.matmul, jnp.zeros((64, 128)), jnp.zeros((128, 32))) == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_each_turn_of_a_loop_counts_with_the_part_that_it_reads_and_writes():
    many = 16
    found = moved(lambda x: lax.map(lambda row: jnp.sin(row) + 1, x), jnp.zeros((many, N)))
    assert found == pytest.approx(3 * 4 * many * N, rel=0.01)  # what it writes into is filled with zeros first


def test_turns_of_loops_within_loops_are_multiplied():
    def nested(x):
        return lax.fori_loop(0, 3, lambda i, x: lax.fori_loop(0, 5, lambda j, x: jnp.sin(x), x), x)

    once = moved(jnp.sin, jnp.zeros(N))
    assert 15 * once <= moved(nested, jnp.zeros(N)) <= 20 * once
