"""GLNet: attention among a few slots beside convolutions of the whole map.

Source: "Revisiting the Integration of Convolution and Attention for Vision Backbone" (arXiv
2411.14429), section 3. Slots gather the map by a soft grouping and are dispatched back by it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from backbones.config import PerStage
from backbones.errors import CheckpointError, ConfigError, InputSizeError, UnsupportedError
from backbones.families.glnet.blocks import HEAD_DIM, AttentionBlock, SlotBlock
from backbones.layers import Chain, Head, NormHead, TokenHead, norm_conv_downsample
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, check_input, per_stage

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


def with_region_of_others(x: Tensor, box: Sequence[int]) -> Tensor:
    """Return maps (B, C, H, W) with a region taken from the batch in reverse order."""
    top, bottom, left, right = box
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
    return mixed


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
