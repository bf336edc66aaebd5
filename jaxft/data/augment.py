"""Random changes of images, on the device, inside the train step.

Each is a function of (key, images, labels) that gives (images, labels): images float32 [B, H, W, C] of 0 to 255 (uint8
is converted), labels a pytree that comes back as it is. Image i draws from `jax.random.fold_in(key, i)` alone, so
equal keys give equal images. Settings are fields, and `repr` shows all of them.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxft.checks import is_real

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"


@dataclass(frozen=True)
class Warp:
    """One random affine map for each image, resampled once, bilinearly; what lies outside repeats the border.

    Attributes:
        rotation: largest angle in degrees, either way.
        shift: largest translation as a fraction of height and of width, either way.
        zoom: largest change of scale as a fraction, either way; below 1.
        shear: largest shear in degrees, either way; below 90.
        flip_horizontal: mirror left and right with probability one half.
        flip_vertical: mirror top and bottom with probability one half.
        quarter_turns: add 0, 90, 180 or 270 degrees; for square images.

    Raises:
        ValueError: a setting out of its range; when called, quarter turns of images that are not square.

    Source: the Keras fine-tuning guide of 2016, whose `ImageDataGenerator` has fill mode "nearest".
    """

    rotation: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    flip_horizontal: bool = False
    flip_vertical: bool = False
    quarter_turns: bool = False

    def __post_init__(self):
        check_number(self, "rotation", 0, 360, "degrees")
        check_number(self, "shift", 0, 1, "a fraction of the image")
        check_number(self, "zoom", 0, 1, "a fraction", below=True)
        check_number(self, "shear", 0, 90, "degrees", below=True)
        for name in ("flip_horizontal", "flip_vertical", "quarter_turns"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Warp: {name} {getattr(self, name)!r}, expected True or False")

    def __call__(self, key: jax.Array, images: jax.Array, labels: Any) -> tuple[jax.Array, Any]:
        """See the module; images of any range."""
        height, width = images.shape[1:3]
        if self.quarter_turns and height != width:
            raise ValueError(
                f"Warp: quarter_turns needs square images, not {height}×{width}; set an image_size of two "
                f"equal sides, or quarter_turns=False"
            )
        images = jnp.asarray(images, jnp.float32)
        if self == Warp():
            return images, labels
        # Pixel centres about the image's centre, [2, H, W]: (row, column).
        centre = jnp.asarray([(height - 1) / 2, (width - 1) / 2])
        grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")) - centre[:, None, None]

        def one(key: jax.Array, image: jax.Array) -> jax.Array:
            matrix, offset = self._map(key, height, width)
            source = jnp.einsum("ij,jhw->ihw", matrix, grid, precision="highest") + (centre + offset)[:, None, None]
            sample = jax.vmap(
                lambda channel: jax.scipy.ndimage.map_coordinates(channel, list(source), order=1, mode="nearest"),
                -1,
                -1,
            )
            return sample(image)

        return jax.vmap(one)(_keys(key, images), images), labels

    def _map(self, key: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """(matrix [2, 2], offset [2] in pixels) from places in the result to places in the source, (row, column)."""
        angle_key, shift_key, zoom_key, flip_key, turn_key = jax.random.split(key, 5)
        angle = jnp.deg2rad(self.rotation) * jax.random.uniform(angle_key, minval=-1.0)
        if self.quarter_turns:
            angle += jnp.pi / 2 * jax.random.randint(turn_key, (), 0, 4)
        scale = 1.0 + self.zoom * jax.random.uniform(zoom_key, minval=-1.0)
        axes = jnp.asarray([self.flip_vertical, self.flip_horizontal])
        mirror = jnp.where(jax.random.bernoulli(flip_key, shape=(2,)) & axes, -1.0, 1.0)
        offset = self.shift * jnp.asarray([height, width]) * jax.random.uniform(shift_key, (2,), minval=-1.0)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        matrix = jnp.asarray([[cos, -sin], [sin, cos]])
        if self.shear:
            lean = jnp.deg2rad(self.shear) * jax.random.uniform(jax.random.fold_in(key, 5), minval=-1.0)
            slanted = jnp.asarray([[1.0, 0.0], [jnp.tan(lean), 1.0]])  # columns move with the row
            matrix = jnp.matmul(matrix, slanted, precision="highest")
        return matrix * mirror / scale, offset


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue, in this order; the result stays within 0 to 255.

    Attributes:
        brightness: an image is multiplied by 1 - brightness to 1 + brightness; at most 1.
        contrast: the same for its distance from its mean grey; at most 1.
        saturation: the same for its distance from its own grey; at most 1.
        hue: largest turn of the hue, as a fraction of the whole circle, either way; at most 0.5.

    Raises:
        ValueError: a setting out of its range.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation"):
            check_number(self, name, 0, 1, "a fraction")
        check_number(self, "hue", 0, 0.5, "a fraction of the colour circle")

    def __call__(self, key: jax.Array, images: jax.Array, labels: Any) -> tuple[jax.Array, Any]:
        """See the module; images RGB."""
        images = jnp.asarray(images, jnp.float32)

        def one(key: jax.Array, image: jax.Array) -> jax.Array:
            draws = jax.random.uniform(key, (4,), minval=-1.0)
            if self.brightness:
                image = jnp.clip(image * (1.0 + self.brightness * draws[0]), 0.0, 255.0)
            if self.contrast:
                image = _away_from(_grey(image).mean(), image, 1.0 + self.contrast * draws[1])
            if self.saturation:
                image = _away_from(_grey(image), image, 1.0 + self.saturation * draws[2])
            return _turn_hue(image, self.hue * draws[3]) if self.hue else image

        return jax.vmap(one)(_keys(key, images), images), labels


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur of random width; the border is repeated.

    Attributes:
        sigma: largest standard deviation in pixels; each image draws from 0 to it.
        size: pixels of the kernel's side, odd; None: three standard deviations either way.
        probability: of an image to be blurred.

    Raises:
        ValueError: a setting out of its range.
    """

    sigma: float = 2.0
    size: int | None = None
    probability: float = 1.0

    def __post_init__(self):
        check_number(self, "sigma", 0, 100, "pixels")
        check_number(self, "probability", 0, 1, "a probability")
        if self.size is not None and not (type(self.size) is int and self.size >= 1 and self.size % 2):
            raise ValueError(f"Blur: size {self.size!r}, expected an odd number of pixels, such as 3 or 5, or None")

    def __call__(self, key: jax.Array, images: jax.Array, labels: Any) -> tuple[jax.Array, Any]:
        """See the module; images of any range."""
        images = jnp.asarray(images, jnp.float32)
        radius = math.ceil(3 * self.sigma) if self.size is None else self.size // 2

        def blurred(image: jax.Array, axis: int, sigma: jax.Array) -> jax.Array:
            """Along one axis: a product with a band matrix, which takes few operations, whatever the radius."""
            length = image.shape[axis]
            distance = jnp.arange(-radius, length + radius) - jnp.arange(length)[:, None]
            band = jnp.where(jnp.abs(distance) <= radius, jnp.exp(-0.5 * (distance / sigma) ** 2), 0.0)
            padding = [(radius, radius) if each == axis else (0, 0) for each in range(3)]
            padded = jnp.moveaxis(jnp.pad(image, padding, "edge"), axis, 0)
            weights = band / band.sum(1, keepdims=True)
            return jnp.moveaxis(jnp.tensordot(weights, padded, 1, precision="highest"), 0, axis)

        def one(key: jax.Array, image: jax.Array) -> jax.Array:
            width_key, chance_key = jax.random.split(key)
            sigma = jnp.maximum(self.sigma * jax.random.uniform(width_key), 1e-3)
            changed = blurred(blurred(image, 0, sigma), 1, sigma)
            return jnp.where(jax.random.bernoulli(chance_key, self.probability), changed, image)

        return jax.vmap(one)(_keys(key, images), images), labels


