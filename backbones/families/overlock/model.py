"""OverLoCK: an overview of the image first, then a close look guided by it.

Source: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels"
(arXiv 2502.20087), section 3. Of four plain stages the third (base) and the fourth (overview) feed
the focus net, whose two stages give the model's third and fourth feature maps.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timm.layers import (
    DropPath,
    LayerNorm2d,
    SqueezeExcite,
    calculate_drop_path_rates,
    get_device_dtype,
)
from torch import Tensor, nn

from backbones import merge
from backbones.errors import UnsupportedError
from backbones.families.overlock.focus import FocusBlock, FocusDownsample, FocusNet, FocusStage
from backbones.families.overlock.layers import ConvMlp, LayerScale
from backbones.layers import (
    BRANCHED_CONV_LAYOUT,
    BranchedConv,
    Head,
    ResidualConv,
    conv_norm,
    split_merged_kernels,
)
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, check_input, per_stage

EPS = 1e-6
HEAD_DIM = 1024
KERNEL_SIZES = (17, 15, 13, 7)  # a focus stage uses that of its stride
# (kernel, dilation) of the branches beside each large kernel: UniRepLKNet's and a plain one.
BRANCHES = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
}


class Block(nn.Module):
    """A block of the base and overview nets: a large kernel, then an MLP (figure 4a).

    As in the focus block, a layer scale acts on the identity, not on the branch.
    """

    def __init__(self, dim: int, kernel_size: int, layer_scale: bool, drop_path: float) -> None:
        super().__init__()
        self.conv_dw = ResidualConv(dim)
        self.norm = LayerNorm2d(dim, eps=EPS)
        self.mixer = BranchedConv(dim, kernel_size, BRANCHES[kernel_size])
        self.mixer_norm = nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU)
        self.mlp = ConvMlp(dim, 4 * dim)
        self.ls = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_dw(x)
        y = self.se(self.mixer_norm(self.mixer(self.norm(x))))
        return self.ls(x) + self.drop_path(self.mlp(y))

    def reparameterize(self) -> None:
        merge.fold_chain(self, ("conv_dw",))
        merge.fold_chain(self, ("mixer", "mixer_norm"))
        self.mlp.reparameterize()
        if isinstance(self.ls, LayerScale):
            self.ls.shift_into(self.mlp.fc2)


def numbered(pattern: str, replacement: str, names: Mapping[int, str]) -> list[tuple[str, str]]:
    """Return renames of a numbered sequence's parts."""
    return [(rf"{pattern}\.{i}\.", f"{replacement}.{name}.") for i, name in names.items()]


