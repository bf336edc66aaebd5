"""Augmentation against scipy, Pillow and colorsys; its bounds, and what keys decide."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from jaxft.data import augment
from jaxft.data.augment import Blur, Chain, ColorJitter, Erase, Warp, one_by_one
from jaxft.data.mix import CutMix, Mixup

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
LABELS = {"target": np.eye(4, dtype=np.float32), "weight": np.arange(4, dtype=np.float32)}
EVERY = [
    Warp(rotation=20, shift=0.1, zoom=0.1, shear=10, flip_horizontal=True, flip_vertical=True, quarter_turns=True),
    ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
    Blur(sigma=1.5),
    Erase(probability=0.7),
    Erase(probability=0.7, fill="noise"),
]
IDS = ["warp", "colour", "blur", "erase", "noise"]


def smooth(size: int) -> np.ndarray:
    """float32 [1, size, size, 3], so smooth that ways of interpolation hardly differ."""
    return np.clip(
        np.asarray(jax.image.resize(jnp.asarray(IMAGES[:1], jnp.float32), (1, size, size, 3), "cubic")), 0, 255
    )


@functools.cache
def compiled(step):
    return jax.jit(step)


def applied(step, images, seed=0):
    out, labels = compiled(step)(jax.random.key(seed), images, LABELS)
    jax.tree.map(np.testing.assert_array_equal, labels, LABELS)
    return np.asarray(out)


def singly(change, key, images, labels):
    return one_by_one(change, jax.random.split(key, len(images)), images, labels)


def key_of(image: int, seed: int = 0) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), image)


@pytest.mark.parametrize(
    "step", [Warp(), ColorJitter(), Blur(0.0), Erase(probability=0), Chain((Warp(), ColorJitter()))], ids=repr
)
def test_nothing_asked_for_changes_nothing(step):
    """Bug: a resampling by the identity blurs by a rounding error; images stay uint8."""
    out = applied(step, IMAGES)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, IMAGES)


@pytest.mark.parametrize("step", EVERY, ids=IDS)
def test_keys_decide(step):
    """Bug: all images of a batch, or all batches, are changed in the same way; equal keys give different images."""
    same = np.broadcast_to(IMAGES[:1], IMAGES.shape).astype(np.float32)
    out = np.concatenate([applied(step, same, seed) for seed in range(3)])
    assert len({image.tobytes() for image in out}) > 6
    np.testing.assert_array_equal(out[:4], applied(step, same))
    other = same.copy()
    other[3] = 0
    np.testing.assert_array_equal(out[:3], applied(step, other)[:3])  # no image looks at another


@pytest.mark.parametrize("step", EVERY, ids=IDS)
def test_the_range_of_images_is_kept(step):
    """Bug: pixels leave 0 to 255, or are scaled to 0 to 1, before a preprocessing that expects the former."""
    extremes = np.where(IMAGES > 127, 255, 0).astype(np.float32)
    out = np.concatenate([applied(step, extremes, seed) for seed in range(5)])
    assert out.dtype == np.float32 and out.shape == (20, 12, 12, 3)
    assert out.min() >= -1e-3 and 200 < out.max() <= 255 + 1e-3


@pytest.mark.parametrize("step", [*EVERY, Mixup(0.5), CutMix(1.0)], ids=[*IDS, "mixup", "cutmix"])
def test_steps_can_be_compiled(step):
    """Bug: a setting is taken for a traced value, or a Python `if` asks for one: the train step cannot compile."""
    key = jax.random.key(2)
    expected, labels = step(key, jnp.asarray(IMAGES, jnp.float32), LABELS)  # as a picture of it is made
    found, found_labels = compiled(step)(key, jnp.asarray(IMAGES, jnp.float32), LABELS)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    jax.tree.map(np.testing.assert_allclose, found_labels, labels)


@pytest.mark.parametrize("step", [*EVERY[:3], Chain((EVERY[0], EVERY[3]))], ids=[*IDS[:3], "chain"])
def test_one_by_one_is_a_batch_of_one_under_its_own_key(step):
    """Bug: a fixed view of an image depends on which others are in its batch, so that cached features differ."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.asarray([7, 3, 11]))
    labels = {"target": jnp.arange(3.0)[:, None], "weight": jnp.ones(3)}
    images = jnp.asarray(IMAGES[:3], jnp.float32)
    viewed = jax.jit(lambda *arguments: one_by_one(step, *arguments))
    out, kept = viewed(keys, images, labels)
    jax.tree.map(np.testing.assert_array_equal, kept, labels)
    turned = jnp.asarray([1, 2, 0])
    again, _ = viewed(keys[turned], images[turned], labels)
    np.testing.assert_array_equal(again, out[turned])
    if isinstance(step, Chain):
        alone, _ = compiled(step)(keys[1], images[1:2], {})
        np.testing.assert_allclose(out[1], alone[0], atol=2e-3)


