"""Scripted workers: real child processes that start at once."""

import json
import sys
from pathlib import Path

import pytest

from backbones.bench import protocol

SCRIPTED = Path(__file__).parent / "scripted_worker.py"


@pytest.fixture
def scripted(tmp_path):
    """Return a function from a script to the command of a worker that follows it."""

    def command(script):
        path = tmp_path / "script.json"
        path.write_text(json.dumps(script))
        return [sys.executable, "-S", str(SCRIPTED), protocol.__file__, str(path)]

    return command
