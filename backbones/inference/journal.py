"""Rows on disk while a run goes on: whole parts in a folder, which become the output at its end.

``rows.csv.partial/`` holds ``job.json``, which says what is run, and parts that are named by the
numbers of their first row and the one after their last. A part is there as a whole or not at all:
whatever ends a run leaves whole rows, and each process of several writes its own.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from backbones.errors import ConfigError, DataError
from backbones.files import new_file
from backbones.inference.formats import RowFormat
from backbones.inference.rows import Row

__all__ = ["Journal", "partial_of"]

_ROWS, _SECONDS = 4096, 5.0  # a part ends after so many
_JOB, _LOCK = "job.json", ".lock"


def partial_of(output: Path) -> Path:
    """Return the folder of parts of an output that is not complete."""
    return output.with_name(output.name + ".partial")


class Journal:
    """The parts of one output.

    Args:
        output: the file that they become.
        format: how rows are written.
        resume: go on with what an earlier run left.
        shared: several processes write, so that parts of others are expected.

    Raises:
        ConfigError: an earlier run left parts and `resume` is not said.
    """

    def __init__(self, output: Path, format: RowFormat, *, resume: bool, shared: bool) -> None:
        self.output, self.format = output, format
        self.folder = partial_of(output)
        if not output.parent.is_dir():
            raise DataError(f"{output.parent}: no such folder; make it, or name another output")
        if output.is_dir():
            raise DataError(f"{output} is a folder; name a file")
        if self.folder.exists() and not (resume or shared):
            raise ConfigError(
                f"{self.folder}: an earlier run left rows; --resume goes on with it, or delete it"
            )
        self._rows: list[Row] = []
        self._first = 0
        self._since = 0.0

    @property
    def job(self) -> dict[str, Any] | None:
        """What an earlier run, or another process, said that it runs."""
        path = self.folder / _JOB
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); delete {self.folder}") from error

    def begin(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Say what is run, or join those that run the same; return what holds.

        Raises:
            ConfigError: the parts are those of something else.
        """
        self.folder.mkdir(exist_ok=True)
        text = json.dumps(job, indent=2) + "\n"
        draft = self.folder / f".{secrets.token_hex(8)}.tmp"
        draft.write_text(text, encoding="utf-8")
        try:
            # Of several processes one gives the file its name, the others read it.
            os.link(draft, self.folder / _JOB)
        except FileExistsError:
            pass
        except OSError:  # a disk without links
            if not (self.folder / _JOB).exists():
                os.replace(draft, self.folder / _JOB)
        draft.unlink(missing_ok=True)
        found = self.job or {}
        told = json.loads(text)
        other = [key for key in told if key != "setting" and found.get(key) != told[key]]
        if other:
            changes = ", ".join(f"{key} {found.get(key)!r}, now {told[key]!r}" for key in other)
            raise ConfigError(
                f"{self.folder} holds rows of something else ({changes}); delete it, or name"
                " another output"
            )
        return found

    def done(self) -> list[tuple[int, int]]:
        """Return first and end of each part, in order."""
        spans = []
        for part in self.folder.glob(f"*{self.format.suffix}"):
            first, dash, end = part.stem.partition("-")
            if dash and first.isdigit() and end.isdigit():
                spans.append((int(first), int(end)))
        return sorted(spans)

    def add(self, first: int, rows: Sequence[Row]) -> None:
        """Take rows; they are on disk when a part is full, at the latest after some seconds."""
        now = time.monotonic()
        if self._rows and first != self._first + len(self._rows):
            self.flush()
        if not self._rows:
            self._first, self._since = first, now
        self._rows += rows
        if len(self._rows) >= _ROWS or now - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are waiting as a part."""
        if not self._rows:
            return
        end = self._first + len(self._rows)
        part = self._part(self._first, end)
        with new_file(part) as file:
            self.format.write(file, self._rows)
        self._rows = []

    def missing(self, count: int) -> int:
        """Return how many of `count` rows are in no part."""
        left, at = 0, 0
        for first, end in self.done():
            left += max(0, first - at)
            at = max(at, end)
        return left + max(0, count - at)

    def finish(self, count: int, *, parts: bool = False) -> bool:
        """Make the output of the parts, if all of `count` rows are there, and tell whether it is.

        With `parts` the folder of parts becomes the output. Where several processes end at once,
        one does it.
        """
        # The lock makes the folder again, where another process has finished meanwhile.
        with WeakFileLock(self.folder / _LOCK):
            if not (self.folder / _JOB).exists():
                shutil.rmtree(self.folder, ignore_errors=True)
                return self.output.exists()
            if self.missing(count):
                return False
            if parts:
                self.output.unlink(missing_ok=True)
                self.folder.rename(self.output)
                for name in (_JOB, _LOCK):
                    (self.output / name).unlink(missing_ok=True)
            else:
                self._join()
            return True

    def _join(self) -> None:
        """Make one file of the parts, and remove them."""
        at, chosen = 0, []
        for first, end in self.done():
            if first == at:  # two runs at once may have made a part twice
                chosen.append(self._part(first, end))
                at = end
        with new_file(self.output) as file:
            self.format.join(chosen, file)
        self.discard()

    def discard(self) -> None:
        """Remove the parts, all at once."""
        trash = self.folder.with_name(f".{secrets.token_hex(8)}.tmp")
        self.folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _part(self, first: int, end: int) -> Path:
        return self.folder / f"{first:012d}-{end:012d}{self.format.suffix}"
