"""UniFormer: convolution blocks in the first two stages, attention blocks in the last two.

Source: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (arXiv
2201.09450), section 4; the light form is in `light`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from timm.layers import LayerNorm, LayerNorm2d, get_device_dtype
from torch import Tensor, nn

from backbones.config import PerStage
from backbones.errors import CheckpointError, ConfigError, UnsupportedError
from backbones.families.uniformer.blocks import AttentionBlock, ConvBlock
from backbones.families.uniformer.light import FullBlock, PrunedBlock, TokenStage
from backbones.layers import Chain, Head, NormHead, TokenHead
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, check_input, per_stage

AUTHORS = (
    (r"^aux_head\.", "head.token_fc."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^norm\.", "head.norm."),
    (r"^norm_cls\.", "stages.3.aux_head.norm."),
    (r"^head_cls\.", "stages.3.aux_head.fc."),
    (r"^cls_token$", "stages.2.cls_token"),
    (r"^cls_upsample\.", "stages.3.cls_proj."),
    (r"^patch_embed1\.", "stem."),
    *((rf"^patch_embed{i + 1}\.", f"stages.{i}.downsample.") for i in (1, 2, 3)),
    (r"^(stem|stages\.\d\.downsample)\.proj\.(\d)\.", r"\1.\2."),
    (r"^(stem|stages\.\d\.downsample)\.proj\.", r"\1.0."),
    (r"^(stem|stages\.\d\.downsample)\.norm\.", r"\1.1."),
    *((rf"^blocks{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"\.pos_embed\.", ".pos_conv."),
    (r"\.attn\.(weight|bias)$", r".conv_dw.\1"),
    (r"\.gamma_(\d)$", r".gamma\1"),
)
# Of the authors' models for ImageNet-1K; by token labelling some have others.
HEAD_DIMS = {"xxs": 28, "xs": 32, "small": 64, "small_plus": 32, "base": 64, "large": 64}


class UniFormer(StagedBackbone):
    """UniFormer; see :class:`StagedBackbone` for the common arguments.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        head_dim: channels of an attention head; divides those of the last two stages. No weight
            shows it: which one a checkpoint needs is known from its source.
        mlp_ratios: expansion of the MLPs.
        embeddings: what stands in front of each stage: ``patch``, a convolution without overlap and
            a layer norm; or ``conv``, one 3x3 convolution of stride 2 and a batch norm, two in
            front of the first stage.
        ls_init_value: initial layer scale; None for no layer scale.
        token_head: a second classifier, whose logits of the best token count half (token
            labelling); see :meth:`set_token_training`.
        prune_tokens: the light form, whose attention sees half of the tokens.
        aux_head: for the light form, a second classifier on the class token, for
            :meth:`set_distilled_training`.

    Raises:
        ConfigError: channels that are no multiple of `head_dim`, or an `aux_head` without
            `prune_tokens`.
    """

    no_decay_patterns = (r"\.cls_token$",)
    auxiliary_keys = (r"^stages\.3\.aux_head\.",)
    invisible_arguments = ("head_dim",)
    layouts = {"authors": AUTHORS}

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        head_dim: int,
        mlp_ratios: PerStage[float] = 4,
        embeddings: PerStage[Literal["patch", "conv"]] = "patch",
        ls_init_value: PerStage[float | None] = None,
        token_head: bool = False,
        prune_tokens: bool = False,
        aux_head: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        if head_dim < 1 or any(dim % head_dim for dim in dims[2:]):
            raise ConfigError(f"head_dim={head_dim} must divide the channels {list(dims[2:])}")
        if aux_head and not prune_tokens:
            raise ConfigError("aux_head: only the light form (prune_tokens=True) has a class token")
        self.head_dim = head_dim
        self.mlp_ratios = per_stage(mlp_ratios, len(dims), "mlp_ratios")
        self.embeddings = per_stage(embeddings, len(dims), "embeddings")
        self.ls_init_value = per_stage(ls_init_value, len(dims), "ls_init_value")
        self.token_head = token_head
        self.prune_tokens = prune_tokens
        self.with_aux_head = aux_head
        self.distilled_training = False
        self.classifier_names = self.classifiers({"token_head": token_head, "aux_head": aux_head})
        self.assemble()

    @classmethod
    def classifiers(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        names = ["head.fc"]
        names += ["head.token_fc"] if arguments.get("token_head") else []
        names += ["stages.3.aux_head.fc"] if arguments.get("aux_head") else []
        return tuple(names)

    def build_stem(self) -> nn.Module:
        return self.build_embedding(self.plans[0], self.in_chans)

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        return self.build_embedding(plan, plan.in_dim) if plan.index else None

    def build_embedding(self, plan: StagePlan, in_dim: int) -> Chain:
        """Return what stands in front of a stage, from (B, in_dim, H, W) to (B, C, H', W')."""
        dim = plan.dim
        if self.embeddings[plan.index] == "patch":
            return Chain(
                nn.Conv2d(in_dim, dim, plan.stride, plan.stride), LayerNorm2d(dim, eps=1e-5)
            )
        parts: list[nn.Module] = []
        if plan.index == 0:
            parts = [nn.Conv2d(in_dim, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2), nn.GELU()]
            in_dim = dim // 2
        return Chain(*parts, nn.Conv2d(in_dim, dim, 3, 2, 1), nn.BatchNorm2d(dim))

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        ratio, init_value = self.mlp_ratios[plan.index], self.ls_init_value[plan.index]
        if plan.index < 2:
            return ConvBlock(plan.dim, ratio, init_value, drop_path)
        block: type[AttentionBlock] = AttentionBlock
        if self.prune_tokens:
            block = FullBlock if plan.index == 2 and index == 0 else PrunedBlock
        return block(plan.dim, self.head_dim, ratio, init_value, drop_path)

    def build_stage(self, plan: StagePlan, drop_path: Sequence[float]) -> nn.Module:
        stage: Any = super().build_stage(plan, drop_path)
        if plan.index < 2 or not self.prune_tokens:
            return stage
        in_dim = plan.in_dim if plan.index == 3 else None
        return TokenStage(stage.downsample, list(stage.blocks), in_dim, plan.dim)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        stage: Any = self.stages[-1]
        if self.with_aux_head:
            stage.aux_head = Head(dim, vectors={"norm": LayerNorm(dim, eps=1e-5)}, **common)
        head = TokenHead if self.token_head else NormHead
        return head(dim, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Keep PyTorch's convolutions, as the authors do."""
        if isinstance(module, nn.Linear):
            super().init_layer(module, name)
        elif isinstance(module, TokenStage) and module.cls_token is not None:
            nn.init.zeros_(module.cls_token)

    def feature_names(self) -> list[str]:
        names = super().feature_names()
        return [f"{n}.maps" if i > 1 and self.prune_tokens else n for i, n in enumerate(names)]

    def run_stages(self, x: Tensor) -> Iterator[Tensor]:
        for map_, *_ in self.run_states(x):
            yield map_

    def run_states(self, x: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield each stage's feature map; of the light form with class token and scores."""
        state: tuple[Tensor, ...] = (self.stem(x),)
        for stage in self.stages:
            if isinstance(stage, TokenStage):
                state = stage(*state, checkpointing=self.grad_checkpointing)
            else:
                state = (self.run_stage(stage, state[0]),)
            yield state

    def forward(self, x: Tensor) -> Any:
        """Map images (B, in_chans, H, W) to logits (B, num_classes).

        In training mode after ``set_distilled_training(True)``: to (logits, those of the class
        token), both (B, num_classes); the authors take the mean of both losses. After
        ``set_token_training(True)``: to (logits, those of each token, (B, N, num_classes)).
        """
        last: Any = self.stages[-1]
        if not (self.training and self.distilled_training and self.aux_head):
            return super().forward(x)
        check_input(x, self.in_chans, self.plans[-1].reduction)
        *_, (x, token, _) = self.run_states(x)
        return self.forward_head(x), last.class_logits(token)

    @property
    def aux_head(self) -> Head | None:
        """The auxiliary head on the class token, where the model has one."""
        return getattr(self.stages[-1], "aux_head", None)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let the training forward return (logits, those of the class token), or logits again.

        Raises:
            UnsupportedError: the model has no auxiliary head.
        """
        if enable and self.aux_head is None:
            raise UnsupportedError(
                "no auxiliary head; create uniformer_xxs or uniformer_xs with aux_head=True"
            )
        self.distilled_training = enable

    def set_token_training(self, enable: bool = True) -> None:
        """Let the training forward return (logits, those of each token), or logits again.

        Raises:
            UnsupportedError: the model has no classifier of tokens.
        """
        if not isinstance(self.head, TokenHead):
            raise UnsupportedError("no classifier of tokens; create a _tl variant")
        self.head.token_training = enable

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        super().reset_classifier(num_classes, global_pool, reset_other)
        last: Any = self.stages[-1]
        if self.aux_head is None:
            return
        if reset_other:
            last.aux_head = None
        else:
            self.aux_head.reset(num_classes, global_pool, **get_device_dtype(self))
            self.init_layer(self.aux_head.get_classifier(), "stages.3.aux_head.fc")

    @classmethod
    def named_arguments(cls, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the `head_dim` of the authors' model of this name.

        They have two codes with the same names for different models. The one for token labelling is
        known by its second classifier.
        """
        found = re.search(r"uniformer_(xxs|xs|small_plus|small|base|large)(?![a-z])", name.lower())
        if found is None:
            return {}
        labelled = any(re.search(r"(^|\.)(aux_head|token_fc)\.weight$", key) for key in tensors)
        if "_dim64" in name.lower():
            return {"head_dim": 64}
        if found[1] in ("small", "base") and (labelled or "_tl" in name.lower()):
            return {"head_dim": 32}
        return {"head_dim": HEAD_DIMS[found[1]]}

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Refuse a file without the classifier of tokens for a model that has one.

        Raises:
            CheckpointError: it is one.
        """
        theirs = [f"head.{name}.weight" in tensors for name in ("fc", "token_fc")]
        if self.token_head and theirs == [True, False]:
            raise CheckpointError(
                "the file has no classifier of tokens, so it is of no model that was trained by"
                " token labelling; create the variant without _tl"
            )
        return tensors
