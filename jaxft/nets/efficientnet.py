"""EfficientNet (Tan and Le, 2019, arXiv:1905.11946) and EfficientNetV2 (2021, arXiv:2104.00298)."""

import math
from collections.abc import Iterator
from functools import partial

from jaxft.nets.common import IMAGENET_STD, Spec, rounded, weight_files
from jaxft.nets.functional import (
    Functional,
    Layer,
    activation,
    add,
    conv2d,
    depthwise,
    drop,
    global_mean,
    multiply,
    norm,
    normalization,
    nothing,
)

# Rows of EfficientNet: kernel, blocks, width, how much wider the inside is, strides of the first block.
V1 = (
    *((3, 1, 16, 1, 1), (3, 2, 24, 6, 2), (5, 2, 40, 6, 2), (3, 3, 80, 6, 2), (5, 3, 112, 6, 1), (5, 4, 192, 6, 2)),
    *((3, 1, 320, 6, 1),),
)
# Rows of EfficientNetV2: fused or not (a fused block has one convolution where others have a 1×1 and a depthwise one),
# blocks, width, how much wider the inside is, strides of the first block.
V2_B = (
    *((True, 1, 16, 1, 1), (True, 2, 32, 4, 2), (True, 2, 48, 4, 2)),
    *((False, 3, 96, 4, 2), (False, 5, 112, 6, 1), (False, 8, 192, 6, 2)),
)
V2_S = (
    *((True, 2, 24, 1, 1), (True, 4, 48, 4, 2), (True, 4, 64, 4, 2)),
    *((False, 6, 128, 4, 2), (False, 9, 160, 6, 1), (False, 15, 256, 6, 2)),
)
V2_M = (
    *((True, 3, 24, 1, 1), (True, 5, 48, 4, 2), (True, 5, 80, 4, 2)),
    *((False, 7, 160, 4, 2), (False, 14, 176, 6, 1), (False, 18, 304, 6, 2), (False, 5, 512, 6, 1)),
)
V2_L = (
    *((True, 4, 32, 1, 1), (True, 7, 64, 4, 2), (True, 7, 96, 4, 2)),
    *((False, 10, 192, 4, 2), (False, 19, 224, 6, 1), (False, 25, 384, 6, 2), (False, 7, 640, 6, 1)),
)


class EfficientNet(Functional):
    """EfficientNet: inverted blocks with squeeze-and-excite, grown in width, depth and image size together.

    Attributes:
        width, depth: what the widths and depths of B0 are multiplied by.
        dropout: rate before each dense layer of the head.
        drop_path: rate of stochastic depth of the last block; it grows from 0 at the first one.
        rescaled: whether the normalised image is divided by √deviation once more, which `keras.applications` does for
            its ImageNet files and leaves out of models made with `weights=None`.

    The others are those of `Functional`. Source: the papers' tables; `keras.applications.efficientnet`. The images are
    in 0 to 1: their normalisation is a layer whose statistics are in the file.
    """

    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2
    drop_path: float = 0.2
    rescaled: bool = True

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        factor = [1 / math.sqrt(deviation) for deviation in IMAGENET_STD] if self.rescaled else ()
        x = normalization(nothing(x, "rescaling"), "normalization", factor)
        x = nothing(x, "rescaling_1") if self.rescaled else x
        x = norm(conv2d(nothing(x, "stem_conv_pad"), "stem_conv", rounded(32 * self.width), 3, 2), "stem_bn")
        x = activation(x, "swish", "stem_activation")
        yield "stem", x
        rows = [
            (f"block{i}{chr(97 + j)}", size, rounded(width * self.width), wider, 1 if j else strides)
            for i, (size, blocks, width, wider, strides) in enumerate(V1, 1)
            for j in range(math.ceil(self.depth * blocks))
        ]
        for number, (block, size, width, wider, strides) in enumerate(rows):
            y = _inverted(x, block, size, width, wider, strides, "dwconv", 0.99)
            x = _outside(x, y, block, strides, self.drop_path * number / len(rows))
            yield block, x
        x = norm(conv2d(x, "top_conv", rounded(1280 * self.width)), "top_bn")
        yield "top", activation(x, "swish", "top_activation")


