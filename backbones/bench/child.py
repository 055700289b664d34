"""The parent's end of a measurement that runs in a process of its own."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from backbones.bench.protocol import decode, encode
from backbones.errors import BackbonesError

__all__ = ["WORKER", "Child", "ChildError"]

WORKER = (sys.executable, "-m", "backbones.bench.worker")
TAIL = 1500  # characters of a child's standard error that are quoted
LEAVE_S = 10.0  # for its atexit handlers


class ChildError(BackbonesError, RuntimeError):
    """A measurement could not be made; `kind` is the class name of the worker's error, or empty."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Child:
    """A worker process; leaving the ``with`` block ends it, whatever it is doing.

    Args:
        name: what errors call it.
        threads: threads that the numeric libraries are told to use, before they are imported.
        limit_s: seconds that any one reply may take.
        command: what to start; the tests start others.
    """

    def __init__(
        self, name: str, *, threads: int, limit_s: float = 600.0, command: Sequence[str] = WORKER
    ) -> None:
        self.name, self.limit_s = name, limit_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        try:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends the children,
            # and whatever a child started (compilers) can be ended with it.
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=_environment(threads),
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            raise ChildError(f"{name}: {command[0]} cannot be started: {error}") from error
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(
            target=_read, args=(self._stdout, self._lines), daemon=True, name=f"reads {name}"
        )
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the reply.

        Raises:
            ChildError: the worker replied with an error, died, or did not reply in time.
        """
        try:
            self._stdin.write(encode(message))
            self._stdin.flush()
        except OSError:
            raise self._death() from None
        end = time.monotonic() + self.limit_s
        while True:
            # Woken now and then: a grandchild may hold the pipe open after the child is dead.
            try:
                line = self._lines.get(timeout=max(0.0, min(0.5, end - time.monotonic())))
            except queue.Empty:
                if self.process.poll() is not None and self._lines.empty():
                    raise self._death() from None
                if time.monotonic() >= end:
                    raise ChildError(
                        f"its process did not answer within {self.limit_s:g} s{self._tail()}"
                    ) from None
                continue
            if not line:
                raise self._death()
            reply = decode(line)
            if reply is None:
                continue
            if "error" in reply:
                raise ChildError(reply["error"], reply.get("kind", ""))
            return reply

    def leave(self) -> None:
        """Wait for a worker that has replied to its last request, so that it can clean up."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LEAVE_S)
        self.close()

    def close(self) -> None:
        """End the process, if it still runs, and wait until it is gone."""
        if self.process.returncode is None:  # not reaped yet: the group's number is still its own
            with suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(self.process.pid, signal.SIGKILL)
                else:
                    self.process.kill()
        self.process.wait()
        with suppress(OSError):  # what was never sent has nowhere to go
            self._stdin.close()
        self._reader.join(timeout=1.0)
        if not self._reader.is_alive():
            self._stdout.close()
        self._stderr.close()

    def _death(self) -> ChildError:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        code = self.process.returncode
        end = "closed its output" if code is None else f"died (exit code {code}{_signal(code)})"
        return ChildError(f"its process {end}{self._tail()}")

    def _tail(self) -> str:
        self._stderr.seek(0)
        text = self._stderr.read().decode("utf-8", errors="replace").strip()
        return f"; it said last: {text[-TAIL:]}" if text else " and said nothing"


def _environment(threads: int) -> dict[str, str]:
    """Return the environment of a child: as ours, with the threads given and no network."""
    found = dict(os.environ)
    for library in ("OMP", "MKL", "OPENBLAS", "VECLIB_MAXIMUM", "NUMEXPR"):
        found[f"{library}_NUM_THREADS"] = str(threads)
    # LLVM's and Intel's OpenMP let threads without work spin for 200 ms, into the turn of others.
    found.setdefault("KMP_BLOCKTIME", "1")
    # A download has no place in a measurement: weights are at hand or are drawn at random.
    found["HF_HUB_OFFLINE"] = "1"
    # The child imports what the parent would, as with multiprocessing's spawn.
    found["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return found


def _read(stream: BinaryIO | Any, lines: queue.SimpleQueue[bytes]) -> None:
    with suppress(ValueError):  # closed meanwhile
        for line in stream:
            lines.put(line)
    lines.put(b"")


def _signal(code: int) -> str:
    with suppress(ValueError):
        return f", {signal.Signals(-code).name}" if code < 0 else ""
    return ""
