"""ResNet-50, 101 and 152 (He et al., 2015, arXiv:1512.03385, table 1), in the three forms that Keras weights have."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.kernels.pool import max_pool
from jaxft.nets.common import (
    Net,
    Padding,
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

WIDTHS = (64, 128, 256, 512)  # of the 3×3 convolutions of stages 2 to 5; blocks end four times as wide


@dataclasses.dataclass(frozen=True)
class Variant:
    """How one form of the weights differs from the others.

    `epsilon` is BatchNorm's. `scale` adds a Scale layer after each BatchNorm. `pool_padding` is the padding of pool1.
    `names` is `blocks` (conv2_block1_1_conv), `letters` (res2a_branch2a) or `numbers` (res3b1_branch2a).
    `shortcut_first`: in Keras's order of layers a block's shortcut comes before its last convolution.
    """

    bias: bool
    epsilon: float
    scale: bool
    pool_padding: int
    names: str
    shortcut_first: bool


VARIANTS = {
    # keras.applications, since its release 1.0.7
    "keras": Variant(bias=True, epsilon=1.001e-5, scale=False, pool_padding=1, names="blocks", shortcut_first=True),
    # fchollet/deep-learning-models, release v0.2
    "v02": Variant(bias=True, epsilon=1e-3, scale=False, pool_padding=0, names="letters", shortcut_first=False),
    # Keras 2.1 to 2.2, its applications before 1.0.7
    "v21": Variant(bias=True, epsilon=1e-3, scale=False, pool_padding=1, names="letters", shortcut_first=False),
    # converted from the authors' Caffe models
    "scale": Variant(bias=False, epsilon=1.1e-5, scale=True, pool_padding=0, names="numbers", shortcut_first=False),
}


class ResNet(Net):
    """ResNet with bottleneck blocks; strides sit on the first 1×1 convolution of a block.

    Attributes:
        depths: blocks in each of the four stages.
        variant: a key of `VARIANTS`.
        num_classes: width of the last layer; None stops at the last feature map.
        hidden: widths of dense ReLU layers hidden1, hidden2, … before the last layer.
        dropout: rate before each dense layer after hidden1, and before the last one, in training.
        fold_scale: leaves Scale layers out, for variables from `common.fold_scales`.
        frozen: names of frozen layers; their BatchNorm uses and keeps the running statistics.
        dtype: of the computation; parameters, statistics and logits are float32.

    Source: the paper's table 1; layer names of `keras.applications.resnet`, or of the older file that `variant` names.
    """

    depths: tuple[int, ...]
    variant: str = "keras"
    num_classes: int | None = 1000
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    fold_scale: bool = False
    frozen: frozenset[str] = frozenset()
    dtype: DTypeLike = jnp.float32

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers in the order of Keras's `model.layers`, those without weights included."""
        form = VARIANTS[self.variant]
        stem = self._unit("", "")
        table = {
            "conv1": ("input", "conv1_pad", *stem, "conv1_relu"),
            "pool1": (*["pool1_pad"] * form.pool_padding, "pool1_pool"),
        }
        for stage, block, _, strides in self._blocks():
            units = [self._unit(block, branch) for branch in ("1", "2a", "2b", "2c")]
            padding = [f"{block}_pad"] * form.scale  # the script of the Scale files pads in a layer of its own
            main = [*units[1], f"{block}_relu_a", *padding, *units[2], f"{block}_relu_b"]
            last = [units[3]]
            if strides:
                last.insert(0 if form.shortcut_first else 1, units[0])
            side_by_side = [layer for pair in zip(*last, strict=True) for layer in pair]
            table[stage] = (*main, *side_by_side, f"{block}_add", f"{block}_out")
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
            images: [B, H, W, 3], 32×32 or more, preprocessed for the weight file; with `start`, that stage's output.
            train: BatchNorm uses the statistics of the batch, frozen layers excepted; dropout is on, and takes the
                random key called "dropout".

        Returns:
            (logits float32 [B, num_classes], outputs of every stage by name). Without a classifier the first is the
            last feature map, [B, ⌈H/32⌉, ⌈W/32⌉, 2048], or one less a side where pool1 is not padded.

        Raises:
            ValueError: the images are too small, or `start` is not a stage.
        """
        if start is None:
            check_size("ResNet", images, 32)
        pool_padding = VARIANTS[self.variant].pool_padding
        stages: list[Stage] = [
            ("conv1", lambda x: self._conv_bn(x, "", "", 64, 7, train, strides=2, padding=((3, 3), (3, 3)))),
            # Keras pads with zeros. After a ReLU that is the same as padding that no maximum takes.
            ("pool1", lambda x: max_pool(x, (3, 3), (2, 2), padding=((pool_padding, pool_padding),) * 2)),
        ]
        for stage, block, width, strides in self._blocks():
            stages.append((stage, partial(self._block, block=block, width=width, strides=strides, train=train)))
        stages += head_stages(self._head(), self.dropout, train=train, dtype=self.dtype)
        return fold(stages, images.astype(self.dtype), start)

    def _head(self) -> dict[str, int]:
        last = "predictions" if VARIANTS[self.variant].names == "blocks" else "fc1000"
        return head_widths(self.hidden, last, self.num_classes)

    def _blocks(self) -> Iterator[tuple[str, str, int, int]]:
        """(stage, prefix of its layers, width, strides) of each block; strides 0: a shortcut without convolution."""
        names = VARIANTS[self.variant].names
        for s, (depth, width) in enumerate(zip(self.depths, WIDTHS, strict=True), 2):
            for b in range(depth):
                numbered = names == "numbers" and s in (3, 4) and b
                letter = f"b{b}" if numbered else chr(ord("a") + b)
                block = f"conv{s}_block{b + 1}" if names == "blocks" else f"{s}{letter}"
                yield block if names == "blocks" else f"res{block}", block, width, 0 if b else 1 if s == 2 else 2

    def _unit(self, block: str, branch: str) -> tuple[str, ...]:
        """Names of a convolution, its BatchNorm and its Scale; branch 1 is the shortcut, no block is the stem."""
        form = VARIANTS[self.variant]
        if form.names == "blocks":
            i = {"": "", "1": "_0", "2a": "_1", "2b": "_2", "2c": "_3"}[branch]
            return (f"{block or 'conv1'}{i}_conv", f"{block or 'conv1'}{i}_bn")
        at = f"{block}_branch{branch}" if block else "_conv1"
        scale = (f"scale{at}",) if form.scale and not self.fold_scale else ()
        return (f"res{at}" if block else "conv1", f"bn{at}", *scale)

    def _conv_bn(
        self,
        x: jax.Array,
        block: str,
        branch: str,
        width: int,
        size: int,
        train: bool,
        strides: int = 1,
        padding: Padding = "SAME",
        relu: bool = True,
    ) -> jax.Array:
        form = VARIANTS[self.variant]
        name, norm, *scale = self._unit(block, branch)
        return conv(
            x,
            name,
            width,
            (size, size),
            strides=strides,
            padding=padding,
            use_bias=form.bias,
            norm=batch_norm(norm, width, train=train, frozen=self.frozen, epsilon=form.epsilon, dtype=self.dtype),
            scale=scale[0] if scale else None,
            relu=relu,
            dtype=self.dtype,
        )

    def _block(self, x: jax.Array, block: str, width: int, strides: int, train: bool) -> jax.Array:
        shortcut = self._conv_bn(x, block, "1", 4 * width, 1, train, strides, relu=False) if strides else x
        x = self._conv_bn(x, block, "2a", width, 1, train, strides or 1)
        x = self._conv_bn(x, block, "2b", width, 3, train)
        x = self._conv_bn(x, block, "2c", 4 * width, 1, train, relu=False)
        return nn.relu(x + shortcut)


def spec(depths: tuple[int, ...], num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of a ResNet of `keras.applications`, the source of URL and hashes."""
    net = f"resnet{3 * sum(depths) + 2}"
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/resnet/{net}"
    return Spec(
        net=partial(ResNet, depths=depths),
        about=f"{3 * sum(depths) + 2} layers, keras.applications: pool1 padded (56×56), BatchNorm ε 1.001e-5",
        native_size=(224, 224),
        preprocessing="caffe",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=published(url, md5, notop_md5),
        aliases={"probs": "predictions"},
    )


