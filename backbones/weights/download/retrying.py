"""Trying again what failed for a reason that may pass."""

import errno
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["DELAYS", "TransientError", "is_out_of_reach", "is_transient_status", "with_retries"]

_logger = logging.getLogger(__name__)
T = TypeVar("T")

DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before the second, third, ... attempt; one attempt more than there are delays."""
_LONGEST_WAIT = 60.0
_OUT_OF_REACH = (socket.gaierror, ssl.SSLCertVerificationError)
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
_MOST_CAUSES = 16
# An attempt that brought this much is no failure in a row: a long download over a poor line.
_PROGRESS_BYTES = 1 << 20


class TransientError(Exception):
    """A failure that may pass: a busy server, a dropped connection."""

    def __init__(self, reason: str, retry_after: str | None = None) -> None:
        super().__init__(reason)
        self.seconds = float(retry_after) if retry_after and retry_after.isdecimal() else 0.0


def is_transient_status(code: int) -> bool:
    """Whether an HTTP status says that the same request may succeed later."""
    return code in (408, 425, 429) or 500 <= code < 600


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that there is no way to the server from here.

    That is an unknown name, no route, or a certificate that does not hold: to wait helps with none
    of them, and without a network each attempt meets one. A server that refuses, resets or does not
    answer in time may be restarting.
    """
    for _ in range(_MOST_CAUSES):
        if isinstance(error, _OUT_OF_REACH) or getattr(error, "errno", None) in _NO_ROUTE:
            return True
        reason = getattr(error, "reason", None)
        cause = reason if isinstance(reason, BaseException) else None
        error = error and (cause or error.__cause__ or error.__context__)
    return False


def with_retries(action: Callable[[], T], what: str, progress: Callable[[], int] = lambda: 0) -> T:
    """Call `action`, named `what` in messages, until it raises no `TransientError`, ever slower.

    An attempt that added a MiB to the most `progress` ever was (bytes that all attempts together
    have brought) starts the count of failures anew.

    Raises:
        TransientError: the last attempt's.
    """
    failures, most = 0, progress()
    while True:
        try:
            return action()
        except TransientError as error:
            now = progress()
            if now - most >= _PROGRESS_BYTES:
                failures = 0
            most = max(most, now)
            if failures == len(DELAYS):
                raise
            wait = max(DELAYS[failures] * random.uniform(0.5, 1.5), error.seconds)
            failures += 1
            wait = min(wait, _LONGEST_WAIT)
            _logger.warning("%s: %s; trying again in %.1f s", what, error, wait)
            time.sleep(wait)
