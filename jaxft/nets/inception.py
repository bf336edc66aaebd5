"""Inception-V3 (Szegedy et al., 2015, arXiv:1512.00567) and V4 (2016, arXiv:1602.07261), each a table of branches."""

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.kernels.pool import avg_pool, max_pool
from jaxft.nets.common import (
    Net,
    Spec,
    Stage,
    batch_norm,
    check_size,
    conv,
    fold,
    head_stages,
    head_table,
    head_widths,
    published,
)


class Conv(NamedTuple):
    """A convolution with its BatchNorm and ReLU; `number` counts them through the net, as automatic names do.

    `pooled`: average pooling, as `Pool` does it at stride 1, comes before this 1×1 convolution.
    """

    width: int
    kernel: tuple[int, int]
    strides: int = 1
    padding: str = "SAME"
    number: int = 0
    pooled: bool = False


class Pool(NamedTuple):
    """3×3 pooling: `max`, or `avg`, whose mean leaves the padding out as in Keras."""

    kind: str
    strides: int = 1
    padding: str = "SAME"


class Fork(NamedTuple):
    """Branches side by side, their outputs concatenated."""

    branches: tuple["Chain", ...]


Chain = tuple[Conv | Pool | Fork, ...]
Table = Mapping[str, Chain]  # stage → what it does

HALVE = {"strides": 2, "padding": "VALID"}


def c(width: int, height: int, breadth: int | None = None, **options: Any) -> Conv:
    return Conv(width, (height, breadth or height), **options)


def chain(size: int, *widths: int, first: int = 1) -> Chain:
    """A 1×1 convolution, then 1×size and size×1 ones in turn, which factor size×size; size×1 first if `first` is 0."""
    shapes = [(1, 1), *((1, size) if i % 2 == first else (size, 1) for i in range(1, len(widths)))]
    return tuple(c(width, *shape) for width, shape in zip(widths, shapes, strict=True))


def cross(width: int) -> Fork:
    return Fork(((c(width, 1, 3),), (c(width, 3, 1),)))


def fork(*branches: Chain) -> Chain:
    return (Fork(branches),)


def v3(pool_projections: tuple[int, int, int], mixed7_entry: int, last_reduction: str) -> dict[str, Chain]:
    """Inception-V3: figures 5 to 7 of the paper, in the order in which Keras creates the branches."""
    table: dict[str, Chain] = {
        "stem": (
            *(c(32, 3, **HALVE), c(32, 3, padding="VALID"), c(64, 3), Pool("max", **HALVE)),
            *(c(80, 1, padding="VALID"), c(192, 3, padding="VALID"), Pool("max", **HALVE)),
        )
    }
    for i, width in enumerate(pool_projections):
        table[f"mixed{i}"] = fork(
            (c(64, 1),), (c(48, 1), c(64, 5)), (c(64, 1), c(96, 3), c(96, 3)), (c(width, 1, pooled=True),)
        )
    table["mixed3"] = fork((c(384, 3, **HALVE),), (c(64, 1), c(96, 3), c(96, 3, **HALVE)), (Pool("max", **HALVE),))
    for i, (w, entry) in enumerate(((128, 128), (160, 160), (160, 160), (192, mixed7_entry)), 4):
        table[f"mixed{i}"] = fork(
            (c(192, 1),), chain(7, w, w, 192), chain(7, entry, w, w, w, 192, first=0), (c(192, 1, pooled=True),)
        )
    table["mixed8"] = fork(
        (c(192, 1), c(320, 3, **HALVE)),
        (*chain(7, 192, 192, 192), c(192, 3, **HALVE)),
        (Pool(last_reduction, **HALVE),),
    )
    for i in (9, 10):
        table[f"mixed{i}"] = fork(
            (c(320, 1),), (c(384, 1), cross(384)), (c(448, 1), c(384, 3), cross(384)), (c(192, 1, pooled=True),)
        )
    return table


