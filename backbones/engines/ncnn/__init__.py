"""ncnn: files for phones and boards, and their runtime."""

from backbones.engines.ncnn.conversion import NcnnConfig
from backbones.engines.ncnn.runner import ENGINE, FORMAT

__all__ = ["ENGINE", "FORMAT", "NcnnConfig"]
