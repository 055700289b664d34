"""Replace the parts of a merged model by the forms that an engine prefers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import GroupNorm1, LayerNorm2d
from torch import nn

from backbones.lowering.norms import ElementaryGroupNorm1, ElementaryLayerNorm2d

__all__ = ["TARGETS", "lowered"]

# The forms of timm's layers. ONNX Runtime has a kernel for layer norm; OpenVINO moves the data into
# other layouts for it.
TARGETS: Mapping[str, Mapping[type[nn.Module], Callable[[Any], nn.Module]]] = {
    "onnx": {},
    "openvino": {GroupNorm1: ElementaryGroupNorm1, LayerNorm2d: ElementaryLayerNorm2d},
}


def lowered(model: nn.Module, target: str) -> nn.Module:
    """Replace, in place, what an engine runs slowly by what computes the same faster.

    Args:
        model: a merged model in eval mode.
        target: ``onnx`` (for ONNX Runtime) or ``openvino``.
    """
    for name, child in model.named_children():
        block: Any = child
        if hasattr(child, "graph_form"):
            child = block.graph_form(target)
        elif type(child) in TARGETS[target]:
            child = TARGETS[target][type(child)](child)
        model._modules[name] = child
        lowered(child, target)
    return model
