"""Convolutions with the arithmetic that a CPU is good at: matrix products. Other platforms get XLA's own.

XLA's CPU backend takes the gradient of a kernel as a convolution whose window is the whole image, at a fifth of the
processor's speed or less, and 1×1 convolutions at half of it. Here

- 1×1 convolutions and their gradients are one matrix product,
- 3×3 convolutions at stride 1, and their gradients, are Winograd's minimal filtering over 2×2 tiles, F(2×2, 3×3):
  16 matrix products with 4/9 of the multiplications. A longer kernel is split into kernels of three taps; after the
  first three taps, each begins with a zero. 5×5 kernels take 49/100 of the multiplications, 7×1 and 1×7 ones 10/14,
  3×1 and 1×3 ones 4/6,
- the gradient of a kernel with few channels of output is one product with the windows of the output's gradient,
- convolutions at a stride are products with the pixels of each window laid side by side, forward and backward, unless
  they have few channels,
- convolutions of images at a stride lay the rows of each window side by side and add up columns,
- the gradient of any other kernel is a product for each of its taps,
- in bfloat16, convolutions of many channels and the gradients of all kernels are a product for each row of the kernel,
  whose numbers are multiplied as they are and added up in float32. Convolutions of fewer channels are computed as
  above, in float32: minimal filtering would round its sums once more.

A batch that lies on several devices stays there; the gradient of a kernel is summed over them once.

All results stay within float32 rounding of the direct sum, and are then rounded to the type of the images; gradients of
kernels stay float32. They are nearer to the direct sum than XLA's.

Source: Lavin and Gray, 2015, arXiv:1509.09308, section 4. Speeds: `python -m benchmarks.convolutions`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxft.kernels import of_cpu

Rows = Sequence[Any]  # numbers to be combined along one axis of a tile
Planes = list[list[jax.Array]]  # [i][j]: element (i, j) of every tile, [B, tiles down, tiles across, channels]

Pads = tuple[tuple[int, int], ...]  # ((above, below), (left, right))
Finish = Callable[[jax.Array], jax.Array]  # what is done to a chunk of the output at once

MINIMAL = ((3, 3), (5, 5), (1, 3), (3, 1), (1, 7), (7, 1))  # kernels that are filtered minimally
MIN_MACS = 2**25  # multiply-adds of the batch: XLA does less in a millisecond, which is not worth a longer compilation
MIN_CHANNELS = 32  # fewer make products too thin to pay for the transforms
IMAGE_CHANNELS = 4  # at most as many are laid side by side with those of the next pixel
CHUNK_PIXELS = 56 * 56  # of the images that are transformed at once: their planes stay in the cache of a core
CHUNK_CHANNELS = 128  # with fewer to sum over, twice as many: short products of few channels are slow
WIDE_CHANNELS = 128  # with as many, products of bfloat16 are faster than minimal filtering in float32
MANY_TIMES = 4  # the channels of the output: then its windows take little room beside the input
BLOCK_ROWS = 512  # of a matrix that is transposed at once: a strip of them fits the first cache of a core


def _of_input(d: Rows) -> list:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _to_output(m: Rows) -> list:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _of_gradient(y: Rows) -> list:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _of_kernel(taps: Rows) -> list:
    units = [taps[0]]
    for i in range(1, len(taps), 2):
        middle, ends = taps[i] / 2, (taps[i + 1] + (taps[0] if i == 1 else 0)) / 2
        units += [ends + middle, ends - middle, taps[i + 1]]
    return units


def _to_kernel(units: Rows) -> list:
    taps = [units[0]]
    for i in range(1, len(units), 3):
        ends, middle = (units[i] + units[i + 1]) / 2, (units[i] - units[i + 1]) / 2
        taps += [middle, ends + units[i + 2]]
        if i == 1:
            taps[0] += ends
    return taps


def _both_axes(transform: Callable[[Rows], list], planes: Planes) -> Planes:
    """`transform` along each axis of the tiles that has more than one element."""

    def along(row: Rows) -> list:
        return transform(row) if len(row) > 1 else list(row)

    columns = [along(column) for column in zip(*planes, strict=True)]
    return [along(row) for row in zip(*columns, strict=True)]


def _units(size: tuple[int, ...]) -> list[list[list[tuple[int, int]]]]:
    """[i][j]: which units of a transformed kernel of that size are multiplied with element (i, j) of the tiles.

    Three taps become four units. Every two further taps become three units, which meet the next tile.
    """
    rows, columns = ([range(1), *(range(i, 3 * (k // 2) + 1, 3) for i in range(1, 4 if k > 1 else 1))] for k in size)
    return [[[(u, v) for u in down for v in across] for across in columns] for down in rows]


def windows(
    x: jax.Array, size: tuple[int, ...], strides: tuple[int, ...], pads: Pads, fill: float = 0.0
) -> list[jax.Array]:
    """For each place in a window, in the order of rows, the pixels that lie there: [B, H', W', C]."""
    x = lax.pad(x, jnp.array(fill, x.dtype), ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))
    rows, columns = (
        [slice(i, i + (side - k) // stride * stride + 1, stride) for i in range(k)]
        for side, k, stride in zip(x.shape[1:3], size, strides, strict=True)
    )
    return [x[:, row, column] for row in rows for column in columns]


def _tiles(x: jax.Array, length: int, size: tuple[int, ...], pads: Pads) -> Planes:
    """Elements of tiles of `length` pixels at steps of 2, along the axes of a kernel of that size with several taps."""
    window, steps = ([n if k > 1 else 1 for k in size] for n in (length, 2))
    ends = tuple(
        (before, after + (side + before + after) % step)
        for side, (before, after), step in zip(x.shape[1:3], pads, steps, strict=True)
    )
    elements = windows(x, tuple(window), tuple(steps), ends)
    return [elements[i : i + window[1]] for i in range(0, len(elements), window[1])]


def _met(x: jax.Array, size: tuple[int, ...], pads: Pads) -> Planes:
    """The transformed elements of tiles of 4 pixels, for each unit that meets them side by side."""
    planes = _both_axes(_of_input, _tiles(x, 4, size, pads))
    down, across = (n - max(k // 2 - 1, 0) for n, k in zip(planes[0][0].shape[1:3], size, strict=True))

    def side_by_side(plane: jax.Array, units: list[tuple[int, int]]) -> jax.Array:
        tiles = [(max(u - 1, 0) // 3, max(v - 1, 0) // 3) for u, v in units]
        return jnp.concatenate([plane[:, i : i + down, j : j + across] for i, j in tiles], -1)

    return [list(map(side_by_side, *row)) for row in zip(planes, _units(size), strict=True)]


def _shares(images: int) -> int:
    """In how many parts a batch lies on devices: their number, if it divides the batch."""
    devices = jax.device_count()
    return devices if images % devices == 0 else 1


def _chunks(x: jax.Array, pixels: int, least: int = 1, parts: int = 1) -> jax.Array:
    """x [B, H, W, C] → [chunks, images, H, W, C], where an image counts as so many pixels; x itself if images is 1.

    So many images as CHUNK_PIXELS come to, but no more than leave so many parts, or the least, or fewer, if that does
    not divide the batch.

    Each of several devices has its own images in every chunk, [chunks, devices, images, H, W, C]: a chunk that lies on
    one device alone would have to be sent to all the others.
    """
    shares = _shares(len(x))
    own = len(x) // shares
    most = max(min(CHUNK_PIXELS // pixels, own // parts), least)
    images = max(n for n in range(1, most + 1) if own % n == 0)
    if shares > 1:
        return x.reshape(shares, -1, images, *x.shape[1:]).swapaxes(0, 1)
    return x if images == 1 else x.reshape(-1, images, *x.shape[1:])


def _chunk(x: jax.Array) -> jax.Array:
    """One of `_chunks` as a batch. An axis of length 1 in `_chunks` would cost copies, as XLA moves it in memory."""
    return x[None] if x.ndim == 3 else x.reshape(-1, *x.shape[-3:])


def _by_chunks(function: Callable[[jax.Array], jax.Array], x: jax.Array, pixels: int | None = None) -> jax.Array:
    """function(x) chunk by chunk, for x [B, H, W, C] of images that do not depend on each other; `pixels` of each."""

    def some(x: jax.Array) -> jax.Array:
        y = function(_chunk(x))
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    y = lax.map(some, _chunks(x, pixels or math.prod(x.shape[1:3])))
    return (y.swapaxes(0, 1) if y.ndim == 6 else y).reshape(len(x), *y.shape[-3:])


def sum_by_chunks(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, dy: jax.Array, least: int = 1
) -> jax.Array:
    """function(x, dy), a sum over images, by chunks of so many at least; over devices once, at the end.

    In two chunks where one would do: XLA takes a loop of one turn apart, and then computes what makes dy again for each
    place where the function reads it.
    """
    chunks = [_chunks(images, math.prod(dy.shape[1:3]), least, parts=2) for images in (x, dy)]

    def of(x: jax.Array, dy: jax.Array) -> jax.Array:
        if x.ndim == 5:
            return jax.vmap(function)(x, dy)
        return function(_chunk(x), _chunk(dy))

    one = jax.eval_shape(of, *(some[0] for some in chunks))
    total = lax.scan(lambda total, some: (total + of(*some), None), jnp.zeros(one.shape, one.dtype), chunks)[0]
    return total.sum(0) if chunks[0].ndim == 6 else total


def _flat(plane: jax.Array) -> jax.Array:
    return plane.reshape(-1, plane.shape[-1])


def _same(y: jax.Array) -> jax.Array:
    return y


def _times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product with the kernel in the type of x, added up in float32."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    """What is moved in place of bfloat16, which XLA's CPU backend turns into float32 and back to move it."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _of_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _kernel_rows(x: jax.Array, size: tuple[int, ...], stride: int, pads: Pads) -> list[jax.Array]:
    """For each row of a kernel of that size, what it meets, side by side: [B, H', W', w · C]."""
    rows = jnp.concatenate(windows(_bits(x), (1, size[1]), (1, stride), ((0, 0), pads[1])), -1)
    return list(map(_of_bits, windows(rows, (size[0], 1), (stride, 1), (pads[0], (0, 0)))))


