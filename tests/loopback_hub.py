"""A small server on this machine that speaks the Hub's download protocol."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``folder/<owner>/<repo>/<file>`` as ``/<owner>/<repo>/resolve/<revision>/<file>``.

    Any other path is served as a plain file of `folder`, as a web server would.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if len(parts) > 4 and parts[2] == "resolve":
            repo, relative = "/".join(parts[:2]), "/".join(parts[4:])
            path = self.server.folder / repo / relative
            missing = "EntryNotFound" if (self.server.folder / repo).is_dir() else "RepoNotFound"
        else:
            path, missing = self.server.folder.joinpath(*parts), ""
        if not path.is_file():
            self.send_response(404)
            if missing:
                self.send_header("X-Error-Code", missing)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean; requests are recorded instead."""


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Run a hub over a folder for the time of a ``with`` block."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
