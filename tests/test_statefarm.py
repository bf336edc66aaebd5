"""State Farm: Kaggle's layouts, what is refused of them, and the TFDS build."""

import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxft.data import decode, statefarm

CSV = "driver_imgs_list.csv"


def jpeg(i: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 48)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_csv(root: Path, rows, header=("subject", "classname", "img")) -> None:
    with open(root / CSV, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def read_rows(root: Path) -> list[list[str]]:
    with open(root / CSV, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def make(root: Path, per_class: int = 2, test: int = 3) -> Path:
    """A folder as Kaggle's, unpacked: drivers p000, p001, …, in the csv's shuffled order."""
    rows = []
    for i in range(10 * per_class):
        path = root / f"imgs/train/c{i % 10}/img_{i * 37}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
        rows.append((f"p{i // 7:03}", f"c{i % 10}", path.name))
    for i in range(test):
        path = root / f"imgs/test/img_{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(1000 + i))
    write_csv(root, [rows[i] for i in np.random.default_rng(0).permutation(len(rows))])
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("kaggle"))


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "data"))


def zipped(path: Path, root: Path, names, prefix: str = "") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            for file in [root / name] if (root / name).is_file() else sorted((root / name).rglob("*")):
                archive.write(file, file.relative_to(root).as_posix().removeprefix(prefix))


def assert_is(data, folder: Path) -> None:
    """The dataset holds exactly what the csv and the folder do, in the csv's order."""
    rows = read_rows(folder)
    assert list(zip(data.groups, [f"c{label}" for label in data.labels], data.names, strict=True)) == [
        tuple(row) for row in rows
    ]
    for i, (_, classname, img) in enumerate(rows):
        assert data.images[i] == (folder / "imgs/train" / classname / img).read_bytes()


def test_the_build_holds_the_bytes_and_the_csv(folder, tmp_path):
    """Fails when images are recompressed, or columns get out of step with images (shuffled by TFDS, sorted by name)."""
    data = statefarm.prepare(folder, tmp_path)
    assert_is(data, folder)
    assert data.labels.dtype == np.int32
    assert data.classes[0] == "safe driving" and data.classes[9] == "talking to passenger"
    assert len(data.fingerprint) == 64


def test_tfds_itself_reads_what_was_built(folder, tmp_path):
    """Fails when the records are not a TFDS dataset that others can open, with these features."""
    statefarm.prepare(folder, tmp_path)
    (info,) = tmp_path.rglob("dataset_info.json")
    builder = tfds.builder_from_directory(info.parent)
    assert builder.info.splits["train"].num_examples == 20
    assert builder.info.features["label"].names == [f"c{i}" for i in range(10)]
    examples = builder.as_data_source("train")
    for example, (driver, classname, img) in zip(examples, read_rows(folder), strict=True):
        assert example["driver"].decode() == driver and example["filename"].decode() == img
        assert f"c{example['label']}" == classname
        assert example["image"].shape == (48, 64, 3)


def test_the_test_split_has_no_labels(folder, tmp_path):
    """Fails when unknown labels become class 0, or the order is not that of the names."""
    data = statefarm.prepare(folder, tmp_path, split="test")
    assert data.labels.tolist() == [-1] * 3 and set(data.groups) == {""}
    assert data.names == ("img_0.jpg", "img_1.jpg", "img_2.jpg")
    assert [data.images[i] for i in range(3)] == [jpeg(1000 + i) for i in range(3)]


def test_the_test_split_may_be_absent(tmp_path):
    """Fails when training needs Kaggle's test images."""
    root = make(tmp_path / "data", 1, test=0)
    assert len(statefarm.prepare(root, tmp_path / "cache")) == 10
    with pytest.raises(ValueError, match="holds no split 'test', only train"):
        statefarm.prepare(root, tmp_path / "cache", split="test")