class EfficientNetV2(Functional):
    """EfficientNetV2: the first blocks are fused.

    Attributes:
        blocks: rows of a table: fused, blocks, width, how much wider the inside is, strides of the first block.
        stem_width: of the first convolution.
        width, depth: what widths and depths are multiplied by.
        dropout: rate before each dense layer of the head.
        drop_path: rate of stochastic depth of the last block; it grows from 0 at the first one.
        normalised: Keras's model has a Normalization after its Rescaling.

    The others are those of `Functional`. Source: the paper's table 4; `keras.applications.efficientnet_v2`.
    """

    blocks: tuple = V2_S
    stem_width: int = 24
    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2
    drop_path: float = 0.2
    normalised: bool = False

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        x = nothing(x, "rescaling")
        x = nothing(x, "normalization") if self.normalised else x
        x = norm(conv2d(x, "stem_conv", self._width(self.stem_width), 3, 2), "stem_bn", momentum=0.9)
        x = activation(x, "swish", "stem_activation")
        yield "stem", x
        total, number = sum(row[1] for row in self.blocks), 0
        for i, (fused, blocks, width, wider, first) in enumerate(self.blocks, 1):
            for j in range(math.ceil(self.depth * blocks)):
                block, strides = f"block{i}{chr(97 + j)}", 1 if j else first
                if fused:
                    y = _fused(x, block, self._width(width), wider, strides)
                else:
                    y = _inverted(x, block, 3, self._width(width), wider, strides, "dwconv2", 0.9)
                x = _outside(x, y, block, strides, self.drop_path * number / total)
                number += 1
                yield block, x
        x = norm(conv2d(x, "top_conv", self._width(1280)), "top_bn", momentum=0.9)
        yield "top", activation(x, "swish", "top_activation")

    def _width(self, width: float) -> int:
        return max(8, int(width * self.width + 4) // 8 * 8)  # which may be more than a tenth too small


def _fused(x: Layer, block: str, width: int, wider: int, strides: int) -> Layer:
    if wider == 1:
        x = norm(conv2d(x, f"{block}_project_conv", width, 3, strides), f"{block}_project_bn", momentum=0.9)
        return activation(x, "swish", f"{block}_project_activation")
    x = norm(conv2d(x, f"{block}_expand_conv", wider * x.width, 3, strides), f"{block}_expand_bn", momentum=0.9)
    x = activation(x, "swish", f"{block}_expand_activation")
    return norm(conv2d(x, f"{block}_project_conv", width), f"{block}_project_bn", momentum=0.9)


def _inverted(
    x: Layer, block: str, size: int, width: int, wider: int, strides: int, name: str, momentum: float
) -> Layer:
    """1×1 to more channels, a depthwise convolution called `name`, squeeze-and-excite, and 1×1 to `width` channels."""
    narrow = max(1, int(x.width * 0.25))
    if wider != 1:
        x = norm(conv2d(x, f"{block}_expand_conv", wider * x.width), f"{block}_expand_bn", momentum=momentum)
        x = activation(x, "swish", f"{block}_expand_activation")
    x = nothing(x, f"{block}_dwconv_pad") if name == "dwconv" and strides == 2 else x  # in the first version
    x = norm(depthwise(x, f"{block}_{name}", size, strides), f"{block}_bn", momentum=momentum)
    x = activation(x, "swish", f"{block}_activation")
    y = nothing(global_mean(x, f"{block}_se_squeeze"), f"{block}_se_reshape")
    y = conv2d(y, f"{block}_se_reduce", narrow, bias=True, function="swish")
    y = conv2d(y, f"{block}_se_expand", x.width, bias=True, function="sigmoid")
    x = conv2d(multiply([x, y], f"{block}_se_excite"), f"{block}_project_conv", width)
    return norm(x, f"{block}_project_bn", momentum=momentum)


def _outside(x: Layer, y: Layer, block: str, strides: int, rate: float) -> Layer:
    """The shortcut of a block, where its two ends are alike."""
    if strides > 1 or x.width != y.width:
        return y
    return add([drop(y, f"{block}_drop", rate) if rate else y, x], f"{block}_add")


# Of each EfficientNet: width, depth, side of the images, dropout.
SIZES = {
    **{"b0": (1.0, 1.0, 224, 0.2), "b1": (1.0, 1.1, 240, 0.2), "b2": (1.1, 1.2, 260, 0.3), "b3": (1.2, 1.4, 300, 0.3)},
    **{"b4": (1.4, 1.8, 380, 0.4), "b5": (1.6, 2.2, 456, 0.4), "b6": (1.8, 2.6, 528, 0.5), "b7": (2.0, 3.1, 600, 0.5)},
}
# Of each EfficientNetV2: its blocks, width of the stem, width, depth, side of the images.
SIZES_V2 = {
    **{"b0": (V2_B, 32, 1.0, 1.0, 224), "b1": (V2_B, 32, 1.0, 1.1, 240), "b2": (V2_B, 32, 1.1, 1.2, 260)},
    **{"b3": (V2_B, 32, 1.2, 1.4, 300), "s": (V2_S, 24, 1.0, 1.0, 384), "m": (V2_M, 24, 1.0, 1.0, 480)},
    "l": (V2_L, 32, 1.0, 1.0, 480),
}


def spec(size: str, num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of an EfficientNet. Source of URL and hashes: `keras.applications.efficientnet`."""
    width, depth, side, dropout = SIZES[size]
    url = f"https://storage.googleapis.com/keras-applications/efficientnet{size}"
    return Spec(
        net=partial(EfficientNet, width=width, depth=depth, dropout=dropout),
        about=f"inverted blocks with squeeze-and-excite, widths ×{width}, depths ×{depth}; normalises images itself",
        native_size=(side, side),
        preprocessing="unit",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=weight_files((f"{url}.h5", md5), (f"{url}_notop.h5", notop_md5)),
    )


def spec_v2(size: str, num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of an EfficientNetV2. Source of URL and hashes: `keras.applications.efficientnet_v2`."""
    blocks, stem_width, width, depth, side = SIZES_V2[size]
    small = blocks is V2_B
    url = "https://storage.googleapis.com/tensorflow/keras-applications/efficientnet_v2/efficientnetv2"
    url += size if small else f"-{size}"
    fields = {"blocks": blocks, "stem_width": stem_width, "width": width, "depth": depth, "normalised": small}
    return Spec(
        net=partial(EfficientNetV2, **fields),
        about=f"fused and inverted blocks, {f'widths ×{width}, depths ×{depth}' if small else size.upper()}",
        native_size=(side, side),
        preprocessing="torch" if small else "tf_128",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=weight_files((f"{url}.h5", md5), (f"{url}_notop.h5", notop_md5)),
    )
