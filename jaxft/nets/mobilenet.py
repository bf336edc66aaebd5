"""MobileNet (Howard et al., 2017, arXiv:1704.04861), V2 (Sandler et al., 2018, arXiv:1801.04381) and V3 (Howard et al.,
2019, arXiv:1905.02244)."""

from collections.abc import Iterator
from functools import partial

from jaxft.nets.common import Spec, head_widths, rounded, weight_files
from jaxft.nets.functional import (
    Functional,
    Layer,
    activation,
    add,
    conv2d,
    depthwise,
    global_mean,
    multiply,
    norm,
    nothing,
    pad,
)

URL = "https://storage.googleapis.com/tensorflow/keras-applications"


class MobileNet(Functional):
    """MobileNet: depthwise convolutions, and 1×1 ones after them.

    Attributes:
        alpha: what all widths are multiplied by.

    The others are those of `Functional`. Source: the paper's table 1; `keras.applications.mobilenet`, where the last
    layer is a 1×1 convolution.
    """

    alpha: float = 1.0

    last = "conv_preds"

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        x = activation(norm(conv2d(x, "conv1", int(32 * self.alpha), 3, 2), "conv1_bn"), "relu6", "conv1_relu")
        yield "conv1", x
        widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
        for i, width in enumerate(widths, 1):
            strides = 2 if i in (2, 4, 6, 12) else 1
            x = pad(x, ((0, 1), (0, 1)), f"conv_pad_{i}") if strides == 2 else x
            x = depthwise(x, f"conv_dw_{i}", 3, strides, "VALID" if strides == 2 else "SAME")
            x = activation(norm(x, f"conv_dw_{i}_bn"), "relu6", f"conv_dw_{i}_relu")
            x = norm(conv2d(x, f"conv_pw_{i}", int(width * self.alpha)), f"conv_pw_{i}_bn")
            x = activation(x, "relu6", f"conv_pw_{i}_relu")
            yield f"block{i}", x


# Of each stage of MobileNetV2: how much wider the inside of a block is, its width, blocks, strides of the first one.
V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(Functional):
    """MobileNetV2: blocks that are wide inside, with a shortcut between their narrow ends.

    Attributes:
        alpha: what all widths are multiplied by.

    The others are those of `Functional`. Source: the paper's table 2; `keras.applications.mobilenet_v2`.
    """

    alpha: float = 1.0

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        usual = partial(norm, momentum=0.999)
        x = usual(conv2d(x, "Conv1", rounded(32 * self.alpha), 3, 2), "bn_Conv1")
        x = activation(x, "relu6", "Conv1_relu")
        yield "conv1", x
        rows = [(t, c, s if i == 0 else 1) for t, c, n, s in V2 for i in range(n)]
        for i, (wider, width, strides) in enumerate(rows):
            block, inside = f"block_{i}" if i else "expanded_conv", x
            if i:
                inside = usual(conv2d(x, f"{block}_expand", wider * x.width), f"{block}_expand_BN")
                inside = activation(inside, "relu6", f"{block}_expand_relu")
            inside = nothing(inside, f"{block}_pad") if strides == 2 else inside
            inside = usual(depthwise(inside, f"{block}_depthwise", 3, strides), f"{block}_depthwise_BN")
            inside = activation(inside, "relu6", f"{block}_depthwise_relu")
            y = conv2d(inside, f"{block}_project", rounded(int(width * self.alpha)))
            y = usual(y, f"{block}_project_BN")
            x = add([x, y], f"{block}_add") if x.width == y.width and strides == 1 else y
            yield block, x
        x = usual(conv2d(x, "Conv_1", rounded(1280 * max(1, self.alpha))), "Conv_1_bn")
        yield "Conv_1", activation(x, "relu6", "out_relu")


# Of each block of MobileNetV3: how much wider the inside is, width, kernel, strides, squeeze-and-excite, activation.
SMALL = (
    *((1, 16, 3, 2, True, "relu"), (72 / 16, 24, 3, 2, False, "relu"), (88 / 24, 24, 3, 1, False, "relu")),
    *((4, 40, 5, 2, True, "hard_swish"), (6, 40, 5, 1, True, "hard_swish"), (6, 40, 5, 1, True, "hard_swish")),
    *((3, 48, 5, 1, True, "hard_swish"), (3, 48, 5, 1, True, "hard_swish"), (6, 96, 5, 2, True, "hard_swish")),
    *((6, 96, 5, 1, True, "hard_swish"), (6, 96, 5, 1, True, "hard_swish")),
)
LARGE = (
    *((1, 16, 3, 1, False, "relu"), (4, 24, 3, 2, False, "relu"), (3, 24, 3, 1, False, "relu")),
    *((3, 40, 5, 2, True, "relu"), (3, 40, 5, 1, True, "relu"), (3, 40, 5, 1, True, "relu")),
    *((6, 80, 3, 2, False, "hard_swish"), (2.5, 80, 3, 1, False, "hard_swish"), (2.3, 80, 3, 1, False, "hard_swish")),
    *((2.3, 80, 3, 1, False, "hard_swish"), (6, 112, 3, 1, True, "hard_swish"), (6, 112, 3, 1, True, "hard_swish")),
    *((6, 160, 5, 2, True, "hard_swish"), (6, 160, 5, 1, True, "hard_swish"), (6, 160, 5, 1, True, "hard_swish")),
)


