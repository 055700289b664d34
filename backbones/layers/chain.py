"""Modules one after the other that fold the norms between them."""

from __future__ import annotations

from itertools import pairwise

from timm.layers import LayerNorm2d
from torch import nn

from backbones import merge
from backbones.layers.norm import CenteredNorm2d

__all__ = ["CenteringChain", "Chain"]


class Chain(nn.Sequential):
    """An ``nn.Sequential`` that can be re-parameterized; names and keys are those of the parent."""

    conv: nn.Conv2d  # where the chain has a part of this name

    def reparameterize(self) -> None:
        """Fold norms into the maps beside them; see :func:`backbones.merge.fold_chain`."""
        merge.fold_chain(self)


class CenteringChain(Chain):
    """A chain that also takes over the mean of layer norms after convolutions.

    It pays where what follows wants channels first: the layer norm leaves channels last.
    """

    def reparameterize(self) -> None:
        """Fold norms, and center the outputs of convolutions in front of a layer norm."""
        super().reparameterize()
        for (_, before), (name, norm) in pairwise(list(self.named_children())):
            if type(before) is nn.Conv2d and isinstance(norm, LayerNorm2d):
                merge.center_outputs(before)
                setattr(self, name, CenteredNorm2d(norm))
