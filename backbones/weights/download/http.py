"""Files of plain web servers: resumable, verified before they appear, one process at a time."""

import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, tqdm

from backbones.errors import CheckpointError, WeightsUnavailableError, first_line
from backbones.weights.download.disk import require_space, sha256_of, unwritable
from backbones.weights.download.retrying import (
    TransientError,
    is_out_of_reach,
    is_transient_status,
    with_retries,
)

__all__ = ["download"]

_OR_LOCAL = "; or pass checkpoint_path=... with a local copy"
_BLOCK = 1 << 18
SLOWEST = 1024
"""Bytes per second below which a connection is given up, averaged over `PATIENCE` seconds."""
PATIENCE = 30.0


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    again: bool = False,
) -> Path:
    """Download `url` to `path`, which appears whole and verified or not at all.

    What has arrived is kept in a hidden ``.part`` file beside `path`; a later call, also of another
    process, goes on from there where the server knows byte ranges and says that the file is still
    the same (a strong ETag), or where a digest is recorded. Others that ask for the path wait.

    Raises:
        WeightsUnavailableError: it cannot be had or not kept; the message says why.
        CheckpointError: the content has not the recorded digest or size. It was not kept.
    """
    if not url.startswith(("https://", "http://")):
        raise WeightsUnavailableError(f"{url} is no http or https address{_OR_LOCAL}")
    if constants.is_offline_mode():
        raise WeightsUnavailableError(
            f"{url} is not at {path}, and HF_HUB_OFFLINE forbids to fetch it: unset it{_OR_LOCAL}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file() and not again:
                return path  # another process was quicker
            transfer = _Transfer(url, path, sha256, size)
            transfer.fetch()
            if transfer.resumed and transfer.difference():
                transfer.discard()  # the server's file changed between the parts
                transfer.fetch()
            transfer.put_in_place()
    except OSError as error:
        if isinstance(error, WeightsUnavailableError):
            raise
        raise unwritable(path.parent, error, url) from error
    return path


@dataclass
class _Transfer:
    url: str
    path: Path
    sha256: str | None
    size: int | None
    resumed: bool = False

    @property
    def part(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def _validator(self) -> Path:
        """Holds the ETag of the content that the part file belongs to."""
        return self.path.with_name(f".{self.path.name}.part.etag")

    def received(self) -> int:
        """Return how many bytes are there already."""
        return self.part.stat().st_size if self.part.is_file() else 0

    def fetch(self) -> None:
        """Fetch what is missing, in as many attempts as it takes."""
        try:
            with_retries(self._attempt, self.url, self.received)
        except TransientError as error:
            raise WeightsUnavailableError(
                f"{self.url} cannot be had: {error}; check the connection{_OR_LOCAL}"
            ) from error

    def _attempt(self) -> None:
        if self.received() and self.received() == self.size:
            self.resumed = True  # a process ended just before it put the file in place
            return
        with _translated(self.url):
            response = self._open()
            if response is not None:
                with response:
                    self._receive(response)

    def _open(self) -> Any:
        """Ask for the bytes that are missing; None where the server says that none are."""
        request = urllib.request.Request(self.url, headers={"Accept-Encoding": "identity"})
        there = self.received()
        etag = self._validator.read_text() if self._validator.is_file() else ""
        if there and (etag or self.sha256):
            request.add_header("Range", f"bytes={there}-")
            if etag:
                request.add_header("If-Range", etag)
        opener = urllib.request.build_opener(_NoDowngrade)
        try:
            return opener.open(request, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing lies beyond what is there
                if error.headers.get("Content-Range") == f"bytes */{there}":
                    self.resumed = True
                    return None
                self.discard()
                raise TransientError("the server's file has changed") from error
            raise

    def _receive(self, response: Any) -> None:
        begin = 0
        etag = response.headers.get("ETag", "")
        if response.status == 206:
            begin = self.received()
            known = self._validator.read_text() if self._validator.is_file() else etag
            sent = response.headers.get("Content-Range", "")
            if not sent.startswith(f"bytes {begin}-") or etag != known:
                self.discard()
                raise TransientError("the server sent another part than asked for")
            self.resumed = begin > 0
        length = response.headers.get("Content-Length")
        total = begin + int(length) if (length or "").isdecimal() else None
        if self.size is not None and total not in (None, self.size):
            raise CheckpointError(
                f"{self.url}: the server announces {total} bytes, recorded are {self.size};"
                " nothing was loaded. Ask whoever published it, or pass checkpoint_path=..."
            )
        require_space(self.path.parent, (total or 0) - begin, self.url)
        if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag):
            self._validator.write_text(etag)
        else:  # none, a weak one, or nothing a server should send: not to be trusted for resuming
            self._validator.unlink(missing_ok=True)
        with self.part.open("ab" if begin else "wb") as file:
            received = begin + self._copy(response, file, begin, total)
        if total is not None and received < total:
            raise TransientError(f"the connection ended after {received} of {total} bytes")

    def _copy(self, response: Any, file: IO[bytes], begin: int, total: int | None) -> int:
        limit = self.size if total is None else total
        copied, since, at_since = 0, time.monotonic(), 0
        with tqdm(
            total=total, initial=begin, unit="B", unit_scale=True, desc=self.path.name, disable=None
        ) as bar:
            # read1 returns what there is, so that a slow server is noticed before a block is full.
            while block := response.read1(_BLOCK):
                try:
                    file.write(block)
                except OSError:
                    file.close()
                    self.discard()  # a full disk is not to be left full
                    raise
                copied += len(block)
                bar.update(len(block))
                if limit is not None and begin + copied > limit:
                    self.discard()
                    raise CheckpointError(
                        f"{self.url}: the server sends more than {limit} bytes; nothing was kept"
                    )
                now = time.monotonic()
                if now - since > PATIENCE:
                    if (copied - at_since) / (now - since) < SLOWEST:
                        raise TransientError(
                            f"fewer than {SLOWEST} bytes per second arrived for {PATIENCE:.0f} s"
                        )
                    since, at_since = now, copied
        return copied

    def difference(self) -> str | None:
        """Say how what arrived differs from what is recorded; None where it does not."""
        if self.size is not None and self.received() != self.size:
            return f"{self.received()} bytes arrived, recorded are {self.size}"
        digest = sha256_of(self.part) if self.sha256 else None
        if digest != self.sha256:
            return f"sha256 {digest} arrived, recorded is {self.sha256}"
        return None

    def put_in_place(self) -> None:
        """Give the file its name, if it is the recorded one; else discard it and raise."""
        difference = self.difference()
        if difference:
            self.discard()
            raise CheckpointError(
                f"{self.url}: {difference}; nothing was kept. Try again; if it stays so, ask"
                " whoever published it"
            )
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.part, self.path)
        self._validator.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what was kept for resuming."""
        self.part.unlink(missing_ok=True)
        self._validator.unlink(missing_ok=True)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Tell failures that may pass from those that will not."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if is_transient_status(error.code):
            wait = error.headers.get("Retry-After")
            raise TransientError(f"HTTP status {error.code}", wait) from error
        hint = {
            401: "it needs a login; fetch the file with a browser",
            403: "access is refused; fetch the file with a browser",
            404: "there is no such file any more; look for it where it was published",
            410: "there is no such file any more; look for it where it was published",
        }.get(error.code, first_line(error))
        raise WeightsUnavailableError(
            f"{url} cannot be had: HTTP status {error.code}, {hint}{_OR_LOCAL}"
        ) from error
    except urllib.error.URLError as error:
        reason = error.reason
        if is_out_of_reach(error):
            raise WeightsUnavailableError(
                f"{url} cannot be had: {reason}; check the connection and proxies{_OR_LOCAL}"
            ) from error
        raise TransientError(str(reason)) from error
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise TransientError(first_line(error)) from error


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to a protocol without encryption."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise WeightsUnavailableError(
                f"{req.full_url} redirects to {newurl}, which is not encrypted; refused{_OR_LOCAL}"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
