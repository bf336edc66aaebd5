"""CIFAR-10 out of an archive of the real layout, with a few images a file, and the experiment on it."""

import hashlib
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import tyro
from served import serve

from jaxft import fetch
from jaxft.data import cifar10, decode

PER_FILE = 8


def archive(path, files=None, per_file=PER_FILE, label=None):
    """A cifar-10-binary.tar.gz; returns [(label, image)] in the order of the training files, then the test file."""
    rng = np.random.default_rng(0)
    expected = []
    with tarfile.open(path, "w:gz") as tar:
        for name in files or (*cifar10.FILES["train"], *cifar10.FILES["test"]):
            records = []
            for _ in range(per_file):
                number = int(rng.integers(0, 10)) if label is None else label
                image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                records.append(bytes([number]) + image.transpose(2, 0, 1).tobytes())
                expected.append((number, image))
            data = b"".join(records)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return expected


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server with a small archive whose hash is the pinned one; yields what is in it."""
    expected = archive(tmp_path / "made.tar.gz")
    content = (tmp_path / "made.tar.gz").read_bytes()
    with serve(content) as server:
        base = server.url.rsplit("/", 1)[0]
        monkeypatch.setattr(cifar10, "URL", f"{base}/cifar-10-binary.tar.gz")
        monkeypatch.setattr(cifar10, "MD5", hashlib.md5(content).hexdigest())
        monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
        yield expected


def test_images_and_labels(served):
    """Bug: planes read as pixels, test images before training ones, labels shifted by a record; TensorFlow needed."""
    dataset, train_count = cifar10.prepare()
    assert train_count == 5 * PER_FILE
    assert dataset.labels.tolist() == [label for label, _ in served]
    for i in (0, PER_FILE, train_count, len(served) - 1):
        found = decode.pixels(dataset.images[i], (32, 32), dataset.names[i])
        np.testing.assert_array_equal(found, served[i][1])
    assert dataset.names[0] == "train_00000" and dataset.names[train_count] == "test_00000"
    assert "tensorflow" not in sys.modules
    again, _ = cifar10.prepare()
    assert again.fingerprint == dataset.fingerprint and again.labels.tolist() == dataset.labels.tolist()


def test_an_archive_of_another_hash_is_refused(served, monkeypatch):
    """Bug: whatever the server sends is built into records."""
    monkeypatch.setattr(cifar10, "MD5", "0" * 32)
    with pytest.raises(fetch.Unavailable):
        cifar10.prepare()


def test_bad_archives(tmp_path):
    """Bug: a truncated or foreign archive gives half a set, or an error that names nothing."""
    path = tmp_path / "cifar-10-binary.tar.gz"
    archive(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not the whole binary CIFAR-10"):
        list(cifar10.read(path, cifar10.FILES["train"]))
    archive(path, files=("other.bin",))
    with pytest.raises(ValueError, match="is not the whole binary CIFAR-10.*data_batch_1.bin"):
        list(cifar10.read(path, cifar10.FILES["train"]))
    archive(path, label=11)
    with pytest.raises(ValueError, match="data_batch_1.bin holds label 11, expected 0 to 9"):
        list(cifar10.read(path, cifar10.FILES["train"]))


def test_the_experiment(served, tmp_path, capsys):
    """Bug: a net of the zoo that the experiment cannot make, feed or judge."""
    from experiments import cifar10 as experiment

    arguments = ["--net", "googlenet", "--weights", "none", "--image-size", "32", "--epochs", "1", "--batch-size", "8"]
    tyro.cli(experiment.main, args=[*arguments, "--folder", str(tmp_path / "run")])
    assert "googlenet on CIFAR-10, 32 pixels" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["images"] == {"train": 5 * PER_FILE, "held_out": PER_FILE}
    assert np.isfinite(summary["metrics"]["loss"])
