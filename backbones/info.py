"""What is known of a model without downloading anything: size, cost, origin, weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.config import Source
from backbones.errors import UnknownModelError
from backbones.factory import find_variant
from backbones.manifest import WeightsEntry, load_manifest
from backbones.registry import registry, unknown

__all__ = ["ModelInfo", "count_macs", "count_parameters", "model_info"]


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a variant, or of one tag of it.

    `params` counts trainable parameters.
    """

    name: str
    family: str
    arguments: Mapping[str, Any]
    params: int
    input_size: tuple[int, int, int]
    source: Source | None
    aliases: Sequence[str]
    timm_name: str
    weights: Sequence[WeightsEntry]

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of convolutions and matrix products for one image of `input_size`."""
        model = registry.model_class(self.family)(**self.arguments, device="meta")
        return count_macs(model, self.input_size)

    @property
    def tags(self) -> list[str]:
        """Tags of the weights, the default first."""
        return [entry.tag for entry in self.weights]

    @property
    def licenses(self) -> dict[str, str]:
        """License of each tag's weights."""
        return {entry.tag: entry.license for entry in self.weights}


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Return multiply-adds of convolutions and matrix products for one input, without computing.

    Args:
        model: a model on the meta device.
        input_size: (channels, height, width).
    """
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *input_size, device="meta"))
    model.train(training)
    return counter.get_total_flops() // 2


def model_info(name: str) -> ModelInfo:
    """Return what is known of a model of ours, by name, alias, name with tag or YAML path.

    Its input size is that of the tag, or else of the default tag.

    Raises:
        UnknownModelError: no such model or tag.
    """
    variant, tag = find_variant(name)
    if variant is None:
        raise UnknownModelError(unknown("model", name, registry.names()))
    manifest = load_manifest()
    entry = manifest.find(variant.name, tag)
    size = tuple(entry.input_size) if entry is not None else (3, 224, 224)
    model = registry.model_class(variant.family)(**variant.arguments, device="meta")
    return ModelInfo(
        name=variant.name if tag is None else f"{variant.name}.{tag}",
        family=variant.family,
        arguments=dict(variant.arguments),
        params=count_parameters(model),
        input_size=size,  # type: ignore[arg-type]
        source=variant.source,
        aliases=[alias for alias, name in registry.aliases.items() if name == variant.name],
        timm_name=variant.timm_name or variant.name,
        weights=list(manifest.by_variant.get(variant.name, {}).values()),
    )