def v4(blocks: tuple[int, int, int] = (4, 7, 3)) -> dict[str, Chain]:
    """Inception-V4: figures 3 to 9 of the paper."""
    table: dict[str, Chain] = {
        "stem": (
            *(c(32, 3, **HALVE), c(32, 3, padding="VALID"), c(64, 3)),
            *fork((Pool("max", **HALVE),), (c(96, 3, **HALVE),)),
            *fork((c(64, 1), c(96, 3, padding="VALID")), (*chain(7, 64, 64, 64), c(96, 3, padding="VALID"))),
            *fork((c(192, 3, **HALVE),), (Pool("max", **HALVE),)),
        )
    }
    for i in range(1, blocks[0] + 1):
        table[f"inception_a{i}"] = fork(
            (c(96, 1),), (c(64, 1), c(96, 3)), (c(64, 1), c(96, 3), c(96, 3)), (c(96, 1, pooled=True),)
        )
    table["reduction_a"] = fork(
        (c(384, 3, **HALVE),), (c(192, 1), c(224, 3), c(256, 3, **HALVE)), (Pool("max", **HALVE),)
    )
    for i in range(1, blocks[1] + 1):
        table[f"inception_b{i}"] = fork(
            (c(384, 1),),
            chain(7, 192, 224, 256),
            chain(7, 192, 192, 224, 224, 256, first=0),
            (c(128, 1, pooled=True),),
        )
    table["reduction_b"] = fork(
        (c(192, 1), c(192, 3, **HALVE)), (*chain(7, 256, 256, 320), c(320, 3, **HALVE)), (Pool("max", **HALVE),)
    )
    for i in range(1, blocks[2] + 1):
        table[f"inception_c{i}"] = fork(
            (c(256, 1),),
            (c(384, 1), cross(256)),
            (c(384, 1), c(448, 3, 1), c(512, 1, 3), Fork(((c(256, 1, 3),), (c(256, 3, 1),)))),
            (c(256, 1, pooled=True),),
        )
    return table


class Inception(Net):
    """A net of forks of convolutions.

    Attributes:
        table: stage → chain, as (stage, chain) pairs.
        num_classes: width of the last layer; None stops at the last feature map.
        hidden: widths of dense ReLU layers hidden1, hidden2, … before the last layer.
        relu_first: convolution with bias → ReLU → BatchNorm with gamma, so that features can be negative (v0.2); else
            convolution → BatchNorm without gamma → ReLU.
        gamma: BatchNorm has a gamma even so.
        momentum: of BatchNorm's running statistics.
        dropout: rate before each dense layer after hidden1, and before the last one, in training.
        frozen: names of frozen layers; their BatchNorm uses and keeps the running statistics.
        dtype: of the computation; parameters, statistics and logits are float32.

    Convolutions are called conv2d_1, conv2d_2, … and their BatchNorms batch_normalization_1, … in the order in which
    the source creates them; the weight files number them the same way.
    """

    table: tuple[tuple[str, Chain], ...]
    num_classes: int | None = 1000
    hidden: tuple[int, ...] = ()
    relu_first: bool = False
    gamma: bool = False
    momentum: float = 0.99
    dropout: float = 0.0
    frozen: frozenset[str] = frozenset()
    dtype: DTypeLike = jnp.float32

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers in the order of Keras's `model.layers`, those without weights included."""
        table = {}
        for stage, chain in self._numbered():
            # Keras sorts by the longest way to the output, ties by creation.
            deepest_first = sorted(self._depths(chain, 0, stage), key=lambda layer: -layer[0])
            table[stage] = tuple(name for _, name in deepest_first)
        table["stem"] = ("input", *table["stem"])
        return table | head_table(self._head(), self.dropout)

    def head_layers(self) -> tuple[str, ...]:
        """The weighted layers that no ImageNet file fills."""
        return tuple(self._head())

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, start: str | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the net, or the stages after `start`.

        Args:
            images: [B, H, W, 3], 75×75 or more, preprocessed for the weight file; with `start`, that stage's output.
            train: BatchNorm uses the statistics of the batch, frozen layers excepted; dropout is on, and takes the
                random key called "dropout".

        Returns:
            (logits float32 [B, num_classes], outputs of every stage by name). Without a classifier the first is the
            last feature map, [B, 8, 8, C] for 299×299.

        Raises:
            ValueError: the images are too small, or `start` is not a stage.
        """
        if start is None:
            check_size("Inception", images, 75)
        stages: list[Stage] = [(stage, partial(self._run, chain, train)) for stage, chain in self._numbered()]
        stages += head_stages(self._head(), self.dropout, train=train, dtype=self.dtype)
        return fold(stages, images.astype(self.dtype), start)

    def _head(self) -> dict[str, int]:
        return head_widths(self.hidden, "predictions", self.num_classes)

    def _numbered(self) -> list[tuple[str, Chain]]:
        numbers = itertools.count(1)

        def number(part: Conv | Pool | Fork) -> Conv | Pool | Fork:
            if isinstance(part, Fork):
                return Fork(tuple(tuple(map(number, branch)) for branch in part.branches))
            return part._replace(number=next(numbers)) if isinstance(part, Conv) else part

        return [(stage, tuple(map(number, chain))) for stage, chain in self.table]

    def _depths(self, chain: Chain, below: int, name: str) -> Iterator[tuple[int, str]]:
        """(longest way to the end of the stage, layer) in the order of creation."""
        found: list[list[tuple[int, str]]] = []
        for part in reversed(chain):
            if isinstance(part, Conv):
                unit = [f"conv2d_{part.number}", f"batch_normalization_{part.number}"]
                if part.pooled:
                    unit.insert(0, f"{name}_pool")
                if not self.relu_first:
                    unit.append(f"activation_{part.number}")
                layers = [(below + len(unit) - i, layer) for i, layer in enumerate(unit)]
            elif isinstance(part, Pool):
                layers = [(below + 1, f"{name}_pool")]
            else:
                branches = enumerate(part.branches)
                layers = [layer for i, b in branches for layer in self._depths(b, below + 1, f"{name}_{i}")]
                layers.append((below + 1, f"{name}_concat"))
            found.append(layers)
            below = max(depth for depth, _ in layers)
        for layers in reversed(found):
            yield from layers

    def _run(self, chain: Chain, train: bool, x: jax.Array) -> jax.Array:
        for part in chain:
            if isinstance(part, Conv):
                x = self._conv_bn(x, part, train)
            elif isinstance(part, Fork):
                x = jnp.concatenate([self._run(branch, train, x) for branch in part.branches], -1)
            elif part.kind == "max":
                x = max_pool(x, (3, 3), (part.strides,) * 2, part.padding)
            else:
                x = avg_pool(x, (3, 3), (part.strides,) * 2, part.padding)
        return x

    def _conv_bn(self, x: jax.Array, part: Conv, train: bool) -> jax.Array:
        norm = batch_norm(
            f"batch_normalization_{part.number}",
            part.width,
            train=train,
            frozen=self.frozen,
            epsilon=1e-3,
            momentum=self.momentum,
            scale=self.relu_first or self.gamma,
            dtype=self.dtype,
        )
        x = conv(
            x,
            f"conv2d_{part.number}",
            part.width,
            part.kernel,
            strides=part.strides,
            padding=part.padding,
            use_bias=self.relu_first,
            norm=None if self.relu_first else norm,
            relu=True,
            mean=partial(avg_pool, window=(3, 3), padding="SAME") if part.pooled else None,
            dtype=self.dtype,
        )
        return norm(x) if self.relu_first else x


def _spec(net: partial[Inception], **row: Any) -> Spec:
    return Spec(
        net=net,
        native_size=(299, 299),
        preprocessing="tf",
        head="predictions",
        classifier=("predictions",),
        **row,
    )


def spec_v3(num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of Inception-V3 of `keras.applications`, the source of URL and hashes."""
    url = "https://storage.googleapis.com/tensorflow/keras-applications/inception_v3/inception_v3"
    return _spec(
        partial(Inception, table=tuple(v3((32, 64, 64), 192, "max").items())),
        about="keras.applications (release v0.5): convolution without bias → BatchNorm without gamma → ReLU",
        num_params=num_params,
        gmac=gmac,
        weights=published(url, md5, notop_md5),
    )


