"""Inception-ResNet-v2 (Szegedy et al., 2016, arXiv:1602.07261, figures 15 to 19 and 3)."""

from collections.abc import Iterator
from typing import Any

from jaxft.nets.common import Spec, published
from jaxft.nets.functional import Functional, Layer, activation, add, concatenate, conv2d, norm, pool

# A branch: its convolutions as (width, kernel). A kind of block: its branches, and what its output is scaled by.
BLOCKS = {
    "block35": (((32, 1),), ((32, 1), (32, 3)), ((32, 1), (48, 3), (64, 3)), 0.17),
    "block17": (((192, 1),), ((128, 1), (160, (1, 7)), (192, (7, 1))), 0.1),
    "block8": (((192, 1),), ((192, 1), (224, (1, 3)), (256, (3, 1))), 0.2),
}


class InceptionResNetV2(Functional):
    """Inception modules whose output is scaled and added to their input.

    Attributes:
        depths: blocks of the three kinds.

    The others are those of `Functional`. Source: the paper; `keras.applications.inception_resnet_v2`, whose automatic
    names are counted here from 1 in the order in which it makes its layers.
    """

    depths: tuple[int, ...] = (10, 20, 10)

    smallest = 75

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        count = 0

        def unit(x: Layer, width: int, size: int | tuple[int, int], strides: int = 1, padding: str = "SAME") -> Layer:
            nonlocal count
            count += 1
            x = norm(
                conv2d(x, f"conv2d_{count}", width, size, strides, padding), f"batch_normalization_{count}", scale=False
            )
            return activation(x, "relu")

        def branch(x: Layer, units: Any, strides: int = 1) -> Layer:
            """Convolutions one after another; with strides, the last one has them and no padding."""
            *first, last = units
            for width, size in first:
                x = unit(x, width, size)
            width, size = last
            return unit(x, width, size, strides, "VALID" if strides > 1 else "SAME")

        x = unit(unit(unit(x, 32, 3, 2, "VALID"), 32, 3, 1, "VALID"), 64, 3)
        x = pool(x, "max", 3, 2)
        x = pool(unit(unit(x, 80, 1, 1, "VALID"), 192, 3, 1, "VALID"), "max", 3, 2)
        yield "stem", x
        convs = [branch(x, units) for units in (((96, 1),), ((48, 1), (64, 5)), ((64, 1), (96, 3), (96, 3)))]
        x = concatenate([*convs, unit(pool(x, "average", 3, 1, "SAME"), 64, 1)], "mixed_5b")
        yield "mixed_5b", x

        reductions = {
            "mixed_6a": (((384, 3),), ((256, 1), (256, 3), (384, 3))),
            "mixed_7a": (((256, 1), (384, 3)), ((256, 1), (288, 3)), ((256, 1), (288, 3), (320, 3))),
        }
        for depth, (kind, (*branches, factor)), reduction in zip(
            self.depths, BLOCKS.items(), (*reductions, None), strict=True
        ):
            for i in range(1, depth + 1):
                block, last = f"{kind}_{i}", kind == "block8" and i == depth
                mixed = concatenate([branch(x, units) for units in branches], f"{block}_mixed")
                up = conv2d(mixed, f"{block}_conv", x.width, bias=True)
                x = add([x, up], factor=1.0 if last else factor)
                x = x if last else activation(x, "relu", f"{block}_ac")
                yield block, x
            if reduction:
                convs = [branch(x, units, 2) for units in reductions[reduction]]
                x = concatenate([*convs, pool(x, "max", 3, 2)], reduction)
                yield reduction, x
        x = activation(norm(conv2d(x, "conv_7b", 1536), "conv_7b_bn", scale=False), "relu", "conv_7b_ac")
        yield "conv_7b", x


def spec(num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row. Source of URL and hashes: `keras.applications.inception_resnet_v2`."""
    url = "https://storage.googleapis.com/tensorflow/keras-applications/inception_resnet_v2/inception_resnet_v2"
    return Spec(
        net=InceptionResNetV2,
        about="Inception modules with shortcuts, 164 layers deep; BatchNorm without gamma",
        native_size=(299, 299),
        preprocessing="tf",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=published(url, md5, notop_md5),
    )