def wide_output(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, finish: Finish = _same) -> jax.Array:
    """x [B, H, W, C] ∗ kernel [h, w, C, D]: a product for each row of the kernel, in the type of x."""

    def chunk(x: jax.Array) -> jax.Array:
        met = _kernel_rows(x, kernel.shape[:2], stride, pads)
        parts = [_times(row, taps.reshape(-1, kernel.shape[3])) for row, taps in zip(met, kernel, strict=True)]
        return finish(sum(parts[1:], parts[0]))

    return _by_chunks(chunk, x)


def wide_kernel_gradient(x: jax.Array, dy: jax.Array, size: tuple[int, ...], stride: int, pads: Pads) -> jax.Array:
    """The gradient [*size, C, D] of any kernel: a product for each of its rows, in the type of x.

    XLA's CPU backend multiplies a transposed matrix of bfloat16 at a tenth of the speed, and transposes a large one
    slowly: the output's gradient is transposed block by block.
    """

    def rows(x: jax.Array, dy: jax.Array) -> jax.Array:
        pixels = dy[..., 0].size
        block = max(n for n in range(1, BLOCK_ROWS + 1) if pixels % n == 0)
        blocks = _bits(dy).reshape(pixels // block, block, -1).swapaxes(1, 2)
        blocks = _of_bits(lax.optimization_barrier(blocks))
        totals = []
        for row in _kernel_rows(x, size, stride, pads):
            parts = list(map(_times, blocks, _of_bits(_bits(row).reshape(pixels // block, block, -1))))
            totals.append(sum(parts[1:], parts[0]))
        return jnp.stack(totals)

    total = sum_by_chunks(rows, x, dy.astype(x.dtype))
    return total.reshape(size[0], -1, size[1], x.shape[3]).transpose(0, 2, 3, 1)


def minimal_output(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, finish: Finish = _same, *, turned: bool = False
) -> jax.Array:
    """x [B, H, W, C] ∗ kernel [h, w, C, D] at stride 1, h and w odd: [B, H', W', D], through `finish`, by chunks.

    `turned`: x has D channels and the output C, by the kernel turned round, as in the gradient of an input.
    """
    size = kernel.shape[:2]
    height, width = (side + sum(pad) - k + 1 for side, pad, k in zip(x.shape[1:3], pads, size, strict=True))
    taps = kernel[::-1, ::-1] if turned else kernel
    units = _both_axes(_of_kernel, [[taps[i, j] for j in range(size[1])] for i in range(size[0])])
    filters = [
        [jnp.concatenate([units[u][v].T if turned else units[u][v] for u, v in which]) for which in row]
        for row in _units(size)
    ]

    def chunk(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        products = [list(map(jnp.matmul, *rows)) for rows in zip(_met(x, size, pads), filters, strict=True)]
        y = jnp.stack([jnp.stack(row, 3) for row in _both_axes(_to_output, products)], 2)
        _, down, rows, across, columns, _ = y.shape  # rows and columns of a tile's output: 2, or 1 for a single tap
        return finish(y.reshape(len(x), down * rows, across * columns, -1)[:, :height, :width])

    pixels, summed = math.prod(x.shape[1:3]), filters[-1][-1].shape[0]
    return _by_chunks(chunk, x, pixels if summed >= CHUNK_CHANNELS else (pixels + 1) // 2)


def minimal_kernel_gradient(x: jax.Array, dy: jax.Array, size: tuple[int, ...], pads: Pads) -> jax.Array:
    """The gradient [*size, C, D] of the kernel, from x [B, H, W, C] and the output's gradient [B, H', W', D]."""

    def products(x: jax.Array, dy: jax.Array) -> jax.Array:
        planes = _both_axes(_of_gradient, _tiles(dy, 2, size, ((0, 0), (0, 0))))
        pairs = zip(sum(_met(x, size, pads), []), sum(planes, []), strict=True)
        return jnp.concatenate([_flat(pixels).T @ _flat(plane) for pixels, plane in pairs])

    total = sum_by_chunks(products, x, dy).reshape(-1, x.shape[3], dy.shape[3])
    units = dict(zip(sum(sum(_units(size), []), []), total, strict=True))
    height, width = (3 * (k // 2) + 1 for k in size)
    taps = _both_axes(_to_kernel, [[units[u, v] for v in range(width)] for u in range(height)])
    return jnp.stack([jnp.stack(row) for row in taps])


def tap_kernel_gradient(x: jax.Array, dy: jax.Array, size: tuple[int, ...], stride: int, pads: Pads) -> jax.Array:
    """The gradient [*size, C, D] of any kernel: a product for each tap over the pixels that it meets."""

    def taps(x: jax.Array, dy: jax.Array) -> jax.Array:
        products = [_flat(pixels).T @ _flat(dy) for pixels in windows(x, size, (stride, stride), pads)]
        return jnp.stack(products).reshape(*size, x.shape[3], dy.shape[3])

    return taps(x, dy) if size == (1, 1) else sum_by_chunks(taps, x, dy)


def patch_output(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, finish: Finish = _same) -> jax.Array:
    """x [B, H, W, C] ∗ kernel [h, w, C, D]: one product of the kernel and the pixels of each window, side by side."""

    def chunk(x: jax.Array) -> jax.Array:
        patches = jnp.concatenate(windows(x, kernel.shape[:2], (stride, stride), pads), -1)
        return finish(patches @ kernel.reshape(-1, kernel.shape[3]))

    return _by_chunks(chunk, x)


def few_kernel_gradient(x: jax.Array, dy: jax.Array, size: tuple[int, ...], pads: Pads) -> jax.Array:
    """The gradient [*size, C, D] of a kernel at stride 1 of few D: one product with the windows of dy, side by side."""
    around = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(size, pads, strict=True))

    def product(x: jax.Array, dy: jax.Array) -> jax.Array:
        return _flat(x).T @ _flat(jnp.concatenate(windows(dy, size, (1, 1), around), -1))

    taps = sum_by_chunks(product, x, dy).reshape(x.shape[3], *size, dy.shape[3])
    return taps[:, ::-1, ::-1].transpose(1, 2, 0, 3)


def row_output(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, finish: Finish = _same) -> jax.Array:
    """x [B, H, W, C] ∗ kernel [h, w, C, D]: a product of each window's rows, side by side, then a sum.

    `stride` pixels of a row count as one, and as many columns of the kernel. The product gives what each such group of
    columns adds to the output; each group meets the rows one step after the group before.
    """
    height, width, channels, features = kernel.shape
    columns, reach = (x.shape[2] + sum(pads[1]) - width) // stride + 1, -(-width // stride)
    pixels, left = stride * (columns + reach - 1), pads[1][0]
    groups = jnp.pad(kernel, ((0, 0), (0, stride * reach - width), (0, 0), (0, 0)))
    groups = groups.reshape(height, reach, stride * channels, features).swapaxes(1, 2).reshape(-1, reach * features)

    def chunk(x: jax.Array) -> jax.Array:
        ends = (0, 0, 0), (*pads[0], 0), (left, pixels - left - x.shape[2], 0), (0, 0, 0)
        x = x.astype(jnp.float32)
        x = lax.pad(x, jnp.zeros((), x.dtype), ends).reshape(len(x), -1, pixels // stride, stride * channels)
        rows = jnp.concatenate(windows(x, (height, 1), (stride, 1), ((0, 0), (0, 0))), -1)
        parts = jnp.split(rows @ groups, reach, -1)
        return finish(sum(part[:, :, j : j + columns] for j, part in enumerate(parts)))  # type: ignore[arg-type]

    return _by_chunks(chunk, x)


def patch_input_gradient(
    dy: jax.Array, kernel: jax.Array, stride: int, pads: Pads, height: int, width: int
) -> jax.Array:
    """The gradient [B, height, width, C] of the input of a convolution whose kernel is at least as large as its stride.

    Pixels whose rows, and whose columns, leave the same remainder by the stride meet the same taps. Each such set is a
    convolution of the output's gradient with these taps.
    """
    sides = (height, width)
    rows, columns = (-(-(side + sum(pad)) // stride) for side, pad in zip(sides, pads, strict=True))

    def chunk(dy: jax.Array) -> jax.Array:
        dtype, sets = dy.dtype, []
        for i in range(stride):
            for j in range(stride):
                taps = kernel[i::stride, j::stride][::-1, ::-1].swapaxes(2, 3)
                around = [
                    (k - 1, n - m) for k, n, m in zip(taps.shape[:2], (rows, columns), dy.shape[1:3], strict=True)
                ]
                patches = jnp.concatenate(windows(_bits(dy), taps.shape[:2], (1, 1), tuple(around)), -1)
                sets.append(_bits(_times(_of_bits(patches), taps.reshape(-1, kernel.shape[2])).astype(dtype)))
        x = jnp.stack(sets, 3).reshape(*sets[0].shape[:3], stride, stride, -1).swapaxes(2, 3)
        x = x.reshape(len(dy), rows * stride, columns * stride, -1)
        ends = [slice(low, low + side) for side, (low, _) in zip(sides, pads, strict=True)]
        return _of_bits(x[:, *ends])

    return _by_chunks(chunk, dy, height * width)


def product(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, finish: Finish = _same) -> jax.Array:
    """A 1×1 convolution without padding."""
    return finish(_times(_of_bits(_bits(x)[:, ::stride, ::stride]), kernel[0, 0]))


def direct(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, finish: Finish = _same) -> jax.Array:
    """XLA's own convolution, in as many groups as the kernel [h, w, C / groups, D] says."""
    layout, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1] // kernel.shape[2]
    kernel = kernel.astype(x.dtype)
    y = lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=layout, feature_group_count=groups
    )
    return finish(y)


def product_input_gradient(dy: jax.Array, kernel: jax.Array, stride: int, height: int, width: int) -> jax.Array:
    """The gradient [B, height, width, C] of the input of a 1×1 convolution."""
    ends = [
        (0, side - 1 - (n - 1) * stride, stride - 1) for side, n in zip((height, width), dy.shape[1:3], strict=True)
    ]
    turned = lax.optimization_barrier(kernel[0, 0].T.astype(dy.dtype)) if dy.dtype == jnp.bfloat16 else kernel[0, 0].T
    dx = _bits(_times(dy, turned).astype(dy.dtype))
    return _of_bits(lax.pad(dx, jnp.zeros((), dx.dtype), ((0, 0, 0), *ends, (0, 0, 0))))


def fastest(x: jax.Array, kernel: jax.Array, stride: int) -> Callable[..., jax.Array]:
    """The function that computes (x, kernel, stride, pads, finish) fastest."""
    size, (channels, features) = kernel.shape[:2], kernel.shape[2:]
    if size == (1, 1):
        return product
    if stride > 1 and channels <= IMAGE_CHANNELS and size[1] >= stride:
        return row_output
    if min(channels, features) < MIN_CHANNELS:
        return direct
    if x.dtype == jnp.bfloat16 and (stride > 1 or min(channels, features) >= WIDE_CHANNELS):
        return wide_output
    if stride > 1:
        return patch_output if min(size) >= stride else direct
    return minimal_output if size in MINIMAL else direct


def _input_gradient(x: jax.Array, dy: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    way = fastest(x, kernel, stride)
    if way is product:
        return product_input_gradient(dy, kernel, stride, *x.shape[1:3])
    if stride > 1 and way in (patch_output, wide_output) and min(kernel.shape[:2]) >= stride:
        return patch_input_gradient(dy, kernel, stride, pads, *x.shape[1:3])
    if way is direct or stride > 1:
        return jax.linear_transpose(lambda x: direct(x, kernel, stride, pads), x)(dy)[0]
    around = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape[:2], pads, strict=True))
    finish = partial(finished, factor=None, bias=None, relu=False, dtype=dy.dtype)
    if way is wide_output:
        return wide_output(dy, kernel[::-1, ::-1].swapaxes(2, 3), 1, around, finish)
    return minimal_output(dy, kernel, 1, around, finish, turned=True)


def explicit_pads(
    x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding: str | Sequence[tuple[int, int]]
) -> Pads:
    """The padding of images x [B, H, W, C], by name or given, in pixels, for windows at those strides."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    (above, below), (left, right) = padding
    return (int(above), int(below)), (int(left), int(right))


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    factor: jax.Array | None = None,
    relu: bool = False,
    strides: int = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """x [B, H, W, C] ∗ kernel [h, w, C, D], times factor [D], plus bias [D], through a ReLU: [B, H', W', D].

    The output has the type of x. It is XLA's own convolution, with the factor in its kernel, where the default backend
    is not a CPU, where x is neither float32 nor bfloat16, and where there is little work.
    """
    pads = explicit_pads(x, kernel.shape[:2], (strides, strides), padding)
    macs = x.size // strides**2 * math.prod(kernel.shape[:2]) * kernel.shape[3]
    padded_product = kernel.shape[:2] == (1, 1) and any(map(any, pads))
    cropped = min(map(min, pads)) < 0
    if not of_cpu() or x.dtype not in (jnp.float32, jnp.bfloat16) or macs < MIN_MACS or padded_product or cropped:
        kernel = kernel if factor is None else kernel * factor
        bias = bias if bias is None else bias.astype(x.dtype)
        return finished(direct(x, kernel, strides, pads), None, bias, relu)
    return _conv(x, kernel, factor, bias, relu, strides, pads)


def finished(
    y: jax.Array, factor: jax.Array | None, bias: jax.Array | None, relu: bool, dtype: Any = None
) -> jax.Array:
    """y times factor, plus bias, through a ReLU, as that dtype, as far as these are given."""
    y = y if factor is None else y * factor
    y = y if bias is None else y + bias
    y = nn.relu(y) if relu else y
    return y if dtype is None else y.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _conv(
    x: jax.Array,
    kernel: jax.Array,
    factor: jax.Array | None,
    bias: jax.Array | None,
    relu: bool,
    stride: int,
    pads: Pads,
) -> jax.Array:
    finish = partial(finished, factor=factor, bias=bias, relu=relu, dtype=x.dtype)
    return fastest(x, kernel, stride)(x, kernel, stride, pads, finish)


def _forward(x, kernel, factor, bias, relu, stride, pads):
    y = _conv(x, kernel, factor, bias, relu, stride, pads)
    return y, (x, kernel, factor, bias is not None, y if relu else None)


def _backward(relu, stride, pads, saved, dy):
    x, kernel, factor, biased, y = saved
    dy = jnp.where(y > 0, dy, 0) if relu else dy
    of_bias = dy.sum((0, 1, 2), jnp.float32) if biased else None
    scaled = kernel if factor is None else kernel * factor
    of_x = _input_gradient(x, dy, scaled, stride, pads)
    if x.dtype == jnp.bfloat16:
        of_kernel = wide_kernel_gradient(x, dy, kernel.shape[:2], stride, pads)
    elif stride == 1 and kernel.shape[2] >= MANY_TIMES * kernel.shape[3] and kernel.shape[:2] != (1, 1):
        of_kernel = few_kernel_gradient(x, dy, kernel.shape[:2], pads)
    elif fastest(x, kernel, stride) is minimal_output:
        of_kernel = minimal_kernel_gradient(x, dy, kernel.shape[:2], pads)
    else:
        of_kernel = tap_kernel_gradient(x, dy, kernel.shape[:2], stride, pads)
    if factor is None:
        return of_x, of_kernel, None, of_bias
    return of_x, of_kernel * factor, (of_kernel * kernel).sum((0, 1, 2)), of_bias


_conv.defvjp(_forward, _backward)
