"""GLNet: attention among a few slots beside convolutions of the whole map.

Source: "Revisiting the Integration of Convolution and Attention for Vision Backbone" (arXiv
2411.14429), section 3. Slots gather the map by a soft grouping and are dispatched back by it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, LayerNorm2d
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.errors import CheckpointError, ConfigError, InputSizeError, UnsupportedError
from backbones.layers import (
    Chain,
    ChannelMlp,
    Head,
    NormHead,
    ResidualConv,
    SelfAttention,
    TokenHead,
    norm_conv_downsample,
    statistics_dtype,
)
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, check_input, per_stage

EPS = 1e-6  # of the layer norms
GRID = 8  # slots along each side of the map
HEAD_DIM = 32
Mixer = Literal["slots", "turns", "attention"]
MIXERS: tuple[Mixer, ...] = ("slots", "slots", "turns", "attention")

TOKEN_CLASSIFIER = r"^(head\.token_fc|tklb_aux_head)\.weight$"
WRONG_SLOTS = (  # of a model that pools them, of one that learns them
    "the file holds the slots to begin with (init_slots), and this model pools them; create"
    " glnet_stl_paramslot, or the model with param_slots=True",
    "the file holds no slots to begin with (init_slots), since its model pools them; create the"
    " variant without _paramslot, or the model with param_slots=False",
)
WRONG_HEAD = (  # of a model without a classifier of tokens, of one with it
    "the file holds a classifier of tokens, which takes part in the logits; create the variant"
    " with _tklb, or the model with token_head=True",
    "the file holds no classifier of tokens, so it is of no model that was trained by token"
    " labelling; create the variant without _tklb, or the model with token_head=False",
)
AUTHORS = (
    (r"^tklb_aux_head\.", "head.token_fc."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^norm\.", "head.norm."),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"\.(?:relation_mha|mha_op)\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.(?:relation_mha|mha_op)\.out_proj\.", ".attn.proj."),
    (r"\.feature_conv\.0\.", ".conv1."),
    (r"\.feature_conv\.1\.", ".conv_dw."),
    (r"\.feature_conv\.2\.", ".conv2."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.", ".mlp.conv_dw."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"\.ls(\d)\.gamma$", r".gamma\1"),
)


def from_authors(tensors: Tensors, model: Any) -> Tensors:
    """Rename the authors' keys; an overlapping stem begins with an identity there."""
    overlapping = any(key.startswith("downsample_layers.0.5.") for key in tensors)
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        for pattern, replacement in AUTHORS:
            key = re.sub(pattern, replacement, key)
        if overlapping:
            key = re.sub(r"^stem\.(\d)", lambda found: f"stem.{int(found[1]) - 1}", key)
        renamed[key] = tensor
    return renamed


def pooled(x: Tensor) -> Tensor:
    """Return the means over an 8x8 grid of windows of a map (B, C, H, W), (B, 64, C)."""
    return F.adaptive_avg_pool2d(x, GRID).flatten(2).mT


def with_region_of_others(x: Tensor, box: Sequence[int]) -> Tensor:
    """Return maps (B, C, H, W) with a region taken from the batch in reverse order."""
    top, bottom, left, right = box
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
    return mixed


class LocalMlp(ChannelMlp):
    """``fc2(GELU(conv_dw(fc1(x))))`` on (B, C, H, W), `conv_dw` a residual convolution or none."""

    def __init__(self, dim: int, hidden_dim: int, local_conv: bool) -> None:
        super().__init__(dim, hidden_dim, use_conv=True)
        self.conv_dw: nn.Module = ResidualConv(hidden_dim) if local_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.conv_dw(self.fc1(x))))  # B C H W

    def reparameterize(self) -> None:
        """Fold the residual into the depthwise kernel."""
        merge.fold_chain(self, ("conv_dw",))


class Block(nn.Module):
    """What both blocks have: a convolution for the position, an attention, and an MLP.

    Args:
        dim: channels, a multiple of 32.
        mlp_ratio: expansion of the MLP.
        local_convs: depthwise 3x3 convolutions, for the position and in the MLP.
        init_value: initial layer scale; None for none.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float,
        local_convs: bool,
        init_value: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pos_conv: nn.Module = ResidualConv(dim) if local_convs else nn.Identity()
        self.attn = SelfAttention(dim, HEAD_DIM)
        self.norm2: nn.Module = LayerNorm2d(dim, eps=EPS)
        self.mlp = LocalMlp(dim, int(dim * mlp_ratio), local_convs)
        self.gamma1, self.gamma2 = (
            None if init_value is None else nn.Parameter(torch.full((dim,), init_value))
            for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def add_branches(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add to a map (B, C, H, W) what mixes its positions, and then the MLP."""
        if self.gamma1 is not None:
            mixed = mixed * self.gamma1.view(1, -1, 1, 1)
        x = x + self.drop_path(mixed)
        y = self.mlp(self.norm2(x))
        if self.gamma2 is not None:
            y = y * self.gamma2.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        merge.fold_chain(self, ("pos_conv",))
        self.attn.reparameterize()
        merge.scale_into_previous(self.attn.proj, self.gamma1)
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma2)
        self.gamma1 = self.gamma2 = None


