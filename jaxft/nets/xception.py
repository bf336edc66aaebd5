"""Xception (Chollet, 2016, arXiv:1610.02357, figure 5)."""

from collections.abc import Iterator

from jaxft.nets.common import Spec, published
from jaxft.nets.functional import Functional, Layer, activation, add, conv2d, norm, pool, separable


class Xception(Functional):
    """Xception: separable convolutions in blocks with a shortcut.

    Attributes:
        middle: how many blocks of three convolutions the middle flow has.

    The others are those of `Functional`. Source: the paper's figure 5; layer names of `keras.applications.xception`,
    where the shortcuts have automatic ones.
    """

    middle: int = 8

    smallest = 71

    def plan(self, x: Layer) -> Iterator[tuple[str, Layer]]:
        """See `Functional`."""
        for name, width, strides in (("block1_conv1", 32, 2), ("block1_conv2", 64, 1)):
            x = norm(conv2d(x, name, width, 3, strides, "VALID"), f"{name}_bn")
            x = activation(x, "relu", f"{name}_act")
        yield "block1", x
        for block, width in enumerate((128, 256, 728), 2):
            x = _down(x, f"block{block}", block - 1, (width, width), relu_first=block > 2)
            yield f"block{block}", x
        for block in range(5, 5 + self.middle):
            x = add([_separables(x, f"block{block}", (728, 728, 728)), x])
            yield f"block{block}", x
        block = 5 + self.middle
        x = _down(x, f"block{block}", 4, (728, 1024))
        yield f"block{block}", x
        for i, width in enumerate((1536, 2048), 1):
            name = f"block{block + 1}_sepconv{i}"
            x = activation(norm(separable(x, name, width, 3), f"{name}_bn"), "relu", f"{name}_act")
        yield f"block{block + 1}", x


def _separables(x: Layer, block: str, widths: tuple[int, ...], *, relu_first: bool = True) -> Layer:
    for i, width in enumerate(widths, 1):
        name = f"{block}_sepconv{i}"
        x = activation(x, "relu", f"{name}_act") if relu_first or i > 1 else x
        x = norm(separable(x, name, width, 3), f"{name}_bn")
    return x


def _down(x: Layer, block: str, number: int, widths: tuple[int, ...], *, relu_first: bool = True) -> Layer:
    shortcut = norm(conv2d(x, f"conv2d_{number}", widths[-1], 1, 2), f"batch_normalization_{number}")
    x = _separables(x, block, widths, relu_first=relu_first)
    return add([pool(x, "max", 3, 2, "SAME", f"{block}_pool"), shortcut])


def spec(num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row. Source of URL and hashes: `keras.applications.xception`."""
    url = "https://storage.googleapis.com/tensorflow/keras-applications/xception/xception"
    return Spec(
        net=Xception,
        about="separable convolutions, 36 convolutional layers in 14 blocks",
        native_size=(299, 299),
        preprocessing="tf",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=published(url, md5, notop_md5),
    )
