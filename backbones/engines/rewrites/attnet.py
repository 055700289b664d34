"""AttNet's gated MLP without a split."""

from torch import Tensor, nn

from backbones.engines.rewrites.convolutions import select_outputs
from backbones.families.attnet import GatedMlp

__all__ = ["SeparateGateMlp"]


class SeparateGateMlp(nn.Module):
    """``fc2(norm(GELU(conv_dw(gate(x))) * value(x)))``, whose halves are projections of their own.

    It takes over the parts of `mlp`.
    """

    def __init__(self, mlp: GatedMlp) -> None:
        super().__init__()
        half = mlp.fc1.out_channels // 2
        self.gate = select_outputs(mlp.fc1, slice(None, half))
        self.value = select_outputs(mlp.fc1, slice(half, None))
        self.conv_dw, self.act, self.norm, self.fc2 = mlp.conv_dw, mlp.act, mlp.norm, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act(self.conv_dw(self.gate(x)))  # B D H W
        return self.fc2(self.norm(gate * self.value(x)))  # B C H W