class AttentionBlock(Block):
    """Attention of all positions to all (section 3.1), for stages of low resolution."""

    def __init__(self, dim: int, *options: Any) -> None:
        super().__init__(dim, *options)
        self.norm1: nn.Module = LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_conv(x)  # B C H W
        y = self.attn(self.norm1(x.flatten(2).mT))  # B N C
        return self.add_branches(x, y.mT.unflatten(2, x.shape[-2:]))

    def reparameterize(self) -> None:
        self.norm1 = merge.norm_into_next(self.norm1, self.attn.qkv)
        super().reparameterize()


class SlotBlock(Block):
    """GLMix (section 3.2): attention of 8x8 slots and a depthwise 5x5 of the map, side by side.

    A slot is at first the mean of its part of the block's input, or a parameter. The softmax over
    positions of ``scale * cos(slot, position)`` gathers the slots, that over slots dispatches them.

    Args:
        dim: channels, a multiple of 32.
        options: as of `Block`.
        param_slots: the first slots are a parameter.
    """

    def __init__(self, dim: int, *options: Any, param_slots: bool = False) -> None:
        super().__init__(dim, *options)
        slots = nn.Parameter(0.02 * torch.randn(1, GRID**2, dim)) if param_slots else None
        self.init_slots = slots
        self.norm1 = LayerNorm2d(dim, eps=EPS)
        self.slot_scale: nn.Parameter | None = nn.Parameter(torch.full((), dim**-0.5))
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv_dw = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.first_slots(x)
        x = self.pos_conv(x)  # B C H W
        y = self.norm1(x)
        local = self.conv2(self.conv_dw(self.conv1(y)))
        return self.add_branches(x, local + self.mix_slots(y, slots))

    def first_slots(self, x: Tensor) -> Tensor:
        """Return the slots' directions times the scale, (B, 64, C), or (1, 64, C) if learned."""
        slots = self.init_slots if self.init_slots is not None else pooled(x)
        if self.slot_scale is None:
            return slots
        wide = slots.to(statistics_dtype(x))  # whose squares overflow in float16
        return (F.normalize(wide, dim=-1) * self.slot_scale).to(slots.dtype)

    def mix_slots(self, x: Tensor, slots: Tensor) -> Tensor:
        """Gather a map (B, C, H, W) in slots, let these attend to each other, and dispatch them."""
        positions = x.flatten(2)  # B C N
        length = torch.linalg.vector_norm(
            positions, dim=1, keepdim=True, dtype=statistics_dtype(x)
        )  # B 1 N
        logits = slots @ positions / length.clamp_min(1e-12)  # B 64 N
        slots = self.attn(logits.softmax(2).to(x.dtype) @ positions.mT)  # B 64 C
        return (slots.mT @ logits.softmax(1).to(x.dtype)).unflatten(2, x.shape[-2:])

    def reparameterize(self) -> None:
        """Fold all but the norm, whose outputs are compared with the slots and make them."""
        self.attn.reparameterize()
        # What all slots have in common reaches every position: dispatching weights sum to one.
        merge.shift_into_previous(self.conv2, self.attn.proj.bias)
        merge.shift_into_next(self.conv_dw.bias, self.conv2)
        self.attn.proj.register_parameter("bias", None)
        self.conv_dw.bias = None
        merge.scale_into_previous(self.conv2, self.gamma1)
        if self.init_slots is not None and self.slot_scale is not None:
            merge.scale_into_directions(self.init_slots, self.slot_scale)
            self.slot_scale = None
        super().reparameterize()


