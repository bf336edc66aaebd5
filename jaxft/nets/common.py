"""What two or more families share."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxft.checks import is_int, is_real
from jaxft.kernels import of_cpu
from jaxft.kernels.conv import convolve
from jaxft.kernels.dense import dot_general
from jaxft.kernels.norm import normalise

Activation = Callable[[jax.Array], jax.Array]
Stage = tuple[str, Callable[[jax.Array], jax.Array]]
Padding = str | Sequence[tuple[int, int]]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # that nets compute in


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A published Keras weight file.

    `hash` is the one that is published beside the URL, hexadecimal MD5 or SHA-256. `classifier` says whether the file
    holds the layers after the last feature map. `order` is the ordering of its kernels, a key of `port_weights.ORDERS`.
    """

    url: str
    hash: str
    classifier: bool
    order: str = "tf"

    @property
    def known_hash(self) -> str:
        """ "md5:…" or "sha256:…", by the length."""
        return f"{'sha256' if len(self.hash) == 64 else 'md5'}:{self.hash}"


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row of the zoo.

    Attributes:
        net: builds the module from `num_classes` and options.
        about: how this net differs from its siblings, in one line.
        native_size: (height, width) in pixels that the weights were trained at.
        preprocessing: name of the function of `jaxft.preprocess` that every weight file of this net expects.
        head: the layer that a new task replaces.
        classifier: the weighted layers, head included, that a file without a classifier lacks.
        num_classes: of the published weights.
        num_params: with that classifier, running statistics included, as Keras counts them.
        gmac: 10⁹ multiply-accumulates of convolutions and dense layers, for one image of the native size. In a DenseNet
            the convolution of a transition counts after its mean; in the source it comes before.
        weights: `"imagenet"` (with classifier) and `"imagenet-notop"` → published files, with `"-th"` in Theano's form.
        aliases: other names that weight files use → layer names of the net.
        flattened: dense layer that follows a Flatten → (height, width) of the map that is flattened.
        convolved: dense layers of the head that Keras keeps as 1×1 convolutions.
        holds, lacks: layers without weights that a file of this net lists, or does not, if it lists such layers.
    """

    net: Callable[..., "Net"]
    about: str
    native_size: tuple[int, int]
    preprocessing: str
    head: str
    classifier: tuple[str, ...]
    num_params: int
    gmac: float
    num_classes: int = 1000
    weights: Mapping[str, WeightFile] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flattened: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    convolved: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


def published(url: str, md5: str, notop_md5: str, order: str = "tf") -> dict[str, WeightFile]:
    """The files with and without classifier, named as Keras names them: NET_weights_ORDERING.h5 and …_notop.h5."""
    stem = f"{url}_weights_{order}_dim_ordering_{order}_kernels"
    return weight_files((f"{stem}.h5", md5), (f"{stem}_notop.h5", notop_md5), order)


def weight_files(whole: tuple[str, str], notop: tuple[str, str], order: str = "tf") -> dict[str, WeightFile]:
    """The published files with classifier and without, each as (URL, hash), for a row of the zoo."""
    suffix = "" if order == "tf" else f"-{order}"
    return {
        f"imagenet{suffix}": WeightFile(*whole, True, order),
        f"imagenet-notop{suffix}": WeightFile(*notop, False, order),
    }


def rounded(width: float, divisor: int = 8) -> int:
    """The width as a multiple of `divisor`, at least one of it and no more than a tenth too small."""
    near = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * width else near


IMAGENET_STD = (0.229, 0.224, 0.225)  # of red, green and blue, of images in 0 to 1


def of_channels(rgb: Sequence[float], count: int) -> list[float]:
    """The constants of red, green and blue for another number of channels."""
    return [sum(rgb) / 3] if count == 1 else [rgb[i % 3] for i in range(count)]


def fold(stages: Sequence[Stage], x: jax.Array, start: str | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs `stages` in order; returns the last output and every output by stage name.

    With `start`, `x` is the output of the stage of that name, and only the stages after it run.

    Raises:
        ValueError: no stage is called `start`.
    """
    out = {}
    names = [name for name, _ in stages]
    if start is not None:
        if start not in names:
            raise ValueError(f"start={start!r} is not a stage of this net; its stages are {', '.join(names)}")
        out[start] = x
        stages = stages[names.index(start) + 1 :]
    for name, stage in stages:
        x = out[name] = stage(x)
    return x, out