class MobileNetV3(Functional):
    """MobileNetV3: hard swish, and squeeze-and-excite in some blocks.

    Attributes:
        blocks: rows of a table: how much wider the inside is, width, kernel, strides, squeeze-and-excite, activation.
        fc_width: of conv_2, a dense layer after the pooling with hard swish, in Keras a 1×1 convolution.
        fc: conv_2 comes before the rest of the head. False leaves it out.

    The others are those of `Functional`; dropout is also before the layer after conv_2. Source: the paper's tables 1
    and 2; `keras.applications.mobilenet_v3`, whose last layer is a 1×1 convolution.
    """

    blocks: tuple = LARGE
    fc_width: int = 1280
    fc: bool = True

    last = "logits"

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        usual = partial(norm, momentum=0.999)
        x = usual(conv2d(nothing(x, "rescaling"), "conv", 16, 3, 2), "conv_bn")
        x = activation(x, "hard_swish")
        yield "conv", x
        for i, (wider, width, size, strides, squeezed, function) in enumerate(self.blocks):
            block, inside = f"expanded_conv_{i}" if i else "expanded_conv", x
            broad = rounded(x.width * wider)
            if i:
                inside = activation(usual(conv2d(x, f"{block}_expand", broad), f"{block}_expand_bn"), function)
            inside = nothing(inside, f"{block}_depthwise_pad") if strides == 2 else inside
            inside = usual(depthwise(inside, f"{block}_depthwise", size, strides), f"{block}_depthwise_bn")
            inside = activation(inside, function)
            if squeezed:
                inside = _squeeze(inside, f"{block}_squeeze_excite", rounded(broad * 0.25))
            y = usual(conv2d(inside, f"{block}_project", width), f"{block}_project_bn")
            x = add([x, y], f"{block}_add") if x.width == width and strides == 1 else y
            yield block, x
        x = usual(conv2d(x, "conv_1", rounded(x.width * 6)), "conv_1_bn")
        yield "conv_1", activation(x, "hard_swish")

    def _head(self) -> dict[str, int]:
        widths = head_widths(self.hidden, self.last, self.num_classes)
        return {"conv_2": self.fc_width, **widths} if widths and self.fc else widths

    def head_layers(self) -> tuple[str, ...]:
        """The weighted layers that no ImageNet file fills."""
        return tuple(head_widths(self.hidden, self.last, self.num_classes))

    def _head_activations(self) -> dict[str, str]:
        return {"conv_2": "hard_swish"}


def _squeeze(x: Layer, name: str, width: int) -> Layer:
    """Squeeze-and-excite (Hu et al., 2017, arXiv:1709.01507): channels are weighted by what their means say."""
    y = activation(conv2d(global_mean(x, f"{name}_avg_pool"), f"{name}_conv", width, bias=True), "relu", f"{name}_relu")
    y = conv2d(y, f"{name}_conv_1", x.width, bias=True)
    y = activation(nothing(y, "re_lu"), "hard_sigmoid", None)
    return multiply([x, y], f"{name}_mul")


def spec(num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of MobileNet. Source of the URL: `keras.applications.mobilenet`, which states no hash.

    The hashes are those of a public mirror, whose others agree with Keras's.
    """
    stem = f"{URL}/mobilenet/mobilenet_1_0_224_tf"
    return Spec(
        net=MobileNet,
        about="depthwise and 1×1 convolutions, 28 layers",
        native_size=(224, 224),
        preprocessing="tf",
        head="conv_preds",
        classifier=("conv_preds",),
        num_params=num_params,
        gmac=gmac,
        weights=weight_files((f"{stem}.h5", md5), (f"{stem}_no_top.h5", notop_md5)),
        convolved=("conv_preds",),
    )


def spec_v2(num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of MobileNetV2. Source of the URL: `keras.applications.mobilenet_v2`; hashes as MobileNet's."""
    stem = f"{URL}/mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224"
    return Spec(
        net=MobileNetV2,
        about="blocks that are wide inside, 53 layers",
        native_size=(224, 224),
        preprocessing="tf",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=weight_files((f"{stem}.h5", md5), (f"{stem}_no_top.h5", notop_md5)),
        aliases={"Logits": "predictions", **_older_v2()},
    )


def spec_v3(size: str, num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of MobileNetV3. Source of URL and hashes: `keras.applications.mobilenet_v3`."""
    stem = f"{URL}/mobilenet_v3/weights_mobilenet_v3_{size}_224_1.0_float"
    table = {"small": {"blocks": SMALL, "fc_width": 1024}, "large": {}}[size]
    return Spec(
        net=partial(MobileNetV3, **table),
        about=f"{size}; hard swish and squeeze-and-excite; conv_2 after the pooling unless gap is asked for",
        native_size=(224, 224),
        preprocessing="tf",
        head="logits",
        classifier=("conv_2", "logits"),
        num_params=num_params,
        gmac=gmac,
        weights=weight_files((f"{stem}.h5", md5), (f"{stem}_no_top_v2.h5", notop_md5)),
        aliases=_older_v3(MobileNetV3(**table)),
        convolved=("conv_2", "logits"),
    )


def _older_v2() -> dict[str, str]:
    """The names that MobileNetV2's layers had in Keras 2.1 → those of today."""
    aliases = {}
    for i in range(sum(blocks for _, _, blocks, _ in V2)):
        block = f"block_{i}" if i else "expanded_conv"
        for part in ("expand", "depthwise", "project"):
            aliases[f"mobl{i}_conv_{i}_{part}"] = f"{block}_{part}"
            aliases[f"bn{i}_conv_{i}_bn_{part}"] = f"{block}_{part}_BN"
    return aliases


def _older_v3(net: MobileNetV3) -> dict[str, str]:
    """The names that MobileNetV3's layers had in Keras 2, with / for _, → those of today."""
    aliases = {"Conv_2": "conv_2", "Logits": "logits"}
    for name in net.keras_kinds():
        old = f"{name[:-3]}_BatchNorm" if name.endswith("_bn") else name.replace("_excite_conv", "_excite_Conv")
        aliases[f"C{old[1:]}" if old.startswith("conv") else old] = name
    return aliases
