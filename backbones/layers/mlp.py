"""The channel mixer of the ConvNeXt line: expand, activate, reduce."""

from torch import Tensor, nn

from backbones import merge
from backbones.layers.norm import GlobalResponseNorm

__all__ = ["ChannelMlp"]


class ChannelMlp(nn.Module):
    """``fc2(GRN(GELU(fc1(x))))`` at every position; GRN only where asked for.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two layers.
        use_conv: 1x1 convolutions on (B, C, H, W) instead of linear layers on (B, H, W, C). The
            two forms compute the same and their weights differ by two singleton dimensions.
        use_grn: global response norm after the activation (ConvNeXt V2).
        out_bias: whether the second layer has a bias.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        use_conv: bool = False,
        use_grn: bool = False,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        if use_conv:
            self.fc1: nn.Conv2d | nn.Linear = nn.Conv2d(dim, hidden_dim, 1)
        else:
            self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        if use_grn:
            self.grn: nn.Module = GlobalResponseNorm(hidden_dim, channels_last=not use_conv)
        else:
            self.grn = nn.Identity()
        if use_conv:
            self.fc2: nn.Conv2d | nn.Linear = nn.Conv2d(hidden_dim, dim, 1, bias=out_bias)
        else:
            self.fc2 = nn.Linear(hidden_dim, dim, bias=out_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))  # B H W D, or B D H W with `use_conv`
        return self.fc2(self.grn(x))  # B H W C, or B C H W

    def reparameterize(self) -> None:
        """Fold the offset of the response norm into the second layer."""
        if isinstance(self.grn, GlobalResponseNorm) and self.grn.bias is not None:
            merge.shift_into_next(self.grn.bias, self.fc2)
            self.grn.bias = None