def check_size(net: str, images: jax.Array, smallest: int) -> None:
    """Raises ValueError for images [B, H, W, 3] with a side below `smallest` pixels."""
    height, width = images.shape[1:3]
    if min(height, width) < smallest:
        raise ValueError(f"{net} needs images of at least {smallest}×{smallest} pixels, not {height}×{width}")


class Net(nn.Module):
    """A net of the zoo, which checks the fields that all have when it is made.

    Raises:
        ValueError: `num_classes`, `hidden`, `dropout`, `frozen` or `dtype` is not what the classes document.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "dtype", DTYPES[dtype_name(self.dtype)])  # one form, so that equal nets are equal
        super().__post_init__()

    def keras_kinds(self) -> dict[str, str]:
        """Layer with weights → its Keras class in snake case, where the shapes of the weights may not tell."""
        return {}

    def keras_models(self) -> dict[str, str]:
        """Layer → the Keras model inside of the model that holds it, where there is one."""
        return {}


def check_fields(net: Any) -> None:
    """Raises ValueError for a field that every net has and that is not what the classes document."""

    def is_width(value: Any) -> bool:
        return is_int(value) and int(value) > 0

    def is_rate(value: Any) -> bool:
        return is_real(value) and 0 <= float(value) < 1

    if net.num_classes is not None and not is_width(net.num_classes):
        raise ValueError(
            f"num_classes={net.num_classes!r} is not a positive integer; None stops at the last feature map"
        )
    if not isinstance(net.hidden, tuple) or not all(map(is_width, net.hidden)):
        raise ValueError(
            f"hidden={net.hidden!r} is not a tuple of positive integers, the widths of dense layers before the last; "
            "say hidden=(256,) for one, () for none"
        )
    usual = type(net).dropout
    many = isinstance(usual, tuple)
    rates = net.dropout if many and isinstance(net.dropout, tuple) else (net.dropout,)
    if len(rates) != (len(usual) if many else 1) or not all(map(is_rate, rates)):
        wanted = f"tuple of {len(usual)} rates" if many else "rate"
        raise ValueError(
            f"dropout={net.dropout!r} is not a {wanted} from 0 to below 1, such as {usual if many else 0.5}"
        )
    if isinstance(net.frozen, str):
        raise ValueError(
            f"frozen={net.frozen!r} is a specification, where a net takes a frozenset of layer names: "
            f"masking.frozen_layers(net, {net.frozen!r}, params) gives that, net.clone(frozen=…) sets it"
        )
    if not isinstance(net.frozen, frozenset):
        raise ValueError(f"frozen={net.frozen!r} is a {type(net.frozen).__name__}, expected a frozenset of layer names")
    dtype = dtype_name(net.dtype)
    if dtype == "float16":
        raise ValueError("dtype=float16: gradients underflow in it without loss scaling; use bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={net.dtype!r} is not one that nets compute in; use {' or '.join(DTYPES)}")


def dtype_name(dtype: Any) -> str:
    """The name of a dtype in any form, or what was given if it is not a dtype."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)


