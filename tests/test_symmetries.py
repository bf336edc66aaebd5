"""Images in several symmetries, as examples of their own."""

import io

import numpy as np
import pytest
import tiny
from PIL import Image

from jaxft.data import Inputs, loader
from jaxft.data.symmetries import SYMMETRIES, symmetric, viewed


def test_all_views_of_a_square_are_different_and_are_its_symmetries():
    """Bug: a view is there twice, and another is missing."""
    data = tiny.dataset(3)
    found = symmetric(data, "square")
    square = np.asarray(data.images[1])
    group = {np.rot90(each, turns).tobytes() for each in (square, square[:, ::-1]) for turns in range(4)}
    assert len(group) == 8  # the image has no symmetry of its own
    assert {np.asarray(found.images[i]).tobytes() for i in viewed(np.asarray([1]), data, "square")} == group


@pytest.mark.parametrize("kind", SYMMETRIES)
def test_views_keep_label_and_group(kind):
    """Bug: columns of views and images get out of step; a split by groups parts the views of one image."""
    data = tiny.dataset(5)
    found = symmetric(data, kind)
    count = len(SYMMETRIES[kind])
    assert len(found) == 5 * count and found.names[:5] == data.names
    for i in range(5):
        rows = viewed(np.asarray([i]), data, kind)
        assert set(found.labels[rows].tolist()) == {data.labels[i]}
        assert {found.groups[row] for row in rows} == {data.groups[i]}
        assert all(found.names[row].startswith(data.names[i]) for row in rows)
    np.testing.assert_array_equal(viewed(np.asarray([3, 1]), data, kind)[:4], [3, 1, 8, 6])


def test_files_are_decoded_before_they_are_turned():
    """Bug: bytes of a file are reversed; a view is of the resized image's neighbour."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = tiny.dataset(1)
    data = type(data)("one", [file.getvalue()], data.labels, data.groups, data.names, data.classes)
    found = symmetric(data, "flips")
    (batch,) = loader.eval_batches(Inputs(found, np.arange(4), (6, 4), batch_size=4), found.images)
    for view, expected in zip(batch["image"], (pixels, pixels[:, ::-1], pixels[::-1], pixels[::-1, ::-1]), strict=True):
        np.testing.assert_array_equal(view, expected)


def test_an_unknown_kind():
    """Bug: a wrong word is a KeyError."""
    with pytest.raises(ValueError, match="'rotations': expected mirror, flips, square"):
        symmetric(tiny.dataset(2), "rotations")  # pyright: ignore[reportArgumentType]
