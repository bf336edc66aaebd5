"""What 64 GPUs would give, computed from a measured step and the links' stated speed: `python -m benchmarks.scaling`.

A step on n devices takes as long as on one, plus the sum of the gradients over all: a ring moves 2 (n - 1) / n times
the gradient's bytes through the slowest link. Overlap of both would make it better; latency is left out, which counts
where the gradient is small. Source: Patarasu and Yuan, Bandwidth optimal all-reduce algorithms, 2009.
"""

import jax
import jax.numpy as jnp

from jaxft import masking, nets

DEVICES = 64
LINKS = {  # bytes a second in one direction, to each device, as their makers state them
    "NVLink 4, 8 devices in one machine": 450e9,
    "InfiniBand NDR, a card for each device": 50e9,
    "one card of 100 Gbit/s for 8 devices": 12.5e9 / 8,
}
STEPS = {  # (net, options, frozen) → seconds of a step of 16 images on one NVIDIA H200, bfloat16, as docs/hardware.md
    ("vgg16", (("fc", False),), "all-but-head"): 16 / 4110,
    ("vgg16", (("fc", False),), "through:block3"): 16 / 3445,
}
BATCHES = (16, 64, 256)


def gradient_bytes(name: str, options: dict[str, object], frozen: str) -> int:
    """Bytes of the float32 gradient of what is trained, with ten classes."""
    net = nets.create(name, num_classes=10, **options)
    side = nets.spec(name).native_size
    params = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *side, 3), jnp.float32))["params"]
    skipped = masking.frozen_layers(net, frozen, params)
    return sum(4 * leaf.size for layer in params.keys() - skipped for leaf in jax.tree.leaves(params[layer]))


def main() -> None:
    """Prints a row for each step and batch: milliseconds of the sum, and images a second of 64 devices."""
    print(f"| net, frozen | images a device | step, ms | {' | '.join(LINKS)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(LINKS)}")
    for (name, options, frozen), seconds in STEPS.items():
        size = gradient_bytes(name, dict(options), frozen)
        for batch in BATCHES:
            step, cells = seconds * batch / 16, []
            for link, rate in LINKS.items():
                devices = 8 if "8 devices in one" in link else DEVICES
                total = 2 * (devices - 1) / devices * size / rate
                share = step / (step + total)
                cells.append(f"{1e3 * total:.2f} ms, {devices * batch / (step + total):,.0f}/s, {share:.0%}")
            what = f"{name}, {frozen} ({size / 1e6:.2f} MB)"
            print(f"| {what} | {batch} | {1e3 * step:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
