"""ResNet-50V2, 101V2 and 152V2 (He et al., 2016, arXiv:1603.05027): BatchNorm and ReLU come before each convolution."""

from collections.abc import Iterator
from functools import partial

from jaxft.nets.common import Spec, published
from jaxft.nets.functional import Functional, Layer, activation, add, conv2d, norm, pad, pool
from jaxft.nets.resnet import WIDTHS

EPSILON = 1.001e-5


class ResNetV2(Functional):
    """ResNet with pre-activation; the stride sits on the 3×3 convolution of a stage's last block.

    Attributes:
        depths: blocks in each of the four stages.

    The others are those of `Functional`. Source: the paper's figure 1; `keras.applications.resnet_v2`.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        x = conv2d(pad(x, ((3, 3), (3, 3)), "conv1_pad"), "conv1_conv", 64, 7, 2, "VALID", bias=True)
        yield "conv1", x
        x = pool(pad(x, ((1, 1), (1, 1)), "pool1_pad"), "max", 3, 2, name="pool1_pool")
        yield "pool1", x
        for s, (depth, width) in enumerate(zip(self.depths, WIDTHS, strict=True), 2):
            for b in range(1, depth + 1):
                block = f"conv{s}_block{b}"
                x = _block(x, block, width, 2 if b == depth and s < 5 else 1, widened=b == 1)
                yield block, x
        x = activation(norm(x, "post_bn", epsilon=EPSILON), "relu", "post_relu")
        yield "post", x


def _block(x: Layer, block: str, width: int, strides: int, *, widened: bool) -> Layer:
    y = activation(norm(x, f"{block}_preact_bn", epsilon=EPSILON), "relu", f"{block}_preact_relu")
    if widened:
        shortcut = conv2d(y, f"{block}_0_conv", 4 * width, 1, strides, bias=True)
    else:
        shortcut = pool(x, "max", 1, strides) if strides > 1 else x
    y = conv2d(y, f"{block}_1_conv", width)
    y = activation(norm(y, f"{block}_1_bn", epsilon=EPSILON), "relu", f"{block}_1_relu")
    y = conv2d(pad(y, ((1, 1), (1, 1)), f"{block}_2_pad"), f"{block}_2_conv", width, 3, strides, "VALID")
    y = activation(norm(y, f"{block}_2_bn", epsilon=EPSILON), "relu", f"{block}_2_relu")
    return add([shortcut, conv2d(y, f"{block}_3_conv", 4 * width, bias=True)], f"{block}_out")


def spec(depths: tuple[int, ...], num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row. Source of URL and hashes: `keras.applications.resnet_v2`."""
    net = f"resnet{3 * sum(depths) + 2}v2"
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/resnet/{net}"
    return Spec(
        net=partial(ResNetV2, depths=depths),
        about=f"{3 * sum(depths) + 2} layers, BatchNorm and ReLU before each convolution",
        native_size=(224, 224),
        preprocessing="tf",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=published(url, md5, notop_md5),
        aliases={"probs": "predictions"},
    )
