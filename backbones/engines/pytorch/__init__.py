"""PyTorch itself as an engine: memory layouts, and the files of torch.export and AOTInductor."""

from backbones.engines.pytorch.layouts import choose_layout
from backbones.engines.pytorch.programs import AotiConfig, Pt2Config

__all__ = ["AotiConfig", "Pt2Config", "choose_layout"]