@pytest.mark.parametrize("form", ["one zip", "two zips", "imgs.zip with imgs/", "imgs.zip and csv"])
def test_zips_are_read_in_place(folder, tmp_path, form):
    """Fails when a form in which Kaggle serves the data is not read, is unpacked, or counts as other data."""
    root = tmp_path / "zips"
    root.mkdir()
    if form == "one zip":
        zipped(root / "state-farm-distracted-driver-detection.zip", folder, ["imgs", CSV])
    else:
        zipped(root / "imgs.zip", folder, ["imgs"], "" if "with" in form else "imgs/")
        if form == "imgs.zip and csv":
            shutil.copy(folder / CSV, root)
        else:
            zipped(root / f"{CSV}.zip", folder, [CSV])
    before = sorted(root.rglob("*"))
    data = statefarm.prepare(root, tmp_path / "cache")
    assert_is(data, folder)
    assert data.fingerprint == statefarm.prepare(folder, tmp_path / "cache2").fingerprint
    assert sorted(root.rglob("*")) == before
    assert len(statefarm.prepare(root, tmp_path / "cache", split="test")) == 3


def test_a_zip_of_windows_and_a_home_folder_are_read(folder, tmp_path, monkeypatch):
    """Bug: backslashes in a zip are said to point outside; ~ makes a folder of that name."""
    with zipfile.ZipFile(tmp_path / "state-farm-distracted-driver-detection.zip", "w") as archive:
        for path in files(folder):
            archive.writestr(path.relative_to(folder).as_posix().replace("/", "\\"), path.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert_is(statefarm.prepare("~", "~/cache"), folder)
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "state-farm-distracted-driver-detection.zip"}


