"""The zoo: every backbone by name."""

import difflib
from typing import Any

import flax.linen as nn

from jaxft.nets import vgg
from jaxft.nets.common import Spec, WeightFile

__all__ = ["ZOO", "Spec", "WeightFile", "create", "spec"]

ZOO: dict[str, Spec] = {
    "vgg16": vgg.spec(
        (2, 2, 3, 3, 3), notop_md5="6d6bbae143d832006294945121d1f1fc", md5="64373286793e3c8b2b4e3219cbf3544b"
    ),
    "vgg19": vgg.spec(
        (2, 2, 4, 4, 4), notop_md5="253f8cb515780f3b799900260a226db6", md5="cbe5617147190e668d6c5d5026f83318"
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


def create(name: str, num_classes: int | None = 1000, **options: Any) -> nn.Module:
    """The Flax module of the net called `name`; `options` are fields of its class (head, frozen, dtype, …).

    Raises:
        ValueError: no net has that name.
    """
    return spec(name).net(num_classes=num_classes, **options)
