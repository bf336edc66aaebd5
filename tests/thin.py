"""The nets of the zoo cut in depth, with random variables: what the tests of all nets run."""

import jax
import numpy as np
import pytest

from jaxft import nets
from jaxft.nets import inception, mobilenet

CLASSES = 5
DEPTHS = (2, 1, 1, 1)
# Cut to those depths, every other net is one of these again.
DISTINCT = (
    *("vgg16", "googlenet", "inception_v3", "inception_v3_v02", "inception_v4", "resnet50", "resnet50_v02"),
    *("resnet101_scale", "densenet121", "densenet121_scale"),
    *("resnet50v2", "xception", "inception_resnet_v2", "mobilenet", "mobilenet_v2", "mobilenet_v3_small"),
    *("nasnet_mobile", "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny"),
)
# Every net; those that are a deeper or wider copy of another one are slow.
LATER = list(nets.ZOO)[list(nets.ZOO).index("resnet50v2") :]
COPIES = set(nets.ZOO) - set(DISTINCT)
ZOO = [pytest.param(name, marks=pytest.mark.slow) if name in COPIES else name for name in nets.ZOO]
SMALL = {
    "xception": ({"middle": 1}, 71),
    "inception_resnet_v2": ({"depths": (1, 1, 2)}, 75),
    "mobilenet": ({"alpha": 0.25}, 32),
    "mobilenet_v2": ({"alpha": 0.25}, 32),
    "mobilenet_v3_small": ({"fc": False, "blocks": mobilenet.SMALL[:5]}, 32),
    "nasnet_mobile": ({"filters": 16, "depth": 1}, 32),
    "efficientnet_b0": ({"width": 0.5, "depth": 0.5}, 32),
    "efficientnet_v2_s": ({"blocks": ((True, 1, 8, 1, 1), (True, 2, 16, 4, 2), (False, 2, 24, 4, 2))}, 32),
    "convnext_tiny": ({"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32)}, 32),
}
# Inception-V3 keeps one fork of each kind.
FORKS = ("stem", "mixed0", "mixed3", "mixed4", "mixed8", "mixed9")


def options(name):
    """(options that make the net small, image size)."""
    if name not in DISTINCT:
        return nets.any_size(name) if not name.startswith("googlenet") else {}, 32
    if name in SMALL:
        return SMALL[name]
    if name.startswith(("resnet", "densenet")):
        return {"depths": DEPTHS}, 32
    if name == "inception_v4":
        return {"table": tuple(inception.v4((1, 1, 1)).items())}, 75
    if name.startswith("inception"):
        table = dict(nets.spec(name).net.keywords["table"])
        return {"table": tuple((stage, table[stage]) for stage in FORKS)}, 75
    if name == "googlenet":
        return {}, 224
    return {"fc": False, "depths": (1, 1, 1, 1, 2)}, 32


def make(name, **fields):
    """(net, variables with random statistics, normalised images)."""
    small, size = options(name)
    net = nets.create(name, CLASSES, **{**small, **fields})
    rng = np.random.default_rng(0)
    images = rng.normal(0, 1, (3, size, size, 3)).astype(np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)

    def draw(path, leaf):
        field, shape = path[-1].key, leaf.shape
        if field.endswith("kernel"):
            fan_in = np.prod(shape[:2] if field.startswith("depthwise") else shape[:-1])
            return rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)
        if field in ("scale", "var"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return rng.normal(0, 0.1, shape).astype(np.float32)

    return net, jax.tree_util.tree_map_with_path(draw, shapes), images