def spec_v3_v02(num_params: int, gmac: float, tf: tuple[str, str], th: tuple[str, str]) -> Spec:
    """The zoo's row of Inception-V3 of fchollet/deep-learning-models, release v0.2, the source of URL and hashes."""
    url = "https://github.com/fchollet/deep-learning-models/releases/download/v0.2/inception_v3"
    return _spec(
        partial(Inception, table=tuple(v3((32, 32, 32), 160, "avg").items()), relu_first=True),
        about="release v0.2: convolution with bias → ReLU → BatchNorm with gamma",
        num_params=num_params,
        gmac=gmac,
        weights=published(url, *tf) | published(url, *th, order="th"),
    )


def spec_v4(num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of Inception-V4 of kentsommer/keras-inceptionV4, release 2.1, the source of URL and hashes."""
    url = "https://github.com/kentsommer/keras-inceptionV4/releases/download/2.1/inception-v4"
    return _spec(
        partial(Inception, table=tuple(v4().items()), momentum=0.9997, dropout=0.2),
        about="1001 classes, of which 0 is the background; convolution without bias → BatchNorm without gamma → ReLU",
        num_classes=1001,
        num_params=num_params,
        gmac=gmac,
        weights=published(url, md5, notop_md5),
    )


def spec_v4_gamma(num_params: int, gmac: float) -> Spec:
    """The zoo's row of Inception-V4 with a gamma, as files have that the source's script trained: give their path."""
    return _spec(
        partial(Inception, table=tuple(v4().items()), gamma=True, momentum=0.9997, dropout=0.2),
        about="as inception_v4, and BatchNorm has a gamma that was trained",
        num_classes=1001,
        num_params=num_params,
        gmac=gmac,
    )