@dataclass(frozen=True)
class Erase:
    """Fills a random rectangle of an image.

    Attributes:
        probability: of an image to lose a rectangle.
        area: (smallest, largest) part of the image's area, within 0 to 1.
        aspect: largest ratio of the rectangle's sides, relative to the image's, either way; at least 1.
        fill: "mean", the image's own mean colour, or "noise", uniform from 0 to 255.

    Raises:
        ValueError: a setting out of its range.

    Source: Zhong et al., Random erasing data augmentation, 2017.
    """

    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.33)
    aspect: float = 3.3
    fill: Literal["mean", "noise"] = "mean"

    def __post_init__(self):
        check_number(self, "probability", 0, 1, "a probability")
        check_number(self, "aspect", 1, 100, "a ratio of sides")
        if self.fill not in ("mean", "noise"):
            raise ValueError(f"Erase: fill {self.fill!r}, expected 'mean' or 'noise'")
        if not isinstance(self.area, tuple | list) or len(self.area) != 2 or not all(map(is_real, self.area)):
            raise ValueError(f"Erase: area {self.area!r}, expected (smallest, largest), such as (0.02, 0.33)")
        object.__setattr__(self, "area", tuple(map(float, self.area)))
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"Erase: area {self.area}, expected 0 < smallest <= largest <= 1, such as (0.02, 0.33)")

    def __call__(self, key: jax.Array, images: jax.Array, labels: Any) -> tuple[jax.Array, Any]:
        """See the module."""
        images = jnp.asarray(images, jnp.float32)
        sides = jnp.asarray(images.shape[1:3])

        def one(key: jax.Array, image: jax.Array) -> jax.Array:
            chance_key, area_key, aspect_key, place_key, fill_key = jax.random.split(key, 5)
            area = jax.random.uniform(area_key, minval=self.area[0], maxval=self.area[1])
            # No side may be longer than the image's, or the area would not be the one drawn.
            longest = jnp.minimum(math.log(self.aspect), -jnp.log(area))
            ratio = jnp.exp(longest * jax.random.uniform(aspect_key, minval=-1.0))
            size = jnp.clip(jnp.round(jnp.sqrt(area * jnp.stack([ratio, 1 / ratio])) * sides), 1, sides)
            first = jnp.floor(jax.random.uniform(place_key, (2,)) * (sides - size + 1))
            erased = rectangle(image.shape[0], image.shape[1], first, first + size)
            erased &= jax.random.bernoulli(chance_key, self.probability)
            if self.fill == "mean":
                filling = image.mean((0, 1))
            else:
                filling = jax.random.uniform(fill_key, image.shape, maxval=255.0)
            return jnp.where(erased[..., None], filling, image)

        return jax.vmap(one)(_keys(key, images), images), labels


