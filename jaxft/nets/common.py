"""What two or more families share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax

Stage = tuple[str, Callable[[jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A published Keras weight file.

    `md5` is the hash that Keras publishes beside the URL; `classifier` says whether the file holds the layers behind
    the last feature map; `preprocessing` names the function of `jaxft.preprocess` that the weights were trained with.
    """

    url: str
    md5: str
    classifier: bool
    preprocessing: str


@dataclasses.dataclass(frozen=True)
class Spec:
    """One row of the zoo.

    `net` builds the module from `num_classes` and options; `native_size` is (height, width) in pixels; `weights` maps
    `"imagenet"` (with classifier) and `"imagenet-notop"` to files; `head` is the layer that a new task replaces;
    `classifier` lists the weighted layers, head included, that a file without a classifier lacks.
    """

    net: Callable[..., nn.Module]
    native_size: tuple[int, int]
    weights: Mapping[str, WeightFile]
    head: str
    classifier: tuple[str, ...]


def fold(stages: Sequence[Stage], x: jax.Array, start: str | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs `stages` in order; returns the last output and every output by stage name.

    With `start`, `x` is taken to be the output of the stage of that name and only what follows is run.

    Raises:
        ValueError: no stage is called `start`.
    """
    out = {}
    names = [name for name, _ in stages]
    if start is not None:
        if start not in names:
            raise ValueError(f"start={start!r} is no stage of this net; its stages are {', '.join(names)}")
        out[start] = x
        stages = stages[names.index(start) + 1 :]
    for name, stage in stages:
        x = out[name] = stage(x)
    return x, out