def test_quarter_turns_and_flips_only_move_pixels():
    """Bug: the centre is off by half a pixel, so that turns and mirror images are interpolated."""
    symmetries = [np.rot90(image, k)[:, ::way] for image in IMAGES for k in range(4) for way in (1, -1)]
    symmetries = np.stack(symmetries).reshape(4, 8, -1).astype(np.float32)
    seen = set()
    step = Warp(flip_horizontal=True, flip_vertical=True, quarter_turns=True)
    for seed in range(10):
        distance = np.abs(applied(step, IMAGES, seed).reshape(4, 1, -1) - symmetries).max(-1)
        assert (distance.min(1) < 0.05).all()
        seen |= set(distance.argmin(1))
    assert seen == set(range(8))


@pytest.mark.parametrize(
    ("step", "mirrored"),
    [(Warp(flip_horizontal=True), IMAGES[:, :, ::-1]), (Warp(flip_vertical=True), IMAGES[:, ::-1])],
    ids=["horizontal", "vertical"],
)
def test_a_flip_is_of_one_axis(step, mirrored):
    """Bug: asking for one mirror image gives both, and street signs stand on their heads."""
    count = 0
    for seed in range(20):
        out = applied(step, IMAGES, seed)
        for i in range(4):
            flipped = np.abs(out[i] - mirrored[i]).max() < 0.05
            assert flipped or np.abs(out[i] - IMAGES[i]).max() < 0.05
            count += flipped
    assert 25 < count < 55


def test_a_rotation_is_scipys():
    """Bug: rows and columns swapped, or an angle in radians."""
    image = smooth(40)
    out = applied(Warp(rotation=25), image, seed=3)[0]
    angle_key = jax.random.split(key_of(0, 3), 5)[0]
    angle = 25.0 * float(jax.random.uniform(angle_key, minval=-1.0))
    assert abs(angle) > 5
    expected = ndimage.rotate(image[0], -angle, reshape=False, order=1, mode="nearest")
    inner = np.s_[8:-8, 8:-8]
    assert np.abs(out - expected)[inner].mean() < 0.5 < np.abs(out - image[0])[inner].mean()


def test_a_shear_is_scipys():
    """Bug: the shear is in radians, moves the centre, or squeezes the rows."""
    image = smooth(40)
    out = applied(Warp(shear=30), image, seed=1)[0]
    lean = np.deg2rad(30.0) * float(jax.random.uniform(jax.random.fold_in(key_of(0, 1), 5), minval=-1.0))
    assert abs(lean) > 0.1
    matrix = np.array([[1, 0], [np.tan(lean), 1]])
    offset = 19.5 - matrix @ [19.5, 19.5]
    expected = np.stack(
        [ndimage.affine_transform(image[0, ..., c], matrix, offset, order=1, mode="nearest") for c in range(3)], -1
    )
    np.testing.assert_allclose(out, expected, atol=0.05)
    assert np.abs(out - image[0]).mean() > 1


def test_shifts_stay_within_their_bound_and_repeat_the_border():
    """Bug: a shift in pixels instead of a fraction, or black borders."""
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32)[:, None, None], (64, 20, 20, 1))
    out = applied(Warp(shift=0.1), ramp)
    moved = out[:, 10, 10, 0] - 10
    assert 1.5 < np.abs(moved).max() <= 2.0 + 1e-4
    assert out.min() >= 0 and out.max() <= 19 + 1e-4


def test_quarter_turns_want_squares():
    """Bug: a turned oblong image is squeezed in silence."""
    with pytest.raises(ValueError, match="needs square images, not 4×6; set an image_size"):
        applied(Warp(quarter_turns=True), np.zeros((1, 4, 6, 3)))


