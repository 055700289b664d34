"""PyTorch itself: modules, eager or compiled, and the files of torch.export and AOTInductor."""

from backbones.engines.pytorch.modules import COMPILE, EAGER
from backbones.engines.pytorch.programs import AOTI, PT2, AotiConfig, Pt2Config

__all__ = ["AOTI", "COMPILE", "EAGER", "PT2", "AotiConfig", "Pt2Config"]
