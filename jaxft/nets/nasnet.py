"""NASNet-A, mobile and large (Zoph et al., 2017, arXiv:1707.07012, figures 2 to 4)."""

from collections.abc import Iterator
from functools import partial

from jaxft.nets.common import Spec, weight_files
from jaxft.nets.functional import (
    Functional,
    Layer,
    activation,
    add,
    concatenate,
    conv2d,
    crop,
    norm,
    nothing,
    pad,
    pool,
    separable,
)

MOMENTUM = 0.9997


class NASNet(Functional):
    """NASNet-A: cells that read the outputs of the two cells before them.

    One tensor carries everything only after the first convolution and after the last cell, so the cells are one stage.
    `first:N` and regular expressions freeze parts of it.

    Attributes:
        filters: width inside of the cells before the second reduction; it doubles with each.
        depth: normal cells between reductions.
        stem_width: of the first convolution.
        skip_reduction: the cell after a reduction reads the input of the cell before it, not of the reduction.

    The others are those of `Functional`. Source: the paper; `keras.applications.nasnet`.
    """

    filters: int = 44
    depth: int = 4
    stem_width: int = 32
    skip_reduction: bool = False

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        x = _norm(conv2d(x, "stem_conv1", self.stem_width, 3, 2, "VALID"), "stem_bn1")
        yield "stem", x
        n = self.depth
        before, x = x, _reduction(x, x, self.filters // 4, "stem_1")
        before, x = x, _reduction(x, before, self.filters // 2, "stem_2", reduced=True)
        for part in range(3):
            width = self.filters * 2**part
            if part:
                last, x = x, _reduction(x, before, width, f"reduce_{n * part}")
                before = before if self.skip_reduction else last
            for i in range(n):
                cell = _normal(x, before, width, str(n * part + i + (part > 0)), reduced=i == 0)
                before, x = x, cell
        yield "cells", activation(x, "relu")


def _norm(x: Layer, name: str) -> Layer:
    return norm(x, name, momentum=MOMENTUM)


def _adjusted(p: Layer, x: Layer, width: int, name: str, reduced: bool) -> Layer:
    """The output of the cell before the last one, at the size of the last one's and `width` channels wide.

    `reduced`: the last one, x, is a reduction, and halved its map.
    """
    if p is x:
        return p
    if reduced:
        p = activation(p, "relu", f"adjust_relu_1_{name}")
        one = pool(p, "average", 1, 2, name=f"adjust_avg_pool_1_{name}")
        one = conv2d(one, f"adjust_conv_1_{name}", width // 2)
        two = crop(pad(p, ((0, 1), (0, 1))), 1, 1)
        two = pool(two, "average", 1, 2, name=f"adjust_avg_pool_2_{name}")
        two = conv2d(two, f"adjust_conv_2_{name}", width // 2)
        return _norm(concatenate([one, two]), f"adjust_bn_{name}")
    if p.width == width:
        return p
    return _norm(conv2d(activation(p, "relu"), f"adjust_conv_projection_{name}", width), f"adjust_bn_{name}")


def _separable(x: Layer, width: int, size: int, name: str, strides: int = 1) -> Layer:
    x = activation(x, "relu")
    x = nothing(x, f"separable_conv_1_pad_{name}") if strides == 2 else x
    x = _norm(separable(x, f"separable_conv_1_{name}", width, size, strides), f"separable_conv_1_bn_{name}")
    x = activation(x, "relu")
    return _norm(separable(x, f"separable_conv_2_{name}", width, size), f"separable_conv_2_bn_{name}")


def _normal(x: Layer, before: Layer, width: int, name: str, *, reduced: bool) -> Layer:
    p = _adjusted(before, x, width, name, reduced)
    h = _norm(conv2d(activation(x, "relu"), f"normal_conv_1_{name}", width), f"normal_bn_1_{name}")

    def mean(x: Layer, side: str) -> Layer:
        return pool(x, "average", 3, 1, "SAME", f"normal_{side}_{name}")

    one = [_separable(h, width, 5, f"normal_left1_{name}"), _separable(p, width, 3, f"normal_right1_{name}")]
    two = [_separable(p, width, 5, f"normal_left2_{name}"), _separable(p, width, 3, f"normal_right2_{name}")]
    pairs = [one, two, [mean(h, "left3"), p], [mean(p, "left4"), mean(p, "right4")]]
    pairs.append([_separable(h, width, 3, f"normal_left5_{name}"), h])
    sums = [add(pair, f"normal_add_{i}_{name}") for i, pair in enumerate(pairs, 1)]
    return concatenate([p, *sums], f"normal_concat_{name}")


def _reduction(x: Layer, before: Layer, width: int, name: str, *, reduced: bool = False) -> Layer:
    p = _adjusted(before, x, width, name, reduced)
    h = _norm(conv2d(activation(x, "relu"), f"reduction_conv_1_{name}", width), f"reduction_bn_1_{name}")
    padded = pad(h, 3, f"reduction_pad_1_{name}")

    def halved(x: Layer, size: int, side: str) -> Layer:
        return _separable(x, width, size, f"reduction_{side}_{name}", 2)

    one = add([halved(h, 5, "left1"), halved(p, 7, "right1")], f"reduction_add_1_{name}")
    two = pool(padded, "max", 3, 2, name=f"reduction_left2_{name}")
    two = add([two, halved(p, 7, "right2")], f"reduction_add_2_{name}")
    three = pool(padded, "average", 3, 2, name=f"reduction_left3_{name}")
    three = add([three, halved(p, 5, "right3")], f"reduction_add3_{name}")
    four = add([two, pool(one, "average", 3, 1, "SAME", f"reduction_left4_{name}")])
    five = _separable(one, width, 3, f"reduction_left4_{name}")
    five = add([five, pool(padded, "max", 3, 2, name=f"reduction_right5_{name}")], f"reduction_add4_{name}")
    return concatenate([two, three, four, five], f"reduction_concat_{name}")


def spec(size: str, num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of NASNet-A. Source of URL and hashes: `keras.applications.nasnet`."""
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/nasnet/NASNet-{size}"
    large = {"filters": 168, "depth": 6, "stem_width": 96, "skip_reduction": True}
    side = {"mobile": 224, "large": 331}[size]
    return Spec(
        net=partial(NASNet, **(large if size == "large" else {})),
        about=f"{size}; cells found by search, which are one stage",
        native_size=(side, side),
        preprocessing="tf",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=weight_files((f"{url}.h5", md5), (f"{url}-no-top.h5", notop_md5)),
    )