@pytest.mark.parametrize(
    ("setting", "draw", "enhance"),
    [
        ("brightness", 0, ImageEnhance.Brightness),
        ("contrast", 1, ImageEnhance.Contrast),
        ("saturation", 2, ImageEnhance.Color),
    ],
)
def test_colours_change_as_pillows(setting, draw, enhance):
    """Bug: contrast about 127 instead of the image's grey, another grey, or no clipping at 0 and 255."""
    out = applied(ColorJitter(**{setting: 0.9}), IMAGES)
    for i in range(4):
        factor = 1 + 0.9 * float(jax.random.uniform(key_of(i), (4,), minval=-1.0)[draw])
        expected = np.asarray(enhance(Image.fromarray(IMAGES[i])).enhance(factor))
        np.testing.assert_allclose(out[i], expected, atol=2.5)  # Pillow's is in whole numbers, its grey too
    assert np.abs(out - IMAGES).mean() > 10


def test_hues_turn_as_colorsys():
    """Bug: the circle has 360 or 6 parts, a sixth of it is wrong, or greys become coloured."""
    images = IMAGES.astype(np.float32)
    images[0, 0] = images[0, 0, :, :1]  # greys
    out = applied(ColorJitter(hue=0.5), images)
    for i in range(4):
        turn = 0.5 * float(jax.random.uniform(key_of(i), (4,), minval=-1.0)[3])
        for pixel, found in zip(images[i].reshape(-1, 3), out[i].reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
            np.testing.assert_allclose(found, colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), atol=0.02)


@pytest.mark.parametrize("size", [None, 3, 31])
def test_a_blur_is_scipys(size):
    """Bug: the kernel does not sum to 1, blurs one axis or across channels, or the border darkens."""
    step = Blur(sigma=3.0, size=size)
    radius = 9 if size is None else size // 2
    out = applied(step, IMAGES)
    for i in range(4):
        sigma = 3.0 * float(jax.random.uniform(jax.random.split(key_of(i))[0]))
        expected = ndimage.gaussian_filter(
            IMAGES[i].astype(np.float64), sigma, axes=(0, 1), mode="nearest", radius=radius
        )
        np.testing.assert_allclose(out[i], expected, atol=0.01)


def test_some_images_are_not_blurred():
    """Bug: the probability is of the batch, or of nothing."""
    many = np.broadcast_to(IMAGES[:1], (200, 12, 12, 3))
    unchanged = (applied(Blur(sigma=5, probability=0.3), many) == many).all((1, 2, 3)).mean()
    assert 0.55 < unchanged < 0.85


@pytest.mark.parametrize("shape", [(40, 40), (20, 60)])
def test_what_is_erased_is_a_rectangle_of_the_size_asked_for(shape):
    """Bug: the area is of the side, the rectangle leaves the image, or its mean is that of the batch."""
    images = np.random.default_rng(1).uniform(0, 255, (300, *shape, 3)).astype(np.float32)
    out = applied(Erase(probability=0.5, area=(0.1, 0.4), aspect=3.0), images)
    areas = []
    for image, erased in zip(images, out, strict=True):
        changed = (image != erased).any(-1)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            np.testing.assert_allclose(
                erased[changed], np.broadcast_to(image.mean((0, 1)), (changed.sum(), 3)), rtol=1e-4
            )
            areas.append(changed.mean())
            ratio = (len(rows) / shape[0]) / (len(columns) / shape[1])
            assert 1 / 3.7 < ratio < 3.7
    assert 120 < len(areas) < 180
    assert 0.08 < min(areas) < 0.15 and 0.35 < max(areas) < 0.43


def test_the_whole_image_may_be_erased():
    """Bug: a rectangle that would be longer than the image is cut, and its area with it."""
    images = np.random.default_rng(1).uniform(0, 255, (50, 10, 30, 3)).astype(np.float32)
    out = applied(Erase(probability=1, area=(1.0, 1.0), aspect=10), images)
    np.testing.assert_allclose(out, np.broadcast_to(images.mean((1, 2), keepdims=True), out.shape), rtol=1e-4)


def test_noise_is_noise():
    """Bug: the noise is between 0 and 1, or one value."""
    out = applied(Erase(probability=1, area=(1.0, 1.0), fill="noise"), np.zeros((4, 20, 20, 3), np.float32))
    assert abs(out.mean() - 127.5) < 5 and abs(out.std() - 255 / 12**0.5) < 5


