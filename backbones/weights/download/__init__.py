"""Released files on their way to this machine: Hub, web servers, retries, cache, digests."""

from backbones.weights.download.disk import sha256_of
from backbones.weights.download.fetching import (
    check_obtainable,
    fetch,
    local_copy,
    mirror_path,
    verify,
)
from backbones.weights.download.hub import is_connection_error
from backbones.weights.download.pinning import Pin, measure_pin, write_pin

__all__ = [
    "Pin",
    "check_obtainable",
    "fetch",
    "is_connection_error",
    "local_copy",
    "measure_pin",
    "mirror_path",
    "sha256_of",
    "verify",
    "write_pin",
]
