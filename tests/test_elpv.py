import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import wheel

from jaxft import fetch
from jaxft.data import Inputs, decode, elpv, loader

ROWS = (
    "images/a.png  1.0                 mono",
    "images/b.png  0.3333333333333333  poly",
    "images/c.png  0.6666666 mono",
)


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (6, 4), grey).save(file, "PNG")
    return file.getvalue()


def cells(folder: Path, rows: tuple[str, ...] = ROWS, images: str = "abc", grey: int = 0) -> Path:
    members = {f"{elpv.FOLDER}images/{name}.png": png(grey + ord(name)) for name in images}
    # The wheel holds the images in another order than the csv.
    members = dict(reversed(members.items())) | {f"{elpv.FOLDER}labels.csv": "\n".join(rows).encode()}
    return wheel(folder, "elpv_dataset", "1.0.0.post1", members)


def test_columns(tmp_path: Path):
    """Fails if images, labels and types of different cells mix, or 1/3 counts as defective or 2/3 as sound."""
    found = elpv.read(cells(tmp_path))
    assert found.names == found.groups == ("a.png", "b.png", "c.png")
    assert found.labels.tolist() == [1, 0, 1]
    assert found.labels.dtype == np.int32
    assert [found.classes[label] for label in found.labels] == ["defective", "functional", "defective"]
    np.testing.assert_array_equal(found.probabilities, np.asarray([1, 1 / 3, 2 / 3], np.float32))
    assert found.types == ("mono", "poly", "mono")
    assert found.strata == ((1, "mono"), (0, "poly"), (1, "mono"))
    for i, name in enumerate("abc"):
        assert (decode.pixels(found.images[i], (4, 6), name) == ord(name)).all()


def test_cells_are_batched(tmp_path: Path):
    """Fails if the images cannot be batched."""
    found = elpv.read(cells(tmp_path))
    (batch,) = loader.eval_batches(Inputs(found, np.array([2, 0, 1]), (4, 6), batch_size=3), found.images)
    assert batch["image"][:, 0, 0, 0].tolist() == [ord("c"), ord("a"), ord("b")]
    assert batch["label"].tolist() == [1, 1, 0]


def test_fingerprint(tmp_path: Path):
    """Fails if changed pixels or labels pass for the same data, or a rewritten zip for changed data."""
    first = elpv.read(cells(tmp_path)).fingerprint
    assert elpv.read(cells(tmp_path)).fingerprint == first
    seen = {first, elpv.read(cells(tmp_path, grey=1)).fingerprint}
    seen.add(elpv.read(cells(tmp_path, (ROWS[0].replace("1.0", "0.0"), *ROWS[1:]))).fingerprint)
    seen.add(elpv.read(cells(tmp_path, ROWS[::-1])).fingerprint)
    assert len(seen) == 4


def test_the_same_cells_for_other_tasks(tmp_path: Path):
    """Bug: labels or values get out of step with the images, or the strata change with the task."""
    found = elpv.read(cells(tmp_path))
    several, values = found.with_labels(), found.with_values()
    assert (several.target, several.classes) == ("labels", ("polycrystalline", "defective"))
    assert several.labels.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert (values.target, values.classes) == ("values", ("probability",))
    np.testing.assert_array_equal(values.labels, found.probabilities[:, None])
    assert found.strata == several.strata == values.strata
    assert found.digests == several.digests == values.digests
    assert len({each.fingerprint for each in (found, several, values)}) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((ROWS[0], "images/b.png 0.5 poly"), r"line 2 of .*labels\.csv in .*whl is 'images/b.png 0.5 poly'; expected"),
        ((ROWS[0], "images/b.png nan poly"), "line 2 .*expected a path, a probability"),
        ((ROWS[0], "", "images/b.png much poly"), "line 3 .*expected a path, a probability"),
        (("images/a.png 1.0",), "line 1 .*expected a path, a probability"),
        (("images/a.png 1.0 thin",), "line 1 .*the type is 'thin', expected mono or poly"),
        ((ROWS[0], ROWS[0]), "line 2 .*names images/a.png a second time"),
        ((*ROWS, "images/z.png 1.0 mono"), "names 1 images that the wheel lacks, the first images/z.png"),
        (("",), "labels.csv in .* is empty"),
    ],
)
def test_bad_csv(tmp_path: Path, rows: tuple[str, ...], message: str):
    """Fails if a row that makes no sense is dropped or read as something, or the message does not name its place."""
    with pytest.raises(ValueError, match=message):
        elpv.read(cells(tmp_path, rows))


def test_other_wheel(tmp_path: Path):
    """Fails if a wheel of something else ends in a bare KeyError."""
    with pytest.raises(ValueError, match="there is no elpv_dataset/data/labels.csv in"):
        elpv.read(wheel(tmp_path, "other", "1.0", {}))


def test_wheel_is_checked_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fails if another wheel than the published one is read, or the cached one is fetched again."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path = cells(tmp_path)
    with pytest.raises(fetch.Unavailable, match=f"not the published file.*expected {elpv.SHA256}"):
        elpv.prepare(tmp_path / "cache")
    monkeypatch.setattr(elpv, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(elpv.prepare(tmp_path / "cache")) == 3
    path.unlink()
    assert len(elpv.prepare(tmp_path / "cache")) == 3


@pytest.mark.slow
def test_as_published(tmp_path: Path):
    """Fails if the package is gone or changed, or its counts are not those of the paper's table of cells."""
    found = elpv.prepare(tmp_path)
    thirds = (found.probabilities * 3).round().astype(int).tolist()
    counts = Counter(zip(found.types, thirds, strict=True))
    assert [counts["mono", third] for third in range(4)] == [588, 117, 56, 313]
    assert [counts["poly", third] for third in range(4)] == [920, 178, 50, 402]
    assert int(found.labels.sum()) == 821
    image = decode.pixels(found.images[2623], (300, 300), found.names[2623])
    assert image.std() > 1
    encoded = found.images[0]
    assert isinstance(encoded, bytes)
    with Image.open(io.BytesIO(encoded)) as first:
        assert first.size == (300, 300)
