"""GoogLeNet (Szegedy et al., 2014, arXiv:1409.4842, table 1), as converted from the BVLC Caffe model."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.kernels.pool import avg_pool, max_pool
from jaxft.nets.common import (
    Net,
    Padding,
    Spec,
    Stage,
    check_size,
    conv,
    dense,
    dropped,
    fold,
    head_stages,
    head_table,
    head_widths,
)

# Module → widths of 1x1, 3x3_reduce, 3x3, 5x5_reduce, 5x5, pool_proj.
MODULES = {
    "inception_3a": (64, 96, 128, 16, 32, 32),
    "inception_3b": (128, 128, 192, 32, 96, 64),
    "inception_4a": (192, 96, 208, 16, 48, 64),
    "inception_4b": (160, 112, 224, 24, 64, 64),
    "inception_4c": (128, 128, 256, 24, 64, 64),
    "inception_4d": (112, 144, 288, 32, 64, 64),
    "inception_4e": (256, 160, 320, 32, 128, 128),
    "inception_5a": (256, 160, 320, 32, 128, 128),
    "inception_5b": (384, 192, 384, 48, 128, 128),
}
POOLED = {"inception_3b": "pool3", "inception_4e": "pool4"}  # module → the pooling after it
AUXILIARY = {"loss1": "inception_4a", "loss2": "inception_4d"}  # auxiliary head → the stage that it reads
HEAD_STAGES = {"loss3_classifier": "loss3"}  # layer → stage, where their names differ
FC_WIDTH = 1024
FLATTENED = (4, 4)  # the map after the average pooling of an auxiliary head


class GoogLeNet(Net):
    """GoogLeNet with its two auxiliary heads, which count in training and in prediction.

    Attributes:
        num_classes: width of the three last layers; None stops at the last feature map.
        auxiliary: False leaves the auxiliary heads out, and takes any input of 32×32 or more.
        hidden: widths of dense ReLU layers hidden1, hidden2, … before the last layer of loss3.
        dropout: rates before the classifiers of loss1, loss2 and loss3 in training, and before hidden2, hidden3, … as
            before that of loss3.
        frozen: names of frozen layers; GoogLeNet has no BatchNorm, so nothing of its own depends on it.
        dtype: of the computation; parameters and logits are float32.

    Source: the paper's table 1; layer names are those of the Caffe model with _ for /, which Keras 3 forbids.
    """

    num_classes: int | None = 1000
    auxiliary: bool = True
    hidden: tuple[int, ...] = ()
    dropout: tuple[float, float, float] = (0.7, 0.7, 0.4)
    frozen: frozenset[str] = frozenset()
    dtype: DTypeLike = jnp.float32

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers; an auxiliary head follows the stage that it reads: no cut lies between the two."""
        table: dict[str, tuple[str, ...]] = {
            "conv1": ("input", "conv1_pad", "conv1_7x7_s2", "pool1_pad", "pool1_3x3_s2", "pool1_norm1"),
            "conv2": ("conv2_3x3_reduce", "conv2_3x3", "conv2_norm2", "pool2_pad", "pool2_3x3_s2"),
        }
        heads = {stage: head for head, stage in AUXILIARY.items()} if self._has_auxiliary else {}
        for module in MODULES:
            parts = ("3x3_reduce", "5x5_reduce", "pool", "1x1", "3x3", "5x5", "pool_proj", "output")
            table[module] = tuple(f"{module}_{part}" for part in parts)
            if pool := POOLED.get(module):
                table[pool] = (f"{pool}_pad", pool)
            if head := heads.get(module):
                parts = ("ave_pool", "conv", "flatten", "fc", "classifier_dropout", "classifier")
                table[head] = tuple(f"{head}_{part}" for part in parts)
        last = head_table(self._head(), self.dropout[2])
        return table | {HEAD_STAGES.get(stage, stage): layers for stage, layers in last.items()}

    def keras_layers(self) -> tuple[str, ...]:
        """All layers in the order of Keras's `model.layers`: by the longest way to an output, the longest first."""
        heads = [layers for stage, layers in self.layers().items() if stage in AUXILIARY]
        trunk = [layer for stage, layers in self.layers().items() if stage not in AUXILIARY for layer in layers]
        first = trunk.index("inception_5b_1x1")
        convs, last = trunk[first : first + 4], trunk[first + 4 :]  # of the last module, which are side by side
        left = dict.fromkeys(convs, len(last))
        for layers in (*heads, last):
            left |= {layer: len(layers) - i for i, layer in enumerate(layers, 1)}
        return (*trunk[:first], *sorted([*sum(heads, ()), *convs, *last], key=lambda layer: -left[layer]))

    def head_layers(self) -> tuple[str, ...]:
        """The weighted layers that no ImageNet file fills."""
        if self.num_classes is None:
            return ()
        heads = AUXILIARY if self.auxiliary else ()
        return (*(f"{head}_classifier" for head in heads), *self._head())

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, start: str | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the net, or the stages after `start`.

        Args:
            images: [B, H, W, 3], preprocessed for the weight file: 223 to 270 pixels a side with auxiliary heads, 32 or
                more without; with `start`, that stage's output.
            train: dropout is on, and takes the random key called "dropout".

        Returns:
            (logits float32, outputs of every stage by name). The logits are those of loss1, loss2 and loss3 in
            training, [3, B, num_classes], whose losses are added; else [B, num_classes], the logarithm of the mean of
            the three predictions. Without auxiliary heads they are loss3's, and without a classifier the first is the
            output of inception_5b, [B, about H/32, W/32, 1024].

        Raises:
            ValueError: the images do not fit; `start` is not a stage, or follows one that an auxiliary head reads.
        """
        if start is None:
            check_size("GoogLeNet", images, 32)
        stages: list[Stage] = [("conv1", self._conv1), ("conv2", self._conv2)]
        for module, widths in MODULES.items():
            stages.append((module, partial(self._module, module, widths)))
            if pool := POOLED.get(module):
                stages.append((pool, _pool))
        if self.num_classes is None:
            return fold(stages, images.astype(self.dtype), start)
        last = head_stages(self._head(), self.dropout[2], train=train, dtype=self.dtype)
        stages += [(HEAD_STAGES.get(name, name), stage) for name, stage in last]
        logits, out = fold(stages, images.astype(self.dtype), start)
        if not self._has_auxiliary:
            return logits, out
        for (head, stage), rate in zip(AUXILIARY.items(), self.dropout, strict=False):
            if stage not in out:
                raise ValueError(
                    f"start={start!r} lies after {stage}, which the auxiliary head {head} reads; start at or before "
                    f"{AUXILIARY['loss1']}, or make the net with auxiliary=False"
                )
            out[head] = self._auxiliary_head(head, rate, train, out[stage])
        three = jnp.stack([out["loss1"], out["loss2"], out["loss3"]])
        if train:
            return three, out
        return jax.nn.logsumexp(jax.nn.log_softmax(three), axis=0) - jnp.log(3.0), out

    @property
    def _has_auxiliary(self) -> bool:
        return self.auxiliary and self.num_classes is not None

    def _relu_conv(
        self, x: jax.Array, name: str, width: int, size: int, strides: int = 1, padding: Padding = "SAME"
    ) -> jax.Array:
        return conv(x, name, width, (size, size), strides=strides, padding=padding, relu=True, dtype=self.dtype)

    def _conv1(self, x: jax.Array) -> jax.Array:
        # "SAME" would pad (2, 3).
        return local_response_norm(_pool(self._relu_conv(x, "conv1_7x7_s2", 64, 7, 2, ((3, 3), (3, 3)))))

    def _conv2(self, x: jax.Array) -> jax.Array:
        x = self._relu_conv(x, "conv2_3x3_reduce", 64, 1)
        return _pool(local_response_norm(self._relu_conv(x, "conv2_3x3", 192, 3)))

    def _module(self, name: str, widths: tuple[int, ...], x: jax.Array) -> jax.Array:
        one, reduce3, three, reduce5, five, projection = widths
        branches = (
            self._relu_conv(x, f"{name}_1x1", one, 1),
            self._relu_conv(self._relu_conv(x, f"{name}_3x3_reduce", reduce3, 1), f"{name}_3x3", three, 3),
            self._relu_conv(self._relu_conv(x, f"{name}_5x5_reduce", reduce5, 1), f"{name}_5x5", five, 5),
            self._relu_conv(max_pool(x, (3, 3), padding="SAME"), f"{name}_pool_proj", projection, 1),
        )
        return jnp.concatenate(branches, -1)

    def _auxiliary_head(self, head: str, rate: float, train: bool, x: jax.Array) -> jax.Array:
        x = self._relu_conv(avg_pool(x, (5, 5), (3, 3)), f"{head}_conv", 128, 1)
        if x.shape[1:3] != FLATTENED:
            raise ValueError(
                f"{head}_fc takes a 4×4 map, which inputs of 223 to 270 pixels a side give; these give "
                f"{x.shape[1]}×{x.shape[2]}: resize the images, or make the net with auxiliary=False"
            )
        assert self.num_classes is not None
        x = nn.relu(dense(x.reshape(x.shape[0], -1), f"{head}_fc", FC_WIDTH, self.dtype))
        name = f"{head}_classifier"
        return dense(dropped(x, name, rate, train), name, self.num_classes, jnp.float32)

    def _head(self) -> dict[str, int]:
        return head_widths(self.hidden, "loss3_classifier", self.num_classes)


def _pool(x: jax.Array) -> jax.Array:
    """3×3/2 max pooling, padded at the bottom and right; the source pads with zeros, the same after a ReLU."""
    return max_pool(x, (3, 3), (2, 2), padding=((0, 1), (0, 1)))


@jax.jit  # a name in the program, by which `jaxft.graph` knows it
def local_response_norm(x: jax.Array) -> jax.Array:
    """Local response normalisation over five channels; α is divided by their number, as in Caffe."""
    around = jax.lax.reduce_window(x * x, 0.0, jax.lax.add, (1, 1, 1, 5), (1, 1, 1, 1), "SAME")
    return x / (1.0 + 1e-4 / 5 * around) ** 0.75


def spec(num_params: int, gmac: float) -> Spec:
    """The zoo's row. Its weight file, converted from Caffe, has no address with a published hash: give its path."""
    heads = tuple(f"{head}_{layer}" for head in AUXILIARY for layer in ("conv", "fc", "classifier"))
    return Spec(
        net=GoogLeNet,
        about="from Caffe",
        native_size=(224, 224),
        preprocessing="caffe",
        head="loss3_classifier",
        classifier=(*heads, "loss3_classifier"),
        num_params=num_params,
        gmac=gmac,
        flattened={"loss1_fc": FLATTENED, "loss2_fc": FLATTENED},
    )
