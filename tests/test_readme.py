"""The README says what is there: its table is current and its commands and code run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import torch

import backbones

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_models_is_current():
    script = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
    assert script["updated"](README) == README, "run: python scripts/update_readme.py"
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
