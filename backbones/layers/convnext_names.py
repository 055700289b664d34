"""What other code bases call the parts of ConvNeXt: renames for `StagedBackbone.layouts`."""

from __future__ import annotations

__all__ = ["CONVNEXT_LAYOUT", "PYRAMID_LAYOUT", "TRANSFORMERS_LAYOUT"]

# From the keys of ConvNeXt's authors, which HorNet's and UniRepLKNet's took over.
PYRAMID_LAYOUT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
)
CONVNEXT_LAYOUT = (
    *PYRAMID_LAYOUT,
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
# From the keys of ConvNextForImageClassification and ConvNextV2ForImageClassification, or of their
# trunks alone, to ours; inside of a block to those of the authors.
TRANSFORMERS_LAYOUT = (
    (r"^convnext(?:v2)?\.", ""),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.", ""),
    (r"\.downsampling_layer\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^layernorm\.", "head.norm."),
    (r"\.layernorm\.", ".norm."),
    (r"\.grn\.", ".mlp.grn."),
    (r"^classifier\.", "head.fc."),
)
