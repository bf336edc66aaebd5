"""VGG16 and VGG19 (Simonyan and Zisserman, 2014, arXiv:1409.1556, table 1, columns D and E)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.kernels.pool import max_pool
from jaxft.nets.common import Spec, Stage, conv, dense, fold, published

WIDTHS = (64, 128, 256, 512, 512)
FC_WIDTH = 4096
FLATTENED = (7, 7)  # the feature map that fc1's 25,088 inputs come from


class VGG(nn.Module):
    """VGG with one of three heads.

    Attributes:
        depths: number of convolutions in each of the five blocks.
        num_classes: width of the last layer; None stops after `block5` and takes any input of 32×32 or more.
        head: None is the origin's Flatten → fc1 (4096) → fc2 (4096) → predictions, for inputs of 224 to 255 pixels a
            side; a tuple is global average pooling, one hidden ReLU layer per width in it, then predictions.
        dropout: rate behind each hidden dense layer (fc1, fc2 or hidden1, …) in training.
        frozen: names of frozen layers; VGG has no BatchNorm, so nothing of its own depends on it.
        dtype: of the computation; parameters and logits are float32.

    Source: the paper's table 1; layer names are those of `keras.applications.vgg16` and `vgg19`.
    """

    depths: tuple[int, ...]
    num_classes: int | None = 1000
    head: tuple[int, ...] | None = None
    dropout: float = 0.5
    frozen: frozenset[str] = frozenset()
    dtype: DTypeLike = jnp.float32

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers in the order of the origin's Sequential model, those without weights included."""
        table = {}
        for b, depth in enumerate(self.depths, 1):
            convs = [(f"block{b}_pad{i}", f"block{b}_conv{i}") for i in range(1, depth + 1)]
            table[f"block{b}"] = (*(name for pair in convs for name in pair), f"block{b}_pool")
        if self.num_classes is None:
            return table
        layers = ["fc1", "fc2"] if self.head is None else [f"hidden{i}" for i in range(1, len(self.head) + 1)]
        layers.append("predictions")
        if self.head is not None:
            table["avg_pool"] = ("avg_pool",)
        for i, name in enumerate(layers):
            before = ("flatten",) if name == "fc1" else (f"{name}_dropout",) if i else ()
            table[name] = (*before, name)
        return table

    def head_layers(self) -> tuple[str, ...]:
        """The weighted layers that no ImageNet file fills: the last one, and hidden layers of the caller's widths."""
        if self.num_classes is None:
            return ()
        return (*(f"hidden{i}" for i in range(1, len(self.head or ()) + 1)), "predictions")

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, start: str | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the net, or what follows the stage `start`.

        Args:
            images: [B, H, W, 3], preprocessed for the weight file; with `start`, the output of the stage of that name.
            train: dropout is on, and takes the random key called "dropout".

        Returns:
            (logits float32 [B, num_classes], outputs of every stage by name). Without a classifier the first is the
            output of `block5`, [B, H // 32, W // 32, 512].

        Raises:
            ValueError: the images are too small or do not fit the fc head, or `start` is no stage.
        """
        if start is None:
            self._check_size(*images.shape[1:3])
        stages: list[Stage] = [(f"block{b}", partial(self._block, b, depth)) for b, depth in enumerate(self.depths, 1)]
        if self.num_classes is not None:
            stages += self._head_stages(self.num_classes, train)
        return fold(stages, images.astype(self.dtype), start)

    def _check_size(self, height: int, width: int) -> None:
        if min(height, width) < 32:
            raise ValueError(f"VGG halves its input five times and needs at least 32×32 pixels, not {height}×{width}")
        if self.num_classes is not None and self.head is None and (height // 32, width // 32) != FLATTENED:
            raise ValueError(
                f"fc1 takes a 7×7 feature map, which inputs of 224 to 255 pixels a side give, not {height}×{width}; "
                "resize the images or use a pooled head (head=() or hidden widths)"
            )

    def _block(self, block: int, depth: int, x: jax.Array) -> jax.Array:
        for i in range(1, depth + 1):
            x = conv(x, f"block{block}_conv{i}", WIDTHS[block - 1], (3, 3), relu=True, dtype=self.dtype)
        return max_pool(x, (2, 2), (2, 2))

    def _head_stages(self, num_classes: int, train: bool) -> list[Stage]:
        def dropped(name: str, width: int, rate: float, dtype: DTypeLike, x: jax.Array) -> jax.Array:
            # Dropout sits in front of a layer, not behind the last: the output of a stage stays deterministic.
            x = nn.Dropout(rate, deterministic=not train, name=f"{name}_dropout")(x)
            return dense(x, name, width, dtype)

        def hidden(name: str, width: int, rate: float, x: jax.Array) -> jax.Array:
            return nn.relu(dropped(name, width, rate, self.dtype, x.reshape(len(x), -1)))

        stages: list[Stage] = []
        if self.head is None:
            widths = {"fc1": FC_WIDTH, "fc2": FC_WIDTH}
        else:
            widths = {f"hidden{i}": width for i, width in enumerate(self.head, 1)}
            stages.append(("avg_pool", lambda x: x.mean((1, 2))))
        for i, (name, width) in enumerate(widths.items()):
            stages.append((name, partial(hidden, name, width, self.dropout if i else 0.0)))
        rate = self.dropout if widths else 0.0
        stages.append(("predictions", partial(dropped, "predictions", num_classes, rate, jnp.float32)))
        return stages


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


def head(text: str) -> tuple[int, ...] | None:
    """A head as a command line names it: `fc`, `gap` or `gap:4096,2048` → the `head` field of `VGG`.

    Raises:
        ValueError: it is none of these.
    """
    kind, _, widths = text.partition(":")
    if text in ("fc", "gap"):
        return None if text == "fc" else ()
    if kind == "gap" and all(width.isdecimal() and int(width) for width in widths.split(",")):
        return tuple(int(width) for width in widths.split(","))
    raise ValueError(f"head={text!r} is not fc, gap, or gap: with the widths of hidden layers, as in gap:4096,2048")
