"""The rules of the house: who may import whom, faces, public paths, a quick and quiet import."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import backbones

PACKAGE = Path(backbones.__file__).parent
# Each room imports only from those before it (families do not know one another).
ROOMS = (
    "errors schema files optional images config manifest wrappers merge ops layers stages skeleton "
    "families reparameterization weights registry timm_bridge factory info conversion engines "
    "inference bench train quickstart cli"
).split()
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_MODULES = (
    14  # of a folder; the root and families/ have as many as there are rooms and families
)
by_path = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if name in NAMES]
            found += modules
            if len(modules) < len(inner) or module in ("timm", "torch"):
                found.append(module)
            if module in ("timm", "torch"):
                found += inner
    return tuple(found)


def ours(path: Path) -> list[str]:
    return [name for name in imports(path) if name.split(".")[0] == "backbones"]


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


@by_path
def test_rooms_import_only_from_those_above(path):
    own = name_of(path)
    room = room_of(own)
    if room in ("", "__main__"):
        return
    assert room in ROOMS, f"{path} is in no room; add it to backbones/README.md and to ROOMS"
    for name in ours(path):
        if name == "backbones":
            assert room == "cli", f"{path} imports the whole package"
            continue
        assert ROOMS.index(room_of(name)) <= ROOMS.index(room), f"{path} imports {name}"
        if room == "families" == room_of(name):
            same = name.split(".")[:3] == own.split(".")[:3]
            assert same, f"{path} imports another family: {name}"


@by_path
def test_packages_are_entered_through_their_faces(path):
    """Of a package that a file is not in itself, it sees the package alone."""
    own = name_of(path)
    home = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for name in ours(path):
        if name == "backbones":
            continue
        package = home
        while not f"{name}.".startswith(f"{package}."):
            package = package.rpartition(".")[0]
        assert name != home or path.name == "__init__.py", f"{path} imports its own package"
        inner = name[len(package) + 1 :].split(".")
        if package == "backbones" and inner[0] == "families":
            inner = inner[1:]  # each family is a room of its own
        assert len(inner) <= 1, f"{path} imports {name}; enter by {package}.{inner[0]}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: {n for n in ours(path) if n in NAMES} for name, path in NAMES.items()}
    for name in graph:  # importing a module runs the packages around it first
        graph[name] -= {name}
        if room_of(name) == "cli":
            graph[name] -= {"backbones"}
    graph["backbones"] = set()
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the way


def test_folders_are_small():
    for folder in {path.parent for path in MODULES} - {PACKAGE, PACKAGE / "families"}:
        modules = list(folder.glob("*.py"))
        assert len(modules) <= MOST_MODULES, f"{folder} has {len(modules)} modules"


def test_families_know_nothing_of_graph_engines():
    for path in MODULES:
        assert "graph_form" not in path.read_text(encoding="utf-8"), path


@by_path
def test_helpers_outside_all_have_an_underscore(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            public = set(ast.literal_eval(node.value))
    if public is None:
        return
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    helpers = {node.name for node in tree.body if isinstance(node, kinds)} - public
    assert not {name for name in helpers if not name.startswith("_")}


@by_path
def test_only_public_paths_of_timm_and_torch(path):
    for name in imports(path):
        if name.split(".")[0] in ("timm", "torch"):
            assert "._" not in name, f"{path} imports the private {name}"


@pytest.mark.parametrize("room", ["errors", "schema", "files", "optional", "config", "manifest"])
def test_descriptions_are_read_without_torch(room):
    assert not any(
        name.split(".")[0] in ("torch", "timm") for name in imports(PACKAGE / f"{room}.py")
    )


def test_no_package_shares_a_name_with_a_public_function():
    packages = {p.parent.name for p in PACKAGE.rglob("__init__.py")}
    assert not packages & {*backbones.__all__, "predict", "embed"}


def test_import_is_quiet_and_costs_little_more_than_timm():
    program = """
import json, sys, time
start = time.process_time(); import timm; middle = time.process_time()
import backbones; end = time.process_time()
heavy = ["onnx", "onnxruntime", "sklearn", "matplotlib", "openvino", "pandas", "scipy"]
print(json.dumps([middle - start, end - middle, [m for m in heavy if m in sys.modules]]))
"""
    # timm's modules were compiled by pip, ours by the first of these runs
    variables = {key: os.environ[key] for key in os.environ if key != "PYTHONDONTWRITEBYTECODE"}
    ratios = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=variables
        )
        assert result.stderr == ""
        of_timm, ours, heavy = json.loads(result.stdout)
        assert heavy == []
        ratios.append(ours / of_timm)
    # a ratio, as machines are noisy
    assert min(ratios[1:]) < 0.15
