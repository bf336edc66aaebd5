import csv
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from experiments import standin
from experiments.standin import cabin


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_seed_draws_the_same_files(tmp_path):
    """Bug: a picture depends on the threads, the clock, or on how many others are drawn."""
    small = files(standin.render(tmp_path / "a", drivers=2, images_per_driver=10, seed=5, workers=1))
    again = files(standin.render(tmp_path / "b", drivers=2, images_per_driver=10, seed=5, workers=4))
    large = files(standin.render(tmp_path / "c", drivers=3, images_per_driver=12, seed=5))
    other = files(standin.render(tmp_path / "d", drivers=2, images_per_driver=10, seed=6))
    assert small == again
    pictures = [name for name in small if name.endswith(".jpg")]
    assert len(pictures) == 20 and all(large[name] == small[name] for name in pictures)
    assert all(other[name] != small[name] for name in pictures)


def test_kaggles_layout(tmp_path):
    """Bug: the csv and the folders disagree, classes are uneven, or images are not Kaggle's 640×480 JPEG."""
    root = standin.render(tmp_path / "data", drivers=3, images_per_driver=20)
    rows = list(csv.DictReader((root / "driver_imgs_list.csv").read_text(encoding="utf-8").splitlines()))
    assert list(rows[0]) == ["subject", "classname", "img"] and len(rows) == 60
    assert {f"imgs/train/{row['classname']}/{row['img']}" for row in rows} == {
        name for name in files(root) if name.endswith(".jpg")
    }
    counts = {(row["subject"], row["classname"]) for row in rows}
    assert len(counts) == 30 and len(rows) == 2 * len(counts)
    for row in rows[::13]:
        data = (root / "imgs/train" / row["classname"] / row["img"]).read_bytes()
        assert simplejpeg.decode_jpeg_header(data)[:3] == (480, 640, "YCbCr")
    assert "nothing about State Farm" in json.loads((root / standin.MARKER).read_text(encoding="utf-8"))["note"]


def draw(driver=0, label=0, moment=0.0, noise=0):
    return cabin.picture(
        cabin.random_driver(np.random.default_rng([1, driver])),
        label,
        clip=np.random.default_rng([1, 7]),
        moment=moment,
        noise=np.random.default_rng([1, noise]),
    ).astype(int)


def difference(a, b):
    """Mean over pixels whose difference is more than noise."""
    return (np.abs(a - b).max(-1) > 60).mean()


def test_postures_differ(monkeypatch):
    """Bug: two classes are drawn in the same way."""
    rows = [(label, row) for label, variants in enumerate(cabin.POSTURES) for row in variants]
    # One row a class, because choosing among several moves the generator on: the background would differ as well.
    monkeypatch.setattr(cabin, "POSTURES", tuple((row,) for _, row in rows))
    pictures = [draw(label=k) for k in range(len(rows))]
    for i, (label, _) in enumerate(rows):
        for j, (other, _) in enumerate(rows[:i]):
            assert label == other or difference(pictures[i], pictures[j]) > 0.01, (label, other)


def test_movement_is_slow():
    """Bug: a sequence is one picture, or jumps."""
    near = difference(draw(moment=0.0), draw(moment=0.3, noise=1))
    far = difference(draw(), draw(driver=3))
    assert 0 < near < 0.5 * far
    assert not np.array_equal(draw(moment=0.0), draw(moment=1.0))