class Mixing:
    """The base of what mixes the images of a batch with one another: `Inputs.mix` takes it, and `augment` does not."""


@dataclass(frozen=True)
class Chain:
    """One after another, each under its own key.

    Attributes:
        steps: functions of (key, images, labels), such as `Warp` or `Blur`.

    Raises:
        ValueError: no steps, one that is not a function, or one that mixes images.
    """

    steps: tuple[Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]], ...]

    def __post_init__(self):
        if not isinstance(self.steps, tuple | list) or not self.steps or not all(map(callable, self.steps)):
            raise ValueError(
                f"Chain: steps {self.steps!r}, expected functions, such as Chain((Warp(rotation=10), Blur()))"
            )
        if mixing := [step for step in self.steps if isinstance(step, Mixing)]:
            raise ValueError(f"Chain: {mixing[0]!r} mixes whole batches: take it out, and give it as Inputs(mix=…)")
        object.__setattr__(self, "steps", tuple(self.steps))

    def __call__(self, key: jax.Array, images: jax.Array, labels: Any) -> tuple[jax.Array, Any]:
        """See the module."""
        images = jnp.asarray(images, jnp.float32)
        for number, step in enumerate(self.steps):
            images, labels = applied(step, jax.random.fold_in(key, number), images, labels)
        return images, labels


