"""Files of the Hugging Face Hub, through the Hub's own client and cache."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from backbones.errors import CheckpointError, WeightsUnavailableError, first_line
from backbones.weights.download.disk import require_space, unwritable
from backbones.weights.download.retrying import (
    TransientError,
    is_out_of_reach,
    is_transient_status,
    with_retries,
)

__all__ = [
    "EntryMissingError",
    "cached_file",
    "file_revision",
    "hub_file",
    "is_connection_error",
]

T = TypeVar("T")

_OR_LOCAL = "; or pass checkpoint_path=... with a local copy"
# The client names its files after these two; anything else could name a place outside the cache.
_ETAG = re.compile(r"[0-9A-Za-z_-]{1,128}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


class EntryMissingError(WeightsUnavailableError):
    """The repository exists and has no such file."""


def cached_file(
    repo: str, file: str, revision: str | None, cache_dir: str | Path | None
) -> Path | None:
    """Return the file in the Hub's cache, without any call to the network; None if not there."""
    found = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision)
    return Path(found) if isinstance(found, str) else None


def hub_file(
    repo: str,
    file: str,
    revision: str | None = None,
    *,
    cache_dir: str | Path | None = None,
    sha256: str | None = None,
    size: int | None = None,
    again: bool = False,
) -> Path:
    """Return the path of a Hub file in the Hub's cache, downloading it where needed.

    Dropped connections are resumed and busy servers asked again. What the server says of the file
    is compared with the recorded digest and size, and with the free space on the disk, before the
    download begins; the caller verifies what came. Without a connection, a cached copy is returned,
    unless it is to be downloaded `again`.

    Raises:
        EntryMissingError: the repository has no such file.
        WeightsUnavailableError: it cannot be had.
        CheckpointError: the server announces another file than the recorded one.
    """
    where = _Place(repo, file, revision, cache_dir)
    cached = None if again else cached_file(repo, file, revision, cache_dir)
    try:
        announced = _announcement(where)
    except EntryMissingError:
        raise
    except WeightsUnavailableError:
        if cached is not None:
            return cached
        raise
    _check_announcement(announced, where, sha256, size)
    return Path(
        _ask(
            lambda: hf_hub_download(
                repo, file, revision=revision, cache_dir=cache_dir, force_download=again
            ),
            where,
        )
    )


def file_revision(repo: str, file: str) -> str:
    """Return the commit that the main branch of a repository stands at; it must have the file."""
    where = _Place(repo, file, None, None)
    announced = _announcement(where)
    _check_announcement(announced, where, None, None)
    return str(announced.commit_hash)


@dataclass(frozen=True)
class _Place:
    repo: str
    file: str
    revision: str | None
    cache_dir: str | Path | None

    def __str__(self) -> str:
        return f"{self.file} of {self.repo}"

    @property
    def cache(self) -> Path:
        return Path(self.cache_dir or constants.HF_HUB_CACHE)


def _announcement(where: _Place) -> HfFileMetadata:
    """Ask the Hub for commit, digest and size of a file."""
    url = hf_hub_url(where.repo, where.file, revision=where.revision)
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    return _ask(lambda: get_hf_file_metadata(url, timeout=timeout), where)


def _check_announcement(
    announced: HfFileMetadata, where: _Place, sha256: str | None, size: int | None
) -> None:
    etag, commit = announced.etag or "", announced.commit_hash or ""
    if not _ETAG.fullmatch(etag) or not _COMMIT.fullmatch(commit):
        raise WeightsUnavailableError(
            f"{where}: {constants.ENDPOINT} does not answer as a Hub does (ETag {etag[:80]!r},"
            f" commit {commit[:80]!r}); check HF_ENDPOINT and proxies{_OR_LOCAL}"
        )
    if sha256 and _SHA256.fullmatch(etag) and etag != sha256:
        raise CheckpointError(
            f"{where}: the Hub announces sha256 {etag}, recorded is {sha256}; nothing was"
            " downloaded. Ask whoever published it, or pass checkpoint_path=... with the right file"
        )
    if size is not None and announced.size is not None and announced.size != size:
        raise CheckpointError(
            f"{where}: the Hub announces {announced.size} bytes, recorded are {size}; nothing was"
            " downloaded"
        )
    require_space(where.cache, announced.size, str(where))


def _ask(action: Callable[[], T], where: _Place) -> T:
    """Call the client, again where that may help, and translate its errors."""

    def attempt() -> T:
        try:
            return action()
        except Exception as error:
            if _is_transient(error):
                response = getattr(error, "response", None)
                wait = response.headers.get("Retry-After") if response is not None else None
                raise TransientError(first_line(error), wait) from error
            if is_connection_error(error):
                raise _unreachable(error, where) from error
            if isinstance(error, OSError | ValueError | EntryNotFoundError):
                raise _translated(error, where) from error
            raise

    try:
        return with_retries(attempt, str(where))
    except TransientError as error:
        raise _unreachable(error, where) from error


def _unreachable(error: Exception, where: _Place) -> WeightsUnavailableError:
    return WeightsUnavailableError(
        f"{where} cannot be had from {constants.ENDPOINT}: {first_line(error)}; check the"
        f" connection (HF_ENDPOINT names a mirror){_OR_LOCAL}"
    )


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return is_transient_status(_status(error))
    if isinstance(error, LocalEntryNotFoundError):
        return isinstance(error.__cause__, Exception) and _is_transient(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled | FileMetadataError):
        return False
    if is_out_of_reach(error):
        return False
    if isinstance(error, OSError) and error.errno is None:
        return True  # "Consistency check failed": fewer bytes than announced
    return is_connection_error(error)


def is_connection_error(error: Exception) -> bool:
    """Whether an error is of the Hub client's transport: no connection, or one that broke."""
    # The client changed its transport more than once, and their errors have no class in common.
    return type(error).__module__.partition(".")[0] in _TRANSPORTS


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code) if error.response is not None else 0


def _translated(error: Exception, where: _Place) -> WeightsUnavailableError:
    """Say what the user can do about an error of the client that will not pass."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    if isinstance(cause, HfHubHTTPError | OfflineModeIsEnabled | FileMetadataError):
        return _translated(cause, where)
    if isinstance(error, GatedRepoError):
        reason = (
            f"{where.repo} is gated: accept its terms at {constants.ENDPOINT}/{where.repo} and set"
            " HF_TOKEN to a token of that account"
        )
    elif isinstance(error, RepositoryNotFoundError):
        reason = (
            f"no repository {where.repo} at {constants.ENDPOINT}, or it is private: check the"
            " name, and set HF_TOKEN if it is yours"
        )
    elif isinstance(error, RevisionNotFoundError):
        reason = f"{where.repo} has no revision {where.revision!r}"
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return EntryMissingError(f"{where.repo} has no file {where.file}{_OR_LOCAL}")
    elif isinstance(error, OfflineModeIsEnabled):
        reason = (
            f"{where} is not in the cache {where.cache}, and HF_HUB_OFFLINE forbids to fetch it:"
            " unset it"
        )
    elif isinstance(error, HfHubHTTPError) and _status(error) in (401, 403):
        reason = (
            f"{constants.ENDPOINT} refuses {where} ({_status(error)}): HF_TOKEN is wrong or has"
            " no access, correct or unset it"
        )
    elif isinstance(error, OSError) and error.errno is not None:
        return unwritable(where.cache, error, str(where))
    else:
        reason = f"{where} cannot be had from {constants.ENDPOINT}: {first_line(error)}"
    return WeightsUnavailableError(f"{reason}{_OR_LOCAL}")
