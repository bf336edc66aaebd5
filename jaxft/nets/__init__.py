"""The zoo: every backbone by name."""

import difflib
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft.nets import densenet, googlenet, inception, resnet, vgg
from jaxft.nets.common import Spec, WeightFile

__all__ = ["ZOO", "Spec", "WeightFile", "any_size", "create", "init", "spec"]

# Parameters, GMAC and, of the published files, the md5 with classifier and without.
ZOO: dict[str, Spec] = {
    "vgg16": vgg.spec(
        (2, 2, 3, 3, 3), 138_357_544, 15.47, "64373286793e3c8b2b4e3219cbf3544b", "6d6bbae143d832006294945121d1f1fc"
    ),
    "vgg19": vgg.spec(
        (2, 2, 4, 4, 4), 143_667_240, 19.63, "cbe5617147190e668d6c5d5026f83318", "253f8cb515780f3b799900260a226db6"
    ),
    "googlenet": googlenet.spec(13_378_280, 1.59),
    "inception_v3": inception.spec_v3(
        23_851_784, 5.71, "9a0d58056eeedaa3f26cb7ebd46da564", "bcbd6486424b2319ff4ef7d526e38f63"
    ),
    "inception_v3_v02": inception.spec_v3_v02(
        23_660_968,
        5.62,
        tf=("fe114b3ff2ea4bf891e9353d1bbfb32f", "2f3609166de1d967d1a481094754f691"),
        th=("b3baf3070cc4bf476d43a2ea61b0ca5f", "79aaa90ab4372b4593ba3df64e142f05"),
    ),
    "inception_v4": inception.spec_v4(
        42_712_937, 12.25, "9fe79d77f793fe874470d84ca6ba4a3b", "9296b46b5971573064d12e4669110969"
    ),
    "resnet50": resnet.spec(
        (3, 4, 6, 3), 25_636_712, 3.86, "2cb95161c43110f7111970584f804107", "4d473c1dd8becc155b73f8504c6f6626"
    ),
    "resnet101": resnet.spec(
        (3, 4, 23, 3), 44_707_176, 7.57, "f1aeb4b969a6efcfb50fad2f0c20cfc5", "88cf7a10940856eca736dc7b7e228a21"
    ),
    "resnet152": resnet.spec(
        (3, 8, 36, 3), 60_419_944, 11.28, "100835be76be38e30d865e96f2aaae62", "ee4c566cf9a93f14d82f913c2dc6dd0c"
    ),
    "resnet50_v02": resnet.spec_v02(
        25_636_712,
        3.83,
        tf=("a7b3fe01876f51b976af0dea6bc144eb", "a268eb855778b3df3c7506639542a6af"),
        th=("1c1f8f5b0c8ee28fe9d950625a230e1c", "f64f049c92468c9affcd44b0976cdafe"),
    ),
    "resnet101_scale": resnet.spec_scale((3, 4, 23, 3), 44_759_848, 7.55),
    "resnet152_scale": resnet.spec_scale((3, 8, 36, 3), 60_495_656, 11.26),
    "densenet121": densenet.spec(
        (6, 12, 24, 16), 8_062_504, 2.60, "9d60b8095a5708f2dcce2bca79d332c7", "30ee3e1110167f948a6b9946edeeb738"
    ),
    "densenet169": densenet.spec(
        (6, 12, 32, 32), 14_307_880, 3.09, "d699b8f76981ab1b30698df4c175e90b", "b8c4d4c20dd625c148057b9ff1c1176b"
    ),
    "densenet201": densenet.spec(
        (6, 12, 48, 32), 20_242_984, 3.90, "1ceb130c1ea1b78c3bf6114dbdfd8807", "c13680b51ded0fb44dff2d8f86ac8bb1"
    ),
    "densenet121_scale": densenet.spec_scale((6, 12, 24, 16), 8_146_152, 2.60),
    "densenet161_scale": densenet.spec_scale((6, 12, 36, 24), 29_120_872, 7.05, growth=48, stem_width=96),
    "densenet169_scale": densenet.spec_scale((6, 12, 32, 32), 14_466_280, 3.09),
}


def spec(name: str) -> Spec:
    """The zoo's row of the net called `name`.

    Raises:
        ValueError: no net has that name; the message suggests the nearest.
    """
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no net is called {name!r}: {hint}The zoo holds {', '.join(ZOO)}")
    return ZOO[name]


def create(name: str, num_classes: int | None = 1000, **options: Any) -> nn.Module:
    """The Flax module of the net called `name`; `options` are fields of its class (head, frozen, dtype, …).

    Raises:
        ValueError: no net has that name.
    """
    return spec(name).net(num_classes=num_classes, **options)


def any_size(name: str) -> dict[str, Any]:
    """The options with which the net called `name` takes images of other than its native size.

    VGG's dense layers become global average pooling, and GoogLeNet loses its auxiliary heads; others take any size.
    """
    family = type(create(name))
    return {vgg.VGG: {"head": ()}, googlenet.GoogLeNet: {"auxiliary": False}}.get(family, {})


def init(net: nn.Module, image_size: tuple[int, int], seed: int) -> dict[str, Any]:
    """Random variables of a net of the zoo: Glorot-uniform kernels, BatchNorm and Scale that change nothing.

    The same as `net.init` in distribution; that takes half a minute to compile for two hundred layers, this none.
    """
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    total = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    draws = np.asarray(jax.random.uniform(jax.random.key(seed), (total,), minval=-1.0))
    used = 0

    def value(path: Any, leaf: Any) -> np.ndarray:
        nonlocal used
        if path[-1].key != "kernel":
            return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)
        *taps, fan_in, fan_out = leaf.shape
        limit = math.sqrt(6 / (math.prod(taps) * (fan_in + fan_out)))
        used += leaf.size
        return limit * draws[used - leaf.size : used].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(value, shapes)