def test_nothing_is_left_in_the_temporary_folder(folder, tmp_path, monkeypatch):
    """Fails when TFDS looks for the dataset in its bucket, leaving an empty folder each time."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    statefarm.prepare(folder, tmp_path / "cache")
    assert list((tmp_path / "tmp").iterdir()) == []


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_a_second_run_builds_nothing(folder, tmp_path, capfd):
    """Fails when every run builds anew, or anything is printed where no terminal is."""
    first = statefarm.prepare(folder, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    second = statefarm.prepare(folder, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == before
    assert first.fingerprint == second.fingerprint
    assert capfd.readouterr() == ("", "")


def relabel(root: Path) -> None:
    rows = read_rows(root)
    write_csv(root, [["p999", *rows[0][1:]], *rows[1:]])


def another_picture(root: Path) -> None:
    (root / "imgs/train/c0/img_0.jpg").write_bytes(jpeg(5000))


def same_size(root: Path) -> None:
    path = root / "imgs/train/c0/img_0.jpg"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [relabel, another_picture, same_size])
def test_changed_data_are_built_again(broken, tmp_path, change):
    """Fails when an old build stands in for changed data, or two data sets share a fingerprint."""
    before = statefarm.prepare(broken, tmp_path / "cache").fingerprint
    change(broken)
    data = statefarm.prepare(broken, tmp_path / "cache")
    assert_is(data, broken)
    assert data.fingerprint != before


def test_a_touched_file_keeps_its_fingerprint(broken, tmp_path):
    """Fails when the fingerprint holds times of change: a copied folder would not resume its run."""
    before = statefarm.prepare(broken, tmp_path / "cache").fingerprint
    os.utime(broken / "imgs/train/c0/img_0.jpg", ns=(1, 1))
    assert statefarm.prepare(broken, tmp_path / "cache").fingerprint == before


# What is refused. Each breaks one thing, and says what the message must name.


def no_csv(root):
    (root / CSV).unlink()


def no_images(root):
    shutil.rmtree(root / "imgs")


def other_header(root):
    write_csv(root, read_rows(root), ("driver", "class", "image"))


def empty_csv(root):
    (root / CSV).write_bytes(b"")


def binary_csv(root):
    (root / CSV).write_bytes(bytes(range(128, 256)))


def short_row(root):
    write_csv(root, [*read_rows(root), ["p001", "c1"]])


def no_driver(root):
    write_csv(root, [*read_rows(root), ["", "c1", "img_1.jpg"]])


def csv_class(root):
    write_csv(root, [*read_rows(root), ["p001", "c10", "img_1.jpg"]])


def missing_image(root):
    (root / "imgs/train/c3/img_111.jpg").unlink()


def moved_image(root):
    (root / "imgs/train/c3/img_111.jpg").rename(root / "imgs/train/c4/img_111.jpg")


def extra_image(root):
    (root / "imgs/train/c3/new.jpg").write_bytes(jpeg(1))


def image_twice_in_csv(root):
    write_csv(root, [*read_rows(root), ["p009", "c3", "img_111.jpg"]])


def image_in_two_folders(root):
    shutil.copy(root / "imgs/train/c3/img_111.jpg", root / "imgs/train/c4")


def empty_folder(root):
    for path in (root / "imgs/train/c7").iterdir():
        path.unlink()


def missing_folder(root):
    shutil.rmtree(root / "imgs/train/c7")


def unknown_folder(root):
    (root / "imgs/train/c10").mkdir()


def absolute_member(root):
    no_images(root)
    with zipfile.ZipFile(root / "imgs.zip", "w") as archive:
        archive.writestr("/etc/imgs/train/c0/img_1.jpg", b"")


def climbing_member(root):
    no_images(root)
    with zipfile.ZipFile(root / "imgs.zip", "w") as archive:
        archive.writestr("imgs/train/c0/../../../../img_1.jpg", b"")


def cut_zip(root):
    no_images(root)
    (root / "imgs.zip").write_bytes(b"PK\3\4" + bytes(100))


REFUSED = [
    (no_csv, FileNotFoundError, r"holds no driver_imgs_list\.csv \(found: imgs\)"),
    (no_images, FileNotFoundError, r"holds no imgs/train/ \(found: driver_imgs_list\.csv\)"),
    (other_header, ValueError, "begins with 'driver,class,image', expected 'subject,classname,img'"),
    (empty_csv, ValueError, "begins with '', expected 'subject,classname,img'"),
    (binary_csv, ValueError, r"driver_imgs_list\.csv is not a csv file"),
    (short_row, ValueError, "line 22: expected subject,classname,img, found 'p001,c1'"),
    (no_driver, ValueError, "line 22: expected subject,classname,img, found ',c1,img_1.jpg'"),
    (csv_class, ValueError, "line 22: unknown class 'c10', expected c0, c1"),
    (missing_image, ValueError, r"names a missing image: imgs/train/c3/img_111\.jpg"),
    (moved_image, ValueError, r"names a missing image: imgs/train/c3/img_111\.jpg"),
    (extra_image, ValueError, r"does not name: imgs/train/c3/new\.jpg; its driver is unknown"),
    (image_twice_in_csv, ValueError, r"names an image more than once: img_111\.jpg"),
    (image_in_two_folders, ValueError, r"more than one class folder: img_111\.jpg"),
    (empty_folder, ValueError, "empty class folder: imgs/train/c7"),
    (missing_folder, ValueError, "missing class folder: imgs/train/c7"),
    (unknown_folder, ValueError, "unknown class folder: imgs/train/c10"),
    (absolute_member, ValueError, "member '/etc/imgs/train/c0/img_1.jpg' that points outside"),
    (climbing_member, ValueError, "that points outside"),
    (cut_zip, ValueError, r"imgs\.zip is not a whole zip file"),
]


@pytest.mark.parametrize(("damage", "error", "message"), REFUSED, ids=[row[0].__name__ for row in REFUSED])
def test_bad_data_are_refused_before_anything_is_written(broken, tmp_path, damage, error, message):
    """Fails when bad data build, fail with a message that does not name the thing, or leave something behind."""
    damage(broken)
    with pytest.raises(error, match=message):
        statefarm.prepare(broken, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["absent", f"data/{CSV}"])
def test_a_folder_that_is_none_says_where_to_get_the_data(broken, tmp_path, place):
    """Fails when the user is not told which layout is expected and where the data are."""
    with pytest.raises(FileNotFoundError) as caught:
        statefarm.prepare(tmp_path / place, tmp_path / "cache")
    assert place in str(caught.value)
    assert "kaggle.com/competitions" in str(caught.value) and "imgs/train/c0 … c9" in str(caught.value)


def test_junk_beside_the_images_is_ignored(broken, tmp_path):
    """Fails when what file managers, notebooks and network disks leave stops the build."""
    (broken / "imgs/train/c0/.DS_Store").write_bytes(b"x")
    (broken / "imgs/train/c0/._img_0.jpg").write_bytes(b"x")
    (broken / "imgs/train/Thumbs.db").write_bytes(b"x")
    (broken / "imgs/train/.ipynb_checkpoints").mkdir()
    (broken / "imgs/train/@eaDir").mkdir()
    (broken / "imgs/train/@eaDir/img_0.jpg").write_bytes(b"x")
    zipped(tmp_path / "state-farm-distracted-driver-detection.zip", broken, ["imgs", CSV])
    with zipfile.ZipFile(tmp_path / "state-farm-distracted-driver-detection.zip", "a") as archive:
        archive.writestr("__MACOSX/imgs/train/c0/._img_0.jpg", b"x")
        archive.writestr("sample_submission.csv", b"x")
    assert len(statefarm.prepare(broken, tmp_path / "cache")) == 20
    assert len(statefarm.prepare(tmp_path, tmp_path / "cache")) == 20


@pytest.mark.parametrize("image", ["train/c5/img_555.jpg", "test/img_2.jpg"])
@pytest.mark.parametrize("contents", [b"", b"not a picture", jpeg(0)[:40]])
def test_a_corrupt_jpeg_is_named_and_leaves_no_build(broken, tmp_path, image, contents):
    """Fails when a build with a broken image counts as built, or half of one stays behind."""
    good = (broken / "imgs" / image).read_bytes()
    (broken / "imgs" / image).write_bytes(contents)
    with pytest.raises(ValueError, match=f"image imgs/{image} "):
        statefarm.prepare(broken, tmp_path / "cache")
    assert files(tmp_path / "cache") == []
    (broken / "imgs" / image).write_bytes(good)
    assert_is(statefarm.prepare(broken, tmp_path / "cache"), broken)


def test_a_damaged_zip_member_is_named(folder, tmp_path):
    """Fails when zipfile's own error escapes, or wrong bytes are built: the checksum must be looked at."""
    path = tmp_path / "state-farm-distracted-driver-detection.zip"
    zipped(path, folder, ["imgs", CSV])
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("imgs/train/c3/img_111.jpg")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"imgs/train/c3/img_111\.jpg in .* cannot be read"):
        statefarm.prepare(tmp_path, tmp_path / "cache")
    assert files(tmp_path / "cache") == []


