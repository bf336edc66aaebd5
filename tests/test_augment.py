import jax
import numpy as np
import pytest
from scipy import ndimage

from jaxft.data.augment import warp

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)


def test_nothing_asked_for_changes_nothing():
    """Bug: a resampling by the identity blurs by a rounding error."""
    out = warp(jax.random.key(0), IMAGES)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, IMAGES)


def test_quarter_turns_and_flips_only_move_pixels():
    """Bug: the centre is off by half a pixel, so that turns and mirror images are interpolated."""
    symmetries = [np.rot90(image, k)[:, ::way] for image in IMAGES for k in range(4) for way in (1, -1)]
    symmetries = np.stack(symmetries).reshape(4, 8, -1).astype(np.float32)
    seen = set()
    for seed in range(10):
        out = np.asarray(warp(jax.random.key(seed), IMAGES, flip=True, quarter_turns=True)).reshape(4, 1, -1)
        distance = np.abs(out - symmetries).max(-1)
        assert (distance.min(1) < 0.05).all()
        seen |= set(distance.argmin(1))
    assert seen == set(range(8))


def test_a_rotation_is_scipys():
    """Bug: rows and columns swapped, or an angle in radians."""
    import jax.numpy as jnp

    smooth = np.asarray(jax.image.resize(jnp.asarray(IMAGES[:1], jnp.float32), (1, 40, 40, 3), "cubic"))
    key = jax.random.key(3)
    out = np.asarray(warp(key, smooth, rotation=25.0))[0]
    angle_key = jax.random.split(jax.random.fold_in(key, 0), 5)[0]
    angle = 25.0 * float(jax.random.uniform(angle_key, minval=-1.0))
    assert abs(angle) > 5
    expected = ndimage.rotate(smooth[0], angle, reshape=False, order=1, mode="nearest")
    other_way = ndimage.rotate(smooth[0], -angle, reshape=False, order=1, mode="nearest")
    inner = np.s_[8:-8, 8:-8]
    error = min(np.abs(out - expected)[inner].mean(), np.abs(out - other_way)[inner].mean())
    assert error < 0.5 < np.abs(out - smooth[0])[inner].mean()


def test_shifts_stay_within_their_bound_and_repeat_the_border():
    """Bug: a shift in pixels instead of a fraction, or black borders."""
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32)[:, None, None], (64, 20, 20, 1))
    out = np.asarray(warp(jax.random.key(0), ramp, shift=0.1))
    moved = out[:, 10, 10, 0] - 10
    assert 1.5 < np.abs(moved).max() <= 2.0 + 1e-4
    assert out.min() >= 0 and out.max() <= 19 + 1e-4


def test_images_and_keys_differ():
    """Bug: every image of a batch, or every batch, is moved alike."""
    same = np.broadcast_to(IMAGES[:1], IMAGES.shape)
    out = np.asarray(warp(jax.random.key(0), same, rotation=20, shift=0.2, zoom=0.1))
    assert all(not np.allclose(out[0], out[i]) for i in range(1, 4))
    assert not np.allclose(out, warp(jax.random.key(1), same, rotation=20, shift=0.2, zoom=0.1))


def test_quarter_turns_want_squares():
    """Bug: a turned oblong image is squeezed in silence."""
    with pytest.raises(ValueError, match="square"):
        warp(jax.random.key(0), np.zeros((1, 4, 6, 3)), quarter_turns=True)
