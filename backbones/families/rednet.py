"""RedNet: a ResNet whose 3x3 convolutions are involutions.

Source: "Involution: Inverting the Inherence of Convolution for Visual Recognition" (arXiv
2103.06255), sections 3 and 4.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from backbones import merge, ops
from backbones.errors import CheckpointError, ConfigError
from backbones.layers import Chain, Head, conv_norm, fx_leaf, init_by_fan_out
from backbones.skeleton import StagedBackbone, StagePlan, Tensors

STEM_DIM = 64  # channels of the stem's output
SHARING = 16  # neighboring channels that share a kernel
REDUCTION = 4  # of channels, in a block and again where kernels are predicted
KERNEL_SIZE = 7

involve = fx_leaf(ops.involution)


class Involution(nn.Module):
    """An involution whose kernels are predicted from its input: (B, C, H, W) to (B, C, H', W').

    ``involution(x, predict(reduce(pool(x))))`` (equations 4 and 6, figure 1). Kernels of a strided
    one come from the mean of the positions that they stand for. At odd sizes, which the authors'
    code does not take, that mean is over the positions there are.

    Args:
        dim: channels C, a multiple of 16.
        kernel_size: side of the kernels, odd.
        stride: H' and W' are H and W divided by it and rounded up.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.pool: nn.Module = nn.Identity()
        if stride > 1:
            self.pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        self.reduce = conv_norm(dim, dim // REDUCTION, 1, act=nn.ReLU())
        self.predict = nn.Conv2d(dim // REDUCTION, dim // SHARING * kernel_size**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.predict(self.reduce(self.pool(x)))  # B G*K H' W'
        kernels = kernels.unflatten(1, (-1, self.kernel_size**2))  # B G K H' W'
        return involve(x, kernels, self.stride)  # B C H' W'


class Block(nn.Module):
    """``relu(shortcut(x) + conv2(relu(norm(involution(conv1(x))))))``, the bottleneck of ResNet.

    Args:
        in_dim: channels of the input.
        dim: channels of the output; a quarter of them pass the involution.
        stride: of the involution and the shortcut.
        projected: the shortcut is a 1x1 convolution instead of the identity.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self, in_dim: int, dim: int, stride: int, projected: bool, drop_path: float
    ) -> None:
        super().__init__()
        hidden_dim = dim // REDUCTION
        self.conv1 = conv_norm(in_dim, hidden_dim, 1, act=nn.ReLU())
        self.involution = Involution(hidden_dim, KERNEL_SIZE, stride)
        self.norm = nn.BatchNorm2d(hidden_dim)
        self.act = nn.ReLU()
        self.conv2 = conv_norm(hidden_dim, dim, 1)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if projected:
            self.downsample = conv_norm(in_dim, dim, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.involution(self.conv1(x))))  # B D/4 H' W'
        return self.act(self.downsample(x) + self.drop_path(self.conv2(y)))  # B D H' W'

    def reparameterize(self) -> None:
        """Fold norms after convolutions, and let the projected shortcut add both biases."""
        for chain in (self.conv1, self.conv2):
            merge.fold_chain(chain)
        if isinstance(self.downsample, Chain):
            merge.fold_chain(self.downsample)
            merge.shift_into_previous(self.downsample.conv, self.conv2.conv.bias)
            self.conv2.conv.bias = None


AUTHORS = (
    (r"^backbone\.", ""),
    *((rf"^layer{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"^stem\.1\.conv1\.", "stem.1.reduce."),
    (r"^stem\.1\.conv2\.conv\.", "stem.1.predict."),
    (r"\.conv2\.conv1\.", ".involution.reduce."),
    (r"\.conv2\.conv2\.conv\.", ".involution.predict."),
    (r"^(stem\.\d|.*\.reduce)\.bn\.", r"\1.norm."),
    (r"(blocks\.\d+)\.conv1\.", r"\1.conv1.conv."),
    (r"(blocks\.\d+)\.bn1\.", r"\1.conv1.norm."),
    (r"(blocks\.\d+)\.bn2\.", r"\1.norm."),
    (r"(blocks\.\d+)\.conv3\.", r"\1.conv2.conv."),
    (r"(blocks\.\d+)\.bn3\.", r"\1.conv2.norm."),
    (r"\.downsample\.0\.", ".downsample.conv."),
    (r"\.downsample\.1\.", ".downsample.norm."),
)


class RedNet(StagedBackbone):
    """RedNet; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, multiples of 64.
        stem_kernel_size: side of the stem's involution, odd: 3 in the authors' classification
            models, 7 in those for detection and segmentation. The shape of ``stem.1.predict`` tells
            the forms of a checkpoint apart, and one of the other form is refused.

    Raises:
        ConfigError: channels that are no multiples of 64, or an even kernel.
    """

    first_conv = "stem.0.conv"
    layouts = {"authors": AUTHORS}

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int] = (256, 512, 1024, 2048),
        stem_kernel_size: int = 3,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        if any(dim % (REDUCTION * SHARING) for dim in dims):
            raise ConfigError(f"dims: {list(dims)} must be multiples of {REDUCTION * SHARING}")
        if stem_kernel_size < 1 or stem_kernel_size % 2 == 0:
            raise ConfigError(f"stem_kernel_size: {stem_kernel_size} must be odd, as 3 or 7")
        self.stem_kernel_size = stem_kernel_size
        self.assemble()

    def build_stem(self) -> nn.Module:
        hidden_dim = STEM_DIM // 2
        return Chain(
            conv_norm(self.in_chans, hidden_dim, 3, stride=2, act=nn.ReLU()),
            Involution(hidden_dim, self.stem_kernel_size),
            nn.BatchNorm2d(hidden_dim),
            nn.ReLU(),
            conv_norm(hidden_dim, STEM_DIM, 3, act=nn.ReLU()),
            nn.MaxPool2d(3, stride=2, padding=1),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        """Return None: the first block of a stage strides."""
        return None

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        if index > 0:
            return Block(plan.dim, plan.dim, 1, False, drop_path)
        in_dim, stride = (plan.in_dim, plan.stride) if plan.index > 0 else (STEM_DIM, 1)
        return Block(in_dim, plan.dim, stride, True, drop_path)

    def build_head(self, **common: Any) -> Head:
        return Head(self.plans[-1].dim, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Initialize convolutions by their fan-out; the branches of blocks begin as zeros."""
        if isinstance(module, nn.Conv2d):
            init_by_fan_out(module)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif name.endswith(".conv2.norm"):
            nn.init.zeros_(module.get_parameter("weight"))

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Refuse a checkpoint of the other stem by words instead of shapes."""
        taps = self.stem_kernel_size**2
        given = tensors.get("stem.1.predict.weight")
        groups = STEM_DIM // 2 // SHARING
        if given is not None and len(given) != groups * taps:
            side = round((len(given) / groups) ** 0.5)
            raise CheckpointError(
                f"its stem has an involution of {side}x{side} and the model's has"
                f" {self.stem_kernel_size}x{self.stem_kernel_size} (3 for classification, 7 for"
                f" detection and segmentation); create the model with stem_kernel_size={side}"
            )
        return tensors
