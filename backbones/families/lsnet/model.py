"""LSNet: see large with a 7x7 kernel, focus small with 3x3 kernels predicted from what is seen.

Source: "LSNet: See Large, Focus Small" (arXiv 2503.23135), section 3. Its stages have the strides
8, 16, 32 and 64.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, SqueezeExcite
from torch import Tensor, nn

from backbones.errors import CheckpointError, UnsupportedError
from backbones.families.lsnet.attention import DistanceAttention, resize_tables
from backbones.families.lsnet.head import DistilledHead
from backbones.families.lsnet.large_small_conv import LargeSmallConv
from backbones.layers import BranchedConv, Chain, Head, VectorBatchNorm, conv_norm
from backbones.skeleton import StagedBackbone, StagePlan, Tensors

TABLE = re.compile(r"\.attention_biases$")
POINT = ".mixer.branches.k1_d1."


class Block(nn.Module):
    """A mixer, squeeze and excitation after the depthwise one, and a residual MLP (figure 3)."""

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float) -> None:
        super().__init__()
        self.mixer = mixer
        se = isinstance(mixer, BranchedConv)
        self.se = SqueezeExcite(dim, rd_ratio=0.25) if se else nn.Identity()
        fc1, fc2 = conv_norm(dim, 2 * dim, 1, act=nn.ReLU()), conv_norm(2 * dim, dim, 1)
        self.mlp = Chain(OrderedDict(fc1=fc1, fc2=fc2))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.mixer(x))
        return x + self.drop_path(self.mlp(x))

    def reparameterize(self) -> None:
        if isinstance(self.mixer, BranchedConv):
            self.mixer = self.mixer.merged()


def from_authors(tensors: Tensors, model: Any = None) -> Tensors:
    """Rename the authors' keys; there, a downsampling is the first two blocks of its stage."""
    rules = (
        (r"\.c\.", ".conv."),
        (r"(^|\.)bn\.", r"\1norm."),
        (r"\.mixer\.m\.dw\.", ".mixer.q_dw."),
        (r"\.mixer\.m\.proj\.1\.", ".mixer.proj."),
        (r"\.mixer\.m\.", ".mixer."),
        (r"\.mixer\.conv\.", ".mixer.large."),
        (r"\.mixer\.conv1\.", ".mixer.branches.k1_d1."),
        (r"\.lkp\.cv1\.", ".lkp.reduce."),
        (r"\.lkp\.cv2\.", ".lkp.conv_dw."),
        (r"\.lkp\.cv3\.", ".lkp.mix."),
        (r"\.lkp\.cv4\.", ".lkp.predict."),
        (r"\.ffn\.m\.pw(\d)\.", r".mlp.fc\1."),
        (r"^head_dist\.", "head.dist."),
        (r"^head\.(dist\.)?l\.", r"head.\1fc."),
    )
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if match := re.match(r"patch_embed\.(\d+)\.", key):
            key = f"stem.{int(match[1]) // 2}.{key[match.end() :]}"
        if match := re.match(r"blocks([1-4])\.(\d+)\.", key):
            stage, place = int(match[1]) - 1, int(match[2])
            index = place - 2 if stage else place
            part = f"blocks.{index}" if index >= 0 else f"downsample.{place}"
            key = f"stages.{stage}.{part}.{key[match.end() :]}"
        renamed[key] = tensor
    return renamed


