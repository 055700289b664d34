"""Replace the blocks of a merged model by the forms that an engine prefers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import GroupNorm1, LayerNorm2d
from torch import nn

from backbones.families import convnext, hornet, spartan
from backbones.lowering.maps import gated_block_on_maps, on_maps
from backbones.lowering.norms import ElementaryGroupNorm1, ElementaryLayerNorm2d
from backbones.lowering.pairs import PairMixer, elementary_pairs
from backbones.lowering.parts import SeparateGates
from backbones.reparam import backbones_in

__all__ = ["TARGETS", "lowered"]

Rule = Callable[[Any], nn.Module | None]

COMMON: Mapping[type[nn.Module], Rule] = {
    convnext.Block: on_maps,
    hornet.Block: gated_block_on_maps,
    hornet.GatedConv: SeparateGates.of,
    spartan.ChannelMixer: PairMixer.of,
}
TARGETS: Mapping[str, Mapping[type[nn.Module], Rule]] = {
    # ONNX Runtime has kernels for layer norm, argmax and gather; OpenVINO moves the data into
    # other layouts for them.
    "onnx": COMMON,
    "openvino": {
        **COMMON,
        GroupNorm1: ElementaryGroupNorm1,
        LayerNorm2d: ElementaryLayerNorm2d,
        spartan.ChannelMixer: elementary_pairs,
    },
}


def lowered(model: nn.Module, target: str) -> nn.Module:
    """Return a copy in which what an engine runs slowly computes the same by faster operations.

    Args:
        model: in eval mode. One that is not merged, or holds no backbone of this package, is
            returned as it is.
        target: ``onnx`` (for ONNX Runtime) or ``openvino``.
    """
    parts = [part for _, part in backbones_in(model)]
    if not parts or not all(part.deployed for part in parts):
        return model
    return replace_children(copy.deepcopy(model), TARGETS[target])


def replace_children(model: nn.Module, rules: Mapping[type[nn.Module], Rule]) -> nn.Module:
    """Apply the rules to all submodules in place, those within replaced ones included."""
    for name, child in model.named_children():
        rule = rules.get(type(child))
        other = rule(child) if rule is not None else None
        if other is not None:
            model._modules[name] = child = other
        replace_children(child, rules)
    return model
