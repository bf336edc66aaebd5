"""jaxft's convolutions on a CPU beside XLA's own: output and both gradients, layer by layer.

    python -m benchmarks.convolutions [--batch-size 16] [--dtype bfloat16] [--out docs/convolutions.md]

10⁹ operations a second, where an operation is one of the direct sum, whatever is really computed; medians of runs that
alternate between the two.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import peaks
from benchmarks.machine import write_table
from jaxft.kernels import conv, depthwise
from jaxft.progress import bar

LAYERS = (  # net, side, channels in and out (0: depthwise), kernel, stride
    ("vgg16", 224, 64, 64, (3, 3), 1),
    ("vgg16", 112, 128, 128, (3, 3), 1),
    ("vgg16", 56, 256, 256, (3, 3), 1),
    ("vgg16", 28, 512, 512, (3, 3), 1),
    ("vgg16", 14, 512, 512, (3, 3), 1),
    ("resnet50", 56, 64, 256, (1, 1), 1),
    ("resnet50", 56, 256, 128, (1, 1), 2),
    ("resnet50", 28, 512, 128, (1, 1), 1),
    ("resnet50", 28, 128, 128, (3, 3), 1),
    ("resnet50", 14, 1024, 256, (1, 1), 1),
    ("resnet50", 7, 512, 512, (3, 3), 1),
    ("inception_v3", 299, 3, 32, (3, 3), 2),
    ("inception_v3", 147, 32, 64, (3, 3), 1),
    ("inception_v3", 71, 80, 192, (3, 3), 1),
    ("inception_v3", 35, 48, 64, (5, 5), 1),
    ("inception_v3", 35, 288, 384, (3, 3), 2),
    ("inception_v3", 17, 192, 192, (7, 1), 1),
    ("inception_v3", 8, 448, 384, (3, 3), 1),
    ("densenet121", 28, 128, 32, (3, 3), 1),
    ("mobilenet_v2", 112, 32, 0, (3, 3), 1),
    ("mobilenet_v2", 112, 96, 0, (3, 3), 2),
    ("efficientnet_b0", 28, 240, 0, (5, 5), 1),
    ("efficientnet_b0", 14, 672, 0, (5, 5), 1),
    ("convnext_tiny", 56, 96, 0, (7, 7), 1),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Time convolutions and their gradients."""

    net: tuple[str, ...] = ()
    """Nets whose layers are timed; all by default."""
    batch_size: int = 16
    """Images."""
    dtype: str = "float32"
    """Of the images: float32 or bfloat16. Kernels are float32."""
    repeats: int = 5
    """Runs of each."""
    out: pathlib.Path = pathlib.Path("docs/convolutions.md")
    """The table, as Markdown."""


def xla(x: Any, kernel: Any, strides: int, padding: str) -> Any:
    return conv.direct(x, kernel, strides, conv.explicit_pads(x, kernel.shape[:2], (strides, strides), padding))


def programs(way: Callable[..., Any], stride: int) -> tuple[Callable[..., Any], ...]:
    def output(x: Any, kernel: Any, dy: Any) -> Any:
        return way(x, kernel, strides=stride, padding="SAME")

    def of_input(x: Any, kernel: Any, dy: Any) -> Any:
        return jax.vjp(lambda x: output(x, kernel, dy), x)[1](dy)

    def of_kernel(x: Any, kernel: Any, dy: Any) -> Any:
        return jax.vjp(lambda kernel: output(x, kernel, dy), kernel)[1](dy)

    return jax.jit(output), jax.jit(of_input), jax.jit(of_kernel)


def seconds(run: Callable[..., Any], arrays: tuple[Any, ...]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    return time.perf_counter() - began


def main(settings: Settings) -> None:
    rng, rows, dtype = np.random.default_rng(0), [], jnp.dtype(settings.dtype)
    layers = [layer for layer in LAYERS if not settings.net or layer[0] in settings.net]
    with bar("convolutions", len(layers), unit="layers") as advance:
        for net, side, fan_in, fan_out, size, stride in layers:
            x = rng.normal(size=(settings.batch_size, side, side, fan_in)).astype(dtype)
            kernel = rng.normal(size=(*size, *((fan_in, fan_out) if fan_out else (1, fan_in)))).astype(np.float32)
            ours = conv.convolve if fan_out else depthwise.convolve_depthwise
            sides = [programs(way, stride) for way in (xla, ours)]
            y = jax.eval_shape(sides[0][0], x, kernel, x)
            arrays = tuple(map(jax.device_put, (x, kernel, rng.normal(size=y.shape).astype(dtype))))
            giga = 2 * y.size * kernel[..., 0].size / 1e9
            cells = []
            for pair in zip(*sides, strict=True):
                for run in pair:
                    seconds(run, arrays)  # compiles
                times = [[seconds(run, arrays) for run in pair] for _ in range(settings.repeats)]
                cells += [
                    f"{giga / statistics.median(side):{'.0f' if fan_out else '.2f'}}"
                    for side in zip(*times, strict=True)
                ]
            shape = f"{side}² {fan_in} → {fan_out or 'each'}, {size[0]}×{size[1]}" + (
                f" / {stride}" if stride > 1 else ""
            )
            rows.append(f"| {net} | {shape} | " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
            advance(1)
    head = [
        "# Convolutions on a CPU",
        "",
        f"`python -m benchmarks.convolutions` writes this table: batch {settings.batch_size}, {settings.dtype}, 10⁹",
        f"operations of the direct sum a second, medians of {settings.repeats}, XLA's and ours in turn. A product of",
        f"square matrices reaches {peaks.operations(dtype) / 1e9:.0f} there.",
    ]
    columns = [
        "| net | layer | output: XLA | jaxft | input gradient: XLA | jaxft | kernel gradient: XLA | jaxft |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    write_table(settings.out, head, [*columns, *rows])


if __name__ == "__main__":
    main(tyro.cli(Settings))
