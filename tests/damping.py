"""Factors on residual branches that keep filled models in the range of trained ones.

Under the plain fill of the golden files every branch is as strong as its identity, and rounding
grows from block to block as it does in no trained model. By family: (pattern, factor) for the
entries of our own layout.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from backbones.registry import registry

# Freshly filled branches are as strong as their identities; no trained model's are.
GAMMA = [(r"\.gamma$", 0.2)]
DAMPING: dict[str, list[tuple[str, float]]] = {
    "attnet": [(r"\.(mixer\.proj|mlp\.fc2)\.(weight|bias)$", 0.2)],
    "hornet": [],  # the gates keep their size: 1e-6 as filled
    "cpubone": [
        (r"\.upsampling\.0\.(weight|bias)$", 0.2),
        (r"\.total\.0\.1\.main\.3\.(weight|bias)$", 0.2),
        (r"\.total\.1\.main\.point_conv\.norm\.weight$", 0.2),
        (r"^(stem|stages\.[01])\.[1-9]\d*\.main\.point_conv\.norm\.weight$", 0.2),
    ],
    "lsnet": [
        (r"\.mixer\.(norm|large\.norm|branches\.k1_d1\.norm|proj\.norm)\.weight$", 0.2),
        (r"\.mlp\.fc2\.norm\.weight$", 0.2),
    ],
    "glnet": [(r"\.(attn\.proj|conv2|fc2)\.(weight|bias)$", 0.2), (r"\.pos_conv\.weight$", 0.3)],
    "moganet": [(r"\.(gamma\d|sigma)$", 0.05), (r"\.(attn\.proj_2|mlp\.fc2)\.", 0.2)],
    "rednet": [  # involutions multiply what comes in with itself
        (r"\.involution\.predict\.(weight|bias)$", 0.15),
        (r"\.conv2\.norm\.weight$", 0.4),
    ],
    "smpnet": [  # large kernels add up what comes in; filled radii reach over half of them
        (r"\.radius$", 0.2),
        (r"\.(mixer\.conv2|mlp\.fc2)\.norm\.weight$", 0.2),
    ],
    "transnext": [(r"\.(proj|fc2)\.(weight|bias)$", 0.2)],
    "uniformer": [(r"\.(conv2|proj|fc2)\.(weight|bias)$", 0.2), (r"\.pos_conv\.weight$", 0.3)],
    "spanet": [(r"\.(proj_out|fc2)\.(weight|bias)$", 0.2)],
    "spartan": [(r"\.ls\d\.gamma$", 0.2)],
    "unireplknet": [(r"blocks\.\d+\.gamma$", 0.2)],
    "overlock": [
        (r"\.conv_dw\d?\.(weight|bias)$", 0.2),
        (r"\.mlp\.(fc2|grn)\.", 0.2),
        (r"^focus\..*\.blocks\.\d+\.proj\.conv\.", 0.2),
        (r"\.ls\d?\.weight$", 0.8),  # on the identity; filled with 0.5 to 1.5
    ],
}


@torch.no_grad()
def damp(model: nn.Module, name: str) -> nn.Module:
    """Damp the residual branches of variant `name`, in place."""
    rules = DAMPING.get(registry.variants[name].family, GAMMA)
    for key, tensor in model.state_dict().items():
        for pattern, factor in rules:
            if re.search(pattern, key):
                tensor.mul_(factor)
    return model