class BatchNorm(nn.Module):
    """Keras's BatchNormalization over the last axis: biased variance, in the running one too.

    Attributes:
        features: C, the length of that axis.
        inference: normalise by the running statistics and leave them.
        momentum, epsilon: as Keras's.
        use_scale: whether there is a gamma.
        dtype: of the output. Statistics, parameters and arithmetic are float32. Only what a convolution does for this
            layer is in the convolution's dtype: it subtracts `offset`, or has `affine` in its kernel and bias.
    """

    features: int
    inference: bool
    momentum: float
    epsilon: float
    use_scale: bool
    dtype: DTypeLike

    def setup(self) -> None:
        shape = (self.features,)
        self.running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        self.running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        self.gamma = self.param("scale", nn.initializers.ones, shape) if self.use_scale else jnp.ones(shape)
        self.beta = self.param("bias", nn.initializers.zeros, shape)

    def affine(self, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """(factor, shift), float32 [C]: in inference x, plus a bias if given, becomes factor · x + shift."""
        factor = lax.rsqrt(self.running_var.value + self.epsilon) * self.gamma
        mean = self.running_mean.value if bias is None else self.running_mean.value - bias
        return factor, self.beta - mean * factor

    def offset(self, bias: jax.Array | None = None) -> jax.Array:
        """[C] of `dtype`: what is subtracted from the input of `of_batch`. Statistics of numbers near 0 lose no digits.

        `bias` [C] is the bias of a convolution, where the input is without it.
        """
        mean = self.running_mean.value if bias is None else self.running_mean.value - lax.stop_gradient(bias)
        return mean.astype(self.dtype)

    def of_batch(
        self, x: jax.Array, bias: jax.Array | None = None, *, less: bool = True, relu: bool = False
    ) -> jax.Array:
        """Normalises x [..., C] by the batch, maybe through a ReLU, and moves the running statistics.

        `less` says that x is less offset(bias) already. A mean takes a bias out again: the bias has no gradient, and
        nothing but the running mean depends on it.
        """
        offset = self.offset(bias)
        y, mean, var = normalise(x, None if less else offset, self.gamma, self.beta, self.epsilon, relu)  # type: ignore[misc]
        mean = mean + offset if less else mean
        mean = mean if bias is None else mean + lax.stop_gradient(bias)
        if not self.is_initializing():
            for running, batch in ((self.running_mean, mean), (self.running_var, var)):
                running.value = self.momentum * running.value + (1 - self.momentum) * batch
        return y.astype(self.dtype)

    def __call__(self, x: jax.Array, *, relu: bool = False) -> jax.Array:
        """x [..., C] normalised, maybe through a ReLU."""
        if not self.inference:
            return self.of_batch(x, less=False, relu=relu)
        y = (x - self.running_mean.value) * self.affine()[0] + self.beta
        return (nn.relu(y) if relu else y).astype(self.dtype)


class Conv(nn.Module):
    """A convolution with Keras's initializer.

    Attributes:
        features, kernel_size, strides, padding: as in `flax.linen.Conv`, with one stride for both axes.
        use_bias: whether there is a bias.
        relu: whether a ReLU follows, after the BatchNorm if there is one.
        mean: for a 1×1 convolution, a mean over windows that comes before it. The two commute, so the mean is taken
            after the convolution, where there are fewer channels.
        dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: Padding = "SAME"
    use_bias: bool = True
    relu: bool = False
    mean: Callable[[jax.Array], jax.Array] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, norm: BatchNorm | None = None) -> jax.Array:
        """x [B, H, W, C] through the convolution and `norm`, which in inference is part of the convolution."""
        kernel_shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), kernel_shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        of_batch = norm is not None and not norm.inference
        if norm is None:
            factor, shift = None, bias
        else:
            factor, shift = (None, -norm.offset(bias)) if of_batch else norm.affine(bias)
        at_once = not of_batch and self.mean is None  # a ReLU follows the convolution itself
        options = {"strides": self.strides, "padding": self.padding, "relu": self.relu and at_once}
        x = convolve(x.astype(self.dtype), kernel, shift, factor=factor, **options)
        x = x if self.mean is None else self.mean(x)
        if norm is not None and of_batch:
            return norm.of_batch(x, bias, relu=self.relu)
        return nn.relu(x) if self.relu and not at_once else x


def conv(
    x: jax.Array,
    name: str,
    width: int,
    kernel: tuple[int, int],
    *,
    dtype: DTypeLike,
    norm: BatchNorm | None = None,
    scale: str | None = None,
    relu: bool = False,
    **options: Any,
) -> jax.Array:
    """A convolution, its BatchNorm, the Scale of that name and a ReLU; to be called inside a compact module.

    `options` are other fields of `Conv`.
    """
    x = Conv(width, kernel, relu=relu and not scale, dtype=dtype, name=name, **options)(x, norm)
    if scale is None:
        return x
    x = Scale(dtype, name=scale)(x)
    return nn.relu(x) if relu else x


def batch_norm(
    name: str,
    width: int,
    *,
    train: bool,
    frozen: Collection[str],
    epsilon: float,
    momentum: float = 0.99,
    scale: bool = True,
    dtype: DTypeLike,
) -> BatchNorm:
    """A BatchNorm, in inference mode where its name is frozen; to be called inside a compact module."""
    return BatchNorm(width, not train or name in frozen, momentum, epsilon, scale, dtype, name=name)


class Scale(nn.Module):
    """x · scale + bias for each channel: Caffe, and weight files from Caffe, keep it apart from the normalisation."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return x * scale.astype(self.dtype) + bias.astype(self.dtype)


def dense(x: jax.Array, name: str, width: int, dtype: DTypeLike) -> jax.Array:
    """A dense layer with Keras's initializer: x [B, C] → [B, width] of `dtype`; to be called inside a compact module.

    On a CPU it computes in float32, whatever the dtype: what takes time is to read the kernel, and to round it first
    would be to read it twice.
    """
    kernel_init, computed = nn.initializers.glorot_uniform(), jnp.float32 if of_cpu() else dtype
    layer = nn.Dense(width, kernel_init=kernel_init, dtype=computed, dot_general=dot_general, name=name)
    return layer(x).astype(dtype)


def head_widths(hidden: tuple[int, ...], last: str, num_classes: int | None) -> dict[str, int]:
    """Dense layer → width: hidden1, hidden2, … and the one called `last`; none where `num_classes` is None."""
    if num_classes is None:
        return {}
    return {**{f"hidden{i}": width for i, width in enumerate(hidden, 1)}, last: num_classes}


def head_table(widths: Mapping[str, int], dropout: float, *, pooled: bool = True) -> dict[str, tuple[str, ...]]:
    """Stage → its layers, of the head that `head_stages` runs with the same arguments."""
    if not widths:
        return {}
    table: dict[str, tuple[str, ...]] = {"avg_pool": ("avg_pool",)} if pooled else {}
    for name, rate in _rates(widths, dropout).items():
        flatten = () if table or pooled else ("flatten",)
        table[name] = (*flatten, *([f"{name}_dropout"] if rate else []), name)
    return table


def head_stages(
    widths: Mapping[str, int],
    dropout: float,
    *,
    train: bool,
    dtype: DTypeLike,
    pooled: bool = True,
    functions: Mapping[str, Activation] = MappingProxyType({}),
) -> list[Stage]:
    """Global average pooling and dense layers, a stage each, with ReLU after all but the last: float32 logits.

    Args:
        widths: dense layer → width, in order, as from `head_widths`.
        dropout: rate in front of each dense layer after the first, and of the last one. It is not after a layer, so
            that the output of every stage is deterministic.
        train: dropout is on.
        dtype: of the computation of all layers but the last.
        pooled: False flattens the map in place of the pooling.
        functions: dense layer → what comes after it in place of ReLU.
    """

    def layer(x: jax.Array, name: str, rate: float) -> jax.Array:
        x = dropped(x.reshape(x.shape[0], -1), name, rate, train)
        last = name == list(widths)[-1]
        x = dense(x, name, widths[name], jnp.float32 if last else dtype)
        return x if last else functions.get(name, nn.relu)(x)

    pool: list[Stage] = [("avg_pool", lambda x: x.mean((1, 2)))] if widths and pooled else []
    return [*pool, *((name, partial(layer, name=name, rate=rate)) for name, rate in _rates(widths, dropout).items())]


def dropped(x: jax.Array, name: str, rate: float, train: bool) -> jax.Array:
    """Dropout of that rate in front of the layer called `name`; to be called inside a compact module."""
    return nn.Dropout(rate, deterministic=not train, name=f"{name}_dropout")(x) if rate else x


def _rates(widths: Mapping[str, int], dropout: float) -> dict[str, float]:
    last = len(widths) - 1
    return {name: dropout if i or i == last else 0.0 for i, name in enumerate(widths)}


def fold_scales(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a net with Scale layers → variables of the same net with `fold_scale=True`.

    Each Scale is multiplied into the BatchNorm before it. In inference the net computes the same up to rounding.
    """
    params = dict(variables["params"])
    for layer in [layer for layer in params if "scale" in layer]:
        scale, norm = params.pop(layer), layer.replace("scale", "bn")
        params[norm] = {
            "scale": params[norm]["scale"] * scale["scale"],
            "bias": params[norm]["bias"] * scale["scale"] + scale["bias"],
        }
    return {**variables, "params": params}
