"""A new family is one Python file and one YAML; everything else follows from being registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FAMILY = '''
"""A toy: patch stem, residual depthwise blocks, strided 2x2 convolutions."""
from timm.layers import DropPath
from torch import nn
from backbones.layers import Head
from backbones.skeleton import StagedBackbone


class Block(nn.Module):
    def __init__(self, dim, kernel_size, drop_path):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.mix = nn.Conv2d(dim, dim, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.mix(self.norm(self.conv(x)).relu()))


class Toy(StagedBackbone):
    layouts = {"authors": ((r"^patch\\.", "stem."),)}

    def __init__(self, depths: list[int], dims: list[int], kernel_size: int = 3, **common):
        super().__init__(dims, depths, **common)
        self.kernel_size = kernel_size
        self.assemble()

    def build_stem(self):
        return nn.Sequential(nn.Conv2d(self.in_chans, self.plans[0].dim, 4, stride=4))

    def build_downsample(self, plan):
        return nn.Conv2d(plan.in_dim, plan.dim, 2, stride=2) if plan.index else None

    def build_block(self, plan, index, drop_path):
        return Block(plan.dim, self.kernel_size, drop_path)

    def build_head(self, **common):
        return Head(self.plans[-1].dim, **common)
'''

CONFIG = """
family: toy
sources:
  paper: {title: A toy, paper: none, repository: none, license: mit}
variants:
  toy_t:
    depths: [1, 1, 3, 1]
    dims: [128, 192, 384, 768]
  toy_t_k5:
    like: toy_t
    kernel_size: 5
aliases:
  toy: toy_t
"""

PLUGIN = """
from pathlib import Path
import backbones
here = Path(__file__).parent
assert backbones.register_family(here / "toy.yaml", here / "toy.py") == ["toy_t", "toy_t_k5"]
"""

USE = """
import timm, torch
model = timm.create_model("toy", num_classes=3)
assert type(model).__name__ == "Toy"
assert timm.list_models("toy*", module="backbones") == ["toy", "toy_t", "toy_t_k5"]
authors = {k.replace("stem.", "patch."): v for k, v in model.state_dict().items()}
twin = backbones.create_model("toy_t", num_classes=3)
report = backbones.load_checkpoint(twin, authors)
assert report.layout == "authors"
x = torch.randn(1, 3, 64, 64)
assert torch.equal(twin.eval()(x), model.eval()(x))
print("used")
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=root
    )


def test_one_file_and_one_yaml_are_enough(tmp_path):
    (tmp_path / "toy.py").write_text(FAMILY)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    (tmp_path / "toy_plugin.py").write_text(PLUGIN)
    (tmp_path / "use.py").write_text(PLUGIN + USE)
    used = run(tmp_path, str(tmp_path / "use.py"))
    assert used.stdout == "used\n", used.stderr
    contract = run(
        tmp_path, "-m", "pytest", "-q", "-n0", "-p", "toy_plugin", "tests/contract", "-k", "toy_t"
    )
    assert contract.returncode == 0, contract.stdout[-3000:]
    passed = int(contract.stdout.splitlines()[-1].split()[0])
    per_variant = 30
    assert passed >= 2 * per_variant - 12  # costly tests run once, as the two differ in structure