def test_drivers_look_and_sit_differently():
    """Bug: the seed does not reach the driver, so that folds by driver test nothing."""
    pictures = [draw(driver=d) for d in range(5)]
    assert min(difference(pictures[i], pictures[j]) for i in range(5) for j in range(i)) > 0.1


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    """Bug: a half-drawn folder is taken for a whole set by the next run."""
    draw_one = standin.jpeg

    def fails(seed, driver, image, scale):
        if image == 7:
            raise KeyboardInterrupt
        return draw_one(seed, driver, image, scale)

    monkeypatch.setattr(standin, "jpeg", fails)
    with pytest.raises(KeyboardInterrupt):
        standin.render(tmp_path / "data", drivers=1, images_per_driver=10)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_reused_or_refused(tmp_path, monkeypatch):
    """Bug: pictures are drawn again at every start, or a user's own folder is written into."""
    root = standin.render(tmp_path / "data", drivers=1, images_per_driver=10)
    monkeypatch.setattr(standin, "jpeg", lambda *place: pytest.fail("drawn again"))
    assert standin.render(root, drivers=1, images_per_driver=10) == root
    with pytest.raises(ValueError, match="is not this stand-in"):
        standin.render(root, drivers=2, images_per_driver=10)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine is there"):
        standin.render(tmp_path / "mine", drivers=1, images_per_driver=10)


def test_a_full_disk_is_named_and_left_clean(tmp_path, monkeypatch):
    """Bug: "No space left on device" with no word of which, or half a set that fills it."""
    written = []

    def fills_up(path, data):
        written.append(path)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")  # as a write raises it: without the file's name

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    with pytest.raises(OSError, match=r"data; nothing of it is left;.*No space left") as caught:
        standin.render(tmp_path / "data", drivers=1, images_per_driver=10, workers=1)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_draw_the_same(tmp_path, monkeypatch):
    """Bug: the slower of two runs that start together fails, or takes a different set for its own."""
    fast = standin.render(tmp_path / "fast", drivers=1, images_per_driver=10)
    other = standin.render(tmp_path / "other", drivers=1, images_per_driver=10, seed=1)
    write = standin._write

    def render_while(winner, root):
        def overtaken(*arguments):
            write(*arguments)
            shutil.copytree(winner, root)

        monkeypatch.setattr(standin, "_write", overtaken)
        return standin.render(root, drivers=1, images_per_driver=10)

    assert files(render_while(fast, tmp_path / "same")) == files(fast)
    with pytest.raises(OSError, match="cannot be written to .*different"):
        render_while(other, tmp_path / "different")
    assert files(tmp_path / "different") == files(other)
    assert {path.name for path in tmp_path.iterdir()} == {"fast", "other", "same", "different"}


def test_bad_requests(tmp_path):
    """Bug: an empty class folder, or a raw error from the depth of tempfile."""
    with pytest.raises(ValueError, match="one of each class"):
        standin.render(tmp_path / "data", drivers=1, images_per_driver=9)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        standin.render(tmp_path / "file" / "data", drivers=1, images_per_driver=10)


def test_a_test_set_of_other_drivers_in_random_order(tmp_path):
    """Bug: names tell the order of the film; a driver of the training set; the solution does not fit the pictures."""
    root = standin.render(tmp_path / "data", drivers=2, images_per_driver=10, test=(3, 20), scale=0.25)
    rows = list(csv.DictReader((root / "solution.csv").read_text(encoding="utf-8").splitlines()))
    sample = list(csv.DictReader((root / "sample_submission.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["img"] for row in sample] == [row["img"] for row in rows]
    assert {row["img"] for row in rows} == {path.name for path in (root / "imgs/test").iterdir()} and len(rows) == 60
    train = set(csv.DictReader((root / "driver_imgs_list.csv").read_text(encoding="utf-8").splitlines()).__next__())
    assert train and not {row["subject"] for row in rows} & {"p000", "p001"}
    in_order = sorted(rows, key=lambda row: int(row["img"][4:-4]))
    assert len({row["subject"] for row in in_order[:12]}) == 3  # no driver's pictures come together
    name, label = rows[0]["img"], int(rows[0]["classname"][1:])
    drawn = [
        standin.jpeg(0, standin.TEST + driver, image, 0.25) for driver in range(3) for image in range(label, 20, 10)
    ]
    assert (root / "imgs/test" / name).read_bytes() in drawn
    assert simplejpeg.decode_jpeg_header(drawn[0])[:2] == (120, 160)