def spec_v02(num_params: int, gmac: float, tf: tuple[str, str], th: tuple[str, str]) -> Spec:
    """The zoo's row of ResNet-50 of fchollet/deep-learning-models, release v0.2, the source of URL and hashes."""
    url = "https://github.com/fchollet/deep-learning-models/releases/download/v0.2/resnet50"
    return _spec_letters(
        (3, 4, 6, 3),
        "v02",
        about="50 layers, release v0.2: pool1 not padded (55×55), BatchNorm ε 1e-3",
        num_params=num_params,
        gmac=gmac,
        weights=published(url, *tf) | published(url, *th, order="th"),
        lacks=("pool1_pad",),
    )


def spec_v21(num_params: int, gmac: float) -> Spec:
    """The zoo's row of ResNet-50 of Keras 2.1 and 2.2: give the path of a file that they trained."""
    about = "50 layers, Keras 2.1 to 2.2: as v0.2, and pool1 padded (56×56)"
    return _spec_letters((3, 4, 6, 3), "v21", about=about, num_params=num_params, gmac=gmac, holds=("pool1_pad",))


def spec_scale(depths: tuple[int, ...], num_params: int, gmac: float) -> Spec:
    """The zoo's row of a ResNet with Scale layers; its files have no official address, so give their path."""
    about = f"{3 * sum(depths) + 2} layers, from Caffe: BatchNorm ε 1.1e-5 and a Scale layer, no bias"
    return _spec_letters(depths, "scale", about=about, num_params=num_params, gmac=gmac)


def _spec_letters(depths: tuple[int, ...], variant: str, **row: Any) -> Spec:
    """The row of a form whose layers have the names of the authors' Caffe model."""
    return Spec(
        net=partial(ResNet, depths=depths, variant=variant),
        native_size=(224, 224),
        preprocessing="caffe",
        head="fc1000",
        classifier=("fc1000",),
        **row,
    )
