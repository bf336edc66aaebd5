"""DenseNet-121, 161, 169 and 201 (Huang et al., 2016, arXiv:1608.06993, table 1), with and without Scale layers."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.kernels.pool import avg_pool, max_pool
from jaxft.nets.common import (
    Net,
    Scale,
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


class DenseNet(Net):
    """DenseNet-BC: bottlenecks of four times the growth, transitions that halve the channels.

    Attributes:
        depths: dense layers in each of the four blocks.
        growth: channels that each dense layer adds.
        stem_width: channels of the first convolution.
        scale: the form converted from Caffe, with BatchNorm ε 1.1e-5 and a Scale layer after each BatchNorm; else
            the form of `keras.applications`, with ε 1.001e-5.
        num_classes: width of the last layer; None stops at the last feature map.
        hidden: widths of dense ReLU layers hidden1, hidden2, … before the last layer.
        dropout: rate before each dense layer after hidden1, and before the last one, in training.
        fold_scale: leaves Scale layers out, for variables from `common.fold_scales`.
        frozen: names of frozen layers; their BatchNorm uses and keeps the running statistics.
        dtype: of the computation; parameters, statistics and logits are float32.

    Source: the paper's table 1; layer names of `keras.applications.densenet`, with `scale` of DenseNet-Keras.
    """

    depths: tuple[int, ...]
    growth: int = 32
    stem_width: int = 64
    scale: bool = False
    num_classes: int | None = 1000
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    fold_scale: bool = False
    frozen: frozenset[str] = frozenset()
    dtype: DTypeLike = jnp.float32

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers in the order of Keras's `model.layers`, those without weights included."""
        table: dict[str, tuple[str, ...]] = {
            "conv1": ("input", "conv1_pad", self._stem, *self._norm("conv1"), "conv1_relu"),
            "pool1": ("pool1_pad", "pool1"),
        }
        for s, depth in enumerate(self.depths, 2):
            for b in range(1, depth + 1):
                stage, (first, second), (conv1, conv2) = self._dense(s, b)
                # The script of the Scale files pads in a layer of its own.
                padding = (f"{conv2}_pad",) if self.scale else ()
                table[stage] = (
                    *(*self._norm(first), f"{first}_relu", conv1),
                    *(*self._norm(second), f"{second}_relu", *padding, conv2, f"{stage}_concat"),
                )
            stage, norm, transition = self._transition(s)
            rest = (transition, f"{stage}_pool") if s <= len(self.depths) else ()
            table[stage] = (*self._norm(norm), f"{stage}_relu", *rest)
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
            last feature map, [B, about H/32, W/32, C].

        Raises:
            ValueError: the images are too small, or `start` is not a stage.
        """
        if start is None:
            check_size("DenseNet", images, 32)

        epsilon = 1.1e-5 if self.scale else 1.001e-5
        norm = partial(batch_norm, train=train, frozen=self.frozen, epsilon=epsilon, dtype=self.dtype)
        convolve = partial(conv, use_bias=False, dtype=self.dtype)

        def norm_relu(x: jax.Array, stem: str) -> jax.Array:
            name, *scale = self._norm(stem)
            x = norm(name, x.shape[-1])(x, relu=not scale)
            return nn.relu(Scale(self.dtype, name=scale[0])(x)) if scale else x

        def conv_norm_relu(
            x: jax.Array, name: str, stem: str, width: int, kernel: tuple[int, int], **options: Any
        ) -> jax.Array:
            bn, *scale = self._norm(stem)
            after = {"norm": norm(bn, width), "scale": scale[0] if scale else None, "relu": True}
            return convolve(x, name, width, kernel, **after, **options)

        def stem(x: jax.Array) -> jax.Array:
            padding = ((3, 3), (3, 3))
            return conv_norm_relu(x, self._stem, "conv1", self.stem_width, (7, 7), strides=2, padding=padding)

        def dense(x: jax.Array, s: int, b: int) -> jax.Array:
            _, norms, convs = self._dense(s, b)
            y = conv_norm_relu(norm_relu(x, norms[0]), convs[0], norms[1], 4 * self.growth, (1, 1))
            return jnp.concatenate([x, convolve(y, convs[1], self.growth, (3, 3))], -1)

        def transition(x: jax.Array, s: int) -> jax.Array:
            _, stem, name = self._transition(s)
            x = norm_relu(x, stem)
            if s > len(self.depths):
                return x
            # In the source the mean comes after the convolution. The two commute, and a quarter of the pixels is left.
            return convolve(avg_pool(x, (2, 2), (2, 2)), name, x.shape[-1] // 2, (1, 1))

        stages: list[Stage] = [
            ("conv1", stem),
            ("pool1", lambda x: max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))),
        ]
        for s, depth in enumerate(self.depths, 2):
            stages += [(self._dense(s, b)[0], partial(dense, s=s, b=b)) for b in range(1, depth + 1)]
            stages.append((self._transition(s)[0], partial(transition, s=s)))
        stages += head_stages(self._head(), self.dropout, train=train, dtype=self.dtype)
        return fold(stages, images.astype(self.dtype), start)

    def _head(self) -> dict[str, int]:
        return head_widths(self.hidden, "fc6" if self.scale else "predictions", self.num_classes)

    @property
    def _stem(self) -> str:
        return "conv1" if self.scale else "conv1_conv"

    def _norm(self, name: str) -> tuple[str, ...]:
        """Names of a BatchNorm and its Scale."""
        if not self.scale:
            return (name if name == "bn" else f"{name}_bn",)
        return (f"{name}_bn",) if self.fold_scale else (f"{name}_bn", f"{name}_scale")

    def _dense(self, s: int, b: int) -> tuple[str, tuple[str, str], tuple[str, str]]:
        """(stage, stems of its BatchNorms' names, names of its convolutions) of dense layer b of block s."""
        if self.scale:
            first, second = f"conv{s}_{b}_x1", f"conv{s}_{b}_x2"
            return f"conv{s}_{b}", (first, second), (first, second)
        stage = f"conv{s}_block{b}"
        return stage, (f"{stage}_0", f"{stage}_1"), (f"{stage}_1_conv", f"{stage}_2_conv")

    def _transition(self, s: int) -> tuple[str, str, str]:
        """(stage, stem of its BatchNorm's name, name of its convolution) after block s; the last has no convolution."""
        if self.scale:
            return f"conv{s}_blk", f"conv{s}_blk", f"conv{s}_blk"
        stage = "bn" if s > len(self.depths) else f"pool{s}"
        return stage, stage, f"{stage}_conv"


def spec(depths: tuple[int, ...], num_params: int, gmac: float, md5: str, notop_md5: str) -> Spec:
    """The zoo's row of a DenseNet of `keras.applications`, the source of URL and hashes."""
    net = f"densenet{2 * sum(depths) + 5}"
    url = f"https://storage.googleapis.com/tensorflow/keras-applications/densenet/{net}"
    return Spec(
        net=partial(DenseNet, depths=depths),
        about=f"{2 * sum(depths) + 5} layers, keras.applications: BatchNorm ε 1.001e-5, no Scale layers",
        native_size=(224, 224),
        preprocessing="torch",
        head="predictions",
        classifier=("predictions",),
        num_params=num_params,
        gmac=gmac,
        weights=published(url, md5, notop_md5),
        aliases={"fc1000": "predictions"},
    )


def spec_scale(depths: tuple[int, ...], num_params: int, gmac: float, growth: int = 32, stem_width: int = 64) -> Spec:
    """The zoo's row of a DenseNet with Scale layers; its files have no official address, so give their path."""
    return Spec(
        net=partial(DenseNet, depths=depths, growth=growth, stem_width=stem_width, scale=True),
        about=f"{2 * sum(depths) + 5} layers, from Caffe: BatchNorm ε 1.1e-5 and a Scale layer",
        native_size=(224, 224),
        preprocessing="caffe_017",
        head="fc6",
        classifier=("fc6",),
        num_params=num_params,
        gmac=gmac,
    )