def applied(
    change: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]], key: jax.Array, images: jax.Array, labels: Any
) -> tuple[jax.Array, Any]:
    """`change(key, images, labels)`, if it takes these and gives (images, labels).

    Raises:
        ValueError: it takes other arguments, or gives something else.
    """
    wanted = "expected a function of (key, images, labels) that returns (images, labels)"
    try:
        inspect.signature(change).bind(key, images, labels)
    except TypeError as error:
        raise ValueError(f"{change!r} does not take three arguments ({error}): {wanted}") from None
    except ValueError:  # a function of C, of which no signature is known
        pass
    changed = change(key, images, labels)
    if not isinstance(changed, tuple | list) or len(changed) != 2:
        found = f"{len(changed)} values" if isinstance(changed, tuple | list) else f"a {type(changed).__name__} alone"
        raise ValueError(f"{change!r} returns {found}: {wanted}")
    return changed[0], changed[1]


def one_by_one(
    augment: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    keys: jax.Array,
    images: jax.Array,
    labels: Any,
) -> tuple[jax.Array, Any]:
    """`augment` of each image as a batch of one under its own key: what comes out depends on no other image.

    Args:
        augment: a function of (key, images, labels).
        keys: [B].
        images: [B, H, W, C].
        labels: a pytree of [B, …].

    Returns:
        (images, labels) of the same batch.
    """

    def one(key: jax.Array, image: jax.Array, label: Any) -> tuple[jax.Array, Any]:
        changed = applied(augment, key, image[None], jax.tree.map(lambda leaf: leaf[None], label))
        return jax.tree.map(lambda leaf: leaf[0], changed)

    return jax.vmap(one)(keys, images, labels)


def rectangle(height: int, width: int, first: jax.Array, last: jax.Array) -> jax.Array:
    """bool [height, width]: True from `first` up to before `last`, each (row, column)."""
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    return (rows >= first[0]) & (rows < last[0]) & (columns >= first[1]) & (columns < last[1])


def _keys(key: jax.Array, images: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))


def _grey(image: jax.Array) -> jax.Array:
    """[H, W, 3] → [H, W, 1]."""
    return jnp.matmul(image, jnp.asarray(_GREY)[:, None], precision="highest")


def _away_from(middle: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(middle + factor * (image - middle), 0.0, 255.0)


def _turn_hue(image: jax.Array, turn: jax.Array) -> jax.Array:
    """The colour of each pixel turned on the HSV circle by a fraction of it; value and saturation stay."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = image.max(-1)
    chroma = value - image.min(-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixths = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0),
    )
    sixths = (sixths + 6.0 * turn) % 6.0
    # Each channel is at its value over a third of the circle, and falls off linearly on both sides.
    place = (sixths[..., None] + jnp.asarray([5.0, 3.0, 1.0])) % 6.0
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(place, 4.0 - place), 0.0, 1.0)


def check_number(
    step: Any, name: str, low: float, high: float, unit: str, *, above: bool = False, below: bool = False
) -> None:
    """Refuses a setting of `step` that is not a number from `low` (or `above` it) to `high` (or `below` it)."""
    value = getattr(step, name)
    if not is_real(value) or not low <= value <= high or (above and value == low) or (below and value == high):
        bounds = f"{'above ' if above else ''}{low:g} to {'below ' if below else ''}{high:g}"
        raise ValueError(f"{type(step).__name__}: {name} {value!r}, expected {unit} of {bounds}")
    object.__setattr__(step, name, float(value))  # 5, 5.0 and np.float32(5) have one repr
