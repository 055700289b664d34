"""Replace the parts of a merged model by the forms that an engine prefers."""

from __future__ import annotations

from typing import Any

from torch import nn

from backbones.families.cpubone.attention import ConvAttention
from backbones.families.lsnet.attention import DistanceAttention
from backbones.lowering.attention import SeparateHeads, SeparateProjections
from backbones.lowering.norms import NORMS

__all__ = ["lowered"]


def lowered(model: nn.Module, elementary: bool) -> nn.Module:
    """Replace, in place, what an engine runs slowly by what computes the same faster.

    Args:
        model: a merged model in eval mode.
        elementary: compute norms over channels and the like in elementary operations. OpenVINO
            would move the data into other layouts for them; ONNX Runtime has fast kernels.
    """
    for name, child in model.named_children():
        block: Any = child
        if hasattr(child, "graph_form"):
            child = block.graph_form(elementary)
        elif type(child) is DistanceAttention:
            child = SeparateProjections(block)
        elif type(child) is ConvAttention:
            child = SeparateHeads(block)
        elif elementary and type(child) in NORMS:
            child = NORMS[type(child)](block)
        model._modules[name] = child
        lowered(child, elementary)
    return model
