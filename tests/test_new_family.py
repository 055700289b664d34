"""A new family is one Python file and one YAML, in the repository or outside of it.

Everything else follows from being registered. Recipes, golden files, manifest entries and rows in
the tables of merges are further files, which it may bring.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import backbones

ROOT = Path(__file__).parent.parent
# What a clone holds, without whatever else lies beside it: environments, builds, downloads.
TREE = (
    ".ci",
    ".github",
    "backbones",
    "configs",
    "scripts",
    "tests",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "weights_manifest.yaml",
)

# Files that say something of every family or of the tree as a whole.
WHOLE = (
    "tests/test_house.py",
    "tests/test_config.py",
    "tests/test_factory.py",
    "tests/test_readme.py",
    "tests/cli/test_commands.py",
    "tests/reparam/test_merges.py",
    "tests/train/test_recipes.py",
    "tests/weights/test_manifest_entries.py",
)

FAMILY = '''
"""Toynet: a patch stem, and residual blocks of two depthwise kernels side by side and an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones import merge
from backbones.layers import BranchedConv, Chain, ChannelMlp, Head
from backbones.skeleton import StagedBackbone, StagePlan


class Block(nn.Module):
    """``x + gamma * mlp(norm2(mixer(norm1(x))))``, (B, C, H, W) to the same."""

    def __init__(self, dim: int, kernel_size: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)  # stays: the kernels after it are padded
        self.mixer: nn.Module = BranchedConv(dim, kernel_size, [(1, 1)])
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = ChannelMlp(dim, 2 * dim, use_conv=True)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((dim,), 0.1))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(self.mixer(self.norm1(x))))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        if isinstance(self.mixer, BranchedConv):
            self.mixer = self.mixer.merged()
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma)
        self.gamma = None


class Toynet(StagedBackbone):
    """Toynet; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        kernel_size: of the depthwise convolutions.
    """

    layouts = {"authors": ((r"^patch\\.", "stem."),)}

    def __init__(
        self, depths: Sequence[int], dims: Sequence[int], kernel_size: int = 3, **common: Any
    ) -> None:
        super().__init__(dims, depths, **common)
        self.kernel_size = kernel_size
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(nn.Conv2d(self.in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim))

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        return nn.Conv2d(plan.in_dim, plan.dim, 2, stride=2) if plan.index else None

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        return Block(plan.dim, self.kernel_size, drop_path)

    def build_head(self, **common: Any) -> Head:
        return Head(self.plans[-1].dim, **common)
