"""PatchConvNet."""

from backbones.families.patchconvnet.head import ClassTokenHead
from backbones.families.patchconvnet.model import Block, PatchConvNet

__all__ = ["Block", "ClassTokenHead", "PatchConvNet"]