def test_a_build_that_another_process_finishes_first_is_used(folder, tmp_path, monkeypatch):
    """Fails when two runs begun at once end with one of them failing to rename its folder."""
    check, nested = decode.jpeg_size, []

    def meanwhile(data, name):
        if not nested:
            nested.append(True)
            statefarm.prepare(folder, tmp_path)
        return check(data, name)

    monkeypatch.setattr(decode, "jpeg_size", meanwhile)
    assert_is(statefarm.prepare(folder, tmp_path), folder)
    assert len(list(tmp_path.rglob("dataset_info.json"))) == 1


def test_a_build_that_lost_a_file_says_what_to_delete(folder, tmp_path):
    """Fails when a record file that is gone shows as an obscure error in the middle of training."""
    statefarm.prepare(folder, tmp_path)
    next(tmp_path.rglob("*train.array_record*")).unlink()
    with pytest.raises(FileNotFoundError, match="train.array_record.* delete that folder and run again"):
        statefarm.prepare(folder, tmp_path)


def test_a_read_only_cache_is_named(folder, tmp_path):
    """Fails when a cache that cannot be written gives another error than the system's, with its path."""
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        statefarm.prepare(folder, blocked / "cache")


def test_several_shards_keep_the_order(tmp_path, monkeypatch):
    """Fails when records of several files are read in another order than they were written."""

    monkeypatch.setattr(statefarm, "_SHARD", 7)
    root = make(tmp_path / "data")
    assert_is(statefarm.prepare(root, tmp_path / "cache"), root)
    assert len(list((tmp_path / "cache").rglob("*train.array_record*"))) == 3


def test_building_does_not_need_memory_for_the_whole_split(folder, tmp_path, monkeypatch):
    """Fails when the build goes through TFDS's shuffler, which above its limit needs an installed TensorFlow."""
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    assert_is(statefarm.prepare(folder, tmp_path), folder)


def test_neither_tensorflow_nor_the_network_is_touched(folder, tmp_path):
    """Fails when TensorFlow is imported, or a name is looked up or an address connected to (a hang when offline)."""
    program = f"""
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"network: {{event}} {{args}}")
from pathlib import Path
from jaxft.data import statefarm
assert "tensorflow_datasets" not in sys.modules, "imported before it is needed"
sys.addaudithook(hook)
data = statefarm.prepare(Path({str(folder)!r}), Path({str(tmp_path)!r}))
data.images[0]
assert "tensorflow" not in sys.modules
print(len(data))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "20\n", "")
