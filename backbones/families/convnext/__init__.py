"""ConvNeXt V1 and V2, their variants with other convolutions, and ConvNeXt-DCLS."""

from backbones.families.convnext.model import Block, ConvNeXt

__all__ = ["Block", "ConvNeXt"]
