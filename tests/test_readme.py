"""The README says what is there: its table is current and its commands and code run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import backbones

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_table_of_models_is_current():
    assert SCRIPT["updated"](README) == README, "run: python scripts/update_readme.py"


def test_table_of_models_is_current_but_for_multiply_adds():
    """Counting those takes a minute; everything else is compared by default."""
    written = README.partition(SCRIPT["START"])[2].partition(SCRIPT["END"])[0]
    fresh = SCRIPT["table"](lambda info: f"{info.params / 1e6:.2f} | -")
    without = re.sub(r"(?m)^(\| `.*? \| [\d.]+ \|) [^|]* \|", r"\1 - |", written)
    assert without.strip() == fresh.strip(), "run: python scripts/update_readme.py"
    for name in backbones.list_models():
        assert f"| `{name}`" in README


def test_the_two_commands_stand_in_the_readme_and_ci_runs_the_second():
    assert 'pip install ".[quickstart]" && backbones quickstart' in README
    assert 'pip install ".[test]" && pytest' in README
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in ci  # it takes the command from the file, so that they cannot differ


def test_python_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    lines = code.group(1).strip().splitlines()
    assert len([line for line in lines if line]) <= 6
    # The example downloads weights; here it runs with fresh ones.
    program = code.group(1).replace("pretrained=True", "pretrained=False")
    names: dict[str, object] = {}
    exec(program, names)
    assert any(isinstance(value, torch.Tensor) for value in names.values())


def test_links_to_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
