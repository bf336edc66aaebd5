"""The zoo: every backbone by name."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft.nets import densenet, googlenet, inception, resnet, vgg
from jaxft.nets.common import Net, Spec, WeightFile, dtype_name
from jaxft.nets.regions import Regions

__all__ = [
    "ZOO",
    "Net",
    "Regions",
    "Spec",
    "WeightFile",
    "any_size",
    "create",
    "fields",
    "from_options",
    "head_options",
    "init",
    "options",
    "spec",
]

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


def create(name: str, num_classes: int | None = 1000, **options: Any) -> Net:
    """The Flax module of the net called `name`; `options` are fields of its class (hidden, dropout, frozen, dtype, …).

    With `regions`, rows (name, top, left, height, width) in fractions of the image, and `region_size`, (height, width)
    in pixels, it is a `Regions` of that net: one look at each region, with an output layer of its own.

    Raises:
        ValueError: no net has that name, the net has no such field, or the field does not take that value.
    """
    known = fields(name)
    if "regions" in options:
        return _with_regions(name, num_classes, **options)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            if option == "head":
                widths = options[option] if isinstance(options[option], tuple | list) else (256,)
                hint = f"for hidden layers before the last one say hidden={tuple(widths)!r}. "
            raise ValueError(f"{name} has no option {option!r}: {hint}Its options are {', '.join(known)}")
    return spec(name).net(num_classes=num_classes, **options)


def _with_regions(name: str, num_classes: Any, regions: Any, region_size: Any = None, **options: Any) -> Net:
    size = spec(name).native_size if region_size is None else region_size
    own = {field: options.pop(field) for field in ("frozen", "dtype") if field in options}
    options = any_size(name) | options
    create(name, None, **options)  # which refuses what is none
    return Regions(spec(name).net, regions, size, tuple(sorted(options.items())), num_classes, **own)


def fields(name: str) -> tuple[str, ...]:
    """The options of the net called `name`, `num_classes` included."""
    net = spec(name).net
    family: Any = net.func if isinstance(net, functools.partial) else net
    return tuple(field.name for field in dataclasses.fields(family) if field.name not in ("parent", "name"))


def any_size(name: str) -> dict[str, Any]:
    """The options with which the net called `name` takes images of another size than its native one.

    VGG gets global average pooling in place of fc1 and fc2, and GoogLeNet loses its auxiliary heads; the others take
    any size as they are.
    """
    return {option: False for option in ("fc", "auxiliary") if option in fields(name)}


def head_options(name: str, word: str) -> dict[str, Any]:
    """The options of the head that a command line calls `fc`, `gap`, `gap:4096,2048` or `fc:256`.

    `fc` keeps the fully connected layers of the weight file, which VGG alone has; `gap` takes global average pooling.
    The numbers are the widths of hidden layers before the last one.

    Raises:
        ValueError: the word is none of these, or the net has no fc layers.
    """
    kind, colon, listed = word.partition(":")
    widths = listed.split(",") if colon else []
    if kind not in ("fc", "gap") or not all(width.isdecimal() and int(width) for width in widths):
        raise ValueError(
            f"head={word!r} is not fc, gap, or one of these with widths of hidden layers, as gap:4096,2048"
        )
    hidden = {"hidden": tuple(map(int, widths))}
    if "fc" in fields(name):
        return {"fc": kind == "fc", **hidden}
    if kind == "fc":
        raise ValueError(f"head={word!r} keeps fc layers, which {name} does not have: say gap{word[2:]}")
    return hidden


def options(name: str, net: nn.Module) -> dict[str, Any]:
    """The fields in which `net` differs from `create(name)`, as JSON values: `from_options` makes the net again.

    Raises:
        ValueError: no net has that name, or `net` is of another family.
    """
    if isinstance(net, Regions):
        if net.trunk != spec(name).net:
            raise ValueError(f"this net has regions of another net than {name}")
        own = {"num_classes": net.num_classes, "dtype": net.dtype, "frozen": net.frozen}
        own |= {"regions": tuple(map(tuple, net.regions)), "region_size": net.size}
        return {field: _to_json(value) for field, value in {**dict(net.options), **own}.items()}
    default = create(name)
    if type(net) is not type(default):
        raise ValueError(f"{name} is a {type(default).__name__}, and this net is a {type(net).__name__}")
    pairs = {field: (_to_json(getattr(net, field)), _to_json(getattr(default, field))) for field in fields(name)}
    return {field: value for field, (value, usual) in pairs.items() if value != usual}


def from_options(name: str, options: Mapping[str, Any]) -> Net:
    """The net called `name` with fields as `options` gives them, from a JSON file say.

    Raises:
        ValueError: as `create`.
    """
    values = {field: _from_json(value) for field, value in options.items()}
    if isinstance(values.get("frozen"), tuple):
        values["frozen"] = frozenset(values["frozen"])
    return create(name, **values)


# A table of Inception holds these; in JSON each is {name of the class: its fields}.
PARTS = {part.__name__: part for part in (inception.Conv, inception.Pool, inception.Fork)}


def _to_json(value: Any) -> Any:
    if type(value) in PARTS.values():
        return {type(value).__name__: {field: _to_json(entry) for field, entry in value._asdict().items()}}
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return value.item() if isinstance(value, np.number) else dtype_name(value)


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return tuple(map(_from_json, value)) if isinstance(value, list) else value
    if len(value) != 1 or not set(value) <= set(PARTS):
        raise ValueError(f"{value} is not a part of a net, which is {{NAME: fields}} with {' or '.join(PARTS)} as NAME")
    ((part, values),) = value.items()
    return PARTS[part](**{field: _from_json(entry) for field, entry in values.items()})


def init(net: nn.Module, image_size: tuple[int, int], seed: int) -> dict[str, Any]:
    """Random variables of a net of the zoo: Glorot-uniform kernels, BatchNorm and Scale that change nothing.

    They have the distribution of those of `net.init`, which takes half a minute to compile for two hundred layers.
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
