"""One trunk for several regions of an image, with an output layer for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.checks import is_int, is_real
from jaxft.nets.common import Net, dense


class Region(NamedTuple):
    """A rectangle of an image, in fractions of its sides: 0 is the upper or left edge."""

    name: str
    top: float
    left: float
    height: float
    width: float


class Regions(Net):
    """A net of the zoo that looks at several regions of each image, and at each with the same weights.

    The output of its last stage with places, averaged over them, goes to an output layer of the region's own. Training
    adds up their losses; the prediction is the mean of their probabilities.

    Attributes:
        trunk: makes the net, with the field `num_classes`.
        options: further fields of it, (name, value) each.
        regions: where to look.
        size: (height, width) in pixels that the trunk sees of each region.
        num_classes: width of each output layer.
        frozen: names of frozen layers.
        dtype: of the computation; parameters and logits are float32.

    Source: the winner of State Farm distracted driver detection, who gave the whole image, the head and the lower right
    quarter to one VGG16.
    """

    trunk: Callable[..., Net]
    regions: tuple[Region, ...]
    size: tuple[int, int]
    options: tuple[tuple[str, Any], ...] = ()
    num_classes: int = 1000
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    frozen: frozenset[str] = frozenset()
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", checked(self.regions))
        if not isinstance(self.size, tuple) or len(self.size) != 2 or not all(is_int(n) and n > 0 for n in self.size):
            raise ValueError(f"region_size={self.size!r} is not (height, width) in pixels, such as (224, 224)")
        if self.hidden:
            raise ValueError(f"hidden={self.hidden}: a net with regions has one layer for each, and no hidden ones")
        super().__post_init__()

    def _trunk(self, **fields: Any) -> Net:
        heads = frozenset(self.head_layers())
        options = {**dict(self.options), "dtype": self.dtype, "frozen": self.frozen - heads, **fields}
        return self.trunk(num_classes=None, **options)

    def layers(self) -> dict[str, tuple[str, ...]]:
        """Stage name → its layers: those of the trunk, the mean over places, and the output layers."""
        return {**self._trunk(parent=None).layers(), "avg_pool": ("avg_pool",), "predictions": self.head_layers()}

    def head_layers(self) -> tuple[str, ...]:
        """The output layer of each region."""
        return tuple(f"predictions_{region.name}" for region in self.regions)

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, start: str | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the net, or the stages after `start`; R regions.

        Args:
            images: [B, H, W, C], preprocessed for the weight file; with `start`, the output of the stage of that name.
            train: BatchNorm takes the batch's statistics where it is not frozen.

        Returns:
            (logits float32, outputs of every stage by name). Logits are [R, B, num_classes] in training, and else
            [B, num_classes], the logarithm of the mean of probabilities. Outputs of stages are [B, R, …].

        Raises:
            ValueError: `start` is not a stage, or a region is too small for the trunk.
        """
        trunk, out = self._trunk(), {}
        nn.share_scope(self, trunk)
        stages, x = list(self.layers()), images
        if start is not None and start not in stages:
            raise ValueError(f"start={start!r} is not a stage of this net; its stages are {', '.join(stages)}")
        if start is None or start in stages[:-2]:
            x = self._cut(images) if start is None else images
            batch = x.shape[:2]
            _, found = trunk(x.reshape(-1, *x.shape[2:]), train=train, start=start)
            out = {name: value.reshape(*batch, *value.shape[1:]) for name, value in found.items()}
            x = out[stages[-3]]
        if start not in stages[-2:]:
            x = out["avg_pool"] = x.mean((2, 3))
        if start == "predictions":
            return images, {"predictions": images}
        heads = [dense(x[:, i], name, self.num_classes, jnp.float32) for i, name in enumerate(self.head_layers())]
        logits = jnp.stack(heads).astype(jnp.float32)
        mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(len(heads))
        out["predictions"] = mean
        return logits if train else mean, out

    def _cut(self, images: jax.Array) -> jax.Array:
        """The regions [B, R, *size, C] of images, resized."""
        height, width = images.shape[1:3]

        def one(region: Region) -> jax.Array:
            first = round(region.top * height), round(region.left * width)
            last = round((region.top + region.height) * height), round((region.left + region.width) * width)
            part = images[:, first[0] : last[0], first[1] : last[1]]
            shape = (len(images), *self.size, images.shape[3])
            return part if part.shape == shape else jax.image.resize(part, shape, "linear")

        return jnp.stack([one(region) for region in self.regions], 1)


def checked(regions: Any) -> tuple[Region, ...]:
    """Regions of rows (name, top, left, height, width).

    Raises:
        ValueError: none, two of one name, or one that does not lie within the image.
    """
    rows = tuple(regions) if isinstance(regions, tuple | list) else ()
    if not rows:
        raise ValueError(f"regions={regions!r} is not a tuple of (name, top, left, height, width)")
    found = []
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != 5 or not isinstance(row[0], str):
            raise ValueError(f"region {row!r} is not (name, top, left, height, width) in fractions of the image")
        name, top, left, height, width = row
        sides = ((top, height), (left, width))
        if not all(is_real(n) for side in sides for n in side) or not all(
            first >= 0 and length > 0 and first + length <= 1 + 1e-9 for first, length in sides
        ):
            raise ValueError(f"region {name!r} does not lie within the image: {row[1:]}; give fractions of 0 to 1")
        found.append(Region(name, *(float(n) for side in ((top, left), (height, width)) for n in side)))
    if len({region.name for region in found}) < len(found):
        raise ValueError(f"two regions have one name: {', '.join(region.name for region in found)}")
    return tuple(found)
