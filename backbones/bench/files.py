"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["put", "write_json"]


def put(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a file beside `path` and then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write JSON values."""
    text = json.dumps(content, indent=2) + "\n"
    return put(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
