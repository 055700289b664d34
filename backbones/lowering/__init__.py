"""The forms of merged blocks that graph engines run fastest: the same function, other operations.

`reparameterize` leaves what PyTorch runs best. ONNX Runtime and OpenVINO differ: they lose more to
a split, a change of layout or an operation they have no kernel for than to one convolution more.
"""

from backbones.lowering.walk import TARGETS, lowered

__all__ = ["TARGETS", "lowered"]