class LSNet(StagedBackbone):
    """LSNet; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, multiples of 16.
        table_size: side of the map for which the attention holds biases: 4 (a 224x224 image) or
            14 (the authors' dense models). A checkpoint with larger tables makes the model take
            its size; smaller tables are resized when loaded, as for the authors' dense models.
        distilled: a second head that learned from a teacher; the logits are the mean of both.
    """

    strides = (8, 2, 2, 2)
    first_conv = "stem.0.conv"
    layouts = {"authors": from_authors}
    derived_keys = (r"\.attention_bias_idxs$",)
    auxiliary_keys = (r"^head\.dist\.",)
    resizable_keys = (TABLE.pattern,)
    no_decay_patterns = (TABLE.pattern,)
    fixed_size_reason = "its attention biases are computed for the size of the map"

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        table_size: int = 4,
        distilled: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.table_size = table_size
        self.distilled = distilled
        self.classifier_names = self.classifiers({"distilled": distilled})
        self.assemble()
        self.register_load_state_dict_pre_hook(adopt_table_size)

    @classmethod
    def classifiers(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        return ("head.fc", "head.dist.fc") if arguments.get("distilled") else ("head.fc",)

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(
            conv_norm(self.in_chans, dim // 4, 3, stride=2, act=nn.ReLU()),
            conv_norm(dim // 4, dim // 2, 3, stride=2, act=nn.ReLU()),
            conv_norm(dim // 2, dim, 3, stride=2),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        if plan.index == 0:
            return None
        return Chain(
            conv_norm(plan.in_dim, plan.in_dim, 3, stride=2, groups=plan.in_dim),
            conv_norm(plan.in_dim, plan.dim, 1),
        )

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        if index % 2 == 0:
            # conv_3x3(x) + conv_1x1(x) + x, as in RepVGG
            mixer: nn.Module = BranchedConv(plan.dim, 3, ((1, 1),), identity=True)
        elif plan.index < 3:
            mixer = LargeSmallConv(plan.dim)
        else:
            mixer = DistanceAttention(plan.dim, self.table_size, drop_path)
        return Block(mixer, plan.dim, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        if self.distilled:
            return DistilledHead(dim, **common)
        return Head(dim, vectors={"norm": VectorBatchNorm(dim)}, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Keep PyTorch's convolutions; attention and MLP branches begin as the identity."""
        if isinstance(module, nn.Linear):
            super().init_layer(module, name)
        elif name.endswith((".mlp.fc2.norm", ".mixer.proj.norm")):
            nn.init.zeros_(module.get_parameter("weight"))

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let the training forward return (logits, logits of the second head), or their mean.

        Raises:
            UnsupportedError: the model has no second head.
        """
        if not isinstance(self.head, DistilledHead) or self.head.dist is None:
            raise UnsupportedError(
                "no second head; create a _distill variant (distilled=True), not re-parameterized"
            )
        self.head.distilled_training = enable

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Resize smaller bias tables, and add branches of zeros where all 1x1 ones are absent.

        The latter are the authors' B models, whose logs count no such branches.
        """
        for key in filter(TABLE.search, list(tensors)):
            side = math.isqrt(tensors[key].shape[-1])
            if side**2 != tensors[key].shape[-1]:
                raise CheckpointError(f"{key!r} {tuple(tensors[key].shape)} is of no square map")
            if side < self.table_size:
                tensors[key] = resize_tables(tensors[key], self.table_size)
        own = {k: v for k, v in self.state_dict().items() if "num_batches_tracked" not in k}
        has_others = all(key in tensors for key in own if ".mixer.large." in key)
        if has_others and not any(POINT in key for key in tensors):
            for key in own:
                if POINT in key:
                    value = 1.0 if key.endswith("running_var") else 0.0
                    tensors[key] = torch.full_like(own[key], value)
        return tensors


def adopt_table_size(model: LSNet, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Give the model the table size of the state dict that is about to be loaded."""
    tables = [v for k, v in state_dict.items() if k.startswith(prefix) and TABLE.search(k)]
    sizes = {math.isqrt(table.shape[-1]) for table in tables}
    if len(sizes) != 1 or sizes == {model.table_size}:
        return
    model.table_size = model.arguments["table_size"] = sizes.pop()
    for module in model.modules():
        if isinstance(module, DistanceAttention):
            old = module.attention_biases
            fresh = old.new_zeros(len(old), model.table_size**2)
            module.attention_biases = nn.Parameter(fresh, old.requires_grad)