'''.lstrip()

CONFIG = """
family: toynet
sources:
  paper:
    title: "Toynet: one file and one YAML"
    paper: https://example.org/toynet.pdf
    repository: https://example.org/toynet
    license: mit
variants:
  toynet_t:
    depths: [1, 1, 3, 1]
    dims: [64, 128, 256, 512]
  toynet_t_k5:
    like: toynet_t
    kernel_size: 5
aliases:
  toynet: toynet_t
""".lstrip()

PLUGIN = """
from pathlib import Path
import backbones
here = Path(__file__).parent
names = backbones.register_family(here / "toynet.yaml", here / "toynet.py")
assert names == ["toynet_t", "toynet_t_k5"]
"""

USE = """
import pathlib, tempfile, timm, torch
import backbones
from backbones.cli import main
model = timm.create_model("toynet", num_classes=3)
assert type(model).__name__ == "Toynet"
assert timm.list_models("toynet*", module="backbones") == ["toynet", "toynet_t", "toynet_t_k5"]
authors = {k.replace("stem.", "patch."): v for k, v in model.state_dict().items()}
twin = backbones.create_model("toynet_t", num_classes=3)
report = backbones.load_checkpoint(twin, authors)
assert report.layout == "authors"
x = torch.randn(1, 3, 64, 64)
assert torch.equal(twin.eval()(x), model.eval()(x))

# No weights were released: lists, facts and errors say so, and one's own are saved and published.
assert backbones.list_models(family="toynet") == ["toynet_t", "toynet_t_k5"]
assert backbones.list_models(family="toynet", pretrained=True) == []
assert backbones.model_info("toynet").weights == []
assert main(["info", "toynet"]) == 0
for create in (backbones.create_model, timm.create_model):
    try:
        create("toynet_t", pretrained=True)
    except backbones.errors.WeightsUnavailableError as error:
        assert "no released weights are known for toynet_t" in str(error)
    else:
        raise AssertionError("weights came from nowhere")
with tempfile.TemporaryDirectory() as folder:
    path = backbones.save_checkpoint(model, pathlib.Path(folder) / "mine.safetensors")
    push = ["weights", "push", str(path), "me/mine", "--license", "mit", "--dry-run"]
    assert main(push) == 0
print("used from", pathlib.Path(backbones.__file__).parent.parent)
"""


def run(folder: Path, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that sees what is in `folder`, then what is in `cwd`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(cwd)))}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=cwd
    )


def copy_of_the_tree(folder: Path) -> Path:
    """Copy what a clone holds, and add the family's two files as a newcomer would."""
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, folder / name)
    (folder / "backbones" / "families" / "toynet.py").write_text(FAMILY)
    (folder / "configs" / "toynet.yaml").write_text(CONFIG)
    return folder


def passed(folder: Path, *arguments: str) -> list[str]:
    """Run pytest in a tree of its own, where all must pass; return ``file::test`` of each."""
    report = folder / "report.xml"
    options = ("-q", "-n0", "-p", "no:cacheprovider", f"--junitxml={report}")
    result = run(folder, "-m", "pytest", *options, *arguments, cwd=folder)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    cases = [case for case in ElementTree.parse(report).iter("testcase") if not len(case)]
    return [f"{case.get('classname')}::{case.get('name')}" for case in cases]


def of_the_family(tests: list[str]) -> Counter[str]:
    """Count, by file, the tests that are the family's own."""
    return Counter(test.partition("::")[0] for test in tests if "toynet" in test)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("tree"))


def test_use_inside_the_repository(tree):
    (tree / "use.py").write_text(USE)
    used = run(tree, "use.py", cwd=tree)
    assert used.stdout.endswith(f"used from {tree}\n"), used.stderr


def test_every_test_over_the_registry_passes_inside_the_repository(tree):
    counts = of_the_family(passed(tree, "tests", "-k", "toynet"))
    assert counts["tests.contract.test_structure"] >= 2 * 9
    assert counts["tests.contract.test_behavior"] >= 2 * 18
    assert counts["tests.reparam.test_equivalence"] >= 2 * 5
    assert counts["tests.reparam.test_forms"] >= 2
    assert counts["tests.clients.test_clients"] == 3
    assert sum(counts.values()) >= 90


@pytest.mark.slow
def test_house_recipe_manifest_and_merge_tests_pass_inside_the_repository(tree):
    """Whole files, but for what is about another family alone."""
    written = run(tree, "scripts/update_tables.py", cwd=tree)  # as the tables' test says
    assert written.returncode == 0, written.stderr
    others = " and ".join(f"not {name}" for name in backbones.list_families())
    tests = passed(tree, *WHOLE, "-k", f"toynet or ({others})")
    files = {test.partition("::")[0] for test in tests}
    assert files == {path.removesuffix(".py").replace("/", ".") for path in WHOLE}
    counts = of_the_family(tests)
    assert counts["tests.test_house"] >= 3  # rooms, faces, public paths
    assert counts["tests.train.test_recipes"] >= 2
    assert counts["tests.test_config"] == 2


def test_outside_of_the_repository(tmp_path):
    (tmp_path / "toynet.py").write_text(FAMILY)
    (tmp_path / "toynet.yaml").write_text(CONFIG)
    (tmp_path / "toynet_plugin.py").write_text(PLUGIN)
    (tmp_path / "use.py").write_text(PLUGIN + USE)
    used = run(tmp_path, str(tmp_path / "use.py"))
    assert used.stdout.endswith(f"used from {ROOT}\n"), used.stderr
    command = "-m pytest -q -n0 -p toynet_plugin tests/contract -k toynet_t".split()
    contract = run(tmp_path, *command)
    assert contract.returncode == 0, contract.stdout[-3000:]
    passed = int(contract.stdout.splitlines()[-1].split()[0])
    per_variant = 30
    assert passed >= 2 * per_variant - 12  # costly tests run once, as the two differ in structure
