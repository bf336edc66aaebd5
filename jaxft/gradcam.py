"""Grad-CAM: which parts of an image speak for what a net says of it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import preprocess
from jaxft.model import Model


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
        weights = jax.grad(score)(output).mean((1, 2), keepdims=True)
        found = jax.nn.relu((weights * output).sum(-1))
        highest = found.max((1, 2), keepdims=True)
        return jnp.where(highest > 0, found / jnp.where(highest > 0, highest, 1), 0)

    return np.asarray(maps(jnp.asarray(images), jnp.asarray(targets, jnp.int32)), np.float32)


def stages(model: Model, shape: tuple[int, ...]) -> list[str]:
    """The stages of a net whose outputs have places, for images of `shape` (height, width, channels)."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = {kind: model.variables.get(kind, {}) for kind in ("params", "batch_stats")}
    _, outputs = jax.eval_shape(lambda v, x: model.net.apply(v, x, train=False), variables, images)
    names = [name for name in model.net.layers() if name in outputs and outputs[name].ndim == 4]
    return [name for name in names if outputs[name].shape[1] * outputs[name].shape[2] > 1]


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