CONV_NORM = {0: "conv", 1: "norm"}
AUTHORS_LAYOUT = (
    *((rf"^patch_embed1\.{3 * i + j}\.", f"stem.{i}.{j}.") for i in range(4) for j in range(2)),
    *((rf"^patch_embed{i + 1}\.", f"stages.{i}.downsample.") for i in range(1, 4)),
    *((rf"^blocks{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    *((rf"^sub_blocks{i + 3}\.", f"focus.stages.{i}.blocks.") for i in range(2)),
    (r"^patch_embedx\.x_proj\.", "focus.stages.1.downsample.image."),
    (r"^patch_embedx\.h_proj\.", "focus.stages.1.downsample.context."),
    (r"^high_level_proj\.", "focus.project."),
    *numbered(r"\.(?:proj\.3|se_layer)\.proj", ".se", {1: "fc1", 3: "fc2"}),
    *numbered(r"^(stages.*)\.proj", r"\1", {0: "norm", 1: "mixer", 2: "mixer_norm"}),
    *numbered(r"^(stages.*)\.proj", r"\1.mlp", {4: "fc1", 6: "conv_dw", 7: "grn", 8: "fc2"}),
    *numbered(r"^(focus.*)\.proj", r"\1.proj", {0: "norm", 1: "conv"}),
    *numbered(r"\.mlp", ".mlp", {0: "fc1", 2: "conv_dw", 3: "grn", 4: "fc2"}),
    *numbered(r"\.weight_key", ".mixer.key", {1: "conv", 2: "norm"}),
    (r"\.weight_query\.", ".mixer.query."),
    (r"\.weight_proj\.", ".mixer.kernel."),
    *numbered(r"\.dyconv_proj", ".mixer.proj", CONV_NORM),
    (r"\.rpb1$", ".mixer.bias_small"),
    (r"\.rpb2$", ".mixer.bias_large"),
    (r"\.dwconv(\d?)\.", r".conv_dw\1."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    *numbered(r"(^stem\.\d|\.(?:downsample|image|context|query|gate))", r"\1", CONV_NORM),
    *numbered("^head", "head", {**CONV_NORM, 4: "fc"}),
    *numbered("^aux_head", "focus.aux_head", {0: "norm", 2: "fc"}),
    *BRANCHED_CONV_LAYOUT,
)


class OverLoCK(StagedBackbone):
    """OverLoCK; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of the three base stages and of the overview stage.
        dims: their channels.
        focus_depths: blocks of the two focus stages.
        groups: groups of channels with dynamic kernels of their own, in these two.
        aux_head: a second classifier, on the overview, for :meth:`set_distilled_training`.
    """

    first_conv = "stem.0.conv"
    auxiliary_keys = (r"^focus\.aux_head\.",)
    layouts = {"authors": AUTHORS_LAYOUT}
    fixed_size_reason = "feature maps smaller than its kernels are enlarged for them"
    focus: FocusNet | None

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        focus_depths: Sequence[int],
        groups: Sequence[int],
        aux_head: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.focus_depths = per_stage(focus_depths, 2, "focus_depths")
        self.groups = per_stage(groups, 2, "groups")
        self.context_dim = dims[-1] // 4
        self.num_features = dims[-1] + self.context_dim
        self.with_aux_head = aux_head
        self.distilled_training = False
        self.assemble()

    def drop_path_rates(self) -> list[list[float]]:
        depths = [plan.depth for plan in self.plans] + self.focus_depths
        return calculate_drop_path_rates(self.drop_path_rate, depths, stagewise=True)

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return nn.Sequential(
            conv_norm(self.in_chans, dim // 2, 3, stride=2, act=nn.GELU()),
            conv_norm(dim // 2, dim // 2, 3, act=nn.GELU()),
            conv_norm(dim // 2, dim, 3, stride=2, act=nn.GELU()),
            conv_norm(dim, dim, 3),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        return conv_norm(plan.in_dim, plan.dim, 3, stride=2) if plan.index else None

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        return Block(plan.dim, KERNEL_SIZES[plan.index], plan.index >= 2, drop_path)

    def build_extras(self, drop_path: Sequence[Sequence[float]]) -> Mapping[str, nn.Module]:
        context, stages = self.context_dim, []
        for plan, groups, rates in zip(self.plans[2:], self.groups, drop_path[4:]):
            first, size = plan.index == 2, KERNEL_SIZES[plan.index]
            blocks = [
                FocusBlock(plan.dim, context, size, BRANCHES[size], groups, first and j == 0, rate)
                for j, rate in enumerate(rates)
            ]
            downsample = None if first else FocusDownsample(plan.in_dim, plan.dim, context)
            stages.append(FocusStage(downsample, blocks))
        return {"focus": FocusNet(self.plans[-1].dim, context, stages)}

    def build_head(self, **common: Any) -> Head:
        if self.with_aux_head and self.focus:
            dim = self.plans[-1].dim
            self.focus.aux_head = Head(dim, maps={"norm": nn.BatchNorm2d(dim)}, **common)
            self.classifier_names = (*self.classifier_names, "focus.aux_head.fc")
        conv = nn.Conv2d(self.num_features, HEAD_DIM, 1, bias=False)
        maps = {"conv": conv, "norm": nn.BatchNorm2d(HEAD_DIM), "act": nn.SiLU()}
        return Head(self.num_features, maps=maps, hidden_features=HEAD_DIM, **common)

    def feature_dims(self) -> list[int]:
        return [p.dim + (self.context_dim if p.index >= 2 else 0) for p in self.plans]

    def feature_names(self) -> list[str]:
        last = [f"focus.stages.{i}.blocks.{n - 1}" for i, n in enumerate(self.focus_depths)]
        return ["stages.0", "stages.1", *last]

    def run_stages(self, x: Tensor) -> Iterator[Tensor]:
        guides = []  # base and overview
        for index, output in enumerate(super().run_stages(x)):
            if index < 2:
                yield output
            else:
                guides.append(output)
        if self.focus is not None:
            base, overview = guides
            yield from self.focus.run_stages(base, overview, self.grad_checkpointing)

    def forward(self, x: Tensor) -> Any:
        """Map images (B, in_chans, H, W) to logits (B, num_classes).

        In training mode after ``set_distilled_training(True)``: to (logits, auxiliary logits),
        whose losses the authors weigh 1 and 0.4.
        """
        aux_head = self.aux_head
        if not (self.training and self.distilled_training and self.focus and aux_head):
            return super().forward(x)
        check_input(x, self.in_chans, self.plans[-1].reduction)
        *_, base, overview = super().run_stages(x)
        *_, x = self.focus.run_stages(base, overview, self.grad_checkpointing)
        return self.forward_head(x), aux_head(overview)

    @property
    def aux_head(self) -> Head | None:
        """The auxiliary head on the overview, where the model has one."""
        return self.focus.aux_head if self.focus else None

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let the training forward return (logits, auxiliary logits), or logits alone again.

        Raises:
            UnsupportedError: the model has no auxiliary head.
        """
        if enable and self.aux_head is None:
            raise UnsupportedError("no auxiliary head; create the model with aux_head=True")
        self.distilled_training = enable

    def prune_stages(self, last: int) -> None:
        if last < 2:  # base and overview serve the focus net alone
            super().prune_stages(last)
            self.focus = None
        elif self.focus is not None:
            self.focus.stages = self.focus.stages[: last - 1]

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        super().reset_classifier(num_classes, global_pool, reset_other)
        if self.aux_head is None or self.focus is None:
            return
        if reset_other:
            self.focus.aux_head = None
        else:
            self.aux_head.reset(num_classes, global_pool, **get_device_dtype(self))
            self.init_layer(self.aux_head.get_classifier(), "focus.aux_head.fc")

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Bring the authors' re-parameterized form, whose large kernels are merged, into ours."""
        split_merged_kernels(tensors, self.state_dict())
        return tensors

    def execution_order(self, coarse: bool = False) -> list[str]:
        patterns = super().execution_order(coarse)
        for i in range(len(self.focus.stages) if self.focus else 0):
            own = rf"^focus\.stages\.{i}\."
            entry = rf"{own}downsample\." if i else r"^focus\.project\."
            blocks = [rf"{own}blocks\.{j}\." for j in range(self.focus_depths[i])]
            patterns += [f"{entry}|{own}"] if coarse else [f"{entry}|{blocks[0]}", *blocks[1:]]
        return patterns
