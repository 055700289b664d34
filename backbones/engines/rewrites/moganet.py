"""MogaNet's blocks with shortcuts as summands of convolutions, which engines add in place."""

from torch import Tensor, nn

from backbones.engines.rewrites.contrast import ContrastedProjection
from backbones.engines.rewrites.convolutions import select_outputs
from backbones.families.moganet import Block, ContrastMlp, GatedAggregation

__all__ = ["ContrastedGates", "SeparateContrast", "SummedBlock"]


class SummedBlock(nn.Module):
    """``x = shortcut * x + attn(x)``, then the MLP with its shortcut inside.

    It takes over the parts of the re-parameterized `block`.
    """

    shortcut: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        if block.shortcut is None:
            raise TypeError("the block is not re-parameterized")
        self.attn = ContrastedGates(block.attn)
        self.register_buffer("shortcut", block.shortcut.detach().view(1, -1, 1, 1))
        self.mlp = SeparateContrast(block.mlp)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x * self.shortcut + self.attn(x))


class ContrastedGates(nn.Module):
    """The gated aggregation with its contrast after the projection, where that is exact."""

    def __init__(self, attn: GatedAggregation) -> None:
        super().__init__()
        self.proj_1 = ContrastedProjection(attn.proj_1, attn.contrast)
        self.gate, self.value, self.proj_2 = attn.gate, attn.value, attn.proj_2
        self.act, self.act_gate = attn.act, attn.act_gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.proj_1(x))  # B C H W
        return self.proj_2(self.act_gate(self.gate(y)) * self.act_gate(self.value(y)))


class SeparateContrast(nn.Module):
    """``x + mlp(x)`` with a convolution of its own for the map of the contrast.

    As one more output of `fc2` it would fill a vector of outputs of its own, and have to be split
    off.
    """

    direction: Tensor

    def __init__(self, mlp: ContrastMlp) -> None:
        super().__init__()
        if mlp.direction is None:
            raise TypeError("the MLP is not re-parameterized")
        self.fc1, self.conv_dw, self.act = mlp.fc1, mlp.conv_dw, mlp.act
        self.fc2 = select_outputs(mlp.fc2, slice(None, -1))
        self.decompose = select_outputs(mlp.fc2, slice(-1, None))
        self.register_buffer("direction", mlp.direction.detach().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv_dw(self.fc1(x)))  # B rC H W
        return x + self.fc2(y) + self.direction * self.act(self.decompose(y))  # B C H W
