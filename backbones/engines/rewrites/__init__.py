"""Re-parameterized blocks in the form that graph engines run fastest.

`reparameterize` leaves what PyTorch runs best. ONNX Runtime and OpenVINO differ: they lose more to
a split, a change of layout or an operation they have no kernel for than to one convolution more.
A rewrite is a function of a block of one exact type; `REWRITES` lists them all. It returns a
module that computes the same by other operations and may use up the block, or the block itself.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

from timm.layers import GroupNorm1, LayerNorm2d, SelectAdaptivePool2d
from torch import nn

from backbones.engines.rewrites.attention import SeparateHeads, SeparateProjections
from backbones.engines.rewrites.attnet import SeparateGateMlp
from backbones.engines.rewrites.channels_first import convnext_block_channels_first
from backbones.engines.rewrites.hornet import ChannelsFirstBlock, separate_gates
from backbones.engines.rewrites.large_kernels import split_large_kernel, split_large_kernels
from backbones.engines.rewrites.moganet import SummedBlock
from backbones.engines.rewrites.norms import DecomposedNorm2d, WholeNorm2d
from backbones.engines.rewrites.pooling import pool_by_reductions
from backbones.engines.rewrites.spartan import JoinedMixer, separate_pairs
from backbones.families import attnet, convnext, hornet, moganet, spartan
from backbones.families.cpubone import ConvAttention
from backbones.families.lsnet import DistanceAttention
from backbones.families.unireplknet import CenteredNorm2d
from backbones.reparameterization import backbones_in

__all__ = [
    "REWRITES",
    "rewrite_block",
    "rewrite_for_graphs",
    "split_large_kernel",
    "split_large_kernels",
]

Rewrite = Callable[[Any, bool], nn.Module]


def _always(form: Callable[[Any], nn.Module]) -> Rewrite:
    return lambda block, decompose: form(block)


def _decomposed(form: Callable[[Any], nn.Module]) -> Rewrite:
    return lambda block, decompose: form(block) if decompose else block


# (block, decompose) -> what takes its place; `decompose` as for `rewrite_for_graphs`
REWRITES: Mapping[type[nn.Module], Rewrite] = {
    attnet.GatedMlp: _always(SeparateGateMlp),
    convnext.Block: _always(convnext_block_channels_first),
    ConvAttention: _always(SeparateHeads),
    hornet.Block: _always(ChannelsFirstBlock),
    hornet.GatedConv: separate_gates,
    DistanceAttention: _always(SeparateProjections),
    moganet.Block: _always(SummedBlock),
    spartan.ChannelMixer: separate_pairs,
    spartan.SpatialMixer: _always(JoinedMixer),
    CenteredNorm2d: _decomposed(DecomposedNorm2d),
    GroupNorm1: _decomposed(WholeNorm2d),
    LayerNorm2d: _decomposed(DecomposedNorm2d),
    SelectAdaptivePool2d: _always(pool_by_reductions),
}


def rewrite_for_graphs(
    model: nn.Module, *, decompose: bool | Collection[type[nn.Module]] = False
) -> nn.Module:
    """Return a copy of a re-parameterized model whose blocks graph engines run faster.

    A model that is not re-parameterized, or holds no backbone of this package, is returned as it
    is.

    Args:
        model: in eval mode; stays as it is.
        decompose: also write norms over channels and the choice of a channel in plain operations,
            or those of certain types of blocks. OpenVINO would move the data into other layouts for
            them; ONNX Runtime has fast kernels.
    """
    parts = [part for _, part in backbones_in(model)]
    if not parts or not all(part.deployed for part in parts):
        return model
    plain = decompose if isinstance(decompose, Collection) else REWRITES if decompose else ()
    return _rewrite_children(copy.deepcopy(model), plain)


def rewrite_block(block: nn.Module, decompose: bool) -> nn.Module:
    """Return what takes the place of a block, which may be used up; the block if nothing does."""
    rewrite = REWRITES.get(type(block))
    return block if rewrite is None else rewrite(block, decompose)


def _rewrite_children(module: nn.Module, decompose: Collection[type[nn.Module]]) -> nn.Module:
    """Rewrite from the outside in, what takes a block's place included."""
    for name, child in module.named_children():
        child = rewrite_block(child, type(child) in decompose)
        module._modules[name] = child
        _rewrite_children(child, decompose)
    return module
