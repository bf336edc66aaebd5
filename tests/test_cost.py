"""What frozen layers cost: a forward pass, and nothing else."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal

from jaxft import features, masking, nets
from jaxft.kernels import conv as convolution
from tests.reference import cost

BATCH = 16


def nbytes(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept_bytes(jaxpr):
    """Bytes that the forward pass of a train step makes and its gradient reads: each value once, constants left out."""
    same, made, kept = {}, {}, {}  # variable → the first of that value; computation → its outputs; variable → bytes
    for eqn in jaxpr.eqns:
        inputs = [str(x) if isinstance(x, Literal) else same.get(x, x) for x in eqn.invars]
        variables = [x for x in inputs if not isinstance(x, str)]
        stack = str(eqn.source_info.name_stack)
        if "transpose(" in stack:
            kept |= {x: nbytes(x.aval) for x in variables if x in same}
        elif "jvp(" in stack and variables:
            first = made.setdefault((eqn.primitive, str(eqn.params), *inputs), eqn.outvars)
            same |= zip(eqn.outvars, first, strict=True)
    return sum(kept.values())


@pytest.mark.parametrize("clip_norm", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    "name, freeze",
    [
        ("vgg16", "none"),
        ("vgg16", "first:10"),
        ("vgg16", "through:block4"),
        ("vgg16", "all-but-head"),
        ("resnet50", "through:conv4_block6"),
        ("resnet50", ".*_bn"),
        ("densenet121", "through:pool3"),
        ("inception_v3", "all-but-head"),
        ("inception_v3", "through:mixed7"),
    ],
)
def test_a_step_does_and_keeps_what_the_formulas_say(name, freeze, clip_norm):
    """Bug: frozen layers get gradients, by a norm over all leaves say, keep activations for them, or momentum."""
    size = (107, 107) if "inception" in name else (64, 64)
    net, state = cost.shapes(nets.create(name, 10, **nets.any_size(name)), freeze, size, clip_norm)
    step = cost.traced_step(net, state, size, BATCH)

    operations = cost.formula(net, state, size, BATCH) + cost.normalisation(net, state, size, BATCH)
    assert step.lower().cost_analysis()["flops"] == pytest.approx(operations, rel=0.05)
    assert kept_bytes(step.jaxpr.jaxpr) == pytest.approx(cost.kept_bytes(net, state, size, BATCH), rel=0.05)
    momentum = nbytes([leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim])
    assert momentum == nbytes(masking.split(state.params, state.labels)[0])


def test_a_step_on_a_cpu_is_the_frozen_stages_forward_and_a_step_after_them(monkeypatch):
    """Bug: the convolutions of a CPU, which have gradients of their own, do or keep something for frozen stages."""
    monkeypatch.setattr(convolution, "MIN_MACS", 1)  # so that small images, too, are computed as large ones are
    net, state = cost.shapes(nets.create("vgg16", 10, fc=False), "through:block4", (64, 64))

    images = jax.ShapeDtypeStruct((BATCH, 64, 64, 3), jnp.float32)
    prefix = features.make_prefix(net, "block4", lambda x: x).lower(state.variables(), images, None)
    programs = [
        cost.jitted_step(net).lower(state, cost.abstract_batch(images, BATCH)),
        cost.jitted_step(net, start="block4").lower(state, cost.abstract_batch(prefix.out_info, BATCH)),
        prefix,
    ]
    whole, rest, frozen_part = (program.compile() for program in programs)

    def products(program):
        return len(re.findall(r" (?:dot|convolution)\(", program.as_text()))

    def held(program):
        return program.memory_analysis().temp_size_in_bytes

    assert products(whole) == products(rest) + products(frozen_part) > 100
    assert held(whole) <= 1.05 * (held(rest) + held(frozen_part) + nbytes(prefix.out_info))