class GLNet(StagedBackbone):
    """GLNet; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, multiples of 32.
        mlp_ratio: expansion of the MLPs.
        mixers: blocks of each stage: ``slots`` (GLMix), ``attention``, or both by turns.
        overlap: 3x3 convolutions of stride 2 between stages, two as the stem, rather than patches.
        local_convs: depthwise 3x3 convolutions, for the position and in the MLPs.
        param_slots: the slots that a block begins with are a parameter, rather than pooled.
        ls_init_value: initial layer scale; None for no layer scale.
        token_head: a second classifier, whose logits of the best token count half (token
            labelling); see :meth:`set_token_training`.

    Raises:
        ConfigError: channels that are no multiples of 32.
    """

    layouts = {"authors": from_authors}

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mlp_ratio: float = 3,
        mixers: PerStage[Mixer] = MIXERS,
        overlap: bool = True,
        local_convs: bool = True,
        param_slots: bool = False,
        ls_init_value: float | None = None,
        token_head: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        if any(dim % HEAD_DIM for dim in dims):
            raise ConfigError(f"dims: {list(dims)} must be multiples of {HEAD_DIM}")
        self.mlp_ratio = mlp_ratio
        self.mixers = per_stage(mixers, len(dims), "mixers")
        self.overlap = overlap
        self.local_convs = local_convs
        self.param_slots = param_slots
        self.ls_init_value = ls_init_value
        self.token_head = token_head
        self.classifier_names = self.classifiers({"token_head": token_head})
        if not param_slots:
            self.fixed_size_reason = "its slots are averages over windows of the map's size"
        self.assemble()

    @classmethod
    def classifiers(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        second = ("head.token_fc",) if arguments.get("token_head") else ()
        return ("head.fc", *second)

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        if not self.overlap:
            return Chain(nn.Conv2d(self.in_chans, dim, 4, 4), nn.BatchNorm2d(dim))
        return Chain(
            nn.Conv2d(self.in_chans, dim // 2, 3, 2, 1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
            nn.BatchNorm2d(dim),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        """Return a convolution and its norm, or of patches a norm and a convolution."""
        if plan.index == 0:
            return None
        if not self.overlap:
            return norm_conv_downsample(nn.BatchNorm2d(plan.in_dim), plan.in_dim, plan.dim)
        return Chain(nn.Conv2d(plan.in_dim, plan.dim, 3, 2, 1), nn.BatchNorm2d(plan.dim))

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        options = (self.mlp_ratio, self.local_convs, self.ls_init_value, drop_path)
        mixer = self.mixers[plan.index]
        if mixer == "attention" or (mixer == "turns" and index % 2):
            return AttentionBlock(plan.dim, *options)
        return SlotBlock(plan.dim, *options, param_slots=self.param_slots)

    def build_head(self, **common: Any) -> Head:
        head = TokenHead if self.token_head else NormHead
        return head(self.plans[-1].dim, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Keep PyTorch's convolutions, as the authors do; their plain MLPs on tokens are linear."""
        if isinstance(module, nn.Linear) and name.endswith(".attn.qkv"):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            super().init_layer(module, name)
        elif isinstance(module, AttentionBlock) and not self.local_convs:
            for layer in (module.mlp.fc1, module.mlp.fc2):
                super().init_layer(layer, name)

    def set_token_training(self, enable: bool = True) -> None:
        """Let the training forward return (logits, those of each token), or logits again.

        Raises:
            UnsupportedError: the model has no classifier of tokens.
        """
        if not isinstance(self.head, TokenHead):
            raise UnsupportedError("no classifier of tokens; create a _tklb variant")
        self.head.token_training = enable

    def forward_mixed(self, x: Tensor, box: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the training forward with MixToken: a region comes from another image of the batch.

        The region of the stem's map is taken from the batch in reverse order; the logits of its
        tokens are put back. Of the target for the mean, the region's share is the other image's.
        Source: arXiv 2104.10858, "Token Labeling with MixToken".

        Args:
            x: images (B, in_chans, H, W).
            box: first row, end of rows, first column and end of columns of the region, in cells of
                the last map, as timm's ``rand_bbox`` draws them.

        Returns:
            Logits of the mean, (B, num_classes), and of each token, (B, N, num_classes).

        Raises:
            UnsupportedError: the model has no classifier of tokens.
            InputSizeError: height or width is no multiple of the total stride.
        """
        if not isinstance(self.head, TokenHead):
            raise UnsupportedError("no classifier of tokens; create a _tklb variant")
        first, last = self.plans[0].reduction, self.plans[-1].reduction
        check_input(x, self.in_chans, last)
        if x.shape[-2] % last or x.shape[-1] % last:
            size = f"{x.shape[-2]}x{x.shape[-1]}"
            raise InputSizeError(
                f"input of {size} cannot be mixed by cells of the last map; height and width must"
                f" be multiples of {last}"
            )
        x = with_region_of_others(self.stem(x), [edge * (last // first) for edge in box])
        for stage in self.stages:
            x = self.run_stage(stage, x)
        logits, tokens = self.head.both(x)
        maps = with_region_of_others(tokens.mT.unflatten(2, x.shape[-2:]), box)
        return logits, maps.flatten(2).mT

    def get_classifier(self) -> Any:
        """Return the classifier layer; a pair of them where tokens have one, too."""
        first = self.head.get_classifier()
        return (first, self.head.token_fc) if isinstance(self.head, TokenHead) else first

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        super().reset_classifier(num_classes, global_pool, reset_other)
        if isinstance(self.head, TokenHead):
            self.init_layer(self.head.token_fc, "head.token_fc")

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Refuse a file of the other form of slots, or of head.

        Raises:
            CheckpointError: it is one.
        """

        def holds(pattern: str) -> bool:
            return any(re.search(pattern, key) for key in tensors)

        if holds(r"\.(slot_scale|init_slots)$") and holds(r"\.init_slots$") != self.param_slots:
            raise CheckpointError(WRONG_SLOTS[self.param_slots])
        if holds(r"^head\.(fc\.)?weight$") and holds(TOKEN_CLASSIFIER) != self.token_head:
            raise CheckpointError(WRONG_HEAD[self.token_head])
        return tensors
