"""The READMEs say what is there: tables are current, links resolve, commands and code run."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import pytest
import torch
from test_house import ROOMS

import backbones
from backbones import cli
from backbones.cli.parsing import Parser

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "update_tables.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
FOLDERS = (".github", "backbones", "configs", "scripts", "tests")
PAGES = [ROOT / "README.md", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.md")))]
REPAIR = "run: python scripts/update_tables.py"

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def code_blocks(page: Path, language: str) -> list[str]:
    """Every block of code of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every command line in blocks and in running text, without comments."""
    lines = [line for block in code_blocks(page, "bash") for line in block.splitlines()]
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    lines += [code for code in inline if re.match(r"(backbones|python scripts/\S+) \S", code)]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part and not part.startswith("#")]


# Tables.


@pytest.mark.slow
def test_table_of_models_is_current():
    assert SCRIPT["written"](MODELS) == SCRIPT["model_table"](), REPAIR


def test_table_of_models_is_current_but_for_multiply_adds():
    """Counting those takes a minute; everything else is compared by default."""
    fresh = SCRIPT["model_table"](lambda info: f"{info.params / 1e6:.2f} | -")
    without = re.sub(r"(?m)^(\| `.*? \| [\d.]+ \|) [^|]* \|", r"\1 - |", SCRIPT["written"](MODELS))
    assert without == fresh, REPAIR
    for name in backbones.list_models():
        assert f"| `{name}`" in MODELS


def test_table_of_families_is_current():
    assert SCRIPT["written"](README) == SCRIPT["family_table"](), REPAIR


def test_models_without_released_weights_have_their_rows(monkeypatch):
    info = partial(_without_weights, backbones.model_info)
    monkeypatch.setattr(backbones, "model_info", info)
    monkeypatch.setattr(backbones, "list_families", lambda: ["lsnet"])
    (row,) = SCRIPT["family_table"]().splitlines()[2:]
    assert re.search(r"\| 11.4 to 23.8 \| - \| none known \|", row)
    assert "| `lsnet_t` | 11.41 | - | - | none known |" in SCRIPT["model_table"](
        lambda info: f"{info.params / 1e6:.2f} | -"
    )


def _without_weights(model_info, name):
    info = model_info(name)
    object.__setattr__(info, "weights", ())
    return info


def test_a_page_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="missing"):
        SCRIPT["updated"]("no marks", "table")


# The front page.


def test_front_page_is_short():
    """Its text: every new family adds a row to a table."""
    assert len([line for line in README.splitlines() if not line.startswith("|")]) <= 162


def test_the_two_commands_stand_in_the_readme_and_ci_runs_the_second():
    assert 'pip install ".[quickstart]" && backbones quickstart' in README
    assert re.search(r'(?m)^pip install "\.\[test\]" && pytest', README)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in ci  # it takes the command from the file, so that they cannot differ


def test_python_example_runs():
    code = code_blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in code.strip().splitlines() if line]) <= 6
    # The example downloads weights; here it runs with fresh ones.
    program = code.replace("pretrained=True", "pretrained=False")
    names: dict[str, object] = {}
    exec(program, names)
    assert any(isinstance(value, torch.Tensor) for value in names.values())


# All pages.


@by_page
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        if heading:
            assert heading in headings(found), target


def headings(page: Path) -> set[str]:
    """The anchors that a reader's program makes of a page's headings."""
    lines = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@by_page
def test_commands_exist(page, monkeypatch, capsys):
    def parse_alone(parser, run):
        ArgumentParser.set_defaults(parser, run=lambda args: 0)

    monkeypatch.setattr(Parser, "set_defaults", parse_alone)
    for line in commands(page):
        words = shlex.split(line, comments=True)
        for script in (word for word in words if re.match(r"scripts/\w+\.py", word)):
            assert (ROOT / script).is_file(), line
        if words[0] != "backbones" or "..." in words or words[1:] == ["..."]:
            continue
        try:
            code = cli.main(words[1:])
        except SystemExit as error:  # argparse
            code = error.code
        assert code == 0, f"{line}\n{capsys.readouterr().err}"


@by_page
def test_files_named_in_the_text_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    paths = re.findall(r"`((?:\w+/)+(?:\w+\.(?:py|yaml|json\.gz))?)`", text)
    for path in paths:
        places = (ROOT, page.parent, ROOT / "backbones")
        assert any((place / path).exists() for place in places), path


def test_the_map_names_the_rooms_in_their_order():
    text = (ROOT / "backbones" / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Rooms")[2].partition("## Rules")[0]
    assert re.findall(r"(?m)^\| \[?`(\w+)`", table) == ROOMS


@by_page
def test_code_uses_names_that_exist(page):
    for block in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "backbones":
                assert hasattr(backbones, node.attr), f"backbones.{node.attr}"
