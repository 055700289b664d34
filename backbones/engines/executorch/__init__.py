"""ExecuTorch with XNNPACK, for phones and small boards."""

from backbones.engines.executorch.lowering import ExecuTorchConfig
from backbones.engines.executorch.target import ENGINE, FORMAT

__all__ = ["ENGINE", "FORMAT", "ExecuTorchConfig"]
