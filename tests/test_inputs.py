"""Inputs: every setting that cannot be is refused with what to give, and examples that leak are told."""

from dataclasses import replace

import numpy as np
import pytest

from jaxft.data import Dataset, Inputs, augment, mix, overlap

PIXELS = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
DATA = Dataset(
    "ten", PIXELS, np.arange(10) % 2, tuple("aabbccddee"), tuple(f"{i}.png" for i in range(10)), ("even", "odd")
)
WARP = augment.Warp(rotation=5.0)


def inputs(indices=range(10), data=DATA, **settings) -> Inputs:
    return Inputs(**{"dataset": data, "indices": np.asarray(indices), "image_size": (4, 4)} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "folder", "indices": []}, "dataset 'folder' is a str, expected a jaxft.data.Dataset"),
        ({"augment": mix.Mixup(1.0)}, r"augment Mixup.* mixes whole batches: give it as mix=Mixup\(alpha=1.0\)"),
        ({"augment": mix.CutMix(), "views": 2}, "augment CutMix.*give it as mix="),
        ({"indices": np.arange(10) > 4}, r"booleans.*np.flatnonzero\(indices\)"),
        ({"indices": np.array([0.0, 1.0])}, "indices are float64, expected whole numbers"),
        ({"indices": np.array([[0, 1]])}, r"shape \[1, 2\], expected one dimension"),
        ({"indices": np.array([], int)}, "the set is empty"),
        ({"indices": []}, "the set is empty"),
        ({"indices": np.array([0, 10])}, "indices 0 to 10, expected within 0 to 9"),
        ({"indices": np.array([-1, 3])}, "indices -1 to 3, expected within 0 to 9"),
        ({"indices": np.array([3, 4, 3])}, r"1 examples more than once, the first 3.*np.unique.*weights"),
        ({"image_size": 224}, r"image_size 224: expected \(height, width\), such as \(224, 224\)"),
        ({"image_size": (0, 4)}, r"image_size \(0, 4\): expected"),
        ({"image_size": (4, 4, 3)}, "two whole numbers of at least 1"),
        ({"image_size": (4.0, 4.0)}, "two whole numbers of at least 1"),
        ({"image_size": None}, "two whole numbers of at least 1"),
        ({"batch_size": 0}, "batch_size 0: expected a whole number of at least 1"),
        ({"batch_size": 2.0}, "batch_size 2.0"),
        ({"augment": {"rotation": 5}}, r"augment .*rotation.*expected a function .*augment.Warp\(rotation=10\)"),
        ({"mix": 0.2}, r"mix 0.2: expected a function .*mix.Mixup\(0.2\)"),
        ({"order": "balanced"}, "order 'balanced': expected a function"),
        ({"views": 2}, "views 2: there is nothing to view without `augment`"),
        ({"views": 0, "augment": WARP}, "views 0: expected at least 1"),
        ({"views": 2, "augment": WARP, "mix": mix.Mixup(0.2)}, "views 2 with mix"),
        ({"weights": np.ones(4)}, r"weights have the shape \[4\], expected \[10\], one for each example of the"),
        ({"weights": -np.ones(10)}, r"weights\[0\] is -1.0, expected a finite number"),
        ({"weights": np.array([1.0] * 9 + [np.nan])}, r"weights\[9\] is nan"),
        ({"weights": np.array([1.0] * 9 + [np.inf])}, r"weights\[9\] is inf"),
        ({"weights": np.array(["1"] * 10)}, "weights are <U1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    """Bug: a setting fails after minutes, in a thread, or trains on something that nobody asked for."""
    with pytest.raises(ValueError, match=message):
        inputs(**settings)


def test_what_is_kept():
    """Bug: lists stay lists, or the caller's arrays change under the run."""
    given = np.array([4, 2, 7], np.uint8)
    kept = inputs(given, image_size=[np.int64(6), 5], weights=list(range(10)), batch_size=np.int64(2))
    given[0] = 9
    assert kept.indices.tolist() == [4, 2, 7] and kept.indices.dtype == np.int64
    assert kept.image_size == (6, 5) and all(type(side) is int for side in kept.image_size)
    assert kept.weights.dtype == np.float32 and len(kept) == 3 and kept.steps_per_epoch == 1
    with pytest.raises(ValueError, match="read-only"):
        kept.indices[0] = 0


def test_steps_per_epoch():
    """Bug: an epoch of no steps, or of one that is not whole."""
    assert [inputs(batch_size=size).steps_per_epoch for size in (1, 3, 4, 10)] == [10, 3, 2, 1]
    large = inputs(range(5), batch_size=6)  # allowed: an evaluation pads it
    with pytest.raises(ValueError, match="batch_size 6: a set of 5 examples gives batches of 1 to 5"):
        _ = large.steps_per_epoch


def test_examples_of_both_sides_are_refused():
    """Bug: a model is scored on what it was trained on."""
    with pytest.raises(ValueError, match=r"2 of the 5 held-out examples.*: 5.png, 6.png; .*jaxft.data.folds"):
        overlap(inputs(range(7)), inputs(range(5, 10)))
    with pytest.raises(ValueError, match=r"7 of the 7 .*: 0.png, 1.png, 2.png and 4 more"):
        overlap(inputs(range(7)), inputs(range(7)))


def test_groups_of_both_sides_are_told():
    """Bug: a driver who is trained on and tested passes without a word, or separate drivers give a warning."""
    assert overlap(inputs(range(4)), inputs(range(4, 10))) == []
    (line,) = overlap(inputs(range(5)), inputs(range(5, 10)))
    assert line.startswith("1 groups are trained on and held out: c;")
    alone = replace(DATA, groups=DATA.names)
    assert overlap(inputs(range(5), alone), inputs(range(5, 10), alone)) == []
    unknown = replace(DATA, groups=("",) * 10)
    assert overlap(inputs(range(5), unknown), inputs(range(5, 10), unknown)) == []


def test_identical_images_of_both_sides_are_told():
    """Bug: the same file under two names, or in two datasets, leaks unseen."""
    pixels = PIXELS.copy()
    pixels[8], pixels[9] = pixels[0], pixels[1]
    doubles = replace(DATA, images=pixels)
    (line,) = overlap(inputs(range(4), doubles), inputs(range(4, 10), doubles))
    assert line.startswith("2 held-out images equal one that is trained on, byte for byte: 8.png, 9.png;")
    same = replace(DATA, name="again", groups=DATA.names)
    (line,) = overlap(inputs(range(4)), inputs([9, 3, 0, 1, 2], same))
    assert line.startswith("4 held-out images") and "3.png, 0.png, 1.png and 1 more" in line
