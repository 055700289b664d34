"""ConvNeXt V1 and V2, their variants with other convolutions, and ConvNeXt-DCLS."""

from backbones.families.convnext.dcls import SpacedConv, kernel_from_points
from backbones.families.convnext.model import Block, ConvNeXt

__all__ = ["Block", "ConvNeXt", "SpacedConv", "kernel_from_points"]
