"""Mixup and CutMix: labels take exactly the share that the images take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data.mix import CutMix, Halves, Mixup

SIZE = 8


@functools.cache
def compiled(step):
    return jax.jit(step)


SHADES = np.arange(SIZE, dtype=np.float32) * 30
FLAT = np.broadcast_to(SHADES[:, None, None, None], (SIZE, 9, 13, 3))  # an image is one shade, which says whose it is


def labels():
    """As a train step passes them."""
    known = np.ones((SIZE, 1), np.float32)
    known[2] = 0
    return {"target": np.eye(SIZE, dtype=np.float32), "known": known, "weight": np.arange(SIZE, dtype=np.float32)}


@pytest.mark.parametrize("step", [Mixup(0.5), CutMix()], ids=repr)
@pytest.mark.parametrize("seed", range(6))
def test_labels_are_mixed_as_the_images(step, seed):
    """Bug: labels go with another partner, or with the share that was drawn instead of the area that was kept."""
    images, mixed = compiled(step)(jax.random.key(seed), FLAT, labels())
    images = np.asarray(images)
    assert images.dtype == np.float32 and images.shape == FLAT.shape
    np.testing.assert_allclose(images.mean((1, 2, 3)), mixed["target"] @ SHADES, rtol=1e-4, atol=1e-3)
    target = np.asarray(mixed["target"])
    np.testing.assert_allclose(target.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(target.sum(0), 1, rtol=1e-5)  # everyone is partner once
    for name, values in labels().items():
        np.testing.assert_allclose(mixed[name], target @ values, rtol=1e-4, atol=1e-5)
    known = target[:, 2] == 0  # image 2 is not; a step masks what is below 1, so that rounding may not mask the others
    assert (np.asarray(mixed["known"])[known] == 1).all()


def test_a_cut_is_one_rectangle_of_the_partner():
    """Bug: the rectangle is averaged instead of pasted, or is not the same for rows and columns."""
    kept = []
    for seed in range(40):
        images, mixed = compiled(CutMix())(jax.random.key(seed), FLAT, labels())
        images = np.asarray(images)
        assert set(np.unique(images)) <= set(SHADES.tolist())
        changed = images[..., 0] != FLAT[..., 0]
        for image in changed[changed.any((1, 2))]:
            rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
            assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            np.testing.assert_array_equal(image, changed[changed.any((1, 2))][0])
        kept.append(float(np.asarray(mixed["target"]).max()))
    assert min(kept) < 0.7 and max(kept) > 0.9


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_distribution_asked_for(alpha):
    """Bug: alpha is the mean, or the inverse."""
    two = np.stack([np.zeros((1, 1, 1)), np.ones((1, 1, 1))]).astype(np.float32)

    def share(key):
        images, _ = Mixup(alpha)(key, two, {})
        return images[1, 0, 0, 0]

    shares = np.asarray(jax.jit(jax.vmap(share))(jax.random.split(jax.random.key(0), 4000)))
    shares = shares[(shares > 0) & (shares < 1)]  # in half of the batches everyone is their own partner
    assert abs(shares.mean() - 0.5) < 0.03
    if alpha >= 1:
        assert abs(shares.std() - (1 / (4 * (2 * alpha + 1))) ** 0.5) < 0.015
    else:
        assert ((shares < 0.1) | (shares > 0.9)).mean() > 0.5


@pytest.mark.parametrize("step", [Mixup(0.5), CutMix()], ids=repr)
def test_keys_decide(step):
    """Bug: every batch is mixed with the same share, or a resumed run mixes differently."""
    first, again, *others = (compiled(step)(jax.random.key(seed), FLAT, labels())[0] for seed in (0, 0, 1, 2, 3, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert sum(not np.array_equal(first, other) for other in others) >= 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(0), "Mixup: alpha 0, expected a number of above 0 to 1000"),
        (lambda: Mixup(-0.2), "Mixup: alpha -0.2"),
        (lambda: CutMix("1"), "CutMix: alpha '1'"),
        (
            lambda: Mixup(0.2)(jax.random.key(0), FLAT, jnp.arange(SIZE)),
            r"labels int32 \[8\] cannot be mixed: give float ones, classes one-hot",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(make, message):
    """Bug: class 3 and class 5 become class 4."""
    with pytest.raises(ValueError, match=message):
        make()


def test_halves_come_from_images_of_one_class():
    """Bug: the right half is that of another class; nothing is composed; an image of a class of its own changes."""
    target = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 1, 1, 1, 2]]
    shades = np.arange(8, dtype=np.float32) * 30
    images = np.broadcast_to(shades[:, None, None, None], (8, 4, 6, 3))
    composed, whole = 0, 0
    for seed in range(20):
        made, labels = compiled(Halves(0.5))(jax.random.key(seed), images, {"target": target})
        made = np.asarray(made)
        np.testing.assert_array_equal(labels["target"], target)
        left, right = made[:, 0, 0, 0], made[:, 0, -1, 0]
        np.testing.assert_array_equal(left, shades)
        partner = (right / 30).round().astype(int)
        np.testing.assert_array_equal(target[partner], target)
        assert (made[:, :, :3] == left[:, None, None, None]).all() and (
            made[:, :, 3:] == right[:, None, None, None]
        ).all()
        composed += int((partner != np.arange(8)).sum())
        whole += int((partner == np.arange(8)).sum())
    assert composed > 20 and whole > 60
    with pytest.raises(ValueError, match="one-hot classes"):
        Halves()(jax.random.key(0), images, {"target": target.argmax(1)})
