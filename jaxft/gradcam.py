"""Grad-CAM: which parts of an image speak for what a net says of it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import preprocess
from jaxft.model import Model
from jaxft.nets import Regions


def heatmaps(model: Model, images: np.ndarray, stage: str | None, targets: Sequence[int] | np.ndarray) -> np.ndarray:
    """The parts of images that raise one output of a net, as a stage sees them.

    The output of the stage, each of its channels weighted by the mean of the logit's gradient over places, added up,
    and cut off below 0.

    Args:
        model: a net, trained or not.
        images: uint8 [B, H, W, C], of the size that the net is used with.
        stage: of `stages`; None for the last of them.
        targets: the output of each image (class, label or value), int [B].

    Returns:
        float32 [B, h, w] of 0 to 1, h and w those of the stage's output; all 0 where nothing speaks for the output.

    Raises:
        ValueError: the net has no such stage, or its output has no places.

    Source: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization".
    """
    known = stages(model, images.shape[1:])
    if not known:
        raise ValueError("no stage of this net has an output with places, so that there is nothing to show")
    stage = known[-1] if stage is None else stage
    if stage not in known:
        raise ValueError(f"{stage!r} is no stage whose output has places; these are {', '.join(known)}")
    prepare = preprocess.get(model.preprocessing)
    variables = {kind: model.variables.get(kind, {}) for kind in ("params", "batch_stats")}

    @jax.jit
    def maps(images: jax.Array, targets: jax.Array) -> jax.Array:
        _, outputs = model.net.apply(variables, prepare(images), train=False)

        def score(output: jax.Array) -> jax.Array:
            logits, _ = model.net.apply(variables, output, train=False, start=stage)
            return jnp.take_along_axis(logits, targets[:, None], 1).sum()

        output = outputs[stage].astype(jnp.float32)
        weights = jax.grad(score)(output).mean((-3, -2), keepdims=True)
        found = jax.nn.relu((weights * output).sum(-1))
        if isinstance(model.net, Regions):  # a map of each region, where it lies
            found = _laid_out(found, model.net.regions)
        highest = found.max((1, 2), keepdims=True)
        return jnp.where(highest > 0, found / jnp.where(highest > 0, highest, 1), 0)

    return np.asarray(maps(jnp.asarray(images), jnp.asarray(targets, jnp.int32)), np.float32)


def stages(model: Model, shape: tuple[int, ...]) -> list[str]:
    """The stages of a net whose outputs have places, for images of `shape` (height, width, channels)."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = {kind: model.variables.get(kind, {}) for kind in ("params", "batch_stats")}
    _, outputs = jax.eval_shape(lambda v, x: model.net.apply(v, x, train=False), variables, images)
    names = [name for name in model.net.layers() if name in outputs and outputs[name].ndim >= 4]
    return [name for name in names if outputs[name].shape[-3] * outputs[name].shape[-2] > 1]


LAID_OUT = 32  # places on a side of the map of an image whose regions have maps of their own


def _laid_out(maps: jax.Array, regions: Sequence[Any]) -> jax.Array:
    """Maps of regions, [B, R, h, w] → of whole images, [B, 32, 32]: where regions overlap, the higher value."""
    whole = jnp.zeros((len(maps), LAID_OUT, LAID_OUT))
    for number, region in enumerate(regions):
        rows, columns = (
            slice(round(first * LAID_OUT), max(round((first + length) * LAID_OUT), round(first * LAID_OUT) + 1))
            for first, length in ((region.top, region.height), (region.left, region.width))
        )
        shape = (len(maps), *whole[0, rows, columns].shape)
        part = jax.image.resize(maps[:, number], shape, "linear")
        whole = whole.at[:, rows, columns].max(part)
    return whole


def box(maps: np.ndarray, height: float = 0.5, width: float = 0.5) -> tuple[float, float, float, float]:
    """The rectangle of an image that holds most of its heat: a region to look at more closely.

    Args:
        maps: float [B, h, w] of `heatmaps`; their mean counts.
        height, width: of the rectangle, in fractions of the image's.

    Returns:
        (top, left, height, width) in fractions, as `nets.create` takes regions.

    Raises:
        ValueError: the rectangle does not lie within the image.
    """
    from scipy import ndimage

    if not 0 < height <= 1 or not 0 < width <= 1:
        raise ValueError(f"a box of {height} × {width} does not lie within an image; give fractions above 0, at most 1")
    mean = maps.mean(0, dtype=np.float64)
    fine = np.asarray(ndimage.zoom(mean, [200 / side for side in mean.shape], order=1))
    sums = np.pad(fine.clip(0).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    h, w = round(height * len(fine)), round(width * fine.shape[1])
    found = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    top, left = divmod(int(found.argmax()), found.shape[1])
    return top / len(fine), left / fine.shape[1], height, width


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image, uint8 [H, W, 3], in grey under a heat map of 0 to 1, [h, w]: uint8 [H, W, 3]."""
    from matplotlib import colormaps
    from PIL import Image

    height, width = image.shape[:2]
    smooth = np.asarray(
        Image.fromarray((heat * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC), np.float32
    )[..., None]
    smooth /= 255
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float32)[..., None].repeat(3, -1)
    colour = colormaps["inferno"](smooth[..., 0])[..., :3] * 255
    opacity = 0.7 * smooth
    return (grey * (1 - opacity) + colour * opacity).clip(0, 255).astype(np.uint8)
