"""A server on this machine that misbehaves as real ones do, and wheels for pip to find."""

import re
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Served:
    """What a server gives out, and what it was asked.

    Attributes:
        content: bytes of every path.
        ranges: "yes", "no" (the whole file with status 200) or "misplaced" (status 206, but from the start).
        cuts: bodies of the next requests end after so many bytes with a broken connection.
        delay: seconds before each answer.
        status: answered in place of 200 if set.
        asked: (Range header or None, status, bytes of body sent) of each request so far.
    """

    def __init__(self, content: bytes):
        self.content = content
        self.ranges = "yes"
        self.cuts: list[int] = []
        self.delay = 0.0
        self.status: int | None = None
        self.asked: list[tuple[str | None, int, int]] = []
        self.url = ""


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def serve(content: bytes) -> Iterator[Served]:
    """Serves `content` under any path of 127.0.0.1 from a thread."""
    served = Served(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(served.delay)
            asked = self.headers.get("Range")
            start, status, content = 0, served.status or 200, served.content
            if asked and served.ranges != "no":
                wanted = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # pyright: ignore[reportOptionalSubscript]
                status = 416 if wanted >= len(content) else 206
                start = 0 if served.ranges == "misplaced" or status == 416 else wanted
            body = b"" if status >= 400 else content[start:]
            sent = body[: served.cuts.pop(0)] if served.cuts else body
            served.asked.append((asked, status, len(sent)))  # before the client can see an answer
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if status == 416:
                self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(ConnectionError):  # a client may hang up once it has seen the headers
                self.wfile.write(sent)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/some/where/weights.h5"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wheel(folder: Path, package: str, version: str, members: dict[str, bytes]) -> Path:
    """Writes a minimal wheel that pip accepts; `package` with underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-{version}-py3-none-any.whl"
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path
