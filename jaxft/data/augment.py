"""Random geometric augmentation, on the device, inside the train step."""

import jax
import jax.numpy as jnp


def warp(
    key: jax.Array,
    images: jax.Array,
    rows: jax.Array | None = None,
    *,
    rotation: float = 0.0,
    shift: float = 0.0,
    zoom: float = 0.0,
    flip: bool = False,
    quarter_turns: bool = False,
) -> jax.Array:
    """One random affine map for each image, resampled once, bilinearly; what lies outside repeats the border.

    Args:
        key: of this batch; image i uses `jax.random.fold_in(key, rows[i])`.
        images: [B, H, W, C], uint8 or float, any range.
        rows: int [B], by default 0 to B - 1; an image's number in its dataset makes its map its own in every batch.
        rotation: largest angle in degrees, either way.
        shift: largest translation as a fraction of height and of width, either way.
        zoom: largest change of scale as a fraction, either way.
        flip: mirror each axis with probability one half.
        quarter_turns: add 0, 90, 180 or 270 degrees; for square images.

    Returns:
        float32 [B, H, W, C], in the range of the input.

    Raises:
        ValueError: quarter turns of images that are not square.

    Source: the origin's `ImageDataGenerator`, fill mode "nearest".
    """
    height, width = images.shape[1:3]
    if quarter_turns and height != width:
        raise ValueError(f"quarter_turns needs square images, not {height}×{width}")
    images = images.astype(jnp.float32)
    if not (rotation or shift or zoom or flip or quarter_turns):
        return images
    # Pixel centres about the image's centre, [2, H, W]: (row, column).
    centre = jnp.asarray([(height - 1) / 2, (width - 1) / 2])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")) - centre[:, None, None]

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        angle_key, shift_key, zoom_key, flip_key, turn_key = jax.random.split(key, 5)
        angle = jnp.deg2rad(rotation) * jax.random.uniform(angle_key, minval=-1.0)
        if quarter_turns:
            angle += jnp.pi / 2 * jax.random.randint(turn_key, (), 0, 4)
        scale = 1.0 + zoom * jax.random.uniform(zoom_key, minval=-1.0)
        mirror = jnp.where(jax.random.bernoulli(flip_key, shape=(2,)), -1.0, 1.0) if flip else jnp.ones(2)
        offset = shift * jnp.asarray([height, width]) * jax.random.uniform(shift_key, (2,), minval=-1.0)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        matrix = jnp.asarray([[cos, -sin], [sin, cos]]) * mirror / scale
        source = jnp.einsum("ij,jhw->ihw", matrix, grid, precision="highest") + (centre + offset)[:, None, None]
        sample = jax.vmap(
            lambda channel: jax.scipy.ndimage.map_coordinates(channel, list(source), order=1, mode="nearest"), -1, -1
        )
        return sample(image)

    rows = jnp.arange(len(images)) if rows is None else rows
    return jax.vmap(one)(jax.vmap(jax.random.fold_in, (None, 0))(key, rows), images)
