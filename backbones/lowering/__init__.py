"""The forms of merged blocks that graph engines run fastest: the same function, other operations.

`reparameterize` leaves what PyTorch runs best. ONNX Runtime and OpenVINO differ: they lose more to
a split, a change of layout or an operation they have no kernel for than to one convolution more.
A block that has such a form says so by a method ``graph_form(elementary)``, called on merged
blocks only, which returns the form (and may use up the block) or the block itself.
"""

from backbones.lowering.attention import SeparateHeads, SeparateProjections
from backbones.lowering.contrast import contrast_after
from backbones.lowering.filters import FilteredGates
from backbones.lowering.maps import MapBlock, mlp_on_maps, norm_on_maps
from backbones.lowering.norms import NORMS
from backbones.lowering.pairs import PairMixer
from backbones.lowering.parts import SeparateGates
from backbones.lowering.rotation import RotatedMixer
from backbones.lowering.squeeze import side_by_side
from backbones.lowering.walk import lowered

__all__ = [
    "NORMS",
    "FilteredGates",
    "MapBlock",
    "PairMixer",
    "RotatedMixer",
    "SeparateGates",
    "SeparateHeads",
    "SeparateProjections",
    "contrast_after",
    "lowered",
    "mlp_on_maps",
    "norm_on_maps",
    "side_by_side",
]