def test_a_chain_goes_in_order_under_different_keys():
    """Bug: the steps run backwards, or two equal ones draw the same."""
    double = lambda key, images, labels: (images * 2, {**labels, "seen": key})  # noqa: E731
    plus = lambda key, images, labels: (images + 1, labels | {"then": key})  # noqa: E731
    out, labels = Chain((double, plus))(jax.random.key(0), IMAGES, {})
    np.testing.assert_array_equal(out, IMAGES.astype(np.float32) * 2 + 1)
    assert labels["seen"] != labels["then"]
    twice = Chain((Warp(shift=0.2), Warp(shift=0.2)))
    out, _ = Chain([Warp(), twice])(jax.random.key(0), jnp.asarray(IMAGES), LABELS)
    assert out.shape == IMAGES.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, images: images, "does not take three arguments"),
        (lambda key, images, labels: images, "returns a .* alone: expected a function"),
        (lambda key, images, labels: (images, labels, key), "returns 3 values: expected a function"),
        (lambda key, images, labels: None, "returns a NoneType alone"),
    ],
)
@pytest.mark.parametrize("way", [augment.applied, lambda change, *args: Chain((change,))(*args), singly])
def test_functions_of_another_signature_are_refused(way, change, message):
    """Bug: Python's own error for a forgotten argument, or the first image is taken for all images of a batch of 2."""
    with pytest.raises(ValueError, match=rf"{message}.*\(key, images, labels\) that returns \(images, labels\)"):
        way(change, jax.random.key(0), jnp.zeros((2, 4, 4, 3)), {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Warp(rotation=-5), "Warp: rotation -5, expected degrees of 0 to 360"),
        (lambda: Warp(rotation="10"), "Warp: rotation '10', expected degrees"),
        (lambda: Warp(rotation=float("nan")), "Warp: rotation nan"),
        (lambda: Warp(shift=20), "Warp: shift 20, expected a fraction of the image of 0 to 1"),
        (lambda: Warp(zoom=1.0), "Warp: zoom 1.0, expected a fraction of 0 to below 1"),
        (lambda: Warp(shear=90), "Warp: shear 90, expected degrees of 0 to below 90"),
        (lambda: Warp(flip_horizontal="yes"), "flip_horizontal 'yes', expected True or False"),
        (lambda: Warp(flip_vertical=1), "flip_vertical 1, expected True or False"),
        (lambda: ColorJitter(brightness=2), "ColorJitter: brightness 2, expected a fraction of 0 to 1"),
        (lambda: ColorJitter(hue=90), "ColorJitter: hue 90, expected a fraction of the colour circle of 0 to 0.5"),
        (lambda: Blur(sigma=-1), "Blur: sigma -1, expected pixels"),
        (lambda: Blur(size=4), "Blur: size 4, expected an odd number"),
        (lambda: Blur(size=True), "Blur: size True, expected an odd number"),
        (lambda: Blur(probability=1.5), "Blur: probability 1.5"),
        (lambda: Erase(probability=-0.1), "Erase: probability -0.1"),
        (lambda: Erase(area=0.3), r"Erase: area 0.3, expected \(smallest, largest\)"),
        (lambda: Erase(area=(0.5, 0.1)), r"Erase: area \(0.5, 0.1\), expected 0 < smallest <= largest"),
        (lambda: Erase(fill="black"), "Erase: fill 'black', expected 'mean' or 'noise'"),
        (lambda: Erase(aspect=0.5), "Erase: aspect 0.5, expected a ratio of sides of 1 to 100"),
        (lambda: Chain(()), r"Chain: steps \(\), expected functions"),
        (lambda: Chain((Warp(), 0.5)), "Chain: steps .*expected functions"),
        (lambda: Chain((Warp(), Chain((CutMix(),)))), r"Chain: CutMix.*take it out, and give it as Inputs\(mix=…\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    """Bug: a misread setting trains for hours on images that nobody wanted."""
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_are_shown():
    """Bug: two different settings have one record, or one setting two: a run resumes where it must not, or not."""
    assert repr(Warp(rotation=np.float32(5))) == repr(Warp(rotation=5)) == repr(Warp(rotation=5.0))
    assert "rotation=5.0" in repr(Warp(rotation=5)) and "flip_horizontal=False" in repr(Warp(rotation=5))
    assert repr(Chain([Blur(1)])) == "Chain(steps=(Blur(sigma=1.0, size=None, probability=1.0),))"
    assert Warp(zoom=0.1) == Warp(zoom=0.1) != Warp(zoom=0.2)
