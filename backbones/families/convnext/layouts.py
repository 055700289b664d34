"""How other code bases name ConvNeXt's parts: renames for `StagedBackbone.layouts`."""

from backbones.layers import CONVNEXT_LAYOUT

__all__ = ["LAYOUTS"]

BLOCK = (
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
)
# From the keys of ConvNextForImageClassification and ConvNextV2ForImageClassification, or of their
# trunks alone, to ours; inside of a block to those of the authors.
TRANSFORMERS = (
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
# torchvision.models.ConvNeXt: the stem, then stages and what comes before each, in turns.
TORCHVISION = (
    (r"^features\.0\.", "stem."),
    *((rf"^features\.{2 * i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
    *((rf"^features\.{2 * i}\.", f"stages.{i}.downsample.") for i in range(1, 4)),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
)
LAYOUTS = {
    "authors": (*CONVNEXT_LAYOUT, *BLOCK),
    "transformers": (*TRANSFORMERS, *BLOCK),
    "torchvision": TORCHVISION,
}
