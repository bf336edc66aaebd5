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

from jaxft.nets import (
    convnext,
    densenet,
    efficientnet,
    googlenet,
    inception,
    inception_resnet_v2,
    mobilenet,
    nasnet,
    resnet,
    resnet_v2,
    vgg,
    xception,
)
from jaxft.nets.common import Net, Spec, WeightFile, dtype_name
from jaxft.nets.functional import LAYER_SCALE
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

# Parameters, GMAC and, of the published files, the hash with classifier and without.
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
    "inception_v4_gamma": inception.spec_v4_gamma(42_744_521, 12.25),
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
    "resnet50_v21": resnet.spec_v21(25_636_712, 3.86),
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
    "resnet50v2": resnet_v2.spec(
        (3, 4, 6, 3), 25_613_800, 3.48, "3ef43a0b657b3be2300d5770ece849e0", "fac2f116257151a9d068a22e544a4917"
    ),
    "resnet101v2": resnet_v2.spec(
        (3, 4, 23, 3), 44_675_560, 7.19, "6343647c601c52e1368623803854d971", "c0ed64b8031c3730f411d2eb4eea35b5"
    ),
    "resnet152v2": resnet_v2.spec(
        (3, 8, 36, 3), 60_380_648, 10.91, "a49b44d1979771252814e80f8ec446f9", "ed17cf2e0169df9d443503ef94b23b33"
    ),
    "xception": xception.spec(22_910_480, 8.36, "0a58e3b7378bc2990ea3b43d5981f1f6", "b0042744bf5b25fce3cb969f33bebb97"),
    "inception_resnet_v2": inception_resnet_v2.spec(
        55_873_736, 13.16, "e693bd0210a403b3192acc6073ad2e96", "d19885ff4a710c122648d3b5c3b684e4"
    ),
    "mobilenet": mobilenet.spec(
        4_253_864, 0.57, "03394917f9a9ea3362f46332a5b6a215", "725ccbd03d61d7ced5b5c4cd17e7d527"
    ),
    "mobilenet_v2": mobilenet.spec_v2(
        3_538_984, 0.30, "321911b381f6fd09b744356f6796ee18", "f1a68526548f7541cda07e19ba6c85f4"
    ),
    "mobilenet_v3_small": mobilenet.spec_v3(
        "small", 2_554_968, 0.06, "8768d4c2e7dee89b9d02b2d03d65d862", "d3e8ec802a04aa4fc771ee12a9a9b836"
    ),
    "mobilenet_v3_large": mobilenet.spec_v3(
        "large", 5_507_432, 0.22, "59e551e166be033d707958cf9e29a6a7", "07fb09a5933dd0c8eaafa16978110389"
    ),
    "nasnet_mobile": nasnet.spec(
        "mobile", 5_326_716, 0.56, "020fb642bf7360b370c678b08e0adf61", "1ed92395b5b598bdda52abe5c0dbfd63"
    ),
    "nasnet_large": nasnet.spec(
        "large", 88_949_818, 23.78, "11577c9a518f0070763c2b964a382f17", "d81d89dc07e6e56530c4e77faddd61b5"
    ),
    "efficientnet_b0": efficientnet.spec(
        "b0", 5_330_571, 0.39, "902e53a9f72be733fc0bcb005b3ebbac", "50bc09e76180e00e4465e1a485ddc09d"
    ),
    "efficientnet_b1": efficientnet.spec(
        "b1", 7_856_239, 0.69, "1d254153d4ab51201f1646940f018540", "74c4e6b3e1f6a1eea24c589628592432"
    ),
    "efficientnet_b2": efficientnet.spec(
        "b2", 9_177_569, 0.99, "b15cce36ff4dcbd00b6dd88e7857a6ad", "111f8e2ac8aa800a7a99e3239f7bfb39"
    ),
    "efficientnet_b3": efficientnet.spec(
        "b3", 12_320_535, 1.83, "ffd1fdc53d0ce67064dc6a9c7960ede0", "af6d107764bb5b1abb91932881670226"
    ),
    "efficientnet_b4": efficientnet.spec(
        "b4", 19_466_823, 4.39, "18c95ad55216b8f92d7e70b3a046e2fc", "ebc24e6d6c33eaebbd558eafbeedf1ba"
    ),
    "efficientnet_b5": efficientnet.spec(
        "b5", 30_562_527, 10.27, "ace28f2a6363774853a83a0b21b9421a", "38879255a25d3c92d5e44e04ae6cec6f"
    ),
    "efficientnet_b6": efficientnet.spec(
        "b6", 43_265_143, 19.07, "165f6e37dce68623721b423839de8be5", "9ecce42647a20130c1f39a5d4cb75743"
    ),
    "efficientnet_b7": efficientnet.spec(
        "b7", 66_658_687, 37.75, "8c03f828fec3ef71311cd463b6759d99", "cbcfe4450ddf6f3ad90b1b398090fe4a"
    ),
    "efficientnet_v2_b0": efficientnet.spec_v2(
        "b0", 7_200_312, 0.72, "21ecbf6da12460d5c40bb2f29ceb2188", "893217f2bb855e2983157299931e43ff"
    ),
    "efficientnet_v2_b1": efficientnet.spec_v2(
        "b1", 8_212_124, 1.20, "069f0534ff22adf035c89e2d9547a9dc", "0e80663031ca32d657f9caa404b6ec37"
    ),
    "efficientnet_v2_b2": efficientnet.spec_v2(
        "b2", 10_178_374, 1.70, "424e49f28180edbde1e94797771950a7", "1dfe2e7a5d45b6632553a8961ea609eb"
    ),
    "efficientnet_v2_b3": efficientnet.spec_v2(
        "b3", 14_467_622, 3.01, "1f1fc43bd98a6e4fd8fdfd551e02c7a0", "f6abf7b5849ac99a89b50dd3fd532856"
    ),
    "efficientnet_v2_s": efficientnet.spec_v2(
        "s", 21_612_360, 8.37, "e1d88a8495beba45748fedd0cecbe016", "af0682fb74e8c54910f2d4393339c070"
    ),
    "efficientnet_v2_m": efficientnet.spec_v2(
        "m", 54_431_388, 24.58, "a3bf6aa3276309f4fc6a34aa114c95cd", "1b8dc055df72dde80d614482840fe342"
    ),
    "efficientnet_v2_l": efficientnet.spec_v2(
        "l", 119_027_848, 56.08, "27e6d408b53c7ebc868fefa357689935", "b0b66b5c863aef5b46e8608fe1711615"
    ),
    "convnext_tiny": convnext.spec(
        "tiny",
        28_589_128,
        4.46,
        "8ae6e78ce2933352b1ef4008e6dd2f17bc40771563877d156bc6426c7cf503ff",
        "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1",
    ),
    "convnext_small": convnext.spec(
        "small",
        50_223_688,
        8.68,
        "ce1277d8f1ee5a0ef0e171469089c18f5233860ceaf9b168049cb9263fd7483c",
        "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab",
    ),
    "convnext_base": convnext.spec(
        "base",
        88_591_464,
        15.35,
        "52cbb006d3dadd03f6e095a8ca1aca47aecdd75acb4bc74bce1f5c695d0086e6",
        "40a20c5548a5e9202f69735ecc06c990e6b7c9d2de39f0361e27baeb24cb7c45",
    ),
    "convnext_large": convnext.spec(
        "large",
        197_767_336,
        34.36,
        "070c5ed9ed289581e477741d3b34beffa920db8cf590899d6d2c67fba2a198a6",
        "96f02b6f0753d4f543261bc9d09bed650f24dd6bc02ddde3066135b63d23a1cd",
    ),
    "convnext_xlarge": convnext.spec(
        "xlarge",
        350_196_968,
        60.92,
        "c1f5ccab661354fc3a79a10fa99af82f0fbf10ec65cb894a3ae0815f17a889ee",
        "de3f8a54174130e0cecdc71583354753d557fcf1f4487331558e2a16ba0cfe05",
    ),
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

    VGG gets global average pooling in place of fc1 and fc2, MobileNetV3 goes without conv_2, and GoogLeNet loses its
    auxiliary heads; the others take any size as they are.
    """
    return {option: False for option in ("fc", "auxiliary") if option in fields(name)}


def head_options(name: str, word: str) -> dict[str, Any]:
    """The options of the head that a command line calls `fc`, `gap`, `gap:4096,2048` or `fc:256`.

    `fc` keeps the dense layers that the weight file has before its last one, in VGG and MobileNetV3; `gap` takes global
    average pooling without them. The numbers are the widths of hidden layers before the last one.

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


def init(net: Net, image_size: tuple[int, int], seed: int) -> dict[str, Any]:
    """Random variables of a net of the zoo: Glorot-uniform kernels, normalisation and Scale that change nothing.

    They have the distribution of those of `net.init`, which takes half a minute to compile for two hundred layers.
    """
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    total = sum(leaf.size for path, leaf in leaves if path[-1].key.endswith("kernel"))
    draws = np.asarray(jax.random.uniform(jax.random.key(seed), (total,), minval=-1.0))
    used, kinds = 0, net.keras_kinds()

    def value(path: Any, leaf: Any) -> np.ndarray:
        nonlocal used
        if not path[-1].key.endswith("kernel"):
            start = LAYER_SCALE if kinds.get(path[-2].key) == "layer_scale" else 1.0
            return np.full(leaf.shape, start * (path[-1].key in ("scale", "var")), np.float32)
        *taps, fan_in, fan_out = leaf.shape
        limit = math.sqrt(6 / (math.prod(taps) * (fan_in + fan_out)))
        used += leaf.size
        return limit * draws[used - leaf.size : used].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(value, shapes)
