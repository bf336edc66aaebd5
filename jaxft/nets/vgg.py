"""VGG16 and VGG19 (Simonyan and Zisserman, 2014, arXiv:1409.1556, table 1, columns D and E)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.kernels.pool import max_pool
from jaxft.nets.common import Net, Spec, Stage, conv, fold, head_stages, head_table, head_widths, published

WIDTHS = (64, 128, 256, 512, 512)
FC_WIDTH = 4096
FLATTENED = (7, 7)  # the feature map that fc1's 25,088 inputs come from


class VGG(Net):
    """VGG with or without the fully connected layers of its weight files.

    Attributes:
        depths: number of convolutions in each of the five blocks.
        num_classes: width of the last layer; None stops after `block5` and takes any input of 32×32 or more.
        fc: Flatten → fc1 (4096) → fc2 (4096) come before the rest of the head, for inputs of 224 to 255 pixels a side.
            False takes global average pooling in their place, for any input of 32×32 or more.
        hidden: widths of dense ReLU layers hidden1, hidden2, … before the last layer.
        dropout: rate before each dense layer after the first, and before the last one, in training. None becomes 0.5
            with fc or hidden layers, and 0 without.
        frozen: names of frozen layers; VGG has no BatchNorm, so nothing of its own depends on it.
        dtype: of the computation; parameters and logits are float32.

    Source: the paper's table 1; layer names are those of `keras.applications.vgg16` and `vgg19`.
    """

    depths: tuple[int, ...]
    num_classes: int | None = 1000
    fc: bool = True
    hidden: tuple[int, ...] = ()
    dropout: float | None = None
    frozen: frozenset[str] = frozenset()
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.dropout is None:
            object.__setattr__(self, "dropout", 0.5 if self.fc or self.hidden else 0.0)
        super().__post_init__()

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers, those without weights too, as Keras's guide of 2016 orders its Sequential model."""
        table = {}
        for b, depth in enumerate(self.depths, 1):
            convs = [(f"block{b}_pad{i}", f"block{b}_conv{i}") for i in range(1, depth + 1)]
            table[f"block{b}"] = (*(name for pair in convs for name in pair), f"block{b}_pool")
        return table | head_table(*self._head(), pooled=not self.fc)

    def head_layers(self) -> tuple[str, ...]:
        """The weighted layers that no ImageNet file fills: hidden layers of the caller's widths and the last one."""
        return tuple(head_widths(self.hidden, "predictions", self.num_classes))

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, start: str | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the net, or the stages after `start`.

        Args:
            images: [B, H, W, 3], preprocessed for the weight file; with `start`, the output of the stage of that name.
            train: dropout is on, and takes the random key called "dropout".

        Returns:
            (logits float32 [B, num_classes], outputs of every stage by name). Without a classifier the first is the
            output of `block5`, [B, H // 32, W // 32, 512].

        Raises:
            ValueError: the images are too small or do not fit fc1, or `start` is not a stage.
        """
        if start is None:
            self._check_size(*images.shape[1:3])
        stages: list[Stage] = [(f"block{b}", partial(self._block, b, depth)) for b, depth in enumerate(self.depths, 1)]
        stages += head_stages(*self._head(), train=train, dtype=self.dtype, pooled=not self.fc)
        return fold(stages, images.astype(self.dtype), start)

    def _check_size(self, height: int, width: int) -> None:
        if min(height, width) < 32:
            raise ValueError(f"VGG halves its input five times and needs at least 32×32 pixels, not {height}×{width}")
        if self.num_classes is not None and self.fc and (height // 32, width // 32) != FLATTENED:
            raise ValueError(
                f"fc1 takes a 7×7 feature map, which inputs of 224 to 255 pixels a side give, not {height}×{width}; "
                "resize the images, or take global average pooling: fc=False, or gap on the command line"
            )

    def _block(self, block: int, depth: int, x: jax.Array) -> jax.Array:
        for i in range(1, depth + 1):
            x = conv(x, f"block{block}_conv{i}", WIDTHS[block - 1], (3, 3), relu=True, dtype=self.dtype)
        return max_pool(x, (2, 2), (2, 2))

    def _head(self) -> tuple[dict[str, int], float]:
        """Dense layer → width, and the rate of dropout."""
        assert self.dropout is not None  # since __post_init__
        widths = head_widths(self.hidden, "predictions", self.num_classes)
        if widths and self.fc:
            widths = {"fc1": FC_WIDTH, "fc2": FC_WIDTH, **widths}
        return widths, self.dropout


def spec(depths: tuple[int, ...], num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of a VGG. Source of URLs and hashes: `keras.applications`."""
    net = f"vgg{sum(depths) + 3}"
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/{net}/{net}"
    return Spec(
        net=partial(VGG, depths=depths),
        about=f"{len(depths)} blocks of 3×3 convolutions and three dense layers, {sum(depths) + 3} in all",
        native_size=(224, 224),
        preprocessing="caffe",
        head="predictions",
        classifier=("fc1", "fc2", "predictions"),
        num_params=num_params,
        gmac=gmac,
        weights=published(url, md5, notop_md5),
        flattened={"fc1": FLATTENED},
    )
