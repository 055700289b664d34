"""How ConvNeXt's authors name its parts, which other families took over: renames for `layouts`."""

__all__ = ["CONVNEXT_LAYOUT", "PYRAMID_LAYOUT"]

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
