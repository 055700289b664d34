"""A small server on this machine that speaks the Hub's download protocol, with faults on demand."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What goes wrong with requests, as long as `times` lasts (-1: always)."""

    method: str = "GET"
    times: int = -1
    status: int | None = None
    """Answer with this status and nothing else."""
    headers: dict[str, str | None] = field(default_factory=dict)
    """Sent in place of, or beside, the usual ones; None leaves one out."""
    cut: int | None = None
    """Close the connection after so many bytes of the body."""
    reset: bool = False
    """Close it with a TCP reset instead."""
    drip: float = 0.0
    """Seconds between two pieces of the body."""
    piece: int = 1
    """Bytes of such a piece."""
    content: bytes | None = None
    """Send this in place of the file, under the file's headers."""
    redirect: str | None = None
    """Send the client to this address."""
    ignore_range: bool = False

    def applies(self, method: str) -> bool:
        """Whether a request meets the fault, counting those that do."""
        if self.method not in (method, "any") or self.times == 0:
            return False
        self.times -= 1
        return True


class Hub(ThreadingHTTPServer):
    """Serves ``folder/<owner>/<repo>/<file>`` as ``/<owner>/<repo>/resolve/<revision>/<file>``.

    Any other path is served as a plain file of `folder`, as a web server would, with byte ranges.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.sent = 0
        """Bytes of bodies that went out."""
        self.fault: Fault | None = None
        self.token: str | None = None
        """What a client must send as its token, if anything."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed or refused hang up; that is what the tests want."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        on_hub = len(parts) > 4 and parts[2] == "resolve"
        if on_hub:
            repo, relative = "/".join(parts[:2]), "/".join(parts[4:])
            path = self.server.folder / repo / relative
            missing = "EntryNotFound" if (self.server.folder / repo).is_dir() else "RepoNotFound"
        else:
            path, missing = self.server.folder.joinpath(*parts), ""
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.refuse(401, {"X-Error-Code": "RepoNotFound"})
        if not path.is_file():
            return self.refuse(404, {"X-Error-Code": missing} if missing else {})
        fault = self.server.fault
        if fault is None or not fault.applies(self.command):
            fault = Fault()
        if fault.redirect is not None:
            return self.refuse(302, {"Location": fault.redirect, **fault.headers})
        if fault.status is not None:
            return self.refuse(fault.status, fault.headers)
        self.send_file(path.read_bytes(), fault, with_body)

    def refuse(self, status: int, headers: Mapping[str, str | None]) -> None:
        self.send_response(status)
        self.send_headers({"Content-Length": "0", **headers})

    def send_headers(self, headers: Mapping[str, str | None]) -> None:
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def send_file(self, content: bytes, fault: Fault, with_body: bool) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        begin = self.range_start(etag) if not fault.ignore_range else 0
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT}
        if begin >= len(content) and begin:
            return self.refuse(416, {"Content-Range": f"bytes */{len(content)}"})
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - begin)
        self.send_response(206 if begin else 200)
        self.send_headers({**headers, **fault.headers})
        if with_body:
            self.send_body((fault.content or content)[begin:], fault)

    def range_start(self, etag: str) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found and self.headers.get("If-Range", etag) == etag else 0

    def send_body(self, body: bytes, fault: Fault) -> None:
        if fault.cut is not None:
            body = body[: fault.cut]
        size = fault.piece if fault.drip else 1 << 16
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            self.wfile.flush()
            self.server.sent += size
            time.sleep(fault.drip)
        if fault.reset:  # without lingering, close sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if fault.cut is not None or fault.content is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean; requests are recorded instead."""


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Run a hub over a folder for the time of a ``with`` block."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
