"""A small server on this machine that takes models as the Hub does: repositories, LFS, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from loopback_hub import COMMIT, Handler, Hub

TOKEN = "hf_write"


class UploadHub(Hub):
    """A hub that can be written to. Branches beside main are kept as ``<repo>@<branch>``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.RequestHandlerClass = UploadHandler
        self.objects: dict[str, bytes] = {}
        """LFS objects by digest."""
        self.private: dict[str, bool | None] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        """Repository and branch, message, files."""
        self.refusals: dict[str, tuple[int, str]] = {}
        """Status and message with which repositories of an owner are refused; 0 is a hang-up."""
        self.writer = TOKEN
        self.lock = threading.Lock()


class UploadHandler(Handler):
    server: UploadHub

    def do_POST(self) -> None:
        self.write(self.take())

    def do_PUT(self) -> None:
        self.write(self.take())

    def do_HEAD(self) -> None:
        self.read(with_body=False)

    def do_GET(self) -> None:
        self.read(with_body=True)

    def read(self, with_body: bool) -> None:
        """Serve a file; one of a branch lies in a folder of its own."""
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            known = (self.server.folder / repo).is_dir()
            return self.say(*((200, {"id": repo, "sha": COMMIT}) if known else (404, {})))
        if len(parts) > 4 and parts[2] == "resolve" and parts[3] not in ("main", COMMIT):
            repo = f"{parts[1]}@{unquote(parts[3])}"
            if (self.server.folder / parts[0] / repo).is_dir():
                self.path = "/".join(["", parts[0], repo, "resolve", "main", *parts[4:]])
        return self.answer(with_body)

    def take(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def say(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(body)

    def write(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):  # the address itself is the permission
            digest = hashlib.sha256(body).hexdigest()
            if digest != path.removeprefix("/lfs/"):
                return self.say(400, {"error": "content is not of that digest"})
            self.server.objects[digest] = body
            return self.say(200, {})
        if self.headers.get("Authorization") != f"Bearer {self.server.writer}":
            return self.say(401, {"error": "Invalid username or password."})
        with self.server.lock:
            self.act(path, body)

    def act(self, path: str, body: bytes) -> None:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path.endswith("/commit/" + parts[-1]):
            return self.commit("/".join(parts[2:4]), parts[-1], body)
        request = json.loads(body)
        if path == "/api/repos/create":
            if request["organization"] in self.server.refusals:
                status, message = self.server.refusals[request["organization"]]
                if status == 0:
                    self.close_connection = True
                    return None
                return self.say(status, {"error": message})
            repo = f"{request['organization']}/{request['name']}"
            url = f"{self.server.address}/{repo}"
            if (self.server.folder / repo).is_dir():
                return self.say(409, {"error": "You already created this model repo", "url": url})
            (self.server.folder / repo).mkdir(parents=True)
            private = request.get("visibility", request.get("private"))
            self.server.private[repo] = private in ("private", True)
            return self.say(200, {"url": url})
        if path == "/api/validate-yaml":
            return self.validate(request["content"])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(request)
        if "preupload" in parts:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in request["files"]
            ]
            return self.say(200, {"files": modes})
        if "branch" in parts:
            branch = self.branch("/".join(parts[2:4]), parts[-1])
            known = branch.is_dir()
            branch.mkdir(exist_ok=True)
            return self.say(409 if known else 200, {"error": "exists"} if known else {})
        return self.say(404, {"error": f"no endpoint {path}"})

    def validate(self, card: str) -> None:
        """Refuse a card without front matter or with a license that is none of the Hub's."""
        lines = card.splitlines()
        front = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] else []
        licenses = [line.partition(": ")[2] for line in front if line.startswith("license: ")]
        if licenses and licenses[0] in ("mit", "apache-2.0", "cc-by-nc-4.0", "unknown", "other"):
            return self.say(200, {"errors": [], "warnings": []})
        return self.say(400, {"errors": [{"message": '"license" must be one of'}], "warnings": []})

    def batch(self, request: dict[str, Any]) -> None:
        objects = []
        for wanted in request["objects"]:
            href = f"{self.server.address}/lfs/{wanted['oid']}"
            known = wanted["oid"] in self.server.objects
            objects.append(wanted | ({} if known else {"actions": {"upload": {"href": href}}}))
        self.say(200, {"transfer": "basic", "objects": objects})

    def branch(self, repo: str, name: str) -> Path:
        return self.server.folder / (repo if name == "main" else f"{repo}@{name}")

    def commit(self, repo: str, branch: str, body: bytes) -> None:
        folder = self.branch(repo, branch)
        if not folder.is_dir():
            return self.say(404, {"error": f"no branch {branch} of {repo}"})
        message, files = "", {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        for name, content in files.items():
            (folder / name).write_bytes(content)
        self.server.commits.append((folder.name, message, sorted(files)))
        url = f"{self.server.address}/{repo}/commit/{COMMIT}"
        return self.say(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})


@contextmanager
def serve_uploads(folder: Path) -> Iterator[UploadHub]:
    """Run a writable hub over a folder for the time of a ``with`` block."""
    hub = UploadHub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
