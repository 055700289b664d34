"""Re-parameterized blocks in the form that graph engines run fastest.

`reparameterize` leaves what PyTorch runs best. ONNX Runtime and OpenVINO differ: they lose more to
a split, a change of layout or an operation they have no kernel for than to one convolution more.
A rewrite is a function of a block of one exact type; `walk.REWRITES` lists them all. It returns a
module that computes the same by other operations and may use up the block, or the block itself.
"""

from backbones.engines.rewrites.walk import REWRITES, rewrite_block, rewrite_for_graphs

__all__ = ["REWRITES", "rewrite_block", "rewrite_for_graphs"]
