"""Kaggle's files of State Farm distracted driver detection: found, checked against their csv, read in place."""

import csv
import hashlib
import io
import itertools
import lzma
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

URL = "https://www.kaggle.com/competitions/state-farm-distracted-driver-detection/data"
CLASSES = {
    "c0": "safe driving",
    "c1": "texting right",
    "c2": "phone right",
    "c3": "texting left",
    "c4": "phone left",
    "c5": "operating the radio",
    "c6": "drinking",
    "c7": "reaching behind",
    "c8": "hair and makeup",
    "c9": "talking to passenger",
}
"""Kaggle's class → what it shows; a label is the number in Kaggle's name."""

LAYOUT = f"""\
Expected, as Kaggle serves them ({URL}), either unpacked or not:
  imgs/train/c0 … c9/*.jpg, imgs/test/*.jpg (test may be absent)   or imgs.zip
  driver_imgs_list.csv                                             or driver_imgs_list.csv.zip
or one state-farm-distracted-driver-detection.zip that holds both."""

_CSV = "driver_imgs_list.csv"
_ZIP = "state-farm-distracted-driver-detection.zip"
_HEADER = ["subject", "classname", "img"]
_MAX_FILE = 64 * 2**20  # bytes of one member; Kaggle's images have about 45 kB


@dataclass(frozen=True)
class Example:
    """One image of the set: where its bytes are and what the csv says of it (class "" and driver "" in test)."""

    path: str  # within the data, "imgs/train/c0/img_1.jpg"
    classname: str
    driver: str

    @property
    def filename(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Layout:
    """Kaggle's data, checked: its examples, in the order in which they are built, and how to read one.

    Attributes:
        splits: "train" in the order of the csv and, where there is one, "test" in the order of the names.
        read: an example's path → the bytes of its file; not for several threads at once.
        key: SHA-256 of the csv and of every file's name, size and time of change (in a zip: its checksum).
    """

    splits: dict[str, tuple[Example, ...]]
    read: Callable[[str], bytes]
    key: str


def open_layout(data_dir: Path) -> Layout:
    """Find and check Kaggle's files; zips are read in place, and stay open as long as the layout lives.

    Raises:
        FileNotFoundError: the folder, the csv or the images are absent.
        ValueError: csv and images do not agree, or a class is empty or unknown. No image is opened.
    """
    files = _find(data_dir)
    data = files[_CSV].read()
    rows = _parse_csv(data)
    folders: dict[str, list[str]] = {}
    test: list[str] = []
    for path in files:
        if "/." in path.removesuffix("/.") or "/@" in path:  # .ipynb_checkpoints, ._img_1.jpg, Synology's @eaDir
            continue
        match path.split("/"):
            case "imgs", "train", classname, name:
                folder = folders.setdefault(classname, [])
                if _is_image(name):
                    folder.append(path)
            case "imgs", "test", name if _is_image(name):
                test.append(path)
    _check(rows, folders, data_dir)
    splits = {"train": tuple(Example(f"imgs/train/{c}/{img}", c, subject) for subject, c, img in rows)}
    if test:
        splits["test"] = tuple(Example(path, "", "") for path in sorted(test))
    digest = hashlib.sha256(data)
    for example in itertools.chain.from_iterable(splits.values()):
        digest.update(f"\0{example.path}\0{files[example.path].state}".encode())
    return Layout(splits, lambda path: files[path].read(), digest.hexdigest())


@dataclass(frozen=True)
class _File:
    state: str  # differs when the contents do
    read: Callable[[], bytes]


def _is_image(name: str) -> bool:
    return name.lower().endswith((".jpg", ".jpeg", ".png"))


def _find(data_dir: Path) -> dict[str, _File]:
    """The csv and everything in imgs/, by path; a folder is there as "imgs/train/c0/."."""
    if not data_dir.is_dir():
        what = "is a file, not the folder that holds it" if data_dir.exists() else "does not exist"
        raise FileNotFoundError(f"the data folder {data_dir} {what}\n{LAYOUT}")
    files: dict[str, _File] = {}
    if (data_dir / _ZIP).is_file():
        files |= _zip_members(data_dir / _ZIP)
    if (data_dir / f"{_CSV}.zip").is_file():
        files |= _zip_members(data_dir / f"{_CSV}.zip")
    if (data_dir / _CSV).is_file():
        files[_CSV] = _on_disk(str(data_dir / _CSV), (data_dir / _CSV).stat())
    # Unpacked images go before packed ones, never both.
    unpacked, packed = data_dir / "imgs", data_dir / "imgs.zip"
    if unpacked.is_dir() or packed.is_file():
        files = {path: file for path, file in files.items() if path == _CSV}
    if unpacked.is_dir():
        for folder in [*unpacked.glob("train/*/"), unpacked / "test"]:
            if folder.is_dir():
                name = folder.relative_to(data_dir).as_posix()
                files[f"{name}/."] = _File("", bytes)
                with os.scandir(folder) as entries:
                    files |= {f"{name}/{e.name}": _on_disk(e.path, e.stat()) for e in entries if _is_image(e.name)}
    elif packed.is_file():
        for path, file in _zip_members(packed).items():  # Kaggle's own holds train/ and test/
            files[path if path.startswith("imgs/") else f"imgs/{path}"] = file
    for wanted in (_CSV, "imgs/train/"):
        if not any(path.startswith(wanted) for path in files):
            found = ", ".join(sorted(path.name for path in data_dir.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{data_dir} holds no {wanted} (found: {found})\n{LAYOUT}")
    return files


def _on_disk(path: str, info: os.stat_result) -> _File:
    return _File(f"{info.st_size} {info.st_mtime_ns}", lambda: Path(path).read_bytes())


def _zip_members(path: Path) -> dict[str, _File]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as err:
        raise ValueError(f"{path} is not a whole zip file ({err}); download it again from {URL}") from err

    def reader(info: zipfile.ZipInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            try:
                return archive.read(info)
            # RuntimeError: encrypted; NotImplementedError, its subclass: an unknown compression; OSError: a place that
            # is not in the file.
            except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError, ValueError) as err:
                raise ValueError(f"{info.filename} in {path} cannot be read ({err}); download it again") from err

        return read

    files: dict[str, _File] = {}
    for info in archive.infolist():
        name = PurePosixPath(info.filename.replace("\\", "/"))  # some Windows tools write backslashes
        if name.is_absolute() or ".." in name.parts or ":" in info.filename:
            raise ValueError(f"{path} has a member {info.filename!r} that points outside; it is not Kaggle's zip")
        if name.parts[:1] == ("__MACOSX",):
            continue
        if info.file_size > _MAX_FILE:
            raise ValueError(f"{info.filename} in {path} unpacks to {info.file_size:,} bytes; at most {_MAX_FILE:,}")
        key = f"{name.as_posix()}/." if info.filename.endswith(("/", "\\")) else name.as_posix()
        if key in files:
            raise ValueError(f"{path} holds {info.filename!r} twice")
        files[key] = _File(f"{info.file_size} {info.CRC:08x}", reader(info))
    return files


def _parse_csv(data: bytes) -> list[tuple[str, str, str]]:
    try:
        lines = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as err:
        raise ValueError(f"{_CSV} is not a csv file ({err})") from err
    header = lines[0] if lines else []
    if header != _HEADER:
        raise ValueError(f"{_CSV} begins with {','.join(header)!r}, expected {','.join(_HEADER)!r}")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        if len(line) != 3 or not all(line):
            raise ValueError(f"{_CSV}, line {number}: expected {','.join(_HEADER)}, found {','.join(line)!r}")
        subject, classname, img = line
        if classname not in CLASSES:
            raise ValueError(f"{_CSV}, line {number}: unknown class {classname!r}, expected {', '.join(CLASSES)}")
        rows.append((subject, classname, img))
    return rows


def _check(rows: list[tuple[str, str, str]], folders: dict[str, list[str]], data_dir: Path) -> None:
    def fail(what: str, names: Iterable[str], remedy: str) -> None:
        if found := sorted(names):
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(f"{data_dir}: {what}: {', '.join(found[:5])}{more}; {remedy}")

    classes = {f"imgs/train/{name}" for name in CLASSES}
    again = "restore it from Kaggle's files"
    fail("unknown class folder", {f"imgs/train/{f}" for f in folders} - classes, f"expected {', '.join(CLASSES)}")
    fail("missing class folder", classes - {f"imgs/train/{f}" for f in folders}, again)
    fail("empty class folder", (f"imgs/train/{f}" for f, paths in folders.items() if not paths), again)
    twice = [img for img, n in Counter(img for _, _, img in rows).items() if n > 1]
    fail(f"{_CSV} names an image more than once", twice, "each image has one driver and one class")
    on_disk = [path for paths in folders.values() for path in paths]
    double = [name for name, n in Counter(path.rpartition("/")[2] for path in on_disk).items() if n > 1]
    fail("image in more than one class folder", double, "keep the one that the csv names")
    named = {f"imgs/train/{classname}/{img}" for _, classname, img in rows}
    fail(f"{_CSV} names a missing image", named - set(on_disk), again)
    fail(f"image that {_CSV} does not name", set(on_disk) - named, "its driver is unknown: remove it or add its row")
