"""Images that cannot be decoded, left out where that is allowed."""

import dataclasses
import io

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import cache, kept_programs, no_pictures  # noqa: F401

from jaxft import model
from jaxft.data.decode import RGB
from jaxft.data.readable import leave_out
from jaxft.phase import Phase


def dataset(bad=(3, 25), target="class"):
    """Thirty PNG files of which some are cut off."""
    data, files = tiny.dataset(target=target), []
    for pixels in data.images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    for number in bad:
        files[number] = files[number][: len(files[number]) // 2]
    return dataclasses.replace(data, images=files)


@pytest.mark.parametrize("target", ["class", "labels", "values"])
def test_a_run_leaves_them_out_and_says_which(tmp_path, capsys, target, kept_programs, no_pictures):  # noqa: F811
    """Bug: one broken file among thousands ends a run that was told to go on, or it is trained on as a black image."""
    with pytest.raises(ValueError, match=r"image img_3.png .*"):
        tiny.run(tmp_path / "strict", [Phase(1, lambda count: 0.01)], data=dataset(target=target))
    data = leave_out(dataset(target=target), RGB, 0.1)
    said = capsys.readouterr().out
    assert "WARNING: 2 of 30 images cannot be decoded and are left out: image img_3.png" in said and "img_25" in said
    assert np.flatnonzero(~data.has_label).tolist() == [3, 25]
    _, found = tiny.run(tmp_path / "run", [Phase(1, lambda count: 0.01)], data=data)
    assert np.flatnonzero(~data.has_label[found.index]).tolist() == [list(found.index).index(25)]
    assert not found.known[list(found.index).index(25)].any() and np.isfinite(found.outputs).all()
    opened = model.open(tmp_path / "run", net=tiny.Tiny())
    assert len(opened.predict(data, np.arange(30))) == 30


def test_more_than_is_allowed(capsys):
    """Bug: half of the images are left out of what was to be one in a hundred."""
    with pytest.raises(ValueError, match=r"2 of 30 images cannot be decoded, more than --corrupt 0.05 allows: .*img_3"):
        leave_out(dataset(), RGB, 0.05)
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="--corrupt"):
            leave_out(dataset(), RGB, share)
    whole = dataset(())
    assert leave_out(whole, RGB, 0.5) is whole and capsys.readouterr().out == ""
