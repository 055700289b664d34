"""Messages between a benchmark and its child processes: one JSON object a line, marked.

Libraries print when they please. The worker therefore keeps the real standard output to itself and
points descriptor 1 at standard error; what was printed before it could do so, while it imported,
lacks the mark and is passed over.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

__all__ = ["Channel", "decode", "encode"]

MARK = "\x1e"  # ASCII's record separator, as in RFC 7464


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as a line."""
    return f"{MARK}{json.dumps(dict(message))}\n".encode()


def decode(line: bytes) -> dict[str, Any] | None:
    """Return the message of a line; None for a line that holds none."""
    _, mark, text = line.decode("utf-8", errors="replace").partition(MARK)
    return json.loads(text) if mark else None


class Channel:
    """The worker's end: takes standard input and output for itself."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb")
        self._in: BinaryIO = os.fdopen(os.dup(0), "rb")
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next request; None once the parent is gone."""
        for line in self._in:
            message = decode(line)
            if message is not None:
                return message
        return None

    def send(self, message: dict[str, Any]) -> None:
        """Send a reply."""
        self._out.write(encode(message))
        self._out.flush()
