"""The one skeleton of all families: stem -> stages -> head, and timm's whole model contract.

A family states class data and four builders; everything that timm's users expect of a model
(features, intermediates, pruning, classifier reset, layer groups, gradient checkpointing) follows
from `StagedBackbone.run_stages`, which yields the output of one stage after the other.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar, Union

import torch
from timm.layers import calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq
from torch import Tensor, nn

from backbones.errors import UnsupportedError
from backbones.layers import Head
from backbones.stages import Stage, StagePlan, check_input, per_stage, plan_stages

__all__ = ["Layout", "Stage", "StagePlan", "StagedBackbone", "Tensors", "check_input", "per_stage"]

Self = TypeVar("Self", bound="StagedBackbone")
Tensors = dict[str, Tensor]
# How a checkpoint of others becomes ours: ordered (pattern, replacement) pairs applied to every key
# (replacement None drops the entry), or a function of (tensors, model).
Layout = Union[Sequence[tuple[str, Union[str, None]]], Callable[[Tensors, Any], Tensors]]


class StagedBackbone(nn.Module):
    """Base class of all families.

    A family calls ``super().__init__(dims, depths, **common)``, keeps its own arguments as
    attributes and then calls :meth:`assemble`, which asks the builders for the parts.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        in_chans: channels of the input.
        num_classes: width of the classifier; 0 for none.
        global_pool: timm's name of the pooling; ``""`` keeps the feature map.
        output_stride: largest stride; 8 or 16 trade strides for dilation where a family can.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        head_init_scale: factor on the classifier's initial weights.
        device: where the parameters are made; ``"meta"`` works.
        dtype: their type.
    """

    # Class data of a family.
    strides: ClassVar[tuple[int, ...]] = (4, 2, 2, 2)  # own stride of each stage, stem in the first
    first_conv: ClassVar[str] = "stem.0"
    classifier_names: tuple[str, ...] = ("head.fc",)  # an instance may have further ones
    layouts: ClassVar[Mapping[str, Layout]] = {}
    derived_keys: ClassVar[tuple[str, ...]] = ()  # entries that the model computes itself
    auxiliary_keys: ClassVar[tuple[str, ...]] = ()  # entries that exist with aux_head=True only
    resizable_keys: ClassVar[tuple[str, ...]] = ()  # entries as long as a checkpoint has them
    no_decay_patterns: ClassVar[tuple[str, ...]] = ()
    invisible_arguments: ClassVar[tuple[str, ...]] = ()  # that no name or shape of a weight shows
    dilatable: ClassVar[bool] = False  # whether output_stride 8 and 16 are possible
    fixed_size_reason: str = ""  # why a recorded graph holds for one image size only, if it does

    arguments: dict[str, Any]
    config: Mapping[str, Any] | None = None  # name, family and arguments, set by the builder
    feature_info: list[dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> StagedBackbone:
        # Every instance knows how it was built, so that twins and checkpoints can be made of it.
        # (Unpickling calls this without arguments and fills the attribute from the state.)
        model = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(model, *args, **kwargs).arguments
        recorded = {**bound.pop("common", {}), **bound}
        for name in ("self", "device", "dtype"):
            recorded.pop(name, None)
        object.__setattr__(model, "arguments", recorded)
        return model

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.drop_path_rate = drop_path_rate
        self.head_init_scale = head_init_scale
        self.grad_checkpointing = False
        self.num_features = dims[-1]
        self._global_pool = global_pool
        self._factory = {"device": device, "dtype": dtype}
        self.plans = plan_stages(
            type(self).__name__, self.strides, dims, depths, output_stride, self.dilatable
        )

    # Builders: what a family supplies.

    def build_stem(self) -> nn.Module:
        """Return the stem, from (B, in_chans, H, W) to the first stage's input."""
        raise NotImplementedError

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        """Return the downsampling in front of a stage, or None."""
        raise NotImplementedError

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        """Return block `index` of a stage."""
        raise NotImplementedError

    def build_head(self, **common: Any) -> Head:
        """Return the head; `common` holds num_classes, pool_type and drop_rate."""
        raise NotImplementedError

    def build_stage(self, plan: StagePlan, drop_path: Sequence[float]) -> nn.Module:
        """Return a whole stage; the default is a downsampling and blocks."""
        blocks = [self.build_block(plan, j, drop_path[j]) for j in range(plan.depth)]
        return Stage(self.build_downsample(plan), blocks)

    def build_extras(self, drop_path: Sequence[Sequence[float]]) -> Mapping[str, nn.Module]:
        """Return the parts beside stem, stages and head, by attribute; the default has none.

        `drop_path` is what :meth:`drop_path_rates` returned, which may hold lists for them.
        """
        return {}

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Initialize one module; the default is truncated normal 0.02 with zero biases."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def drop_path_rates(self) -> list[list[float]]:
        """Return the drop path rate of every block, by stage: 0 to the rate, linearly."""
        depths = [plan.depth for plan in self.plans]
        return calculate_drop_path_rates(self.drop_path_rate, depths, stagewise=True)

    def assemble(self) -> None:
        """Build stem, stages and head, initialize them and place them."""
        device, dtype = self._factory["device"], self._factory["dtype"]
        with torch.device(device) if device is not None else nullcontext():
            self.stem = self.build_stem()
            rates = self.drop_path_rates()
            self.stages = nn.Sequential(
                *(self.build_stage(plan, rates[plan.index]) for plan in self.plans)
            )
            for name, part in self.build_extras(rates).items():
                self.add_module(name, part)
            self.head = self.build_head(
                num_classes=self.num_classes, pool_type=self._global_pool, drop_rate=self.drop_rate
            )
        self.feature_info = [
            {"num_chs": dim, "reduction": plan.reduction, "module": name}
            for plan, dim, name in zip(self.plans, self.feature_dims(), self.feature_names())
        ]
        self.init_weights()
        if dtype is not None:
            self.to(dtype)

    def init_weights(self) -> None:
        """(Re-)initialize all parameters in place."""
        if next(self.parameters()).is_meta:
            return  # nothing to set, and drawing nothing takes most of the time to build a model
        for name, module in self.named_modules():
            self.init_layer(module, name)
        self._scale_classifier()

    def _scale_classifier(self) -> None:
        if self.head_init_scale != 1.0:
            with torch.no_grad():
                for classifier in self.head.classifiers().values():
                    for parameter in classifier.parameters():
                        parameter.mul_(self.head_init_scale)

    def feature_dims(self) -> list[int]:
        """Return the channels of each stage's output."""
        return [plan.dim for plan in self.plans]

    def feature_names(self) -> list[str]:
        """Return the module whose output is each stage's feature map."""
        return [f"stages.{plan.index}" for plan in self.plans]

    # The generator and what follows from it.

    def run_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the output of each stage in turn, un-normalized, (B, C, H, W)."""
        x = self.stem(x)
        for stage in self.stages:
            x = self.run_stage(stage, x)
            yield x

    def run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """Run one stage, block by block under gradient checkpointing where that is on."""
        if not self.grad_checkpointing:
            return stage(x)
        if isinstance(stage, Stage):
            x, stage = stage.downsample(x), stage.blocks
        return checkpoint_seq(stage, x) if len(list(stage.children())) else stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the last feature map (B, C, H', W').

        Raises:
            InputSizeError: an input smaller than the total stride or with other channels.
        """
        check_input(x, self.in_chans, self.feature_info[-1]["reduction"])
        for output in self.run_stages(x):
            x = output
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last feature map to logits, or to what enters the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the un-normalized stage outputs, as timm's method of that name.

        Args:
            x: images (B, in_chans, H, W).
            indices: which stages: the last n, all for None, or a list (negative counts from the
                end); the feature maps come in ascending order.
            norm: accepted for timm's sake; these families normalize in the head, after pooling.
            stop_early: do not run stages beyond the last one asked for.
            output_fmt: only ``"NCHW"``.
            intermediates_only: return only the list, without the final feature map.
        """
        if output_fmt != "NCHW":
            raise UnsupportedError(f"output_fmt={output_fmt!r}; the maps are NCHW")
        check_input(x, self.in_chans, self.feature_info[-1]["reduction"])
        taken, last = self.take_indices(indices)
        intermediates = []
        for i, output in enumerate(self.run_stages(x)):
            x = output
            if i in taken:
                intermediates.append(x)
            if stop_early and i == last:
                break
        return intermediates if intermediates_only else (x, intermediates)

    def take_indices(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Resolve timm's ways of naming stages to indices from 0 and the largest of them.

        Raises:
            IndexError: a stage that the model does not have.
        """
        count = len(self.feature_info)
        if indices is None:
            chosen = list(range(count))
        elif isinstance(indices, int):
            if not 0 < indices <= count:
                raise IndexError(f"last {indices} of {count} stages")
            chosen = list(range(count - indices, count))
        else:
            for i in indices:
                if not -count <= i < count:
                    raise IndexError(
                        f"stage {i} does not exist; out_indices run from {-count} to {count - 1}"
                    )
            chosen = [i % count for i in indices]
        return chosen, max(chosen)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the stages asked for do not need; return their indices."""
        taken, last = self.take_indices(indices)
        at_end = last == len(self.feature_info) - 1
        self.prune_stages(last)
        if not at_end:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or not at_end:
            self.reset_classifier(0, "", reset_other=True)
        return taken

    def prune_stages(self, last: int) -> None:
        """Remove the stages after `last`."""
        self.stages = self.stages[: last + 1]

    # The classifier.

    @property
    def head_hidden_size(self) -> int:
        """Width of the vector that enters the classifier."""
        return self.head.num_features

    def get_classifier(self) -> Any:
        """Return the classifier layer; all of them where the head has several."""
        layers = tuple(self.head.classifiers().values())
        return layers if len(layers) > 1 else layers[0]

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        """Replace the classifier, keeping device, type, train mode and by default the pooling.

        Args:
            num_classes: width of the new classifier; 0 for none.
            global_pool: new pooling; None keeps it.
            reset_other: also remove the head's other parts.
        """
        self.num_classes = num_classes
        self.arguments["num_classes"] = num_classes
        if global_pool is not None:
            self.arguments["global_pool"] = global_pool
        self.head.reset(
            num_classes,
            global_pool,
            reset_other=reset_other,
            in_features=self.num_features,
            **get_device_dtype(self),
        )
        for name, classifier in self.head.classifiers().items():
            self.init_layer(classifier, f"head.{name}")
        self._scale_classifier()

    @classmethod
    def classifiers(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the classifiers that a model of these arguments has."""
        return cls.classifier_names

    # The re-parameterized form.

    deploy_trainable = False  # set True to train a re-parameterized model after all

    @property
    def deployed(self) -> bool:
        """Whether the model has been re-parameterized; why `Head` holds the mark is said there."""
        return bool(getattr(self._modules.get("head"), "deployed", False))

    def train(self: Self, mode: bool = True) -> Self:
        """Set training or evaluation mode.

        Raises:
            UnsupportedError: training mode for a re-parameterized model.
        """
        if mode and self.deployed and not self.deploy_trainable:
            raise UnsupportedError(
                f"{type(self).__name__} is re-parameterized: its norms and branches are folded"
                " away, and training it would be training another, worse conditioned model. Train"
                " the training form and re-parameterize it afterwards; or set"
                " model.deploy_trainable = True first"
            )
        return super().train(mode)

    # Training helpers.

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: keep only block inputs and recompute the rest in backward."""
        self.grad_checkpointing = enable

    def execution_order(self, coarse: bool = False) -> list[str]:
        """Return patterns of parameter names in the order in which forward reaches them.

        One pattern a block, a stage's other parts counting with its first block; with `coarse`
        one a stage. What none matches (the head) comes last.
        """
        patterns = [r"^stem\."]
        for i, stage in enumerate(self.stages):
            blocks = stage.blocks if isinstance(stage, Stage) else stage
            inner = r"blocks\." if isinstance(stage, Stage) else ""
            if coarse or len(list(blocks.children())) == 0:
                patterns.append(rf"^stages\.{i}\.")
                continue
            for j in range(len(list(blocks.children()))):
                others = r"(?!blocks\.)|" if j == 0 and inner else ""
                patterns.append(rf"^stages\.{i}\.(?:{others}{inner}{j}\.)")
        return patterns

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's description of layer groups, for layer-wise learning rates."""
        return {f"group{i}": pattern for i, pattern in enumerate(self.execution_order(coarse))}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should spare (beside 1-D ones)."""
        return {
            name
            for name, _ in self.named_parameters()
            if any(re.search(pattern, name) for pattern in self.no_decay_patterns)
        }

    def clamp_parameters(self) -> None:
        """Bring parameters that left their range back to its border, after an optimizer's step.

        Our trainer calls it; a hook for families.
        """

    # Checkpoints.

    def expected_shapes(self) -> dict[str, torch.Size]:
        """Return the state dict's shapes of the whole, unpruned model."""
        twin = type(self)(**self.arguments, device="meta")
        return {key: value.shape for key, value in twin.state_dict().items()}

    @classmethod
    def named_arguments(cls, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the invisible arguments that the name of a file or its model tells; a hook.

        Args:
            name: of a checkpoint's file, or of the model as its training script called it.
            tensors: what the checkpoint holds, by its own names.
        """
        return {}

    def shown_arguments(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments that the entries of a checkpoint show and a model follows; a hook.

        Args:
            tensors: what the checkpoint holds, by its own names.
        """
        return {}

    def follow(self, arguments: Mapping[str, Any]) -> None:
        """Become the model of other values of `shown_arguments`; fresh parts have initial values.

        A family changes its modules in place, pruned and re-parameterized ones too.
        """
        for name, value in arguments.items():
            setattr(self, name, value)
        self.arguments.update(arguments)

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Add what a released checkpoint is known to lack; a hook for families."""
        return tensors
